"""Measure a reference's noise floor: replay it under changes that are known to be harmless.

Each variation is a function on the pipeline, like a change under test. All run on the trusted side,
on the recorded inputs, so what they differ by is rounding and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
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
        if elsewhere.known(recording):  # an earlier recording gave these very tensors, and taped it
            todo[0] = replace(todo[0], only=(1,), stages=AT_A_STEP)
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
        variation = Variation("instructions", elsewhere.detail, unchanged, pair)
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
