"""Structure of a residual: what rounding noise does not have, whatever its size. Pure: no I/O.

With e = (a - r) / rms(r), every statistic is in units of the reference's rms, so that it can be set
against the same statistic of benign runs:

================  ============================================================================
`gain`            sum(e r) / sum(r r) * rms(r): the least-squares factor from r to a, minus 1
`correlation`     gain / rel_l2: cosine between residual and reference, -1 to 1
`channel_mean`    largest |mean of e| over a channel
`frame_energy`    largest rms of e over a frame
`row_energy`      largest rms of e over a row of pixels (all frames, channels, columns)
`token_energy`    largest rms of e over the channels of one position
================  ============================================================================

A few huge elements make all of these small. `bulk` is what they cannot hide: the relative distance
of the half of the elements that is smallest in the reference, in units of that half's own rms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

BULK_SAMPLE = 16_384
"""Elements that `bulk` looks at, drawn evenly from larger tensors: it is then known to 1 %."""

BULK_LEAST, BULK_DEVIATIONS = 8, 6.0
"""A gain of the bulk is believed from this many elements on, this many standard errors away."""

LAYOUTS: Mapping[int, Mapping[str, int]] = {
    5: {"channel": 1, "frame": 2, "row": 3, "column": 4},  # b c f h w
    4: {"channel": 1, "row": 2, "column": 3},  # b c h w
    3: {"token": 1, "channel": 2},  # b l c
    2: {"token": 0, "channel": 1},
}
"""Axis names by number of dimensions; fewer dimensions have a gain only."""


def structure(actual: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Structure statistics of a residual.

    Args:
        actual, reference: Same shape (`b c f h w`, `b c h w`, `b l c` or `l c`), real, finite.

    Returns:
        Statistic to value in units of the reference's rms. Empty where there is no residual, or
        an all-zero reference to set it against.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(reference.shape)}")
    residual, theirs, rms = residual_of(actual, reference)
    size = _rms(residual)
    if not rms or not size or not math.isfinite(size):
        return {}
    gain = float((residual * theirs).sum(dtype=torch.float64)) / theirs.numel() / rms
    found = {"gain": gain, "correlation": gain / size}
    axes = LAYOUTS.get(residual.ndim, {})
    if "channel" in axes and residual.shape[axes["channel"]] > 1:
        others = [axis for axis in range(residual.ndim) if axis != axes["channel"]]
        found["channel_mean"] = float(residual.mean(others).abs().max())
    squares = residual.square_()
    for name in ("frame", "row"):
        if name in axes and squares.shape[axes[name]] > 1:
            others = [axis for axis in range(squares.ndim) if axis != axes[name]]
            found[f"{name}_energy"] = math.sqrt(float(squares.mean(others).max()))
    if "channel" in axes and squares.shape[axes["channel"]] > 1:
        found["token_energy"] = math.sqrt(float(squares.mean(axes["channel"]).max()))
    small = bulk(actual, reference)
    return found | {"bulk": small["bulk"]} if small else found


def bulk(actual: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Distance of the elements that are small in the reference, whatever the large ones do.

    Sums beside large values round as those do, so that a small element may hold little but noise:
    a large `bulk` alone does not tell a fault from that. `bulk_gain` does. Noise on either side
    draws the least-squares factor between the two, taken either way, towards 0 and never beyond 1.

    Args:
        actual, reference: Same shape, real, finite.

    Returns:
        `bulk`, and `bulk_gain`, the factor from the reference to the actual side, where no noise
        explains it. Empty for an all-zero reference.
    """
    first, second = actual.detach().reshape(-1), reference.detach().reshape(-1)
    if second.numel() > BULK_SAMPLE:
        drawn = torch.Generator().manual_seed(0)
        at = torch.randint(second.numel(), (BULK_SAMPLE,), generator=drawn)
        first, second = first[at.to(first.device)], second[at.to(second.device)]
    # numpy's calls cost a tenth of torch's, and a comparison may be of very many small tensors
    a, r = (t.to("cpu", torch.float64).numpy() for t in (first, second))
    size = np.abs(r)
    nonzero = size[size > 0]
    if not nonzero.size:
        return {}
    middle = (nonzero.size - 1) // 2
    most = np.partition(nonzero, middle)[middle]
    with np.errstate(over="ignore", invalid="ignore"):
        a, r = a[size <= most] / most, r[size <= most] / most
        e = a - r
        ee, er, rr, aa = (float(np.dot(x, y)) for x, y in ((e, e), (e, r), (r, r), (a, a)))
    return bulk_of(ee, er, rr, aa, r.size)


def bulk_of(ee: float, er: float, rr: float, aa: float, count: int) -> dict[str, float]:
    """`bulk` from its sums over the elements that are small, residual e, reference r, actual a."""
    if not math.isfinite(ee + aa):
        return {"bulk": math.inf}
    found = {"bulk": math.sqrt(ee / rr)}
    if count >= BULK_LEAST and ee and _beyond_noise(ee, er, rr, aa, count):
        found["bulk_gain"] = 1.0 + er / rr
    return found


def _beyond_noise(ee: float, er: float, rr: float, aa: float, count: int) -> bool:
    """Whether the factor from r to a, or from a to r, is above 1 or below 0."""
    for slope, square in ((er / rr, rr), (-(ee + er) / aa if aa else math.inf, aa)):
        left = max(ee - slope * slope * square, 0.0) if aa else 0.0
        error = math.sqrt(left / (count - 1) / square) if square else 0.0
        if slope > BULK_DEVIATIONS * error or slope < -1.0 - BULK_DEVIATIONS * error:
            return True
    return False


def residual_of(
    actual: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Residual over the reference's rms, the reference, and that rms; float32, or wider."""
    wide = any(t.dtype in (torch.float64, torch.int64, torch.int32) for t in (actual, reference))
    dtype = torch.float64 if wide else torch.float32
    with torch.no_grad():
        theirs = reference.detach().to(dtype)
        rms = _rms(theirs)
        return (actual.detach().to(theirs.device, dtype) - theirs).div_(rms or 1.0), theirs, rms


def _rms(tensor: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    return norm / math.sqrt(tensor.numel()) if tensor.numel() else 0.0


def sample_mean(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    sizes: Mapping[str, float],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean over samples of both sides: what noise does to it shrinks, what a fault does stays.

    Args:
        actual, reference: Name to tensor.
        sizes: Names to average over, with the relative noise of each; a sample weighs the inverse
            of its noise.

    Returns:
        The two means, float64; None where a sample is missing, of another shape or not finite.
    """
    shapes = {tuple(reference[name].shape) for name in sizes if name in reference}
    if not sizes or len(shapes) != 1:
        return None
    own, theirs = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, size in sizes.items():
        a, r = actual.get(name), reference.get(name)
        if a is None or r is None or a.shape != r.shape or not size > 0:
            return None
        weight = 1.0 / (size * (_rms(r) or 1.0) * len(sizes))
        own = own + a.to(torch.float64) * weight
        theirs = theirs + r.to(torch.float64) * weight
    return (own, theirs) if bool(torch.isfinite(own).all()) else None
