"""Where along an axis a residual lies: one value a channel, frame, row or token. Pure: no I/O.

`truestep.measure.structure` keeps the largest of these; here they are all of them, to be drawn.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from truestep.measure.structure import LAYOUTS, residual_of

MOST = 256
"""Values of a profile; of more places, as many consecutive ones share the largest of them."""

EXPLAINS = 0.25
"""Share of the residual's energy from which on it is called an offset or a gain of its channels."""


class Profiled(NamedTuple):
    """A statistic along one axis.

    Attributes:
        axis: `channel`, `frame`, `row`, `column` or `token`.
        statistic: As `truestep.measure.structure` calls its largest value, over the reference's
            rms: `channel_mean`, `gain`, `frame_energy`, ...
        values: One a place, or one a group of places.
        places: How many places there are.
    """

    axis: str
    statistic: str
    values: tuple[float, ...]
    places: int


def profile(actual: torch.Tensor, reference: torch.Tensor) -> Profiled | None:
    """The axis along which a residual has most structure, with its values.

    Args:
        actual, reference: Same shape (`b c f h w`, `b c h w`, `b l c` or `l c`), real.

    Returns:
        The mean a channel where that explains much of the residual, else the gain a channel where
        that does, else the rms along the axis of which one place holds most; None where there is
        no residual, it is not finite, or no axis.
    """
    axes = LAYOUTS.get(actual.ndim, {})
    if actual.shape != reference.shape or not axes or not actual.numel() or actual.is_complex():
        return None
    residual, theirs, rms = residual_of(actual, reference)
    energy = float(residual.square().mean(dtype=torch.float64))
    if not rms or not energy or not math.isfinite(energy):
        return None
    if "channel" in axes and residual.shape[axes["channel"]] > 1:
        others = [axis for axis in range(residual.ndim) if axis != axes["channel"]]
        means = residual.mean(others, dtype=torch.float64)
        if float(means.square().mean()) > EXPLAINS * energy:
            return _profiled("channel", "channel_mean", means)
        square = theirs.square().sum(others, dtype=torch.float64)
        gains = (residual * theirs).sum(others, dtype=torch.float64) / square.clamp_min(1e-300)
        explained = float((gains.square() * square).sum()) / theirs.numel()
        if explained > EXPLAINS * energy:
            return _profiled("channel", "gain", gains * rms)
    found = []
    for name, at in axes.items():
        if residual.shape[at] > 1:
            others = [axis for axis in range(residual.ndim) if axis != at]
            energies = residual.square().mean(others, dtype=torch.float64)
            found.append((float(energies.max()) / energy, name, energies))
    if not found:
        return None
    _, name, energies = max(found, key=lambda each: each[0])
    return _profiled(name, f"{name}_energy", energies.sqrt())


def _profiled(axis: str, statistic: str, values: torch.Tensor) -> Profiled:
    places = len(values)
    group = -(-places // MOST)
    padded = torch.nn.functional.pad(values, (0, -places % group)).reshape(-1, group)
    at = padded.abs().argmax(1, keepdim=True)
    return Profiled(axis, statistic, tuple(padded.gather(1, at)[:, 0].tolist()), places)
