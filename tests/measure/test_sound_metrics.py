"""Waveforms: what is measured, against formulas in numpy float64, and SGLang-Diffusion's gate."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.errors import MissingExtraError, UsageError
from truestep.measure.sound import (
    FLOOR_DB,
    HOP,
    WINDOW,
    SglangSound,
    sample_rate_of,
    sglang_sound,
    spectrogram_db,
    waveform_metrics,
)
from truestep.verdict import SoundMetrics

RATE = 16_000
Array = np.ndarray  # type: ignore[type-arg]


def noise(samples: int, *, seed: int = 0, channels: int = 2) -> torch.Tensor:
    """Sound with loud and quiet parts, `1 c n`."""
    generator = torch.Generator().manual_seed(seed)
    sound = torch.randn(1, channels, samples, generator=generator).cumsum(-1)
    return sound / sound.abs().max() * 0.7


def measure(actual: torch.Tensor, reference: torch.Tensor, rate: int = RATE) -> SoundMetrics:
    return waveform_metrics(actual, reference, sample_rate=rate)


def spectrogram(x: Array) -> Array:
    """Levels in dB of `n` samples, frame by frame."""
    padded = np.pad(x, WINDOW // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    frames = [padded[at : at + WINDOW] * window for at in range(0, len(x) + 1, HOP)]
    magnitude = np.abs(np.fft.rfft(frames, axis=1)) / (window.sum() / 2)
    return 20 * np.log10(np.maximum(magnitude, 1e-5)).T


@pytest.mark.parametrize("samples", [1, 100, 1024, 5000])
def test_against_plain_formulas(samples: int) -> None:
    r, a = noise(samples), noise(samples) * 0.9 + noise(samples, seed=1) * 0.1
    x, y = a.double().numpy(), r.double().numpy()
    found = measure(a, r)
    assert found.rel_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y), rel=1e-6)
    cx, cy = (z - z.mean(-1, keepdims=True) for z in (x, y))
    expected = (cx * cy).sum() / math.sqrt((cx**2).sum() * (cy**2).sum()) if samples > 1 else 0.0
    assert found.correlation == pytest.approx(expected, rel=1e-9)
    level = 10 * math.log10((x**2).mean() / (y**2).mean())
    assert found.level_db == pytest.approx(level, abs=1e-9)
    assert (found.peak_actual, found.peak_reference) == (abs(x).max(), abs(y).max())
    pictures = [[spectrogram(c) for c in z[0]] for z in (x, y)]
    distance = np.abs(np.subtract(*pictures)).mean()
    assert found.spectrum_db == pytest.approx(distance, rel=1e-9)


def test_a_sine_of_full_scale_is_0_db() -> None:
    sine = torch.sin(2 * math.pi * torch.arange(8192, dtype=torch.float64) * 64 / WINDOW)
    picture = spectrogram_db(sine)
    assert picture.shape == (513, 33)
    assert picture[64, 16] == pytest.approx(0, abs=1e-9)
    assert picture[70:, 16].max() == FLOOR_DB


def test_no_sample_is_left_out() -> None:
    for samples in (1, 255, 256, 257, 1000):
        for at in (0, samples - 1):
            click = torch.zeros(1, 1, samples)
            click[..., at] = 1
            assert spectrogram_db(click).max() > FLOOR_DB


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(2, 3000), st.sampled_from([-1, 1]))
def test_a_gain_is_a_level_and_nothing_else(gain: float, samples: int, sign: int) -> None:
    sound = noise(samples).double()
    found = measure(sound * gain * sign, sound)
    assert found.level_db == pytest.approx(20 * math.log10(gain), abs=1e-6)
    assert found.correlation == pytest.approx(sign, abs=1e-9)
    assert found.spectrum_db is not None
    assert found.spectrum_db <= abs(20 * math.log10(gain)) + 1e-9
    back = measure(sound, sound * gain * sign)
    assert back.level_db == pytest.approx(-found.level_db, abs=1e-6)
    assert back.spectrum_db == pytest.approx(found.spectrum_db, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 2), st.integers(0, 99))
def test_equal_sounds_measure_zero(samples: int, channels: int, seed: int) -> None:
    sound = noise(samples, seed=seed, channels=channels)
    found = measure(sound.clone(), sound)
    assert (found.rel_l2, found.correlation, found.level_db, found.spectrum_db) == (0, 1, 0, 0)
    assert (found.seconds_difference, found.note) == (0, "")


@settings(max_examples=25, deadline=None)
@given(st.integers(2000, 5000), st.integers(0, 99))
def test_samples_in_another_order_are_not_correlated(samples: int, seed: int) -> None:
    sound = noise(samples, seed=seed)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    found = measure(sound[..., order], sound)
    assert found.level_db == pytest.approx(0, abs=1e-9)  # the level alone sees nothing
    assert found.correlation is not None
    assert found.correlation < 0.5
    assert found.spectrum_db is not None
    assert found.spectrum_db > 3


def test_swapped_channels_are_seen() -> None:
    sound = noise(4000)
    found = measure(sound.flip(1), sound)
    assert found.level_db == pytest.approx(0, abs=1e-9)
    assert found.correlation is not None
    assert found.correlation < 0.9
    assert found.rel_l2 is not None
    assert found.rel_l2 > 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_what_is_not_finite_measures_nothing(bad: float, side: int) -> None:
    sides = [noise(3000), noise(3000)]
    for index in (0, 1) if side == 2 else (side,):
        sides[index][0, 1, 1234] = bad
    found = measure(*sides)
    for value in (found.rel_l2, found.correlation, found.level_db, found.spectrum_db):
        assert value is not None
        assert math.isnan(value)
    word = ("the actual side is", "the reference side is", "both sides are")[side]
    assert found.note == f"{word} not finite"
    assert not math.isfinite((found.peak_actual, found.peak_reference, found.peak_actual)[side])


def test_two_silent_sides_are_equal_and_one_is_infinitely_far() -> None:
    sound, silence = noise(3000), torch.zeros(1, 2, 3000)
    both = measure(silence, silence.clone())
    assert (both.rel_l2, both.correlation, both.level_db, both.spectrum_db) == (0, 1, 0, 0)
    assert both.note == "both sides are silent"
    own = measure(silence, sound)
    assert (own.rel_l2, own.correlation, own.spectrum_db) == (1, 0, math.inf)
    assert (own.level_db, own.note) == (-math.inf, "the actual side is silent")
    other = measure(sound, silence)
    assert (other.rel_l2, other.correlation, other.spectrum_db) == (math.inf, 0, math.inf)
    assert (other.level_db, other.note) == (math.inf, "the reference side is silent")
    assert SoundMetrics.model_validate_json(other.model_dump_json()) == other


def test_other_lengths_are_told_in_seconds_and_not_measured_sample_for_sample() -> None:
    found = measure(noise(24_000), noise(48_000), rate=24_000)
    assert (found.seconds_actual, found.seconds_reference) == (1, 2)
    assert found.seconds_difference == -1
    assert (found.rel_l2, found.correlation, found.spectrum_db) == (None, None, None)
    assert math.isfinite(found.level_db)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 10), torch.zeros(1, 2, 0), torch.zeros(1, 2, 9, dtype=torch.int16)]
)
def test_what_is_not_a_waveform_is_refused(bad: torch.Tensor) -> None:
    for pair in ((bad, noise(9)), (noise(9), bad)):
        with pytest.raises(ValueError, match="not a waveform"):
            measure(*pair)


def test_the_sample_rate_of_settings() -> None:
    assert sample_rate_of({"sample_rate": 24_000}) == 24_000
    for rate in (0, -1, 24e3, "24000", True, None):
        assert sample_rate_of({"sample_rate": rate}) is None
    assert sample_rate_of({}) is None


def by_the_formulas(a: torch.Tensor, r: torch.Tensor) -> SglangSound:
    """The gate's four numbers of mono sounds at 16 kHz, in numpy float64."""
    x, y = (side[0, 0].double().numpy() for side in (a, r))
    n = min(len(x), len(y))
    duration = abs(len(x) - len(y)) / 16_000
    x, y = x[:n], y[:n]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 511)

    def picture(z: Array) -> Array:
        z = np.pad(z, (0, max(512 - n, 0)))
        cut = [z[at : at + 512] * window for at in range(0, len(z) - 511, 160)]
        return np.sqrt(np.abs(np.fft.rfft(cut, axis=1))).ravel()

    def cosine(p: Array, q: Array) -> float:
        norms = math.sqrt((p**2).sum() * (q**2).sum())
        return float((p * q).sum() / norms) if norms else 0.0

    levels = [20 * math.log10(max(math.sqrt((z**2).mean()), 1e-12)) for z in (x, y)]
    return SglangSound(
        spectral_similarity=cosine(picture(x), picture(y)),
        waveform_correlation=cosine(x - x.mean(), y - y.mean()),
        rms_db_diff=abs(levels[0] - levels[1]),
        duration_diff=duration,
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0, 1), st.integers(0, 99))
def test_sglang_against_plain_formulas(n: int, m: int, mix: float, seed: int) -> None:
    r, a = noise(n, channels=1), noise(m, seed=seed, channels=1)
    shorter = min(n, m)
    a[..., :shorter] = a[..., :shorter] * mix + r[..., :shorter] * (1 - mix)
    found, expected = sglang_sound(a, r, sample_rate=RATE), by_the_formulas(a, r)
    for name in ("spectral_similarity", "waveform_correlation", "rms_db_diff", "duration_diff"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-9), name


def tone(hertz: float, *, rate: int = RATE, seconds: float = 1.0) -> torch.Tensor:
    times = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hertz * times).float()[None, None]


def passes(found: SglangSound) -> bool:
    """The tool's own limits (sglang 0.5.23, test_utils.py, `DEFAULT_AUDIO_*_THRESHOLD`)."""
    alike = found.spectral_similarity >= 0.95 and found.waveform_correlation >= 0.90
    return alike and found.rms_db_diff <= 2.0 and found.duration_diff <= 0.10


def test_sglang_passes_what_is_alike_and_no_other_tone() -> None:
    assert passes(sglang_sound(tone(440) * 0.9, tone(440), sample_rate=RATE))
    assert not passes(sglang_sound(tone(880), tone(440), sample_rate=RATE))
    assert not passes(sglang_sound(tone(440) * 0.7, tone(440), sample_rate=RATE))  # 3.1 dB
    assert passes(sglang_sound(tone(440, seconds=1.09), tone(440), sample_rate=RATE))
    assert not passes(sglang_sound(tone(440, seconds=1.11), tone(440), sample_rate=RATE))
    silence = tone(440) * 0
    assert not passes(sglang_sound(silence, silence, sample_rate=RATE))  # as the tool has it
    assert not passes(sglang_sound(tone(440) * math.nan, tone(440), sample_rate=RATE))


def test_sglang_resamples_to_16_khz_and_mixes_to_mono() -> None:
    for rate in (24_000, 48_000):
        high = tone(440, rate=rate)
        stereo = torch.cat([high, high], 1) / math.sqrt(2)
        found = sglang_sound(stereo, high, sample_rate=rate)
        assert passes(found)
        assert found.rms_db_diff == pytest.approx(0, abs=1e-5)
        longer = torch.cat([high, high[..., : rate // 2]], -1)
        assert sglang_sound(longer, high, sample_rate=rate).duration_diff == pytest.approx(0.5)
        beyond = tone(10_000, rate=rate) * 0.5  # above 8 kHz: gone at 16 kHz
        assert sglang_sound(high + beyond, high, sample_rate=rate).waveform_correlation > 0.999


def test_sglang_says_what_it_cannot_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"needs decoded sound(.|\n)*shape \(3, 4\)"):
        sglang_sound(torch.zeros(3, 4), tone(440), sample_rate=RATE)
    with pytest.raises(UsageError, match="1 samples at 48,000 Hz, none at 16,000 Hz"):
        sglang_sound(tone(440)[..., :1], tone(440), sample_rate=48_000)
    monkeypatch.setitem(sys.modules, "av", None)
    assert sglang_sound(tone(440), tone(440), sample_rate=RATE).waveform_correlation > 0.999
    with pytest.raises(MissingExtraError, match="resampling a sound"):
        sglang_sound(tone(440), tone(440), sample_rate=24_000)
