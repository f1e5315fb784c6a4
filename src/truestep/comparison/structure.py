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
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

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
    residual, theirs, rms = _residual(actual, reference)
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
    return found


def _residual(
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
