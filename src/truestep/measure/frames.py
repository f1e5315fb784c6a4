"""PSNR and SSIM of decoded frames. Pure: no I/O.

Convention, for both: RGB at 8 bits as a video file holds them (`levels`), data range
255. SSIM: 11x11 Gaussian window of sigma 1.5, no padding, K = (0.01, 0.03), mean over channels and
places: the numbers of pytorch-msssim's `ssim` to 1e-6 in a fraction of its time, and without the
package (`bench/results/ab.md` has the ratio).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from truestep.errors import UsageError

CONVENTION = (
    "RGB at 8 bits, data range 255; SSIM with an 11x11 Gaussian window of sigma 1.5, no padding, "
    "K 0.01 and 0.03, as pytorch-msssim's ssim"
)
WINDOW, SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

_ROWS, _COLUMNS = 64, 32
"""Outputs of one small matrix product with the banded window: the least time on one AVX-512 core
among 16 to 96 (`bench/bench_ab.py --ssim`)."""


def levels(frames: torch.Tensor) -> torch.Tensor:
    """Frames as a video file would hold them: whole numbers from 0 to 255.

    Values are clamped and cut down, not rounded, as FastVideo and diffusers' `export_to_video` do
    (`(x / 2 + 0.5).clamp(0, 1) * 255`, then a cast to uint8). That cast turns NaN into 0 on
    common hardware, so NaN is black here, and no gate that reads a video file can tell it from
    black.

    Args:
        frames: `b c f h w`, c = 3, floating-point in [-1, 1].

    Returns:
        `n c h w` float32, n = b * f.

    Raises:
        UsageError: It is not decoded video.
    """
    if frames.ndim != 5 or frames.shape[1] != 3 or not frames.is_floating_point():
        raise UsageError(
            "a gate on frames needs decoded video",
            measured=f"shape {tuple(frames.shape)}, {frames.dtype}; needed: b c f h w in [-1, 1], "
            "3 channels, floating-point",
        )
    pixels = (frames.detach().cpu().float() * 0.5 + 0.5).clamp(0, 1) * 255
    return pixels.nan_to_num(0.0).trunc().movedim(2, 1).flatten(0, 1)


def both_levels(
    actual: torch.Tensor, reference: torch.Tensor, *, side: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two videos of one shape as `levels`.

    Args:
        side: Fewest pixels of both sides of a frame.

    Raises:
        UsageError: They differ in shape, are too small, or are no decoded video.
    """
    if actual.shape != reference.shape:
        raise UsageError(
            "two videos of one shape are needed",
            measured=f"{tuple(actual.shape)} and {tuple(reference.shape)}",
        )
    if reference.numel() == 0 or min(reference.shape[-2:]) < side:
        raise UsageError(
            "the frames are too small to be measured",
            measured=f"shape {tuple(reference.shape)}; both sides must have {side} pixels or more",
        )
    return levels(actual), levels(reference)


def psnr(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of one mean square over all 8-bit values of the video.

    Computed in float64, so that nothing wraps: black against white is 0 dB. Equal levels are
    infinite. NaN is black.

    Source:
        10 log10(255^2 / MSE), as skimage's `peak_signal_noise_ratio`.
    """
    return psnr_of_levels(*both_levels(actual, reference))


def psnr_of_levels(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """`psnr` of images that are whole numbers from 0 to 255 already, any shape."""
    error = float((actual - reference).square().mean(dtype=torch.float64))
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """SSIM of two videos, mean over frames; 1 is equal. Other conventions give other numbers.

    Args:
        actual, reference: `b c f h w` in [-1, 1], c = 3; sides of 11 pixels or more.

    Raises:
        UsageError: The frames are too small, or not two videos of one shape.
    """
    pairs = zip(*both_levels(actual, reference, side=WINDOW), strict=True)
    values = [ssim_frame(a, r) for a, r in pairs]
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class FrameScores:
    """PSNR of the worst frame in dB (infinite if equal), SSIM of the worst frame and their mean.

    SSIM is NaN for frames with a side below 11 pixels, which the window does not fit.
    """

    psnr_db: float
    ssim_worst: float
    ssim_mean: float


def frame_scores(actual: torch.Tensor, reference: torch.Tensor) -> FrameScores:
    """Score every frame of two videos.

    Args:
        actual, reference: `b c f h w` in [-1, 1], c = 3, equal shapes; NaN is black.

    Raises:
        UsageError: They are not decoded video.
        ValueError: The shapes differ, or there is no frame.
    """
    if actual.shape != reference.shape or not actual.numel():
        raise ValueError(f"two videos of one shape, not {actual.shape} and {reference.shape}")
    own, theirs = levels(actual), levels(reference)
    psnrs, ssims = [], []
    for a, r in zip(own, theirs, strict=True):  # a frame at a time stays in the cache
        psnrs.append(psnr_of_levels(a, r))
        ssims.append(ssim_frame(a, r))
    return FrameScores(min(psnrs), min(ssims), math.fsum(ssims) / len(ssims))


def ssim_frame(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """SSIM of one image `c h w`, float32 in [0, 255]; NaN where the window does not fit.

    Sum s and difference d of the two carry all five moments in four filtered images:
    E[xy] = (E[s^2] - E[d^2]) / 4 and E[x^2 + y^2] = (E[s^2] + E[d^2]) / 2. A strip of rows at a
    time stays in the cache.

    Source:
        Wang et al. 2004, equation 13, averaged over places and channels.
    """
    channels, height, width = actual.shape
    rows, columns = height - WINDOW + 1, width - WINDOW + 1
    if min(rows, columns) < 1:
        return math.nan
    if torch.equal(actual, reference):
        return 1.0
    found = 0.0
    for own, theirs in zip(actual, reference, strict=True):
        for start in range(0, rows, _ROWS):
            count = min(_ROWS, rows - start)
            part = slice(start, start + count + WINDOW - 1)
            found += _strip(own[part], theirs[part], count, columns)
    return found / (channels * rows * columns)


def _strip(actual: torch.Tensor, reference: torch.Tensor, rows: int, columns: int) -> float:
    """Sum of SSIM over `rows columns` places, from one channel of `rows+10 columns+10`."""
    moments = actual.new_empty(4, *actual.shape)
    s, d, ss, dd = moments
    torch.add(actual, reference, out=s)
    torch.sub(actual, reference, out=d)
    torch.mul(s, s, out=ss)
    torch.mul(d, d, out=dd)
    down = (_band(rows) @ moments).reshape(4 * rows, -1)
    across = down.new_empty(4 * rows, columns)
    for start in range(0, columns, _COLUMNS):
        count = min(_COLUMNS, columns - start)
        own = slice(start, start + count)
        torch.mm(down[:, start : start + count + WINDOW - 1], _band(count).T, out=across[:, own])
    s, d, ss, dd = across.view(4, rows, columns)
    ss -= s.square_()
    dd -= d.square_()
    places = (s - d).add_(2 * _C1).mul_((ss - dd).add_(2 * _C2))
    places.div_(s.add_(d).add_(2 * _C1)).div_(ss.add_(dd).add_(2 * _C2))
    return float(places.sum(dtype=torch.float64))


@lru_cache
def _band(count: int) -> torch.Tensor:
    """Matrix `count, count+10` whose row i holds the window at column i."""
    offsets = torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window /= window.sum()
    band = torch.zeros(count, count + WINDOW - 1)
    for row in range(count):
        band[row, row : row + WINDOW] = window
    return band
