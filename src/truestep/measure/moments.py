"""Moments of an activation in few passes, without waiting for a device.

The 8 moments of `truestep.measure.moments.moments`, from four reductions: sum, sum of magnitudes,
dot product, extremes. A finite sum of squares means that every element is finite, so nothing is
masked unless it has to be. Sums are made in float32, 131,072 elements at a time, and added in
float64: moments agree with the exact ones within 1e-6 of the rms. Where the variance is too small a
part of the mean square for that, or something is not finite, the exact ones are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from truestep.records import STATS

_CHUNK = 1 << 20

CHUNK = 1 << 17
"""Elements a step: with the scratch memory 1 MB, which stays in a second-level cache."""

_ILL_CONDITIONED = 1e-3
"""Variance over mean square below which float32 sums say too little about it."""

_FAST = (torch.float32, torch.bfloat16, torch.float16)

Values = tuple[float, float, float, float, float, float, float, float]


class Moments:
    """Fused moments, with scratch memory that is kept. Not for several threads at once.

    Either `of` a tensor, or part by part: `begin`, `add` each part, `values`.
    """

    def __init__(self) -> None:
        self._scratch = torch.empty(CHUNK, dtype=torch.float32, device="cpu")
        self._wide = torch.empty(CHUNK, dtype=torch.float32, device="cpu")
        self.begin()

    def of(self, tensor: torch.Tensor, *, chunk: int = CHUNK) -> Values:
        """Moments of a host tensor, in the order of `reduced.STATS`.

        Args:
            tensor: Detached, real, on the CPU, any shape.
            chunk: Elements a step, up to `CHUNK`: the last bits depend on it.
        """
        self.begin()
        if tensor.dtype in _FAST:
            flat = tensor.reshape(-1)
            for part in flat.split(chunk) if flat.numel() > chunk else (flat,):
                self.add(part)
        return self.values(tensor)

    def begin(self) -> None:
        """Forget all parts."""
        self._total = self._absolute = self._power = 0.0
        self._low, self._high = math.inf, -math.inf

    def add(self, part: torch.Tensor) -> None:
        """Take in some elements, up to `CHUNK`, flat; other dtypes than 16 and 32-bit floats are
        left to `values`."""
        size = part.numel()
        if not size or part.dtype not in _FAST:
            return
        if part.dtype is not torch.float32:
            part = self._wide[:size].copy_(part)
        added = part.sum().item()
        least, most = part.amin().item(), part.amax().item()
        self._total += added
        if least >= 0:
            self._absolute += added
        elif most <= 0:
            self._absolute -= added
        else:
            self._absolute += torch.abs(part, out=self._scratch[:size]).sum().item()
        self._power += torch.dot(part, part).item()
        self._low, self._high = min(self._low, least), max(self._high, most)

    def values(self, tensor: torch.Tensor) -> Values:
        """Moments of a tensor whose parts were all added; the exact ones where sums say too
        little."""
        count = tensor.numel()
        if not count or tensor.dtype not in _FAST or not math.isfinite(self._power + self._total):
            return exact(tensor)
        mean, power = self._total / count, self._power / count
        variance = power - mean * mean
        if variance < _ILL_CONDITIONED * power or (power == 0 and (self._low or self._high)):
            return exact(tensor)
        return (
            float(count), 0.0, mean, self._absolute / count,
            math.sqrt(variance), math.sqrt(power), self._low, self._high,
        )  # fmt: skip


def with_square(values: Values, square: float) -> Values:
    """Moments with the root mean square, and what follows, from an exact sum of squares."""
    count, others, mean, absolute, deviation, rms, low, high = values
    if not count or not math.isfinite(square):
        return values
    power = square / count
    rms = math.sqrt(power)
    if power - mean * mean >= _ILL_CONDITIONED * power:
        deviation = math.sqrt(power - mean * mean)
    return (count, others, mean, absolute, deviation, rms, low, high)


def exact(tensor: torch.Tensor) -> Values:
    """`truestep.measure.moments.moments`, as numbers."""
    values: Values = tuple(moments(tensor.to("cpu")).tolist())
    return values


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Seven sums of a tensor on its own device, float64, without waiting for it.

    Returns:
        Count of finite elements, of others, sum, sum of magnitudes, of squares, least, greatest.
    """
    with torch.no_grad():
        flat = tensor.reshape(-1)
        wide = flat if flat.dtype in (torch.float32, torch.float64) else flat.to(torch.float32)
        fine = torch.isfinite(wide)
        kept = torch.where(fine, wide, 0.0)
        count = fine.sum(dtype=torch.float64)
        return torch.stack(
            (
                count,
                flat.numel() - count,
                kept.sum(dtype=torch.float64),
                kept.abs().sum(dtype=torch.float64),
                kept.double().square_().sum(),
                torch.where(fine, wide, math.inf).amin().double(),
                torch.where(fine, wide, -math.inf).amax().double(),
            )
        )


def from_device(sums: Sequence[float]) -> Values:
    """Moments from the numbers of `on_device`, read back."""
    count, others, total, absolute, power, low, high = sums
    if not count:
        none = math.nan
        return (0.0, others, none, none, none, none, none, none)
    mean, power = total / count, power / count
    deviation = math.sqrt(max(power - mean * mean, 0.0)) if low < high else 0.0
    return (count, others, mean, absolute / count, deviation, math.sqrt(power), low, high)


def moments(tensor: torch.Tensor) -> torch.Tensor:
    """Moments of a tensor in the order of `reduced.STATS`, float64; non-finite values left out.

    Args:
        tensor: Any shape and real dtype. Without a finite element the moments are nan.
    """
    flat = tensor.detach().reshape(-1)
    count = nonfinite = 0
    total = absolute = square = 0.0
    low, high = float("inf"), float("-inf")
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.float64)
        fine = chunk[torch.isfinite(chunk)]
        nonfinite += chunk.numel() - fine.numel()
        if not fine.numel():
            continue
        count += fine.numel()
        total += float(fine.sum())
        absolute += float(fine.abs().sum())
        square += float(torch.dot(fine, fine))
        low, high = min(low, float(fine.min())), max(high, float(fine.max()))
    if not count:
        values = [0.0, float(nonfinite), *[float("nan")] * (len(STATS) - 2)]
    else:
        mean, power = total / count, square / count
        # Of a constant the difference is rounding, whose size depends on the order of the sums.
        deviation = max(power - mean * mean, 0.0) ** 0.5 if low < high else 0.0
        values = [
            float(count),
            float(nonfinite),
            mean,
            absolute / count,
            deviation,
            power**0.5,
            low,
            high,
        ]
    return torch.tensor(values, dtype=torch.float64)
