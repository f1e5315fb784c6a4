"""New limits, from a measured noise floor and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from truestep.errors import UsageError
from truestep.floors import NoiseFloor, NoiseRun, RunMetrics
from truestep.gates.thresholds.file import METRICS, OURS, Metric, Provenance, ReferenceSource
from truestep.gates.thresholds.rule import FRAMES, WAVEFORM, measure
from truestep.gates.thresholds.running import decoded, free_run
from truestep.judge.floor import FloorLookup, pair_of
from truestep.judge.rule import RATE
from truestep.measure.frames import levels
from truestep.measure.sound import sample_rate_of
from truestep.progress import Progress
from truestep.recording.format import Recording
from truestep.replay.variations import variations
from truestep.runtime.pipeline import Pipeline

LEAST_SHARE = 0.01
"""Share of the 8-bit values that rounding alone may move by one level. A value is cut down to a
whole level, so an error of e levels moves a share e of them: 0.01 is one part in 25,000."""

LARGEST_SIZE: Mapping[str, float] = {"ssim": 2.0, "psnr_db": 1.0, "mad": 255.0}
"""Where a size (`_size`) ends: a limit beyond it would let everything pass."""

RULE = (
    "the size that 1 benign free run in {runs:,.0f} would exceed, from a tail fitted to the worst "
    "key frame of each; at least {share:.0%} of the values one level off, and sound at 16 bits"
)


@dataclass(frozen=True)
class Calibrated:
    """The limits of one case, and where they come from.

    Attributes:
        entry: The case's keys, `truestep` among them.
        limits: Metric name to limit. floor: metric name to its worst benign value.
        runs: Benign runs measured.
    """

    entry: Mapping[str, object]
    limits: Mapping[str, float]
    floor: Mapping[str, float]
    runs: int


def calibrated(
    pipe: Pipeline, recording: Recording, *, commit: str = "", progress: Progress | None = None
) -> Calibrated:
    """Make limits for a reference: generate freely under every benign change, and measure.

    The recording's own floor is of stages in isolation, and keeps no SSIM; what a threshold file
    judges is what a whole generation ends in, so that is what runs here, under the same changes.

    Args:
        pipe: The trusted pipeline that made the recording.
        recording: The reference, with a noise floor and decoded frames.
        commit: Of the code that made the reference.
        progress: Told about each run.

    Raises:
        UsageError: No noise floor was measured for the reference, or it holds no frames.
    """
    refuse(recording)
    reference = decoded(recording)
    rate = sample_rate_of(recording.manifest.settings)
    todo = variations(pipe)
    found: list[Mapping[str, float]] = []
    for done, variation in enumerate(todo, start=1):
        with variation.vary(pipe) as varied:
            found.append(measure(free_run(varied), reference, sample_rate=rate).values)
        if progress:
            progress(f"free runs: {variation.kind}", done, len(todo))
    least = measure(rounded(reference), reference, sample_rate=rate).values
    measured = {m.name: tuple(run[m.name] for run in found) for m in METRICS if m.name in least}
    limits = {
        metric.name: _limit(metric, measured[metric.name], least[metric.name])
        for metric in METRICS
        if metric.name in measured
    }
    provenance = Provenance(
        date=_now(),
        runs=len(found),
        environment=dict(recording.manifest.environment),
        reference=_source(recording, commit),
        measured=measured,
        rule=RULE.format(runs=1 / RATE, share=LEAST_SHARE).replace("%", " %"),
    )
    entry: dict[str, object] = {m.key: limits[m.name] for m in METRICS if m.name in limits}
    entry[OURS] = provenance.model_dump(mode="json")
    floor = {m.name: _worst(m, measured[m.name]) for m in METRICS if m.name in measured}
    return Calibrated(entry, limits, floor, len(found))


def refuse(recording: Recording) -> None:
    """Raise unless limits can be measured for a recording, before anything runs.

    Raises:
        UsageError: It has no noise floor, or no decoded frames.
    """
    floor = recording.manifest.noise_floor
    where = str(recording.path or "reference")
    if floor is None or not floor.runs:
        raise UsageError(
            "no limits without a measured noise floor: a guessed one passes everything or nothing",
            where=where,
            measured="the reference was recorded with --floor none",
            hint="truestep record CASE --update",
        )
    if FRAMES not in recording:
        raise UsageError(
            "the reference holds no decoded frames to measure on",
            where=where,
            measured=f"recorded at level {recording.manifest.level}; needed: full, with frames",
            hint="truestep record CASE --update",
        )


def rounded(reference: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Decoded tensors as rounding alone may leave them: no limit is tighter than twice that.

    Args:
        reference: Frames (see `one_level_off`) and, if any, a waveform in [-1, 1], which is put on
            the steps of a 16-bit sound file.
    """
    found = {FRAMES: one_level_off(reference[FRAMES])}
    if WAVEFORM in reference:
        found[WAVEFORM] = (reference[WAVEFORM].float() * 32767).round() / 32767
    return found


def one_level_off(frames: torch.Tensor) -> torch.Tensor:
    """Frames of which `LEAST_SHARE` of the 8-bit values are one level up or down.

    Args:
        frames: `b c f h w` in [-1, 1].
    """
    whole = levels(frames).unflatten(0, (frames.shape[0], frames.shape[2])).movedim(2, 1)
    generator = torch.Generator("cpu").manual_seed(0)
    draw = torch.rand(whole.shape, generator=generator)
    moved = whole + (draw < LEAST_SHARE / 2).float() - (draw > 1 - LEAST_SHARE / 2).float()
    found: torch.Tensor = (moved.clamp(0, 255) + 0.5) / 255 * 2 - 1
    return found


def _size(metric: Metric, value: float) -> float:
    """A value as a distance: 0 for equal sides, larger for worse."""
    if metric.name == "psnr_db":
        return float(10 ** (-value / 20))  # rms error over 255
    return 1 - value if metric.at_least else value


def _value(metric: Metric, size: float) -> float:
    """The inverse of `_size`, rounded away from the floor so that the file is readable."""
    if metric.name == "psnr_db":
        return math.floor(-200 * math.log10(size)) / 10
    if metric.at_least:
        return 1 - math.ceil(size * 1e6) / 1e6
    return float(f"{size * 1.005:.3g}") if size else 0.0


def _limit(metric: Metric, values: tuple[float, ...], least: float) -> float:
    """The limit that a fitted tail gives, never tighter than the least that rounding does."""
    sizes = [_size(metric, value) for value in values]
    pair = pair_of(metric.name, metric.name)
    runs = tuple(
        NoiseRun(
            kind="free",
            detail=str(at),
            pair=pair,
            tensors=(RunMetrics(name=metric.name, rel_l2=size, max_abs=size),),
        )
        for at, size in enumerate(sizes)
    )
    floor = FloorLookup(NoiseFloor(runs=runs), pair=pair).find(metric.name, dtype="")
    critical = floor.tails["rel_l2"].critical(RATE) if floor and any(sizes) else 0.0
    size = max(critical, 2 * _size(metric, least))
    return _value(metric, min(size, LARGEST_SIZE.get(metric.name, math.inf)))


def _worst(metric: Metric, values: tuple[float, ...]) -> float:
    return min(values) if metric.at_least else max(values)


def _source(recording: Recording, commit: str) -> ReferenceSource:
    manifest = recording.manifest
    libraries = {
        key.removeprefix("library."): version
        for key, version in sorted(manifest.environment.items())
        if key.startswith("library.") and version != "(not installed)"
    }
    return ReferenceSource(
        case_id=manifest.case_id or "",
        created=manifest.created,
        weights=manifest.environment.get("model.weights", ""),
        commit=commit,
        implementation=", ".join(f"{name} {version}" for name, version in libraries.items()),
    )


def _now() -> str:
    from datetime import datetime, timezone

    return datetime.now(timezone.utc).isoformat(timespec="seconds")
