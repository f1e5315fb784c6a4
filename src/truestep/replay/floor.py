"""Measure a reference's noise floor: replay it under changes that are known to be harmless.

Each variation is a function on the pipeline, like a change under test. All run on the trusted side,
on the recorded inputs, so what they differ by is rounding and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from truestep.calls.instructions import Elsewhere
from truestep.case import Case
from truestep.errors import TruestepError
from truestep.floors import NoiseFloor, NoiseRun
from truestep.joint import parts
from truestep.judge.floor import pair_of, sample_sizes
from truestep.judge.refusals import refuse_unsteady
from truestep.judge.rows import compare_tensors, measured_run
from truestep.keys import FREE_RUN, SAMPLES, is_prediction
from truestep.measure.structure import sample_mean
from truestep.progress import Progress
from truestep.recording.partial import NOWHERE, Partial
from truestep.replay.raised import raised, raised_stages
from truestep.replay.stages import keeps_state
from truestep.replay.variations import AT_A_STEP, Variation, jitter, unchanged, variations
from truestep.runtime.lent import lending
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline, generate
from truestep.runtime.precision import raised_precision
from truestep.runtime.stored import in_files

OTHER = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
"""The other precision that candidates of a reference commonly run in."""

Tensors = Mapping[str, torch.Tensor]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Measuring:
    """How a floor is measured.

    Attributes:
        case: What was recorded; loaded once more in the other common precision.
        final: Also generate freely under each variation, for the floor of the final latent.
        progress: Told about each variation.
        note: Told which kind could not be measured, and why.
        identity: What runs, in a text that says all of it; see `Elsewhere`.
        kept: Runs that are finished.
        steps: Where predictions are replayed; default first, middle and last.
    """

    case: Case
    final: bool = False
    progress: Progress | None = None
    note: Note = lambda text: None
    identity: str = ""
    kept: Partial = NOWHERE
    steps: tuple[int, ...] | None = None

    def told(self, what: str, done: int, total: int) -> None:
        """Say how far it is."""
        if self.progress:
            self.progress(f"noise floor: {what}", done, total)


_IN_ORDER = "steps in order"


def measure(pipe: Pipeline, recording: Tensors, how: Measuring) -> NoiseFloor:
    """Measure the noise floor of a recording on the pipeline that made it.

    Args:
        pipe: The trusted pipeline.
        recording: Its full recording.
        how: See `Measuring`.

    Raises:
        UsageError: A stage gives something else when it is run again.
    """
    todo = variations(pipe)
    total = len(todo) + 3
    precision = raised_precision(pipe.settings.dtype)
    lifted = precision and any(name.startswith(f"{precision}/") for name in recording)
    how.kept.expect((len(todo) + 1) * (2 if lifted else 1) + 2)  # two in another precision
    runs: list[NoiseRun] = []
    in_order = keeps_state(pipe) or how.kept.has(_IN_ORDER)
    said: list[str] = []
    with Elsewhere(said.append, identity=how.identity) as elsewhere:
        if elsewhere.known(recording):  # an earlier recording gave these very tensors, and taped it
            todo[0] = replace(todo[0], only=(1,), stages=AT_A_STEP)
        there = _Elsewhere(elsewhere, recording, todo[0], said, steps=how.steps)
        for done, variation in enumerate(todo):

            def make(
                note: Note, one: Variation = variation, ordered: bool = in_order
            ) -> list[NoiseRun]:
                with one.vary(pipe) as varied:
                    outputs = one.run(varied, recording, steps=how.steps, in_order=ordered)
                    outputs |= _free_run(varied) if how.final else {}
                return [noise_run(one, outputs, recording, weights=sample_sizes(runs))]

            if variation.kind == "repeat":
                in_order = _repeated(pipe, there, how, runs, in_order=in_order)
            else:
                runs.extend(how.kept.runs(_name(variation), make, how.note))
            with how.kept.refusing():
                refuse_unsteady(runs[-1:])
            how.told(variation.kind, done + 1, total)
        runs.extend(_other_precision(recording, how, in_order=in_order))
        how.told("other precision", total - 2, total)
        make_there = partial(there.collected, weights=sample_sizes(runs))
        runs.extend(how.kept.runs(there.name, make_there, how.note))
        how.told("instructions", total - 1, total)
    if precision and lifted:
        runs.extend(_raised(pipe, recording, how, precision=precision, in_order=in_order))
    how.told("raised", total, total)
    return NoiseFloor(runs=tuple(runs))


def _name(variation: Variation) -> str:
    """What a run is kept by."""
    return f"{variation.pair}: {variation.kind}, {variation.detail}"


def _free_run(varied: Pipeline) -> dict[str, torch.Tensor]:
    return {name: latent.to("cpu") for name, latent in parts(FREE_RUN, generate(varied))}


@dataclass(frozen=True)
class _Elsewhere:
    """The run by other instructions that a repeated run is taped for.

    Attributes:
        repeat: The run that is taped; its neighbouring steps are left out of what is measured.
        said: What was told meanwhile.
    """

    elsewhere: Elsewhere
    recording: Tensors
    repeat: Variation
    said: list[str]
    steps: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What it is kept by."""
        return f"{self.repeat.pair}: {self.elsewhere.detail}"

    def of_its_steps(self, outputs: Tensors) -> dict[str, torch.Tensor]:
        """Outputs without those of a neighbouring step."""
        return self.repeat.without_neighbour(dict(outputs), self.recording, self.steps)

    def collected(
        self, note: Note, *, weights: Mapping[str, float] | None = None
    ) -> list[NoiseRun]:
        """The run, if another process could make it."""

        def measured(outputs: Tensors) -> NoiseRun:
            one = Variation("instructions", self.elsewhere.detail, unchanged, self.repeat.pair)
            return noise_run(one, self.of_its_steps(outputs), self.recording, weights=weights)

        run = self.elsewhere.run(measured)
        for text in self.said:
            note(text)
        return [] if run is None else [run]


def _repeated(
    pipe: Pipeline, there: _Elsewhere, how: Measuring, runs: list[NoiseRun], *, in_order: bool
) -> bool:
    """Add the run that is the same once more, and begin it elsewhere; say whether steps only count
    in order."""
    recording, repeat, kept = there.recording, there.repeat, how.kept
    with repeat.vary(pipe) as varied:
        again = partial(repeat.run, varied, recording, steps=how.steps)

        def taped(in_order: bool) -> dict[str, torch.Tensor]:
            return dict(there.elsewhere.start(partial(again, in_order=in_order), recording))

        def make(note: Note) -> list[NoiseRun]:
            nonlocal in_order
            outputs = taped(in_order)
            if not _answered_alike(outputs, recording):
                in_order = True  # another answer where steps were left out: it keeps state
                kept.mark(_IN_ORDER)
                outputs = taped(in_order)
            outputs = there.of_its_steps(outputs)
            outputs |= _free_run(varied) if how.final else {}
            return [noise_run(repeat, outputs, recording, weights=sample_sizes(runs))]

        name = _name(repeat)
        if kept.has(name) and not kept.has(there.name):
            taped(in_order)
        runs += kept.runs(name, make, how.note)
    return in_order


def _answered_alike(
    outputs: Mapping[str, torch.Tensor], recording: Mapping[str, torch.Tensor]
) -> bool:
    """Whether predictions are the recorded ones, or rounding away from them."""
    predictions = {name: value for name, value in outputs.items() if is_prediction(name)}
    rows = compare_tensors(predictions, {name: recording[name] for name in predictions})
    return all(row.verdict.passed for row in rows)


def _other_precision(recording: Tensors, how: Measuring, *, in_order: bool) -> list[NoiseRun]:
    """The trusted model in the other precision: the floor for a candidate that runs in it."""
    case, steps = how.case, how.steps
    dtype = OTHER[case.dtype]
    pair = pair_of(dtype, case.dtype)

    def make(note: Note) -> list[NoiseRun]:
        return _in_other_precision(case, recording, pair, steps=steps, in_order=in_order)

    return how.kept.runs(f"{pair}: loaded in {dtype}", make, how.note)


def _in_other_precision(
    case: Case,
    recording: Tensors,
    pair: str,
    *,
    steps: Iterable[int] | None,
    in_order: bool,
) -> list[NoiseRun]:
    """Two runs, or none."""
    dtype = OTHER[case.dtype]
    todo = [
        Variation("precision", f"loaded in {dtype}", unchanged, pair, only=(0, 2)),
        replace(jitter(0, pair), only=(1,), stages=AT_A_STEP),
    ]
    runs: list[NoiseRun] = []
    try:
        with ExitStack() as stack:
            lender = stack.enter_context(lending())
            with in_files():  # no model is held twice
                other = load(case.replace(dtype=dtype))
            if not lender.lends:
                stack.close()  # a mode costs a little at every function
            for variation in todo:
                with variation.vary(other) as varied:
                    outputs = variation.run(varied, recording, steps=steps, in_order=in_order)
                runs.append(noise_run(variation, outputs, recording, weights=sample_sizes(runs)))
    except (TruestepError, RuntimeError):  # a device without this dtype: no floor for that pair
        return []
    return runs


def _raised(
    pipe: Pipeline,
    recording: Tensors,
    how: Measuring,
    *,
    precision: str,
    in_order: bool,
) -> list[NoiseRun]:
    """Benign runs of the stages raised to a higher precision, against their recorded outputs."""
    pair = pair_of(precision, precision)
    runs: list[NoiseRun] = []
    said: list[str] = []
    identity = f"{precision} {how.identity}" if how.identity else ""
    with (
        raised(pipe, precision) as lifted,
        Elsewhere(said.append, identity=identity) as elsewhere,
    ):
        elsewhere.known(recording)

        def outputs_of(one: Variation, *, taped: bool) -> Tensors:
            with one.vary(lifted) as varied:

                def again() -> Tensors:
                    return raised_stages(
                        varied,
                        recording,
                        steps=one.at(recording, how.steps),
                        precision=precision,
                        only=one.stages,
                        in_order=in_order,
                    ).outputs

                return elsewhere.start(again, recording) if taped else again()

        every = [replace(one, pair=pair, pairwise=False) for one in variations(lifted)]
        there = _Elsewhere(elsewhere, recording, every[0], said, steps=how.steps)
        for one in every:
            repeats = one.kind == "repeat"

            def make(note: Note, one: Variation = one, taped: bool = repeats) -> list[NoiseRun]:
                outputs = outputs_of(one, taped=taped)
                recorded = {name: outputs[name] for name in outputs if name in recording}
                return [noise_run(one, recorded, recording)]

            name = _name(one)
            if repeats and how.kept.has(name) and not how.kept.has(there.name):
                outputs_of(one, taped=True)
            runs += how.kept.runs(name, make, how.note)
        runs += how.kept.runs(there.name, there.collected, how.note)
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
