"""Measure two waveforms, and see them as spectrograms. Pure: no I/O.

The verdict on a waveform is that of any tensor, by its noise floor. What is measured here says how
a difference sounds; SGLang-Diffusion's gate on sound is here too, under its own names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from truestep.errors import MissingExtraError, UsageError
from truestep.measure.distance import distance
from truestep.verdict import SoundMetrics

WINDOW, HOP = 1024, 256
"""Samples of a spectrogram's Hann window, and between two of them."""

FLOOR_DB = -100.0
"""Quieter bins count as this loud. 16 bits reach down to -98 dB."""

SGLANG_RATE = 16_000
"""Hz at which SGLang-Diffusion compares sound."""

_SGLANG_WINDOW, _SGLANG_HOP = 512, 160


def sample_rate_of(settings: Mapping[str, Any]) -> int | None:
    """Sample rate in Hz of a recording's settings; None if they have none that can be."""
    rate = settings.get("sample_rate")
    return rate if type(rate) is int and rate > 0 else None


def waveform_metrics(
    actual: torch.Tensor, reference: torch.Tensor, *, sample_rate: int
) -> SoundMetrics:
    """Measure how far a waveform is from a reference.

    Two silent sides are equal. Where one side alone is silent, its level is infinitely far, so is
    its spectrum, and the correlation is 0.

    Args:
        actual, reference: `b c n`, floating-point; full scale is 1. They may differ in shape.
        sample_rate: Hz, of both.

    Returns:
        The metrics. `spectrum_db` is the mean over all bins of the absolute difference of both
        spectrograms (`spectrogram_db`).

    Raises:
        ValueError: A side is not a waveform, or holds no samples.
    """
    for tensor in (actual, reference):
        if tensor.ndim != 3 or not tensor.numel() or not tensor.is_floating_point():
            raise ValueError(f"not a waveform: {tuple(tensor.shape)}, {tensor.dtype}")
    a, r = (tensor.detach().cpu().double() for tensor in (actual, reference))
    finite = [bool(torch.isfinite(side).all()) for side in (a, r)]
    silent = [not bool(side.any()) for side in (a, r)]
    same_shape = a.shape == r.shape
    rel_l2 = correlation = spectrum_db = None if not same_shape else math.nan
    level_db = _decibels(_rms(a), _rms(r)) if all(finite) else math.nan
    if same_shape and all(finite):
        rel_l2 = distance(a, r).rel_l2
        correlation = _correlation(a, r)
        spectrum_db = math.inf if any(silent) else 0.0
        if silent[0] is silent[1]:
            spectrum_db = float((spectrogram_db(a) - spectrogram_db(r)).abs().mean())
    return SoundMetrics(
        rel_l2=rel_l2,
        correlation=correlation,
        level_db=level_db,
        spectrum_db=spectrum_db,
        peak_actual=float(a.abs().max()),
        peak_reference=float(r.abs().max()),
        seconds_actual=a.shape[-1] / sample_rate,
        seconds_reference=r.shape[-1] / sample_rate,
        note="; ".join(filter(None, (_sides(silent, "silent"), _broken(finite)))),
    )


def spectrogram_db(waveform: torch.Tensor) -> torch.Tensor:
    """Loudness of every frequency over time, in dB; a sine of amplitude 1 is 0 dB.

    Convention: Hann window of 1,024 samples every 256, silence before the first and after the last
    sample, magnitudes, at least -100 dB (`FLOOR_DB`). No sample is left out, however short the
    waveform is.

    Args:
        waveform: `... n`.

    Returns:
        `... k t` float64, k = 513 frequencies from 0 to half the sample rate, t = n // 256 + 1.
    """
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    bins = torch.stft(
        waveform.reshape(-1, waveform.shape[-1]).detach().cpu().double(),
        WINDOW,
        HOP,
        window=window,
        pad_mode="constant",
        return_complex=True,
    )
    amplitude = bins.abs() / (window.sum() / 2)
    decibels = 20 * amplitude.clamp(min=10 ** (FLOOR_DB / 20)).log10()
    return decibels.reshape(*waveform.shape[:-1], *decibels.shape[-2:])


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _decibels(value: float, reference: float) -> float:
    """Ratio of two amplitudes in dB; two zeros are equal."""
    if value == reference:
        return 0.0
    if not value or not reference:
        return math.inf if value else -math.inf
    return 20 * (math.log10(value) - math.log10(reference))


def _correlation(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Pearson's correlation over all samples, each channel centred on its own.

    Two equal sides have 1 even where they are constant; a constant side has 0 with any other.
    """
    if torch.equal(actual, reference):
        return 1.0
    a, r = (side - side.mean(-1, keepdim=True) for side in (actual, reference))
    norms = float(a.norm() * r.norm())
    return float((a * r).sum()) / norms if norms else 0.0


def _sides(which: list[bool], word: str) -> str:
    """`the actual side is silent`, of those sides for which it is true."""
    if all(which):
        return f"both sides are {word}"
    return next(
        (
            f"the {side} side is {word}"
            for side, holds in zip(("actual", "reference"), which, strict=True)
            if holds
        ),
        "",
    )


def _broken(finite: list[bool]) -> str:
    return _sides([not side for side in finite], "not finite")


@dataclass(frozen=True)
class SglangSound:
    """SGLang-Diffusion's four measurements of a sound.

    Attributes:
        spectral_similarity: Cosine similarity of two spectrograms of square roots of magnitudes.
        waveform_correlation: Pearson's, of the samples that both have.
        rms_db_diff: dB, absolute.
        duration_diff: Seconds, absolute.
    """

    spectral_similarity: float
    waveform_correlation: float
    rms_db_diff: float
    duration_diff: float


def sglang_sound(actual: torch.Tensor, reference: torch.Tensor, *, sample_rate: int) -> SglangSound:
    """Measure a sound as SGLang-Diffusion does: first sample of the batch, mono, 16 kHz.

    Of two lengths the shorter is compared from the start, and the difference is `duration_diff`.
    Two silent sounds have similarity and correlation 0, and so fail. Left out: the lossy AAC track
    of an MP4 that it decodes the candidate from, and the 16-bit file that its reference is. Where a
    value is not finite the tool raises; here the measurements are NaN.

    Args:
        actual, reference: `b c n` in [-1, 1].
        sample_rate: Hz, of both. Others than 16,000 are resampled by FFmpeg's swresample, as there.

    Raises:
        MissingExtraError: PyAV is not installed, and the sample rate is not 16,000.
        UsageError: A side is not a waveform.

    Source:
        sglang 0.5.23, multimodal_gen/test/test_utils.py, `extract_audio_pcm`,
        `_audio_magnitude_spectrogram` and `compare_audio_with_gt`.
    """
    a, r = _mono(actual), _mono(reference)
    if not bool(torch.isfinite(a).all() and torch.isfinite(r).all()):
        return SglangSound(math.nan, math.nan, math.nan, abs(len(a) - len(r)) / sample_rate)
    a, r = _resampled(a, sample_rate), _resampled(r, sample_rate)
    duration, shorter = abs(len(a) - len(r)) / SGLANG_RATE, min(len(a), len(r))
    a, r = a[:shorter].double(), r[:shorter].double()
    levels = [20 * math.log10(max(_rms(side), 1e-12)) for side in (a, r)]
    return SglangSound(
        spectral_similarity=_cosine(_sglang_spectrogram(a), _sglang_spectrogram(r)),
        waveform_correlation=_cosine(a - a.mean(), r - r.mean()),
        rms_db_diff=abs(levels[0] - levels[1]),
        duration_diff=duration,
    )


def _cosine(actual: torch.Tensor, reference: torch.Tensor) -> float:
    norms = float(actual.norm() * reference.norm())
    return float((actual * reference).sum()) / norms if norms else 0.0


def _sglang_spectrogram(waveform: torch.Tensor) -> torch.Tensor:
    """Square roots of magnitudes `k t` of `n` samples: no padding at the ends, symmetric Hann."""
    missing = max(_SGLANG_WINDOW - len(waveform), 0)
    window = torch.hann_window(_SGLANG_WINDOW, periodic=False, dtype=waveform.dtype)
    bins = torch.stft(
        torch.nn.functional.pad(waveform, (0, missing)),
        _SGLANG_WINDOW,
        _SGLANG_HOP,
        window=window,
        center=False,
        return_complex=True,
    )
    return bins.abs().sqrt()


def _mono(waveform: torch.Tensor) -> torch.Tensor:
    """The first sample, `n` float32; stereo is (left + right) / sqrt 2, as FFmpeg has it."""
    if waveform.ndim != 3 or not waveform.numel() or not waveform.is_floating_point():
        raise UsageError(
            "a gate on sound needs decoded sound",
            measured=f"shape {tuple(waveform.shape)}, {waveform.dtype}; needed: b c n in [-1, 1], "
            "floating-point",
        )
    channels = waveform[0].detach().cpu().float()
    return channels.sum(0) / math.sqrt(len(channels))


def _resampled(mono: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """A sound `n` at 16 kHz."""
    if sample_rate == SGLANG_RATE:
        return mono
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "media", "resampling a sound") from None
    frame = av.AudioFrame.from_ndarray(mono[None].numpy(), format="fltp", layout="mono")
    frame.sample_rate = sample_rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=SGLANG_RATE)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    if not parts:
        raise UsageError(
            "the sound is too short for a gate on sound",
            measured=f"{len(mono)} samples at {sample_rate:,} Hz, none at {SGLANG_RATE:,} Hz",
        )
    return torch.cat([torch.from_numpy(part.to_ndarray()[0].copy()) for part in parts])
