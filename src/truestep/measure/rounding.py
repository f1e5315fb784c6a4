"""Exact rounding: is every element of one tensor the nearest that its dtype has of another?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from truestep.floors import EPSILON

SLACK = 2.0**-20
"""Of |source / scale|: what a tie may be off by. Producers divide in float32, or multiply by a
rounded inverse: x / s is then known to 2^-21, and a code's distance to it to twice that."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Rounding:
    """How the codes of one tensor round another: `exact` and `ties` may be, `off` may not.

    `rel_l2` is what the rounding took, of codes of one or two bytes, whose range may be missed:
    without a scale, float16 makes zeros of what is smaller than 6e-8.
    """

    exact: int
    ties: int
    off: int
    rel_l2: float = 0.0


def rounding(codes: torch.Tensor, source: torch.Tensor, scale: torch.Tensor | None) -> Rounding:
    """Count the elements that are the nearest which their dtype has.

    Args:
        codes: What was rounded, of any real dtype.
        source: Same shape; what it was made of.
        scale: What a code of 1 stands for, float64: broadcasts to that shape; None is 1.
    """
    count = off = ties = 0
    lost = whole = 0.0
    for q, x, s in _chunks(codes, source, scale):
        wide = x if s is None else x.to(torch.float64) / s
        nearest = _cast(wide, codes.dtype)
        differs = _bits(nearest) != _bits(q)
        count += q.numel()
        if bool(differs.any()):
            value, near, exact = (t[differs].to(torch.float64) for t in (q, nearest, wide))
            slack = 0.0 if s is None else SLACK * exact.abs()
            # A cast from float64 goes through float32 and may round twice: then q is nearer.
            fits = ((value - exact).abs() <= (near - exact).abs() + slack) & near.isfinite()
            ties += int((fits & (value != near)).sum())
            off += int((~fits & (value != near)).sum())
        if codes.itemsize <= 2:
            step = 1.0 if s is None else s
            wide = wide.to(torch.float64)
            lost += float(((q.to(torch.float64) - wide) * step).square().sum())
            whole += float((wide * step).square().sum())
    return Rounding(count - ties - off, ties, off, math.sqrt(lost / whole) if whole else 0.0)


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to nearest; formats of one byte saturate, wider floats overflow."""
    if not dtype.is_floating_point and values.is_floating_point():
        values = values.round()
    if dtype.itemsize == 1 and dtype is not torch.bool:
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        values = values.clamp(limits.min, limits.max)
    return values.to(dtype)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(width[tensor.itemsize])


def _chunks(
    codes: torch.Tensor, source: torch.Tensor, scale: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Rows of all three together, about `_CHUNK` elements each."""
    codes, source = codes.detach(), source.detach().to(codes.device)
    if scale is None:
        first, second = codes.reshape(-1), source.reshape(-1)
        for start in range(0, first.numel(), _CHUNK):
            yield first[start : start + _CHUNK], second[start : start + _CHUNK], None
        return
    if not codes.ndim:
        yield codes, source, scale
        return
    rows = max(_CHUNK // max(codes[0].numel(), 1), 1)
    whole = scale.expand(codes.shape)
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        yield codes[part], source[part], whole[part]


def spread(scale: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """A stored scale so that it broadcasts to a shape; None where it is not known how it would.

    Args:
        scale: One number, one a row, or one a block of each axis.
    """
    if scale is None:
        return None
    if scale.numel() == 1:
        return scale.reshape(())
    if not shape:
        return None
    if scale.numel() == shape[0] and scale.ndim <= 2:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    if scale.ndim != len(shape) or any(m > n for m, n in zip(scale.shape, shape, strict=True)):
        return None
    for axis, (parts, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if parts not in (1, size):
            scale = scale.repeat_interleave(_block(size, parts), dim=axis).narrow(axis, 0, size)
    return scale


def _block(size: int, parts: int) -> int:
    """Length of a block: a power of two where one fits, since the last block may be cut short."""
    least = -(-size // parts)
    power = 1 << (least - 1).bit_length()
    return power if -(-size // power) == parts else least


def rounded_to(actual: torch.Tensor, reference: torch.Tensor) -> torch.dtype | None:
    """The narrower dtype whose exact rounding of the reference a tensor holds, if there is one."""
    own = EPSILON.get(called(reference.dtype), 1.0)
    narrow = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return next(
        (t for t in narrow if own < EPSILON[called(t)] and _holds(actual, reference, t)), None
    )


def _holds(actual: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> bool:
    for a, r, _ in _chunks(actual, reference, None):
        codes = a.to(dtype)
        if bool((codes.to(a.dtype) != a).any()) or rounding(codes, r, None).off:
            return False
    return True


def nonfinite(tensor: torch.Tensor) -> tuple[int, int]:
    """How many values are NaN, and how many infinite."""
    nans = infinite = 0
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel() if tensor.is_floating_point() else 0, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        chunk = chunk.to(torch.float32) if chunk.itemsize < 4 else chunk
        if not math.isfinite(float(chunk.sum())):
            nans += int(torch.isnan(chunk).sum())
            infinite += int(torch.isinf(chunk).sum())
    return nans, infinite


def reach(*tensors: torch.Tensor) -> torch.Tensor:
    """How far apart two roundings of one number may be: half a step of each."""
    steps = (
        t.double().abs() * torch.finfo(t.dtype).eps / 2 + torch.finfo(t.dtype).smallest_normal
        for t in tensors
    )
    return sum(steps, torch.zeros((), dtype=torch.float64))


def called(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
