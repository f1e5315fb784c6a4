"""The stages of a text-to-video run, the object they read, and the denoise loop.

Stages are plain functions held by the pipeline: to change how one is done, assign another function
of the same signature (`pipeline.combine = my_combine`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from truestep.case import RunSettings
from truestep.errors import UsageError
from truestep.runtime.guidance import Adaptive, Branches

if TYPE_CHECKING:
    import torch

    from truestep.runtime.attention import TextAttention

Branch = Literal["cond", "uncond", "batched"]
"""A guidance pass; `batched` is both in one forward, `[uncond, cond]` on the batch axis."""


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


@dataclass
class Stages:
    """The stage functions of a model family.

    Attributes:
        prepare: Check the settings against the models and apply them.
        encode_text: Prompts to embeddings `b l c`.
        make_schedule: The settings' steps to a `Schedule`; resets the scheduler.
        make_latent: Initial noise `b c f h w`, float32, from a CPU generator.
        predict: (latent, step, embeddings, branch) to the model's prediction `b c f h w`.
        combine: (step, cond, uncond) to the guided prediction.
        update: (step, guided, latent) to the next latent.
        decode: Final latent to frames `b c f h w` in [-1, 1].
    """

    prepare: Callable[[Pipeline], None]
    encode_text: Callable[[Pipeline, list[str]], torch.Tensor]
    make_schedule: Callable[[Pipeline], Schedule]
    make_latent: Callable[[Pipeline], torch.Tensor]
    predict: Callable[[Pipeline, torch.Tensor, Step, torch.Tensor, Branch], torch.Tensor]
    combine: Callable[[Pipeline, Step, torch.Tensor, torch.Tensor], torch.Tensor]
    update: Callable[[Pipeline, Step, torch.Tensor, torch.Tensor], torch.Tensor]
    decode: Callable[[Pipeline, torch.Tensor], torch.Tensor]


def _one(step: Step) -> float:
    return 1.0


@dataclass
class Pipeline(Stages):
    """Models, scheduler, settings and stages of one loaded model. Everything may be replaced.

    Attributes:
        settings: Every control; see `truestep.case.RunSettings`.
        device: Where the models are: `cpu`, `cuda`, ...
        boundary_ratio: Two-expert models: share of the timesteps that the high-noise expert has.
        expand_timesteps: Wan 2.2 5B: one timestep a token.
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


Apply = Callable[[Pipeline], "Pipeline | None"]
"""A change under test: receives the pipeline and changes it, or returns another."""


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


@dataclass(frozen=True)
class Text:
    """Embeddings `b l c` of the prompt and, with guidance, of the negative prompt."""

    cond: torch.Tensor
    uncond: torch.Tensor | None


def encode(pipe: Pipeline, observer: Observer) -> Text:
    """Text stage: each prompt on its own, as the reference pipelines do."""
    cond = pipe.encode_text(pipe, [pipe.settings.prompt])
    observer.tensor("text/cond", cond)
    uncond = None
    if pipe.settings.guided:
        uncond = pipe.encode_text(pipe, [pipe.settings.negative_prompt])
        observer.tensor("text/uncond", uncond)
    return Text(cond, uncond)


def schedule(pipe: Pipeline, observer: Observer) -> Schedule:
    """Schedule stage: sigmas, timesteps and which expert runs."""
    made = pipe.make_schedule(pipe)
    observer.tensor("schedule/sigmas", made.sigmas)
    observer.tensor("schedule/timesteps", made.timesteps)
    observer.tensor("schedule/experts", made.experts)
    return made


def predict_branches(
    pipe: Pipeline, latent: torch.Tensor, step: Step, text: Text, *, only_cond: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A step's predictions with the prompt and, where there is guidance, the negative prompt.

    Args:
        latent: `b c f h w`.
        text: Embeddings of both branches.
        only_cond: Leave the second one out.
    """
    if text.uncond is None or only_cond:
        return pipe.predict(pipe, latent, step, text.cond, "cond"), None

    def call(branch: Branch, *, latent: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return pipe.predict(pipe, latent, step, text, branch)

    return pipe.branches.run(
        call, {"latent": latent, "text": text.cond}, {"latent": latent, "text": text.uncond}
    )


def denoise(
    pipe: Pipeline, latent: torch.Tensor, text: Text, plan: Schedule, observer: Observer
) -> torch.Tensor:
    """Denoising stage: predict, combine, update, once a step.

    Args:
        latent: Initial noise `b c f h w`, float32.

    Returns:
        Final latent `b c f h w`.
    """
    total = len(plan.timesteps)
    adaptive = Adaptive(pipe.settings, total)
    for index in range(total):
        step = plan.step(index)
        with observer.timed("step", pipe.device):
            observer.tensor(f"step/{index:04d}/latent", latent)
            skipped = adaptive.skips(index, step.expert)
            cond, uncond = predict_branches(pipe, latent, step, text, only_cond=skipped)
            guided = cond
            observer.tensor(f"step/{index:04d}/cond", cond)
            if uncond is not None:
                observer.tensor(f"step/{index:04d}/uncond", uncond)
                adaptive.saw(cond, uncond, step.expert, scale=pipe.output_scale(step))
                guided = pipe.combine(pipe, step, cond, uncond)
            elif skipped:
                stand_in = adaptive.stand_in(cond, scale=pipe.output_scale(step))
                guided = pipe.combine(pipe, step, cond, stand_in)
            observer.tensor(f"step/{index:04d}/guided", guided)
            latent = pipe.update(pipe, step, guided, latent)
        observer.step_done(index, total)
    observer.tensor("latent/final", latent)
    return latent


def generate(
    pipe: Pipeline,
    *,
    observer: Observer | None = None,
    output: Literal["latent", "frames"] = "latent",
) -> torch.Tensor:
    """Run all stages.

    Args:
        pipe: The pipeline; its settings say what to generate.
        observer: Sees every named tensor and the stage times.
        output: `latent` stops before decoding.

    Returns:
        Final latent `b c f h w` (float32), or frames `b c f h w` in [-1, 1] (the VAE's dtype).

    Raises:
        CaseError: The settings do not fit the model.
    """
    import torch

    watch = observer or Observer()
    with torch.no_grad():
        pipe.prepare(pipe)
        with watch.timed("text", pipe.device):
            text = encode(pipe, watch)
        with watch.timed("schedule", pipe.device):
            plan = schedule(pipe, watch)
        with watch.timed("latent", pipe.device):
            latent = pipe.make_latent(pipe)
        watch.tensor("latent/initial", latent)
        latent = denoise(pipe, latent, text, plan, watch)
        if output == "latent":
            return latent
        with watch.timed("decode", pipe.device):
            frames = pipe.decode(pipe, latent)
        watch.tensor("video/frames", frames)
        return frames


def apply_change(pipe: Pipeline, change: Apply | None) -> Pipeline:
    """Let a change under test modify the pipeline, and check that what it asked for can be had.

    Raises:
        UsageError: The function raised, returned something else, or changed a setting that only
            loading can honour.
    """
    if change is None:
        return pipe
    fixed = (pipe.settings.dtype, pipe.settings.device)
    name = getattr(change, "__qualname__", repr(change))
    try:
        changed = change(pipe)
    except Exception as error:
        raise UsageError(
            f"the change {name} raised {type(error).__name__}: {error}",
            where=_last_frame(error),
            hint="it is called with the pipeline: transformer, transformer_2, text_encoder, "
            "tokenizer, vae, scheduler, settings and the stage functions",
        ) from error
    result = pipe if changed is None else changed
    if not isinstance(result, Pipeline):
        raise UsageError(
            f"the change {name} returned {type(result).__name__}, not a pipeline or None",
            hint="change the pipeline in place and return nothing, or return a Pipeline",
        )
    if (result.settings.dtype, result.settings.device) != fixed:
        raise UsageError(
            f"the change {name} set dtype or device, which only loading can honour",
            hint="give --set dtype=... or --set device=... instead",
        )
    return result


def _last_frame(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
