"""Predictions of an engine, each set against the trusted model's on the engine's own inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from truestep.engines.conventions import AS_IT_IS, PREDICTIONS, TIME_SCALES, Conversion, as_shape
from truestep.engines.expected import Seams, time_scale
from truestep.engines.run import COND, Pass, Run, Step
from truestep.engines.trusted import Denoiser, Trusted, arguments
from truestep.errors import FOREIGN, UsageError, one_line
from truestep.floors import NoiseRun
from truestep.keys import step_name
from truestep.measure.distance import distance
from truestep.progress import Progress
from truestep.replay.functions import record_function

SAMPLES = 4
"""Predictions on which the floor is measured: first, last, and between."""

CLOSE = 0.05
"""A convention explains predictions that agree to so much; a better one is never worse by this."""


@dataclass(frozen=True)
class _Prediction:
    name: str
    one: Pass
    step: Step
    sigma: float | None


def put_predictions(
    found: Seams, run: Run, known: Run | None, trusted: Trusted, progress: Progress | None
) -> None:
    every = [
        _Prediction(step_name(step.number, one.branch), one, step, _sigma(run, index))
        for index, step in enumerate(run.steps)
        for one in step.passes
    ]
    if not every:
        found.unjudged["prediction"] = "no prediction was recorded"
        return
    templates = _templates(known)
    try:
        way = _convention(every, templates, trusted)
    except UsageError as error:
        found.unjudged["prediction"] = f"{error.what}; {error.measured}"
        return
    scale, conversion = way
    found.convert(TIME_SCALES[scale])
    found.convert(conversion.name)
    samples: dict[tuple[int, tuple[str, ...]], list[tuple[str, dict[str, torch.Tensor]]]] = {}
    denoisers: dict[tuple[int, tuple[str, ...]], Denoiser] = {}
    for done, each in enumerate(every):
        time = each.one.timestep
        model = trusted.denoiser(None if time is None else time * scale)
        template = templates.get(each.one.branch, templates.get(COND))
        tensors, plain, how = arguments(each.one, model, template, scale)
        for one in how:
            found.convert(one)
        denoiser = Denoiser(model, plain)
        expected = denoiser(**tensors)
        actual = conversion.apply(each.one.output, each.step.latent, each.sigma)
        found.put(each.name, actual, expected)
        key = (id(model), tuple(sorted(plain)))
        denoisers[key] = denoiser
        samples.setdefault(key, []).append((each.name, tensors))
        if progress:
            progress("predictions by the trusted model", done + 1, len(every))
    for key, named in samples.items():
        found.floor += _floor(denoisers[key], named, progress)


def _sigma(run: Run, index: int) -> float | None:
    if run.sigmas is not None and index < len(run.sigmas):
        return float(run.sigmas[index])
    return None


def _templates(known: Run | None) -> dict[str, Pass]:
    """The reference's first prediction of each branch: what else the trusted model is given."""
    found: dict[str, Pass] = {}
    for step in known.steps if known else ():
        for one in step.passes:
            found.setdefault(one.branch, one)
    return found


def _convention(
    every: Sequence[_Prediction], templates: Mapping[str, Pass], trusted: Trusted
) -> tuple[float, Conversion]:
    """Scale of time and kind of prediction under which the engine agrees best, at a middle step.

    Where a reference says the time, its scale is that; and what an adapter says of predictions is
    tried first, so nothing else is taken unless it is far better.
    """
    middle = every[len(every) // 2]
    template = templates.get(middle.one.branch, templates.get(COND))
    scales = list(TIME_SCALES)
    theirs = template.timestep if template else None
    ours = every[0].one.timestep
    if theirs is not None and ours is not None:
        scales = [time_scale(ours, theirs)]
    best: tuple[float, float, Conversion] | None = None
    failed: BaseException | None = None
    for scale in scales:
        try:
            model = trusted.denoiser(None if ours is None else ours * scale)
            tensors, plain, _ = arguments(middle.one, model, template, scale)
            expected = Denoiser(model, plain)(**tensors)
        except UsageError:
            raise
        except FOREIGN as error:
            failed = error
            continue
        for conversion in PREDICTIONS:
            try:
                value = conversion.apply(middle.one.output, middle.step.latent, middle.sigma)
                fitted, _ = as_shape(value, expected)
                size = (
                    distance(fitted, expected).rel_l2
                    if fitted.shape == expected.shape
                    else math.inf
                )
            except (ValueError, RuntimeError):
                continue
            simple = conversion is AS_IT_IS and scale == 1.0
            if best is None or size < best[0] * (CLOSE if best[0] < CLOSE or not simple else 1.0):
                best = (size, scale, conversion)
    if best is None:
        why = one_line(failed) if isinstance(failed, FOREIGN) else "outputs have other sizes"
        raise UsageError(
            "the trusted model cannot be called with what the engine gave its own", measured=why
        )
    return best[1], best[2]


def _floor(
    denoiser: Denoiser,
    named: Sequence[tuple[str, dict[str, torch.Tensor]]],
    progress: Progress | None,
) -> list[NoiseRun]:
    """Benign runs of the trusted model on some of the engine's inputs, under the rows' names."""
    count = min(SAMPLES, len(named))
    chosen = [named[round(i * (len(named) - 1) / max(count - 1, 1))] for i in range(count)]
    recording = record_function(denoiser, [tensors for _, tensors in chosen], progress=progress)
    floor = recording.manifest.noise_floor
    names = {f"sample/{i:04d}/output/out": name for i, (name, _) in enumerate(chosen)}
    runs = []
    for one in floor.runs if floor else ():
        rows = [
            row.model_copy(update={"name": names.get(row.name, row.name)}) for row in one.tensors
        ]
        runs.append(one.model_copy(update={"tensors": tuple(rows)}))
    return runs
