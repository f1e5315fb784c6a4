"""SSIM and PSNR: the numbers of pytorch-msssim, and what is black or does not fit."""

from __future__ import annotations

import math

import pytest
import torch

from truestep.errors import UsageError
from truestep.measure.frames import frame_scores, ssim_frame


def video(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [(11, 11), (16, 40), (75, 43), (140, 33)])
@pytest.mark.parametrize("noise", [0.5, 20.0, 200.0])
def test_ssim_is_that_of_pytorch_msssim(size: tuple[int, int], noise: float) -> None:
    package = pytest.importorskip("pytorch_msssim")
    generator = torch.Generator().manual_seed(1)
    reference = (torch.rand(3, *size, generator=generator) * 255).round()
    actual = (reference + noise * torch.randn(3, *size, generator=generator)).clamp(0, 255).round()
    expected = float(package.ssim(actual[None], reference[None], data_range=255))
    assert ssim_frame(actual, reference) == pytest.approx(expected, abs=1e-6)


def test_equal_frames() -> None:
    frames = video(1, 3, 2, 16, 16)
    scores = frame_scores(frames, frames.clone())
    assert (scores.psnr_db, scores.ssim_worst, scores.ssim_mean) == (math.inf, 1.0, 1.0)


def test_the_worst_frame_counts() -> None:
    reference = video(1, 3, 4, 16, 16)
    actual = reference.clone()
    actual[:, :, 2] = video(1, 3, 16, 16, seed=5)
    scores = frame_scores(actual, reference)
    assert scores.ssim_worst < 0.5 < 0.7 < scores.ssim_mean < 1
    black, white = torch.full((1, 3, 1, 16, 16), -1.0), torch.full((1, 3, 1, 16, 16), 1.0)
    assert frame_scores(black, white).psnr_db == 0


def test_frames_that_the_window_does_not_fit_and_what_is_no_video() -> None:
    small = video(1, 3, 1, 8, 16)
    assert math.isnan(frame_scores(small, -small).ssim_worst)
    with pytest.raises(ValueError, match="two videos of one shape"):
        frame_scores(small, small[..., :4])
    with pytest.raises(UsageError, match="decoded video"):
        frame_scores(small[0], small[0])
