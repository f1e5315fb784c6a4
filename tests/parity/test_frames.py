"""Frames of both sides: numbers a viewer understands, beside the verdict."""

from __future__ import annotations

import math

import pytest
import torch

from truestep.measure.frames import psnr
from truestep.parity.frames import frames_of, with_frames
from truestep.verdict import Comparison, Rule, Side, Verdict

VIDEO = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def comparison() -> Comparison:
    side = Side(label="x")
    rule = Rule(name="x", text="x")
    return Comparison(
        verdict=Verdict.IDENTICAL, sentence="x", rule=rule, actual=side, reference=side
    )


def test_numbers_of_equal_and_of_shifted_frames() -> None:
    same = frames_of(VIDEO, VIDEO)
    assert (same.psnr_db, same.largest, same.count) == (math.inf, 0.0, 5)
    shifted = frames_of(VIDEO + 0.02, VIDEO)
    assert shifted.psnr_db == pytest.approx(40.0, abs=0.3)  # 10 log10(4 / 0.02^2), at 8 bits
    assert shifted.psnr_db == psnr(VIDEO + 0.02, VIDEO)
    assert shifted.largest == pytest.approx(0.02, abs=1e-6)


def test_ssim_is_left_out_of_small_frames() -> None:
    assert frames_of(VIDEO[..., :8], VIDEO[..., :8]).ssim is None
    assert frames_of(VIDEO, VIDEO).ssim == pytest.approx(1.0)


def test_the_worst_sample_is_shown() -> None:
    outputs = {"sample/0000/output/frames": VIDEO, "sample/0001/output/frames": VIDEO}
    worse = {**outputs, "sample/0001/output/frames": VIDEO + 0.02}
    made, seen = with_frames(comparison(), worse, outputs)
    assert seen is not None
    assert seen.psnr_db < 41
    assert [media.name for media in made.media] == ["sample/0001/output/frames"]


@pytest.mark.parametrize("shape", [(1, 4, 5, 8, 8), (3, 8, 8), (1, 3, 0, 8, 8)])
def test_what_is_no_video_is_left_alone(shape: tuple[int, ...]) -> None:
    outputs = {"out": torch.zeros(shape)}
    made, seen = with_frames(comparison(), outputs, outputs)
    assert seen is None
    assert made.media == ()


def test_a_lost_or_cut_video_is_left_to_the_verdict() -> None:
    made, seen = with_frames(comparison(), {}, {"out": VIDEO})
    assert (seen, made.media) == (None, ())
    made, seen = with_frames(comparison(), {"out": VIDEO[:, :, :4]}, {"out": VIDEO})
    assert (seen, made.media) == (None, ())
