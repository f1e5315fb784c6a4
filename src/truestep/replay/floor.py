"""Measure a reference's noise floor: replay it under changes that are known to be harmless.

Each variation is a function on the pipeline, like a change under test. All run on the trusted side,
on the recorded inputs, so what they differ by is rounding and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from truestep.calls.instructions import Elsewhere
from truestep.case import Case
from truestep.errors import TruestepError
from truestep.floors import NoiseFloor, NoiseRun
from truestep.joint import Encoded, Value, each, floating, parts
from truestep.judge.floor import pair_of, sample_sizes
from truestep.judge.refusals import refuse_unsteady
from truestep.judge.rows import compare_tensors, measured_run
from truestep.keys import FREE_RUN, SAMPLES, STAGES, address, is_prediction
from truestep.measure.structure import sample_mean
from truestep.progress import Progress
from truestep.replay.raised import raised, raised_stages
from truestep.replay.stages import floor_steps, keeps_state, replay, steps_recorded
from truestep.runtime.changes import OtherFunctions, math_kernel, one_rounding, thread_count
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Branch, Pipeline, Step, Texts, generate, text_branch
from truestep.runtime.precision import HIGHER, raised_precision

OTHER = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""The other precision that candidates of a reference commonly run in."""


Tensors = Mapping[str, torch.Tensor]
Vary = Callable[[Pipeline], AbstractContextManager[Pipeline]]
"""A harmless change: yields the varied pipeline, then undoes what is global."""


@dataclass(frozen=True)
class Variation:
    """One harmless change.

    Attributes:
        kind: `precision`, `repeat`, `batch`, `threads`, `attention`, `jitter`, `functions` or
            `instructions`.
        detail: What exactly was varied.
        vary: The change.
        pair: Working precisions, candidate first.
        stages: Stages that it is run on.
        only: Which of the floor's steps it predicts at (0 the first); none named: all of them.
        pairwise: Also predict at the step after it, or after the middle one.
    """

    kind: str
    detail: str
    vary: Vary
    pair: str
    stages: tuple[str, ...] = STAGES
    only: tuple[int, ...] = ()
    pairwise: bool = False

    def run(
        self,
        pipe: Pipeline,
        recording: Mapping[str, torch.Tensor],
        *,
        steps: Iterable[int] | None = None,
        in_order: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        """Replay a pipeline that the change was made to: predictions, guidance and update at the
        given steps, by default `floor_steps`, or at the one of them that the change is tried at."""
        return replay(
            pipe,
            recording,
            steps=self.at(recording, steps),
            only=self.stages,
            thinned=True,
            in_order=in_order,
        ).outputs

    def at(
        self, recording: Mapping[str, torch.Tensor], steps: Iterable[int] | None
    ) -> tuple[int, ...]:
        """Steps at which it predicts."""
        every = tuple(steps) if steps is not None else floor_steps(recording)
        chosen = {every[place % len(every)] for place in self.only or range(len(every))}
        if self.pairwise:
            middle = every[1 % len(every)]
            chosen.add(min(middle + 1, steps_recorded(recording) - 1))
        return tuple(sorted(chosen))

    def without_neighbour(
        self,
        outputs: Mapping[str, torch.Tensor],
        recording: Mapping[str, torch.Tensor],
        steps: Iterable[int] | None,
    ) -> dict[str, torch.Tensor]:
        """Its outputs without those of the neighbouring step, which no other change was tried at:
        a step's own floor is made of all of them."""
        alone = replace(self, pairwise=False).at(recording, steps)
        neighbour = set(self.at(recording, steps)) - set(alone)
        return {k: v for k, v in outputs.items() if address(k).step not in neighbour}


def variations(pipe: Pipeline) -> list[Variation]:
    """All harmless changes that this machine can make to a pipeline, in its working precision.

    What they cost is part of every recording, so that each runs where it says something: all steps
    for what tells how large rounding is, one step for what adds to the sample.
    """
    dtype = str(pipe.first_transformer.dtype).removeprefix("torch.")
    pair = pair_of(dtype, dtype)
    higher = HIGHER[dtype]
    found = [
        Variation("repeat", "the same run again", _unchanged, pair, pairwise=True),
        Variation("precision", f"{dtype} against {higher}", _precision(higher), pair),
        Variation(
            "batch",
            "both passes in one batch, others beside a neighbour",
            batched,
            pair,
            only=(0, 2),
        ),
    ]
    current, cores = torch.get_num_threads(), os.cpu_count() or 1
    found += [
        Variation(
            "threads", f"{current} -> {count} threads", threads(count), pair, _AT_A_STEP, (1,)
        )
        for count in sorted({1, min(2, cores), cores} - {current})
    ]
    found.append(
        Variation("attention", "math kernel", math_attention, pair, _BEFORE_DECODING, (2,))
    )
    found.append(replace(jitter(0, pair), only=(0,), stages=_ALL_BUT_DECODING))
    detail = "exp, sin, ... as another library computes them"
    found.append(Variation("functions", detail, other_functions, pair, _AT_A_STEP, (0, 1)))
    return found


_ALL_BUT_DECODING = tuple(stage for stage in STAGES if stage != "decoding")
_BEFORE_DECODING = ("text", "connector", "prediction")
_AT_A_STEP = ("connector", "prediction")


def jitter(seed: int, pair: str) -> Variation:
    """Move some elements of every stage's input to a neighbouring number of their dtype."""
    return Variation("jitter", f"one rounding on the inputs, seed {seed}", _jitter(seed), pair)


def measure(
    pipe: Pipeline,
    recording: Mapping[str, torch.Tensor],
    *,
    case: Case,
    steps: Iterable[int] | None = None,
    final: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda text: None,
    identity: str = "",
) -> NoiseFloor:
    """Measure the noise floor of a recording on the pipeline that made it.

    Args:
        pipe: The trusted pipeline.
        recording: Its full recording.
        case: What was recorded; loaded once more in the other common precision.
        steps: Where predictions are replayed; default first, middle and last.
        final: Also generate freely under each variation, for the floor of the final latent.
        progress: Told about each variation.
        note: Told which kind could not be measured, and why.
        identity: What runs, in a text that says all of it; see `Elsewhere`.

    Raises:
        UsageError: A stage gives something else when it is run again.
    """
    todo = variations(pipe)
    total = len(todo) + 3
    runs: list[NoiseRun] = []
    in_order = keeps_state(pipe)
    with Elsewhere(note, identity=identity) as elsewhere:
        if elsewhere.known(recording):  # else the repeat, taped, is what the other process makes
            todo[0] = replace(todo[0], only=(1,))
        for done, variation in enumerate(todo):
            with variation.vary(pipe) as varied:
                again = partial(variation.run, varied, recording, steps=steps)
                if variation.kind == "repeat":
                    outputs = dict(elsewhere.start(partial(again, in_order=in_order), recording))
                    if not _answered_alike(outputs, recording):
                        in_order = True  # another answer where steps were left out: it keeps state
                        outputs = dict(elsewhere.start(partial(again, in_order=True), recording))
                else:
                    outputs = again(in_order=in_order)
                outputs = variation.without_neighbour(outputs, recording, steps)
                if final:
                    for name, latent in parts(FREE_RUN, generate(varied)):
                        outputs[name] = latent.to("cpu")
            runs.append(noise_run(variation, outputs, recording, weights=sample_sizes(runs)))
            refuse_unsteady(runs[-1:])
            if progress:
                progress(f"noise floor: {variation.kind}", done + 1, total)
        runs += _other_precision(case, recording, steps=steps, in_order=in_order)
        if progress:
            progress("noise floor: other precision", total - 2, total)
        runs += _elsewhere(
            elsewhere,
            todo[0].pair,
            recording,
            weights=sample_sizes(runs),
            kept=partial(todo[0].without_neighbour, recording=recording, steps=steps),
        )
        if progress:
            progress("noise floor: instructions", total - 1, total)
    precision = raised_precision(pipe.settings.dtype)
    if precision and any(name.startswith(f"{precision}/") for name in recording):
        elsewhere = Elsewhere(note, identity=f"{precision} {identity}" if identity else "")
        runs += _raised(
            pipe, recording, elsewhere, precision=precision, steps=steps, in_order=in_order
        )
    if progress:
        progress("noise floor: raised", total, total)
    return NoiseFloor(runs=tuple(runs))


def _elsewhere(
    elsewhere: Elsewhere,
    pair: str,
    recording: Tensors,
    *,
    weights: Mapping[str, float] | None = None,
    kept: Callable[[Tensors], Tensors] = dict,
) -> list[NoiseRun]:
    """The run that another process made with other instructions, if it could; of its outputs those
    that are `kept`."""

    def measured(outputs: Tensors) -> NoiseRun:
        variation = Variation("instructions", elsewhere.detail, _unchanged, pair)
        return noise_run(variation, kept(outputs), recording, weights=weights)

    run = elsewhere.run(measured)
    return [] if run is None else [run]


def _answered_alike(
    outputs: Mapping[str, torch.Tensor], recording: Mapping[str, torch.Tensor]
) -> bool:
    """Whether predictions are the recorded ones, or rounding away from them."""
    predictions = {name: value for name, value in outputs.items() if is_prediction(name)}
    rows = compare_tensors(predictions, {name: recording[name] for name in predictions})
    return all(row.verdict.passed for row in rows)


def _other_precision(
    case: Case,
    recording: Mapping[str, torch.Tensor],
    *,
    steps: Iterable[int] | None,
    in_order: bool,
) -> list[NoiseRun]:
    """The trusted model in the other precision: the floor for a candidate that runs in it."""
    dtype = OTHER[case.dtype]
    pair = pair_of(dtype, case.dtype)
    todo = [
        Variation("precision", f"loaded in {dtype}", _unchanged, pair, only=(0, 2)),
        replace(jitter(0, pair), only=(1,), stages=_AT_A_STEP),
    ]
    runs: list[NoiseRun] = []
    try:
        other = load(case.replace(dtype=dtype))
        for variation in todo:
            with variation.vary(other) as varied:
                outputs = variation.run(varied, recording, steps=steps, in_order=in_order)
            runs.append(noise_run(variation, outputs, recording, weights=sample_sizes(runs)))
    except (TruestepError, RuntimeError):  # a device without this dtype: no floor for that pair
        return []
    return runs


def _raised(
    pipe: Pipeline,
    recording: Mapping[str, torch.Tensor],
    elsewhere: Elsewhere,
    *,
    precision: str,
    steps: Iterable[int] | None,
    in_order: bool,
) -> list[NoiseRun]:
    """Benign runs of the stages raised to a higher precision, against their recorded outputs."""
    pair = pair_of(precision, precision)
    runs = []
    with raised(pipe, precision) as lifted, elsewhere:
        elsewhere.known(recording)
        for variation in variations(lifted):
            with variation.vary(lifted) as varied:

                def again(one: Variation = variation, varied: Pipeline = varied) -> Tensors:
                    return raised_stages(
                        varied,
                        recording,
                        steps=replace(one, pairwise=False).at(recording, steps),
                        precision=precision,
                        only=one.stages,
                        in_order=in_order,
                    ).outputs

                repeats = variation.kind == "repeat"
                outputs = elsewhere.start(again, recording) if repeats else again()
            runs.append(noise_run(replace(variation, pair=pair), outputs, recording))
        runs += _elsewhere(elsewhere, pair, recording)
    return runs


def noise_run(
    variation: Variation,
    outputs: Mapping[str, torch.Tensor],
    recording: Mapping[str, torch.Tensor],
    *,
    weights: Mapping[str, float] | None = None,
) -> NoiseRun:
    """What a benign run measured: every output, and the mean over all predictions."""
    pairs = {
        name: (output, recording[name.replace(FREE_RUN, "latent/final")])
        for name, output in outputs.items()
    }
    mean = sample_mean(outputs, recording, weights or {})
    if mean is not None:
        pairs[SAMPLES] = mean
    return measured_run(variation.kind, variation.detail, variation.pair, pairs)


@contextmanager
def _unchanged(pipe: Pipeline) -> Iterator[Pipeline]:
    yield replace(pipe)


def threads(count: int) -> Vary:
    """Run on another number of torch threads."""

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        with thread_count(count):
            yield replace(pipe)

    return vary


@contextmanager
def other_functions(pipe: Pipeline) -> Iterator[Pipeline]:
    """Run with `OtherFunctions`."""
    with OtherFunctions():
        yield replace(pipe)


@contextmanager
def math_attention(pipe: Pipeline) -> Iterator[Pipeline]:
    """Run with `math_kernel`."""
    with math_kernel():
        yield replace(pipe)


@contextmanager
def batched(pipe: Pipeline) -> Iterator[Pipeline]:
    """Run both guidance passes as one batch, or apart where a pipeline batches them already; text
    and decoding beside a neighbour, and predictions where there are no two passes to join."""
    settings, passes = pipe.settings, pipe.passes(pipe)
    joined = not pipe.audio_video and len(passes) == 2 and settings.text_recipe == "pad_trim_zero"
    with in_batch(0)(pipe) as varied:
        if joined:
            plan = "batched" if settings.cfg == "sequential" else "sequential"
            other = settings.model_copy(update={"cfg": plan})
            varied = replace(varied, settings=other, predict=pipe.predict)
        yield varied


def in_batch(row: int) -> Vary:
    """Run every model call with a neighbour in the batch, and take the sample's own row."""

    def beside(sample: torch.Tensor) -> torch.Tensor:
        neighbour = sample.roll(1, dims=-1)
        return torch.cat([sample, neighbour] if row == 0 else [neighbour, sample])

    def twice(sample: torch.Tensor) -> torch.Tensor:
        return torch.cat([sample, sample])

    def own(batch: Value) -> Value:
        return each(lambda tensor: tensor.chunk(2)[row], batch)

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        def encode_text(inner: Pipeline, prompts: list[str]) -> Value:
            batch = [*prompts, "a neighbour"] if row == 0 else ["a neighbour", *prompts]
            return own(pipe.encode_text(inner, batch))

        def predict(
            inner: Pipeline, latent: Value, step: Step, text: Value, branch: Branch
        ) -> Value:
            both = pipe.predict(inner, each(beside, latent), step, each(twice, text), branch)
            return own(both)

        def decode(inner: Pipeline, latent: Value) -> Value:
            return own(pipe.decode(inner, each(beside, latent)))

        yield replace(
            pipe,
            encode_text=encode_text,
            connect=_each_connected(pipe, twice, own),
            predict=predict,
            predict_passes=_one_by_one(pipe),
            decode=decode,
        )

    return vary


def _each_connected(
    pipe: Pipeline,
    change: Callable[[torch.Tensor], torch.Tensor],
    back: Callable[[Value], Value],
) -> Callable[[Pipeline, Texts], Texts] | None:
    """The connector stage on changed texts, where a model has one."""
    original = pipe.connect
    if original is None:
        return None

    def connect(inner: Pipeline, texts: Texts) -> Texts:
        changed = {}
        for branch, text in texts.items():
            embeds = change(text.embeds)
            times = embeds.shape[0] // text.mask.shape[0]
            changed[branch] = Encoded(embeds, text.mask.repeat(times, 1))
        return {branch: back(value) for branch, value in original(inner, changed).items()}

    return connect


def _one_by_one(pipe: Pipeline) -> Callable[..., dict[Branch, Value]]:
    """Passes as separate forwards of the varied `predict`, whatever the plan; a plan is varied by
    being left."""

    def predict_passes(
        inner: Pipeline, latent: Value, step: Step, texts: Texts, wanted: Sequence[Branch]
    ) -> dict[Branch, Value]:
        return {
            branch: inner.predict(inner, latent, step, texts[text_branch(branch)], branch)
            for branch in wanted
        }

    return predict_passes if pipe.audio_video else pipe.predict_passes


def _jitter(seed: int) -> Vary:
    """Round every stage's input once more, in the working precision; see `one_rounding`."""

    @contextmanager
    def vary(pipe: Pipeline) -> Iterator[Pipeline]:
        generator = torch.Generator("cpu").manual_seed(seed)
        working = pipe.first_transformer.dtype

        def rounded(tensor: torch.Tensor) -> torch.Tensor:
            narrower = tensor.itemsize < working.itemsize
            return one_rounding(tensor.to(working) if narrower else tensor, generator)

        def moved(value: Value) -> Value:
            return each(floating(rounded), value)

        def encode_text(inner: Pipeline, prompts: list[str]) -> Value:
            with _embeddings_through(pipe.text_encoder, rounded):
                return pipe.encode_text(inner, prompts)

        def predict(
            inner: Pipeline, latent: Value, step: Step, text: Value, branch: Branch
        ) -> Value:
            return pipe.predict(inner, moved(latent), step, moved(text), branch)

        def combine(inner: Pipeline, step: Step, *predictions: Value) -> Value:
            return pipe.combine(inner, step, *(moved(value) for value in predictions))

        def update(inner: Pipeline, step: Step, guided: Value, latent: Value) -> Value:
            return pipe.update(inner, step, moved(guided), moved(latent))

        def decode(inner: Pipeline, latent: Value) -> Value:
            return pipe.decode(inner, moved(latent))

        yield replace(
            pipe,
            encode_text=encode_text,
            connect=_each_connected(pipe, rounded, lambda value: value),
            predict=predict,
            predict_passes=_one_by_one(pipe),
            combine=combine,
            update=update,
            decode=decode,
        )

    return vary


@contextmanager
def _embeddings_through(
    encoder: Any, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Pass a text encoder's token embeddings through a function, where it says which they are."""
    find = getattr(encoder, "get_input_embeddings", None)
    if find is None:
        yield
        return
    handle = find().register_forward_hook(lambda module, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def _precision(higher: str) -> Vary:
    """Run the same weights in a higher precision."""

    def vary(pipe: Pipeline) -> AbstractContextManager[Pipeline]:
        return raised(pipe, higher)

    return vary
