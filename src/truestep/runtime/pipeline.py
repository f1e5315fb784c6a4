"""The stages of a text-to-video run, the object they read, and the denoise loop.

Stages are plain functions held by the pipeline: to change how one is done, assign another function
of the same signature (`pipeline.combine = my_combine`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from truestep.case import RunSettings
from truestep.errors import CaseError
from truestep.joint import Value, parts
from truestep.runtime.guidance import Adaptive, Branches

if TYPE_CHECKING:
    import torch

    from truestep.controls import Controls
    from truestep.runtime.attention import TextAttention

Branch = Literal["cond", "uncond", "perturbed", "modality", "batched"]
"""A guidance pass; `batched` is several in one forward, on the batch axis: `[uncond, cond]`, or all
passes of an audio-video model."""


@dataclass(frozen=True)
class Step:
    """One denoise iteration.

    Attributes:
        index: 0-based.
        timestep: 0-d tensor in the scheduler's own dtype (int64 or float32), in [0, 1000].
        sigma: Noise level in [0, 1] at the start of the step.
        expert: 1, or 2 where the low-noise transformer of a two-expert model runs.
    """

    index: int
    timestep: torch.Tensor
    sigma: float
    expert: int = 1


@dataclass(frozen=True)
class Schedule:
    """Sigmas `n+1` (float32), timesteps `n` and experts `n` (int64) of one run."""

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    experts: torch.Tensor

    def step(self, index: int) -> Step:
        """Step `index`; negative counts from the end."""
        return Step(
            index=index % len(self.timesteps),
            timestep=self.timesteps[index],
            sigma=float(self.sigmas[index % len(self.timesteps)]),
            expert=int(self.experts[index]),
        )


def passes(pipe: Pipeline) -> tuple[Branch, ...]:
    """Guidance passes of a step by the settings: `cond`, and `uncond` where there is guidance."""
    return ("cond", "uncond") if pipe.settings.guided else ("cond",)


def predict_passes(
    pipe: Pipeline, latent: Value, step: Step, text: Texts, wanted: Sequence[Branch]
) -> dict[Branch, Value]:
    """A step's predictions by pass, run by the pipeline's plan.

    Args:
        latent: `b c f h w`.
        text: Embeddings by branch.
        wanted: The passes to run, `cond` first.
    """
    if len(wanted) == 1:
        return {wanted[0]: pipe.predict(pipe, latent, step, text[wanted[0]], wanted[0])}

    def call(branch: Branch, *, latent: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = pipe.predict(pipe, latent, step, text, branch)
        return made

    cond, uncond = pipe.branches.run(
        call, {"latent": latent, "text": text["cond"]}, {"latent": latent, "text": text["uncond"]}
    )
    return {"cond": cond, "uncond": uncond}


def _never(pipe: Pipeline, index: int) -> bool:
    return False


@dataclass(kw_only=True)
class Stages:
    """The stage functions of a model family. Values are tensors; those of an audio-video model are
    `truestep.joint.Joint`, and its texts `Encoded`, then `Context`.

    Attributes:
        prepare: Check the settings against the models and apply them.
        encode_text: Prompts to embeddings `b l c`.
        connect: Encoded texts by branch to what the transformer is given, in models that have a
            text connector.
        make_schedule: The settings' steps to a `Schedule`; resets the scheduler.
        make_latent: Initial noise `b c f h w`, float32, from a CPU generator.
        passes: The guidance passes of a step, `cond` first.
        predict: (latent, step, embeddings, branch) to the model's prediction `b c f h w`.
        predict_passes: (latent, step, texts, passes) to predictions by pass, by the plan.
        combine: (step, cond, uncond) to the guided prediction; an audio-video model's is given the
            prediction of each of its passes.
        skips: Whether a step (0-based) runs no pass and keeps the last guided prediction.
        update: (step, guided, latent) to the next latent.
        decode: Final latent to frames `b c f h w` in [-1, 1], and to sound `b c n`.
    """

    prepare: Callable[[Pipeline], None]
    encode_text: Callable[[Pipeline, list[str]], Value]
    connect: Callable[[Pipeline, Mapping[Branch, Value]], Mapping[Branch, Value]] | None = None
    make_schedule: Callable[[Pipeline], Schedule]
    make_latent: Callable[[Pipeline], Value]
    passes: Callable[[Pipeline], tuple[Branch, ...]] = passes
    predict: Callable[[Pipeline, Any, Step, Any, Branch], Value]
    predict_passes: Callable[
        [Pipeline, Any, Step, Mapping[Branch, Any], Sequence[Branch]], dict[Branch, Value]
    ] = predict_passes
    combine: Callable[..., Value]
    skips: Callable[[Pipeline, int], bool] = _never
    update: Callable[[Pipeline, Step, Any, Any], Value]
    decode: Callable[[Pipeline, Any], Value]


MODELS = (
    "text_encoder",
    "connectors",
    "transformer",
    "transformer_2",
    "vae",
    "audio_vae",
    "vocoder",
)
"""Attributes of a pipeline that hold its models, in the order in which a run needs them."""


def models_of(pipe: Pipeline) -> dict[str, torch.nn.Module]:
    """The models that a pipeline has, by attribute, without a port's that are no modules."""
    import torch

    held = {name: getattr(pipe, name) for name in MODELS}
    return {name: model for name, model in held.items() if isinstance(model, torch.nn.Module)}


def _one(step: Step) -> float:
    return 1.0


@dataclass(kw_only=True)
class Pipeline(Stages):
    """Models, scheduler, settings and stages of one loaded model. Everything may be replaced.

    Attributes:
        settings: Every control; see `truestep.case.RunSettings`.
        device: Where the models are: `cpu`, `cuda`, ...
        boundary_ratio: Two-expert models: share of the timesteps that the high-noise expert has.
        expand_timesteps: Wan 2.2 5B: one timestep a token.
        connectors, audio_vae, vocoder: Further models of an audio-video (LTX-2) pipeline.
        controls: Its controls, resolved; `prepare` sets them.
        weights: Fingerprint of the model folder that was loaded.
        forwards: Transformer forwards run so far, counted per sample.
        branches: How both guidance passes of a step are run; `follow_plan` sets it.
        text_plans: What is installed on the transformers for their text; likewise.
        output_scale: Factor of the network's output in a step's prediction; 1 where it is that.
        refused: What the settings ask for and no forward of this run can do, in words; likewise.
    """

    tokenizer: Any
    text_encoder: Any
    transformer: Any
    transformer_2: Any
    vae: Any
    scheduler: Any
    settings: RunSettings
    device: str
    boundary_ratio: float | None = None
    expand_timesteps: bool = False
    connectors: Any = None
    audio_vae: Any = None
    vocoder: Any = None
    controls: Controls | None = None
    weights: str = ""
    forwards: int = 0
    branches: Branches = field(default_factory=Branches)
    text_plans: list[TextAttention] = field(default_factory=list)
    refused: tuple[str, ...] = ()
    output_scale: Callable[[Step], float] = _one

    def expert(self, number: int) -> Any:
        """The transformer of expert 1 (high noise) or 2 (low noise)."""
        return self.transformer if number == 1 else self.transformer_2

    @property
    def first_transformer(self) -> Any:
        """The transformer whose dtype and configuration rule: the high-noise one if present."""
        return self.transformer if self.transformer is not None else self.transformer_2

    @property
    def audio_video(self) -> bool:
        """Whether the model makes video and sound: values then are a `Joint`."""
        return self.audio_vae is not None

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Why a plan that the settings ask for was not followed."""
        told = [f"guidance ran sequentially: {reason}" for reason in self.branches.reasons]
        told += [f"text was not collapsed: {r}" for plan in self.text_plans for r in plan.reasons]
        return tuple(dict.fromkeys((*told, *self.refused)))


def follow_plan(pipe: Pipeline) -> None:
    """Set up guidance and text attention as the settings say, for one run.

    Raises:
        UsageError: The branches are to run on two processes, and there is one.
    """
    from truestep.runtime.attention import TextAttention

    settings = pipe.settings
    pipe.branches = Branches(settings.cfg)
    if settings.cfg == "parallel":
        from truestep.runtime.ranks import join

        join(pipe.device)
    pipe.refused = ()
    collapsed = settings.text_attention == "collapsed"
    if settings.text_recipe != "pad_trim_zero":  # made for zero padding: others are left alone
        why = f"text recipe {settings.text_recipe} keeps the encoder's padding"
        if settings.cfg == "batched":
            pipe.branches.fall_back(why)
        if collapsed:
            pipe.refused = (f"text was not collapsed: {why}",)
            collapsed = False
    wanted = (collapsed, settings.text_cache)
    models = [m for m in (pipe.transformer, pipe.transformer_2) if m is not None]
    installed = [(plan.model, plan.collapsed, plan.cache) for plan in pipe.text_plans]
    if installed == [(model, *wanted) for model in models if any(wanted)]:
        for plan in pipe.text_plans:
            plan.forget()
        return
    for plan in pipe.text_plans:
        plan.remove()
    pipe.text_plans = [
        TextAttention(model, collapsed=wanted[0], cache=wanted[1])
        for model in models
        if any(wanted)
    ]


def require_multiple(pipe: Pipeline, key: str, multiple: int) -> None:
    """Refuse a height or width that diffusers would round silently."""
    value = getattr(pipe.settings, key)
    if value % multiple:
        raise CaseError(
            f"{key} {value} does not fit the model",
            measured=f"it must be a multiple of {multiple}",
            hint=f"--set {key}={max(round(value / multiple), 1) * multiple}",
        )


def wrong_frames(pipe: Pipeline, first: int, period: int, fitting: int) -> CaseError:
    """The error of a number of frames that the model does not make."""
    return CaseError(
        f"num_frames {pipe.settings.num_frames} does not fit the model",
        measured=f"it must be {first} more than a multiple of {period}",
        hint=f"--set num_frames={fitting}",
    )


@dataclass
class Observer:
    """What a run shows while it goes on. The base class looks away.

    Attributes:
        seconds: Wall time per stage; `step` has one entry a denoise step.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def tensor(self, name: str, value: torch.Tensor) -> None:
        """Called with every named tensor as it appears; must copy what it keeps."""

    def step_done(self, index: int, total: int) -> None:
        """Called after each denoise step (0-based) of `total`."""

    @contextmanager
    def timed(self, stage: str, device: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds[stage]`, device work included."""
        _synchronize(device)
        start = time.perf_counter()
        yield
        _synchronize(device)
        self.seconds.setdefault(stage, []).append(time.perf_counter() - start)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


Texts = Mapping[Branch, Value]
"""What the transformer is given of the prompts, by branch: `cond` and, with guidance, `uncond`."""


def show(observer: Observer, name: str, value: Value) -> None:
    """Let the observer see every tensor of a value."""
    for part, tensor in parts(name, value):
        observer.tensor(part, tensor)


def text_branch(branch: Branch) -> Branch:
    """Whose text a pass is given: the negative prompt's in `uncond`, else the prompt's."""
    return "uncond" if branch == "uncond" else "cond"


def encode(pipe: Pipeline, observer: Observer) -> Texts:
    """Text stage: each prompt on its own, as the reference pipelines do; then the connector."""
    prompts = {"cond": pipe.settings.prompt}
    if "uncond" in pipe.passes(pipe):
        prompts["uncond"] = pipe.settings.negative_prompt
    texts: dict[Branch, Value] = {}
    for branch in text_branches(pipe):
        texts[branch] = pipe.encode_text(pipe, [prompts[branch]])
        show(observer, f"text/{branch}", texts[branch])
    return connect(pipe, texts, observer)


def text_branches(pipe: Pipeline) -> tuple[Branch, ...]:
    """Branches that have a text of their own."""
    return ("cond", "uncond") if "uncond" in pipe.passes(pipe) else ("cond",)


def connect(pipe: Pipeline, texts: Texts, observer: Observer) -> Texts:
    """Connector stage: encoded texts to what the transformer is given; those themselves where a
    model has no connector."""
    if pipe.connect is None:
        return texts
    connected = pipe.connect(pipe, texts)
    for branch, value in connected.items():
        show(observer, f"connector/{branch}", value)
    return connected


def schedule(pipe: Pipeline, observer: Observer) -> Schedule:
    """Schedule stage: sigmas, timesteps and which expert runs."""
    made = pipe.make_schedule(pipe)
    observer.tensor("schedule/sigmas", made.sigmas)
    observer.tensor("schedule/timesteps", made.timesteps)
    observer.tensor("schedule/experts", made.experts)
    return made


def denoise(
    pipe: Pipeline, latent: Value, text: Texts, plan: Schedule, observer: Observer
) -> Value:
    """Denoising stage: predict, combine, update, once a step.

    Args:
        latent: Initial noise `b c f h w`, float32.

    Returns:
        Final latent `b c f h w`.
    """
    total = len(plan.timesteps)
    adaptive = Adaptive(pipe.settings, total)
    wanted = pipe.passes(pipe)
    guided: Value = None
    for index in range(total):
        step = plan.step(index)
        with observer.timed("step", pipe.device):
            show(observer, f"step/{index:04d}/latent", latent)
            if guided is None or not pipe.skips(pipe, index):
                skipped = adaptive.skips(index, step.expert)
                made = pipe.predict_passes(
                    pipe, latent, step, text, wanted[:1] if skipped else wanted
                )
                for branch, prediction in made.items():
                    show(observer, f"step/{index:04d}/{branch}", prediction)
                guided = guide(pipe, step, made, adaptive, skipped=skipped)
            show(observer, f"step/{index:04d}/guided", guided)
            latent = pipe.update(pipe, step, guided, latent)
        observer.step_done(index, total)
    show(observer, "latent/final", latent)
    return latent


def guide(
    pipe: Pipeline,
    step: Step,
    made: Mapping[Branch, Value],
    adaptive: Adaptive,
    *,
    skipped: bool = False,
) -> Value:
    """Combine a step's predictions; where the unconditional one was skipped, with its stand-in."""
    cond, scale = made["cond"], pipe.output_scale(step)
    if skipped:
        return pipe.combine(pipe, step, cond, adaptive.stand_in(cond, scale=scale))
    if len(made) == 1:
        return pipe.combine(pipe, step, cond) if pipe.audio_video else cond
    if adaptive.on:
        adaptive.saw(cond, made["uncond"], step.expert, scale=scale)
    return pipe.combine(pipe, step, *made.values())


def generate(
    pipe: Pipeline,
    *,
    observer: Observer | None = None,
    output: Literal["latent", "frames"] = "latent",
) -> Value:
    """Run all stages.

    Args:
        pipe: The pipeline; its settings say what to generate.
        observer: Sees every named tensor and the stage times.
        output: `latent` stops before decoding.

    Returns:
        Final latent `b c f h w` (float32), or frames `b c f h w` in [-1, 1] (the VAE's dtype). Of
        an audio-video model a `Joint`, with the latent, or the waveform `b c n`, of the sound.

    Raises:
        CaseError: The settings do not fit the model.
    """
    import torch

    watch = observer or Observer()
    with torch.no_grad():
        pipe.prepare(pipe)
        forget(pipe)
        with watch.timed("text", pipe.device):
            text = encode(pipe, watch)
        with watch.timed("schedule", pipe.device):
            plan = schedule(pipe, watch)
        with watch.timed("latent", pipe.device):
            latent = pipe.make_latent(pipe)
        show(watch, "latent/initial", latent)
        latent = denoise(pipe, latent, text, plan, watch)
        if output == "latent":
            return latent
        with watch.timed("decode", pipe.device):
            decoded = pipe.decode(pipe, latent)
        show_decoded(watch, decoded)
        return decoded


def forget(pipe: Pipeline) -> None:
    """Begin a run without what diffusers' caches kept of the one before.

    Source:
        diffusers 0.42.1, pipelines/pipeline_utils.py: `maybe_free_model_hooks`, which ends a run.
    """
    for model in (pipe.transformer, pipe.transformer_2):
        if getattr(model, "is_cache_enabled", False):
            model._reset_stateful_cache()


def show_decoded(observer: Observer, decoded: Value) -> None:
    """Let the observer see frames (`video/frames`) and sound (`audio/waveform`)."""
    frames, *sound = decoded if isinstance(decoded, tuple) else (decoded,)
    observer.tensor("video/frames", frames)
    for waveform in sound:
        observer.tensor("audio/waveform", waveform)
