"""PSNR and SSIM of decoded frames. Pure: no I/O.

Convention, for both: RGB at 8 bits as a video file holds them (`truestep.gates.levels`), data range
255. SSIM: 11x11 Gaussian window of sigma 1.5, no padding, K = (0.01, 0.03), mean over channels and
places: the numbers of pytorch-msssim's `ssim` to 1e-6 in a fraction of its time, and without the
package (`bench/results/ab.md` has the ratio).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from truestep.gates import levels

CONVENTION = (
    "RGB at 8 bits, data range 255; SSIM with an 11x11 Gaussian window of sigma 1.5, no padding, "
    "K 0.01 and 0.03, as pytorch-msssim's ssim"
)
WINDOW, SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

_ROWS, _COLUMNS = 64, 32
"""Outputs of one small matrix product with the banded window: the least time on one AVX-512 core
among 16 to 96 (`bench/bench_ab.py --ssim`)."""


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
        error = float((a - r).square().mean(dtype=torch.float64))
        psnrs.append(math.inf if error == 0 else 10 * math.log10(255**2 / error))
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
