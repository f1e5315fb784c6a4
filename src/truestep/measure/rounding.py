"""Exact rounding: is every element of one tensor the nearest that its dtype has of another?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from truestep.floors import EPSILON
from truestep.measure.plain import NO_PAGES, Pages

SLACK = 2.0**-20
"""Of |source / scale|: what a tie may be off by. Producers divide in float32, or multiply by a
rounded inverse: x / s is then known to 2^-21, and a code's distance to it to twice that."""

_CHUNK = 1 << 16
"""Elements at once: what is made of them stays in the cache."""

_WHOLE = 1 << 22
_EVERY = 8
"""Of more codes than `_WHOLE`, what rounding took is taken from one chunk of so many."""


@dataclass(frozen=True)
class Rounding:
    """How the codes of one tensor round another: `exact` and `ties` may be, `off` may not.

    `rel_l2` is what the rounding took, of codes of one byte and of float16, whose range may be
    missed: without a scale, float16 makes zeros of what is smaller than 6e-8. Of large tensors it
    is estimated; chunks that saturate always count.
    """

    exact: int
    ties: int
    off: int
    rel_l2: float = 0.0


def rounding(
    codes: torch.Tensor,
    source: torch.Tensor,
    scale: torch.Tensor | None,
    *,
    unit: torch.Tensor | None = None,
    pages: Pages = NO_PAGES,
) -> Rounding:
    """Count the elements that are the nearest which their dtype has.

    Args:
        codes: What was rounded, of any real dtype.
        source: Same shape; what it was made of.
        scale: What a code of 1 stands for, float64, as `spread` gives it; None is 1.
        unit: What 1 of the source stands for, likewise.
        pages: Of both in files, given back as they are read.
    """
    count = off = ties = 0
    lost = whole = 0.0
    ranged = codes.itemsize == 1 or codes.dtype is torch.float16
    every = _EVERY if codes.numel() > _WHOLE else 1
    for at, (q, x, s, u) in enumerate(_chunks(codes, source, scale, unit)):
        x = x if u is None else x.to(torch.float64) * u
        if not (q.is_floating_point() or x.is_floating_point() or s is not None):
            off += int((q.to(torch.int64) != x.to(torch.int64)).sum())
            count += q.numel()
            continue
        wide = x if s is None else _over(x, s)
        nearest = _cast(wide, codes.dtype)
        differs = _bits(nearest) != _bits(q)
        count += q.numel()
        if bool(differs.any()):
            more = _unlike(q, x, s, differs)
            ties, off = ties + more[0], off + more[1]
        if ranged and (at % every == 0 or _saturates(wide, codes.dtype)):
            sums = _energy(q, x, s)
            lost, whole = lost + sums[0], whole + sums[1]
        pages.read(q, x)
    return Rounding(count - ties - off, ties, off, math.sqrt(lost / whole) if whole else 0.0)


def _over(source: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Source over scale, as precise as `SLACK` allows for."""
    if source.dtype is torch.float64 or not bool((scale.abs() > _TINY).all()):
        return source.to(torch.float64) / scale
    return source.to(torch.float32) / scale.to(torch.float32)


_TINY = 2.0**-100
"""Scales below this are divided by in float64: in float32 they have lost bits."""


def _unlike(
    codes: torch.Tensor, source: torch.Tensor, scale: torch.Tensor | None, where: torch.Tensor
) -> tuple[int, int]:
    """Ties, and codes that are not the nearest, of elements whose bits differ from what is."""
    exact = source[where].to(torch.float64)
    if scale is not None:
        exact = exact / scale.expand(codes.shape)[where]
    value, near = (t.to(torch.float64) for t in (codes[where], _cast(exact, codes.dtype)))
    slack = 0.0 if scale is None else SLACK * exact.abs()
    # A cast from float64 goes through float32 and may round twice: then the code is nearer.
    fits = ((value - exact).abs() <= (near - exact).abs() + slack) & near.isfinite()
    other = value != near
    return int((fits & other).sum()), int((~fits & other).sum())


def _saturates(wide: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a value is beyond the largest code by more than rounding takes."""
    if not wide.is_floating_point() or not wide.numel():
        return False
    most = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    return float(wide.abs().max()) > 1.04 * most


def _energy(
    codes: torch.Tensor, source: torch.Tensor, scale: torch.Tensor | None
) -> tuple[float, float]:
    """Squares of what rounding took, and of the source."""
    step = 1.0 if scale is None else scale
    values = source.to(torch.float64)
    taken = codes.to(torch.float64) * step - values
    return float(taken.square().sum()), float(values.square().sum())


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
    codes: torch.Tensor,
    source: torch.Tensor,
    scale: torch.Tensor | None = None,
    unit: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
    """All of them together, about `_CHUNK` elements each: in rows where there is a scale."""
    codes, source = codes.detach(), source.detach().to(codes.device)
    if scale is None and unit is None:
        first, second = codes.reshape(-1), source.reshape(-1)
        for start in range(0, first.numel(), _CHUNK):
            yield first[start : start + _CHUNK], second[start : start + _CHUNK], None, None
        return
    if not codes.ndim:
        yield codes, source, scale, unit
        return
    rows = max(_CHUNK // max(codes[0].numel(), 1), 1)
    for start in range(0, len(codes), rows):
        part = slice(start, min(start + rows, len(codes)))
        own, theirs = (
            None if each is None else of_rows(each, codes.shape, part) for each in (scale, unit)
        )
        yield codes[part], source[part], own, theirs


def spread(scale: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """A stored scale with an axis for each of a shape's; None where it is not known how it would.

    Args:
        scale: One number, one a row, or one a block of each axis (which stays as it is).
    """
    if scale is None:
        return None
    if scale.numel() == 1:
        return scale.reshape(())
    if not shape:
        return None
    if scale.ndim == len(shape) == 2 and scale.shape == (1, shape[1]):
        return scale
    if scale.numel() == shape[0] and scale.ndim <= 2:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    if scale.ndim != len(shape) or any(m > n for m, n in zip(scale.shape, shape, strict=True)):
        return None
    return scale


def expanded(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale as `spread` gives it, one for each element of a shape."""
    return of_rows(scale, shape, slice(None)).expand(shape)


def of_rows(scale: torch.Tensor, shape: torch.Size, rows: slice) -> torch.Tensor:
    """Scales, as `spread` gives them, of adjacent rows of a shape: they broadcast to these."""
    if not scale.ndim:
        return scale
    start, stop, _ = rows.indices(shape[0])
    for axis, (parts, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if parts in (1, size):
            scale = scale[rows] if axis == 0 and parts == size else scale
            continue
        block, first, count = _block(size, parts), 0, size
        if axis == 0:
            begin, count = start // block, stop - start
            scale, first = scale[begin : -(-stop // block)], start - begin * block
        scale = scale.repeat_interleave(block, dim=axis).narrow(axis, first, count)
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
    for a, r, _, _ in _chunks(actual, reference):
        codes = a.to(dtype)
        if bool((codes.to(a.dtype) != a).any()) or rounding(codes, r, None).off:
            return False
    return True


def nonfinite(tensor: torch.Tensor, *, pages: Pages = NO_PAGES) -> tuple[int, int]:
    """How many values are NaN, and how many infinite."""
    nans = infinite = 0
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel() if tensor.is_floating_point() else 0, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if not _finite(chunk):
            wide = chunk.to(torch.float32) if chunk.itemsize < 4 else chunk
            nans += int(torch.isnan(wide).sum())
            infinite += int(torch.isinf(wide).sum())
        pages.read(chunk)
    return nans, infinite


def _finite(chunk: torch.Tensor) -> bool:
    """False where a value is not finite; of wide floats also where their sum is not."""
    largest = _LARGEST.get(chunk.dtype)
    if largest is None:
        wide = chunk.to(torch.float32) if chunk.itemsize == 1 else chunk
        return math.isfinite(float(wide.sum()))
    return int((_bits(chunk) & (0x7F if chunk.itemsize == 1 else 0x7FFF)).max()) <= largest


_LARGEST = {
    torch.bfloat16: 0x7F7F,
    torch.float16: 0x7BFF,
    torch.float8_e4m3fn: 0x7E,
    torch.float8_e5m2: 0x7B,
}
"""Bits of the largest finite number; those of greater ones follow, in these formats."""


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
