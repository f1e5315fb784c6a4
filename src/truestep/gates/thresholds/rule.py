"""SGLang-Diffusion's rule on decoded frames and sound, as one gate beside ours. Pure: no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from truestep.gates.kinds import key_frames
from truestep.gates.thresholds.file import METRICS, Limits
from truestep.measure.sound import sglang_sound
from truestep.verdict import GateResult

FRAMES, WAVEFORM = "video/frames", "audio/waveform"

NO_CLIP = "no CLIP weights here"
NO_RATE = "the reference does not say its sample rate"

SOUND: Mapping[str, str] = {
    "audio_spectral": "spectral_similarity",
    "audio_correlation": "waveform_correlation",
    "audio_rms_db": "rms_db_diff",
    "audio_duration_s": "duration_diff",
}
"""Metrics of the sound, and what `sglang_sound` calls them."""


@dataclass(frozen=True)
class Measured:
    """What the rule measured.

    Attributes:
        values: Metric name to the worst value over the key frames, or the value of the sound.
        not_judged: Metric name to why it has no value.
        failure: Why the two sides cannot be compared at all.
    """

    values: Mapping[str, float]
    not_judged: Mapping[str, str]
    failure: str = ""


def measure(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    *,
    sample_rate: int | None = None,
) -> Measured:
    """Measure what SGLang-Diffusion does, as far as it can be here.

    Args:
        actual, reference: `video/frames` as `b c f h w` in [-1, 1], and `audio/waveform` as
            `b c n` where there is sound. What only the reference has is a failure.
        sample_rate: Hz, of the sound.

    Returns:
        The worst of the first, middle and last frame (`truestep.gates.kinds.key_frames`), and the
        four metrics of the sound (`truestep.measure.sound.sglang_sound`).
    """
    values: dict[str, float] = {}
    not_judged = {"clip": NO_CLIP}
    failures = []
    if FRAMES in reference:
        failures += _differ(FRAMES, actual, reference)
        if not failures:
            frames = key_frames(actual[FRAMES], reference[FRAMES])
            values["ssim"] = _worst((f.ssim for f in frames), smallest=True)
            values["psnr_db"] = _worst((f.psnr for f in frames), smallest=True)
            values["mad"] = _worst((f.mad for f in frames), smallest=False)
    else:
        not_judged |= dict.fromkeys(("ssim", "psnr_db", "mad"), "the reference holds no frames")
    if WAVEFORM not in reference:
        not_judged |= dict.fromkeys(SOUND, "the reference holds no sound")
    elif WAVEFORM not in actual:
        failures.append(f"{WAVEFORM} is missing")
    elif sample_rate is None:
        not_judged |= dict.fromkeys(SOUND, NO_RATE)
    else:
        sound = sglang_sound(actual[WAVEFORM], reference[WAVEFORM], sample_rate=sample_rate)
        values |= {name: getattr(sound, field) for name, field in SOUND.items()}
    return Measured(values, not_judged, "; ".join(failures))


def judge(limits: Limits, measured: Measured, *, note: str = "") -> GateResult:
    """One rule, one result: every metric that has a limit must hold.

    A metric that has a limit and no value is not judged: then the rule fails if another metric
    does, and is undecided (`passed` is None) if none does.
    """
    known = {metric.name: metric for metric in METRICS}
    judged = {name: measured.values[name] for name in limits.values if name in measured.values}
    broken = [n for n, v in judged.items() if not known[n].holds(v, limits.values[n])]
    unjudged = [
        f"{name} ({measured.not_judged.get(name, 'not measured')})"
        for name in limits.values
        if name not in judged
    ]
    fails = bool(broken or measured.failure)
    parts = (measured.failure, f"does not hold: {', '.join(broken)}" if broken else "", note)
    return GateResult(
        name=limits.rule,
        passed=False if fails else (None if unjudged or not judged else True),
        metrics=judged,
        thresholds=dict(limits.values),
        not_judged=tuple(unjudged),
        note="; ".join(part for part in parts if part),
    )


def lives(limits: Limits, measured: Measured) -> bool:
    """Whether nothing that can be judged here notices a difference."""
    return judge(limits, measured).passed is not False


def _worst(values: object, *, smallest: bool) -> float:
    found = list(values)  # type: ignore[call-overload]
    return math.nan if any(map(math.isnan, found)) else (min(found) if smallest else max(found))


def _differ(
    name: str, actual: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> list[str]:
    """Why one tensor of both sides cannot be compared."""
    if name not in actual:
        return [f"{name} is missing"]
    if actual[name].shape != reference[name].shape:
        return [f"{name}: {tuple(actual[name].shape)} against {tuple(reference[name].shape)}"]
    return []
