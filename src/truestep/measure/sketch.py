"""A tensor as 1,024 floats, from two of which the distance of their tensors can be estimated.

A sketch is a linear map s with E |s(x)|^2 = |x|^2 for a fixed x over the random signs and places it
is made of, so |s(a) - s(r)| estimates |a - r|, whatever the structure of a - r. It is made in two
steps, both of which keep that expectation:

1. A count sketch (Charikar, Chen & Farach-Colton 2002) to 16,384 sums: each chunk of the flattened
   tensor is multiplied by a slice of a long table of random signs that starts anywhere, and added
   at a random shift. Neither has a period that a column, a channel or a frame could share.
2. A sparse Johnson-Lindenstrauss transform (Kane & Nelson 2014, the block construction) to 1,024
   sums: each of the 16,384 goes to one place in each of 4 blocks of 256, with a sign and a factor
   of 1/2. With one place instead of 4, one swap of two far elements in 2,048 would be invisible.

Every result bit follows from the elements alone: signs and places come from SplitMix64, the only
float operations are products with +-1 and 1/2, which are exact, and elementwise additions in a
fixed order. Threads, vector width, fused multiply-adds and versions of torch cannot change them.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from truestep.records import SKETCH_SIZE

SIZE = SKETCH_SIZE
"""Floats a sketch. The standard error of an estimated distance is sqrt(1 / (2 SIZE)) = 2.2 %."""

RESOLUTION = 2.0**-24
"""Largest relative error that rounding to float32 adds to a sketch: all that is lost besides the
projection. Of two sketches it adds about 4e-8 to rel. L2, in quadrature, and at most 1.3e-7."""

_CHUNK = 16_384
"""Elements with one shift. Part of the format, like all numbers here."""

STEP = 4 * _CHUNK
"""Elements that are read at a time, with one slice of signs: few enough for a second-level cache,
in which they stay for whatever else wants to see them."""

_SUMS = 16_384
"""Sums of step 1. Elements that share one of them add SIZE / _SUMS = 6 % to the variance."""

_HOST = torch.device("cpu")

_BLOCKS = 4
_WIDTH = SIZE // _BLOCKS

_SIGNS = 1 << 18
"""Length of the sign table (2 MB). Steps whose slices overlap add 4 / (3 _SIGNS) to the relative
variance of the squared distance, 2 / SIZE, at the very worst (a constant): a 400th of it."""

_UNDERFLOW = 2.0**-144
"""Norm of the largest errors below float32's smallest subnormal: 2^-150 for each of 2 x 1,024."""

_FLOOR, _CEILING = (
    (1 - 2 / (9 * SIZE) + z * math.sqrt(2 / (9 * SIZE))) ** 1.5 for z in (-1.959964, 1.959964)
)
"""Central 95 % of estimated over true distance, chi with SIZE degrees of freedom over sqrt(SIZE):
0.957 and 1.043 (Wilson & Hilferty 1931, for chi squared)."""


@dataclass(frozen=True)
class Estimate:
    """A relative L2 distance estimated from two sketches, with its 95 % interval."""

    rel_l2: float
    low: float
    high: float


def sketch(tensor: torch.Tensor) -> torch.Tensor:
    """Project a tensor to 1,024 floats that depend on every element and its place.

    Up to 1,024 elements are kept as they are, so that estimates of those are exact.

    Args:
        tensor: Any shape, real, any device. Elements count in C order, whatever the strides; one
            that is not contiguous is copied. Elements that are not finite count as zero: count
            them elsewhere.

    Returns:
        Shape (1024,), float32, on the CPU; not finite where sums leave the range of float32.

    Raises:
        ValueError: The tensor is complex.
    """
    return sketch_and_square(tensor)[0]


def sketch_and_square(
    tensor: torch.Tensor, *, each: Callable[[torch.Tensor], None] | None = None
) -> tuple[torch.Tensor, float]:
    """A tensor's sketch, and the sum of squares of its finite elements from the same pass.

    Args:
        tensor: See `sketch`.
        each: Shown all elements once, flat, in order, up to `STEP` at a time while they are in a
            cache; not to be kept.

    Returns:
        The sketch, and the sum, added in float64.
    """
    if tensor.is_complex():
        raise ValueError("complex tensors have no sketch: take real and imaginary parts")
    with torch.no_grad():
        flat = tensor.detach().reshape(-1)
        # Once not finite a sum stays so: one look at the end is enough.
        sums, square = _sum(flat, mask=False, each=each)
        if not math.isfinite(float(sums.sum())) and not bool(torch.isfinite(sums).all()):
            sums, square = _sum(flat, mask=True, each=None)
        if flat.numel() > SIZE:
            sums = _spread(sums)
        return sums.to(torch.float32), square


def estimate(
    actual: torch.Tensor, reference: torch.Tensor, *, norm: float, count: int | None = None
) -> Estimate:
    """Estimate the relative L2 distance of two tensors from their sketches.

    Args:
        actual: Sketch of one tensor, shape (1024,).
        reference: Sketch of the other, of the same number of elements.
        norm: L2 norm of the reference tensor, its finite elements, exact.
        count: Number of elements, if known: up to 1,024 only rounding is uncertain.

    Returns:
        The estimate, and an interval that holds the distance in 95 % of cases, rounding included:
        equal sketches give 0 and a `high` of about 1.2e-7. Against a norm of zero all three are
        inf unless the sketches are equal; where a sketch or the norm is not finite, `rel_l2` is
        nan and the interval is from 0 to inf.

    Raises:
        ValueError: A sketch has another shape, or the norm is negative.
    """
    for side, tensor in (("actual", actual), ("reference", reference)):
        if tuple(tensor.shape) != (SIZE,):
            raise ValueError(f"{side} is no sketch: shape {tuple(tensor.shape)}, not ({SIZE},)")
    if norm < 0:
        raise ValueError(f"norm must not be negative: {norm}")
    a, r = actual.tolist(), reference.tolist()
    apart = math.dist(a, r)
    if not math.isfinite(apart + norm):
        return Estimate(rel_l2=math.nan, low=0.0, high=math.inf)
    if norm == 0.0:
        value = math.inf if apart else 0.0
        return Estimate(rel_l2=value, low=value, high=value)
    rounding = RESOLUTION * (math.hypot(*a) + math.hypot(*r)) + _UNDERFLOW
    projected = count is None or count > SIZE
    return Estimate(
        rel_l2=apart / norm,
        low=max(apart - rounding, 0.0) / (_CEILING if projected else 1.0) / norm,
        high=(apart + rounding) / (_FLOOR if projected else 1.0) / norm,
    )


def _sum(
    flat: torch.Tensor, *, mask: bool, each: Callable[[torch.Tensor], None] | None
) -> tuple[torch.Tensor, float]:
    """Step 1: as many float64 sums as `_spread` needs, or the elements where they are few.

    Also the sum of squares, for which signs do not matter.
    """
    count = flat.numel()
    if count <= SIZE:
        few = torch.zeros(SIZE, dtype=torch.float64, device="cpu")
        few[:count].copy_(flat)
        if each:
            each(flat)
        if mask:
            few.nan_to_num_(0.0, 0.0, 0.0)
        return few, float(torch.dot(few, few))
    # A product with a sign is exact in any dtype: in float32 it moves half the bytes.
    narrow = flat.dtype in (torch.float32, torch.bfloat16, torch.float16) and flat.device == _HOST
    signs = _signs32() if narrow else _signs()
    if count <= _CHUNK:
        used = _WIDTH << (-(-count // _WIDTH) - 1).bit_length()  # a power of two of rows
        starts, shifts, flips = [0], [0], [1.0]
    else:
        used = _SUMS
        dice = _hash(2, -(-count // _CHUNK))
        starts = ((dice[:: STEP // _CHUNK] >> np.uint64(32)) % np.uint64(_SIGNS - STEP)).tolist()
        shifts = ((dice >> np.uint64(8)) % np.uint64(_SUMS)).tolist()
        # Without flips two chunks with one slice would add up, not average out, for a constant.
        flips = np.where(dice & np.uint64(1), 1.0, -1.0).tolist()
    wide, signed = _SCRATCH.wide, _SCRATCH.signed if narrow else _SCRATCH.wide
    sums = _SCRATCH.sums[: used + _CHUNK].zero_()
    square = 0.0
    places = zip(shifts, flips, strict=True)
    for part, start in zip(flat.split(STEP), starts, strict=True):
        size = part.numel()
        values, product, factors = wide[:size], signed[:size], signs[start : start + size]
        if narrow:
            source = part if part.dtype is torch.float32 else product.copy_(part)
            if each:
                each(source)
            values.copy_(torch.mul(source, factors, out=product))
        else:
            if each:
                each(part)
            values.copy_(part).mul_(factors)
        if mask:
            values.nan_to_num_(0.0, 0.0, 0.0)
        square += torch.dot(values, values).item()
        for chunk in values.split(_CHUNK):
            shift, flip = next(places)
            sums[shift : shift + chunk.numel()].add_(chunk, alpha=flip)
    if count > _CHUNK:
        sums[:_CHUNK] += sums[_SUMS:]  # shifts wrap around
    return sums[:used], square


def _spread(sums: torch.Tensor) -> torch.Tensor:
    """Step 2: each row of 256 sums, permuted 4 times, is a row of 1,024; add all the rows.

    They are added in halves, elementwise: the order of a torch reduction may change.
    """
    count = len(sums)
    signed, terms = _SCRATCH.wide[: 2 * count], _SCRATCH.terms[: _BLOCKS * count]
    signed[:count].copy_(sums)
    torch.neg(sums, out=signed[count:])
    torch.index_select(signed, 0, _places(count), out=terms)
    return _halved(terms.view(-1, SIZE)) / math.sqrt(_BLOCKS)


def _halved(rows: torch.Tensor) -> torch.Tensor:
    """Sum of a power of two of rows: the second half onto the first until one is left."""
    count = len(rows)
    while count > 1:
        count //= 2
        rows[:count].add_(rows[count : 2 * count])
    return rows[0]


class _Scratch(threading.local):
    """Memory of a thread that is kept: to get it anew would take as long as to fill it."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.wide = torch.empty(STEP, dtype=torch.float64, device="cpu")
            self.signed = torch.empty(STEP, dtype=torch.float32, device="cpu")
            self.sums = torch.empty(_SUMS + _CHUNK, dtype=torch.float64, device="cpu")
            self.terms = torch.empty(_SUMS * _BLOCKS, dtype=torch.float64, device="cpu")


_SCRATCH = _Scratch()


@functools.cache
def _signs() -> torch.Tensor:
    bits = (_hash(0, _SIGNS // 64)[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return torch.from_numpy(np.where(bits, 1.0, -1.0).reshape(-1))


@functools.cache
def _signs32() -> torch.Tensor:
    return _signs().to(torch.float32)


@functools.cache
def _places(used: int) -> torch.Tensor:
    """Where `_spread` takes each term from: the place of a sum, or of its negative behind all sums.

    Returns:
        Shape (row term), flat: the 1,024 terms of each row of sums.
    """
    keys = _hash(1, _SUMS * _BLOCKS)[: used * _BLOCKS].reshape(-1, _BLOCKS, _WIDTH)
    # The low bits number a block's places: sorting permutes them, without ties to break.
    low = np.uint64(_WIDTH - 1)
    keys = np.sort((keys & ~low) | np.arange(_WIDTH, dtype=np.uint64), axis=-1)
    row = np.arange(len(keys), dtype=np.uint64)[:, None, None] * np.uint64(_WIDTH)
    places = row + (keys & low) + np.uint64(used) * (keys >> np.uint64(20) & np.uint64(1))
    return torch.from_numpy(places.reshape(-1).astype(np.int32))


def _hash(stream: int, count: int) -> npt.NDArray[np.uint64]:
    """Random 64-bit numbers: `count` outputs of SplitMix64 (Steele, Lea & Flood 2014)."""
    state = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 40)
    state *= np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
