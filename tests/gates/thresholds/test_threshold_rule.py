"""The rule on decoded frames and sound: three outcomes, and nothing passes unjudged."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gates.thresholds.samples import FRAMES, OTHER_FRAMES, WAVEFORM
from truestep.gates.kinds import sglang_gate
from truestep.gates.thresholds.file import Limits
from truestep.gates.thresholds.rule import judge, measure

RATE = 16_000
WITHOUT_CLIP = Limits("sglang x [a]", {"ssim": 0.92, "psnr_db": 24.0, "mad": 10.0})
USUAL = Limits("sglang x [a]", {"clip": 0.9, **WITHOUT_CLIP.values})


def video(frames: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"video/frames": frames}


def test_what_cannot_be_judged_never_passes() -> None:
    found = judge(USUAL, measure(video(FRAMES), video(FRAMES)))
    assert found.passed is None
    assert found.outcome == "undecided"
    assert found.not_judged == ("clip (no CLIP weights here)",)
    assert found.metrics == {"ssim": 1.0, "psnr_db": math.inf, "mad": 0.0}
    assert found.thresholds == {"clip": 0.9, "ssim": 0.92, "psnr_db": 24.0, "mad": 10.0}


def test_all_judged_passes_and_one_broken_fails() -> None:
    same = measure(video(FRAMES), video(FRAMES))
    assert judge(WITHOUT_CLIP, same).outcome == "passes"
    other = judge(USUAL, measure(video(OTHER_FRAMES), video(FRAMES)), note="see")
    assert (other.passed, other.outcome) == (False, "fails")
    assert other.note == "does not hold: ssim, psnr_db, mad; see"


def test_nothing_measured_is_undecided() -> None:
    found = judge(USUAL, measure({}, {}))
    assert (found.passed, found.metrics) == (None, {})
    assert "ssim (the reference holds no frames)" in found.not_judged
    assert judge(Limits("x", {}), measure({}, {})).passed is None


def test_another_shape_and_missing_frames_fail() -> None:
    cut = judge(USUAL, measure(video(FRAMES[:, :, :4]), video(FRAMES)))
    assert cut.passed is False
    assert "video/frames: (1, 3, 4, 24, 32) against (1, 3, 5, 24, 32)" in cut.note
    gone = judge(USUAL, measure({}, video(FRAMES)))
    assert (gone.passed, gone.note) == (False, "video/frames is missing")


@settings(deadline=None)
@given(st.floats(0.0, 0.3), st.integers(0, 2**31))
def test_it_agrees_with_the_gate_of_the_selftest(amount: float, seed: int) -> None:
    noise = torch.randn(FRAMES.shape, generator=torch.Generator().manual_seed(seed))
    actual = FRAMES + amount * noise
    expected = sglang_gate().passes("video/frames", actual, FRAMES)
    assert judge(WITHOUT_CLIP, measure(video(actual), video(FRAMES))).passed is expected


def test_nan_is_black_in_frames_and_fails_in_sound() -> None:
    damaged = {"video/frames": FRAMES, "audio/waveform": torch.full_like(WAVEFORM, math.nan)}
    reference = {"video/frames": FRAMES, "audio/waveform": WAVEFORM}
    limits = Limits("x", {**WITHOUT_CLIP.values, "audio_correlation": -1.0, "audio_rms_db": 1e9})
    found = judge(limits, measure(damaged, reference, sample_rate=RATE))
    assert found.note == "does not hold: audio_correlation, audio_rms_db"
    assert judge(limits, measure(reference, reference, sample_rate=RATE)).passed is True


def test_sound_is_judged_where_it_has_limits() -> None:
    limits = Limits("x", {"audio_correlation": 0.9, "audio_rms_db": 1.0, "audio_duration_s": 0.05})
    reference = {"audio/waveform": WAVEFORM}
    measured = measure({"audio/waveform": WAVEFORM * 1.1}, reference, sample_rate=RATE)
    assert judge(limits, measured).passed is True  # a gain of 10 % is 0.83 dB
    assert measured.values["audio_rms_db"] == pytest.approx(20 * math.log10(1.1))
    louder = judge(limits, measure({"audio/waveform": WAVEFORM * 1.2}, reference, sample_rate=RATE))
    assert louder.note == "does not hold: audio_rms_db"
    spectral = Limits("x", {"audio_spectral": 0.95, **limits.values})
    assert judge(spectral, measured).passed is True
    cut = {"audio/waveform": WAVEFORM[..., :-1600]}
    shorter = judge(limits, measure(cut, reference, sample_rate=RATE))
    assert shorter.note == "does not hold: audio_duration_s"
    gone = judge(limits, measure({}, reference, sample_rate=RATE))
    assert (gone.passed, gone.note) == (False, "audio/waveform is missing")
    unknown = judge(limits, measure(reference, reference))
    assert unknown.passed is None
    assert unknown.not_judged[0].endswith("(the reference does not say its sample rate)")
    silent = judge(limits, measure(video(FRAMES), video(FRAMES)))
    assert silent.passed is None
    assert "audio_rms_db (the reference holds no sound)" in silent.not_judged
