"""Distances of one tensor pair in one chunked pass, without cancellation.

With d = a - r and, for a shift h, e = d - h r, every metric follows from the sums E = sum e^2,
X = sum e r and R = sum r^2::

    rel_l2          = sqrt(S / R),  S = E + 2 h X + h^2 R
    gain            = 1 + h + X / R                (least-squares factor from r to a)
    |a|^2           = E + 2 (1 + h) X + (1 + h)^2 R
    cosine distance = s / (1 + sqrt(1 - s)),  s = (E - X^2 / R) / |a|^2

so that a difference of 1e-13 reads 1e-13. The shift is 0, or the gain - 1 of a sample where the
difference is mostly a gain: E is then what is left, and nothing cancels. Rows of a chunk are summed
in float32 and accumulated in float64; where float32 cannot carry a chunk (float64 input, overflow,
underflow) it is summed in float64, scaled by a power of two where squares would leave float64's
range too, and so is all of it where the sums show that something cancelled after all. Differences
of 64-bit integers are taken before they are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from truestep.measure.plain import NO_PAGES, Pages
from truestep.verdict import Metrics

CHUNK = 65_536
"""Elements a chunk: operands, difference and residual (1 MB in float32) stay in the L2 cache."""

_ROW = 1024
"""Elements summed in float32: a BLAS dot of more equal terms drifts (1.6e-5 in 65,536)."""

_BLOCK = 16384
"""Elements taken to float64 at once, which then stay in the L1 cache."""

SMALL = 8192
"""Up to this many elements float64 throughout costs less than looking whether it is needed."""

_SHARED = 16
"""Chunks that are worth a thread."""

_SAMPLE = 4096
"""Elements that say which shift to take; a bad guess costs a second pass, not accuracy."""

SAFE_SQUARES = (1e-25, 1e30)
"""Sums of squares outside this range may have lost terms to float32 underflow or overflow."""

SAFE_SQUARES_64 = (1e-280, 1e300)
"""The same for float64; beyond it both sides are scaled by 2^600 or 2^-600, which is exact."""

_CANCELLATION, CANCELLATION_64 = 0.5, 1e-6
"""Below this share of E, summed in float32 and in float64, E - X^2 / R is summed again with the
shift that it shows, in float64."""

_RESOLVED = 2e-7
"""Most that rounding of e to float32 may be of E."""

_NEAR = 0.25
"""Up to this gain - 1 (mostly) float32 does not round a - r."""

_WIDE = 0.5
"""Below this cosine similarity its distance is 1 minus it: nothing cancels."""

_SMALL_GAIN = 0.3
"""Below this, and below this share of 1 + h, gain and norm are small remainders and are summed by
themselves."""

Array = npt.NDArray[Any]
_dots = getattr(np, "vecdot", None) or (lambda x, y: np.einsum("ij,ij->i", x, y))


@dataclass
class Sums:
    """Sums of one chunk, or of all.

    Attributes:
        residual, cross, reference: E, X and R.
        actual, product: sum a^2 and sum a r, where they were summed by themselves.
        peak, peak_at: Largest |d| and where it is.
        nonzero: Of chunks summed in float64: whether anything is.
    """

    residual: float = 0.0
    cross: float = 0.0
    reference: float = 0.0
    actual: float | None = None
    product: float = 0.0
    peak: float = -1.0
    peak_at: int = 0
    count: int = 0
    nonzero: bool = False
    nonfinite_actual: int = 0
    nonfinite_reference: int = 0
    shift: float = 0.0

    @property
    def difference(self) -> float:
        """S."""
        if not self.shift:
            return self.residual
        h = self.shift
        return max(self.residual + 2 * h * self.cross + h * h * self.reference, 0.0)

    @property
    def square(self) -> float:
        """|a|^2; summed itself where it may be a small remainder."""
        if self.actual is not None:
            return self.actual
        g = 1.0 + self.shift
        return max(self.residual + 2 * g * self.cross + g * g * self.reference, 0.0)


def distance(actual: torch.Tensor, reference: torch.Tensor) -> Metrics:
    """Measure how far a tensor is from a reference of the same shape.

    Args:
        actual: Any shape, real, any device; integers and booleans count as numbers.
        reference: Same shape, any real dtype. Chunks are shared among torch's threads.

    Returns:
        The metrics. Positions that are not finite on either side are left out of the sums and
        counted per side. Against an all-zero reference `rel_l2` is inf unless all are zero;
        without a finite element every metric is nan.

    Raises:
        ValueError: Shapes differ or a tensor is complex.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(reference.shape)}")
    if actual.is_complex() or reference.is_complex():
        raise ValueError("complex tensors have no order: compare real and imaginary parts")
    shape = tuple(actual.shape)
    a, r = actual.detach().reshape(-1), reference.detach().reshape(-1)
    exact = a.numel() <= SMALL or _needs_float64(a, r)
    shift, terms, narrow = (0.0, 0.0, True) if exact else _guess(a, r)
    sums = _sum(a, r, exact=exact, shift=shift, narrow=narrow)
    power = _power(sums)
    if power:
        return _scaled(actual, reference, power)
    if not sums.count or not sums.difference or not sums.reference:
        return metrics_of(sums, shape)
    if not exact and _remainder(sums, terms if narrow else math.inf):
        sums = _sum(a, r, exact=True)
        exact = True
    if _left(sums) < (CANCELLATION_64 if exact else _CANCELLATION) * sums.residual:
        again = _sum(a, r, exact=True, shift=sums.shift + sums.cross / sums.reference)
        return metrics_of(sums, shape, left=_left(again), square=again.square)
    return metrics_of(sums, shape)


def distance_to_itself(tensor: torch.Tensor) -> Metrics:
    """What `distance` says of a tensor and its bit-equal copy; quicker for small ones."""
    if not tensor.is_floating_point() or tensor.itemsize == 1 or not 0 < tensor.numel() <= CHUNK:
        return distance(tensor, tensor)
    values = _float64(tensor.detach().reshape(-1))
    with np.errstate(all="ignore"):
        square = float(np.dot(values, values))
    if not SAFE_SQUARES[0] < square < SAFE_SQUARES[1]:  # zero, tiny, huge or not finite
        return distance(tensor, tensor)
    sums = Sums(reference=square, actual=square, peak=0.0, count=tensor.numel())
    return metrics_of(sums, tuple(tensor.shape))


def _guess(a: torch.Tensor, r: torch.Tensor) -> tuple[float, float, bool]:
    """From a few elements: the shift, as how many terms the sums count, and whether e is narrow.

    That is whether e may be taken in float32. A few huge elements are few terms.
    """
    step = max(a.numel() // _SAMPLE, 1)
    x, y = _float64(a[::step]), _float64(r[::step])
    with np.errstate(all="ignore"):
        d = x - y
        dd, dr, rr = (float(np.dot(*pair)) for pair in ((d, d), (d, y), (y, y)))
        if not rr or not dd or not math.isfinite(dd + rr):
            return 0.0, 0.0, True
        shift = float(np.float32(dr / rr))
        e = d - shift * y
        ee = float(np.dot(e, e))
        if not ee < _CANCELLATION * dd:
            return 0.0, 0.0, True
        terms = step * rr * (rr / float(np.dot(y * y, y * y)))
    return shift, terms, _resolved(ee, rr, shift, terms)


def _resolved(residual: float, reference: float, shift: float, terms: float) -> bool:
    """Whether rounding of h r, and of d where r is not near a, is nothing beside e in float32."""
    if not residual:
        return False
    rounded = max(abs(shift), float(abs(shift) > _NEAR)) * 2.0**-25
    share = rounded * math.sqrt(reference / residual)
    return share * share + 2.0 * share / math.sqrt(terms) < _RESOLVED


def _remainder(sums: Sums, terms: float) -> bool:
    """Whether float32 sums cannot carry what is asked of them.

    Args:
        terms: As `_guess` gives them, of an e in float32; else infinite.
    """
    gain = 1.0 + sums.shift
    found, norm = gain + sums.cross / sums.reference, math.sqrt(sums.square / sums.reference)
    if sums.actual is None and min(abs(found), norm) < _SMALL_GAIN * abs(gain):
        return True
    if not sums.shift:
        return False
    if sums.difference < _CANCELLATION * sums.residual:  # the sample's gain is not the tensor's
        return True
    return math.isfinite(terms) and not _resolved(sums.residual, sums.reference, sums.shift, terms)


def _left(sums: Sums) -> float:
    """E - X^2 / R: what no gain explains."""
    return max(sums.residual - sums.cross * (sums.cross / sums.reference), 0.0)


def _power(sums: Sums) -> int:
    """Power of two to scale both sides by, so that their squares fit float64; 0 if they do."""
    low, high = SAFE_SQUARES_64
    largest = max(sums.difference, sums.reference)
    if not sums.count:
        return 0
    if not largest < high:
        return -600
    return 600 if largest < low and sums.nonzero else 0


def _scaled(actual: torch.Tensor, reference: torch.Tensor, power: int) -> Metrics:
    """`distance` of both sides times 2^power, with the absolute metrics scaled back."""
    factor = 2.0**power
    with torch.no_grad():
        found = distance(actual.to(torch.float64) * factor, reference.to(torch.float64) * factor)
    back = {"max_abs": found.max_abs / factor, "rms_reference": found.rms_reference / factor}
    return found.model_copy(update=back)


def _needs_float64(*tensors: torch.Tensor) -> bool:
    wide = {torch.float64, torch.int64, torch.int32, torch.uint64, torch.uint32}
    return any(tensor.dtype in wide for tensor in tensors)


def _sum(
    a: torch.Tensor, r: torch.Tensor, *, exact: bool, shift: float = 0.0, narrow: bool = True
) -> Sums:
    """Sum up two flat tensors, chunks in several threads where torch has several."""
    starts = range(0, a.numel(), CHUNK)
    workers = max(min(torch.get_num_threads(), len(starts) // _SHARED), 1)
    if workers == 1:
        parts = _part(a, r, starts, exact, shift, narrow)
    else:
        each = -(-len(starts) // workers)
        shares = [starts[at : at + each] for at in range(0, len(starts), each)]
        with ThreadPoolExecutor(len(shares)) as pool:
            jobs = [pool.submit(_part, a, r, share, exact, shift, narrow) for share in shares]
            parts = [part for job in jobs for part in job.result()]
    return _total(parts, shift)


def _total(parts: Sequence[Sums], shift: float) -> Sums:
    """One sum of all chunks, the same however they were shared."""
    if len(parts) == 1:
        return parts[0]
    total = Sums(shift=shift)
    for name in ("residual", "cross", "reference", "product"):
        setattr(total, name, math.fsum(getattr(part, name) for part in parts))
    for name in ("count", "nonfinite_actual", "nonfinite_reference"):
        setattr(total, name, sum(getattr(part, name) for part in parts))
    squares = [part.actual for part in parts]
    if None not in squares:
        total.actual = math.fsum(square for square in squares if square is not None)
    total.nonzero = any(part.nonzero for part in parts)
    for part in parts:
        if part.peak > total.peak:
            total.peak, total.peak_at = part.peak, part.peak_at
    return total


def _part(
    a: torch.Tensor, r: torch.Tensor, starts: range, exact: bool, shift: float, narrow: bool
) -> list[Sums]:
    """Sums of some chunks; the largest difference is located in the first that has it."""
    parts = []
    scratch = np.empty((2, CHUNK), np.float32) if not exact else np.empty((2, 0), np.float32)
    peak = -1.0
    with np.errstate(all="ignore"):
        for start in starts:
            x, y = a[start : start + CHUNK], r[start : start + CHUNK]
            part = None if exact else _fast(x, y, shift, narrow, scratch, peak)
            if part is None:
                part = _exact(x, y, shift)
            part.peak_at += start
            peak = max(peak, part.peak)
            parts.append(part)
    return parts


def _fast(
    a: torch.Tensor, r: torch.Tensor, shift: float, narrow: bool, scratch: Array, peak: float
) -> Sums | None:
    """Sums of a chunk in float32; None where that is not safe."""
    x, y = _float32(a), _float32(r)
    d, e = scratch[0, : len(y)], scratch[1, : len(y)]
    np.subtract(x, y, out=d)
    low, high = float(d.min()), float(d.max())
    largest = max(abs(low), abs(high))
    if not math.isfinite(largest):
        return None
    if not shift:
        e = d
    elif narrow:
        np.multiply(y, np.float32(shift), out=e)
        np.subtract(d, e, out=e)
    else:
        for at in range(0, len(e), _BLOCK):
            part = slice(at, at + _BLOCK)
            wide = y[part].astype(np.float64)
            wide *= -1.0 - shift
            wide += x[part].astype(np.float64)
            e[part] = wide
    ee, er, rr = _dot(e, e), _dot(e, y), _dot(y, y)
    safe_low, safe_high = SAFE_SQUARES
    if not (ee == 0.0 or safe_low < ee < safe_high) or not (rr == 0.0 or safe_low < rr < safe_high):
        return None
    if (ee == 0.0 and bool(e.any())) or (rr == 0.0 and bool(y.any())):
        return None
    at = 0
    if largest > peak:
        at = int(d.argmax() if high >= -low else d.argmin())
    sums = Sums(ee, er, rr, peak=largest, peak_at=at, count=len(y), shift=shift)
    if shift and abs(1.0 + shift) < _SMALL_GAIN:
        sums.actual, sums.product = _dot(x, x), _dot(x, y)
        if not (sums.actual == 0.0 or safe_low < sums.actual < safe_high):
            return None
    return sums


def _dot(x: Array, y: Array) -> float:
    """Sum of products: rows in float32, their sums in float64."""
    whole = len(x) - len(x) % _ROW
    rows = _dots(x[:whole].reshape(-1, _ROW), y[:whole].reshape(-1, _ROW))
    return float(rows.sum(dtype=np.float64)) + float(np.dot(x[whole:], y[whole:]))


def _exact(a: torch.Tensor, r: torch.Tensor, shift: float) -> Sums:
    """Sums of a chunk in float64, leaving out and counting what is not finite."""
    whole = _whole_difference(a, r)
    x, y = _float64(a), _float64(r)
    sums = Sums(actual=0.0, count=len(x), shift=shift)
    with np.errstate(all="ignore"):
        xx, yy = float(np.dot(x, x)), float(np.dot(y, y))
        if not math.isfinite(xx + yy):  # not finite, or finite and huge
            fine_x, fine_y = np.isfinite(x), np.isfinite(y)
            fine = fine_x & fine_y
            sums.nonfinite_actual = int((~fine_x).sum())
            sums.nonfinite_reference = int((~fine_y).sum())
            sums.count = int(fine.sum())
            if not sums.count:
                return sums
            x, y = np.where(fine, x, 0.0), np.where(fine, y, 0.0)
            xx, yy = float(np.dot(x, x)), float(np.dot(y, y))
        d = x - y
        if whole is not None:
            d = np.where(np.abs(d) < 2.0**52, whole.astype(np.float64), d)
        # A difference of nearly equal terms: of the two ways, that with the smaller ones.
        e = d - shift * y if abs(shift) < _WIDE else x - (1.0 + shift) * y
        size = np.abs(d)
        sums.peak_at = int(size.argmax())
        sums.peak = float(size[sums.peak_at])
        sums.actual, sums.reference, sums.product = xx, yy, float(np.dot(x, y))
        sums.residual, sums.cross = float(np.dot(e, e)), float(np.dot(e, y))
    sums.nonzero = xx + yy > 0.0 or bool(x.any()) or bool(y.any())
    return sums


def _float64(tensor: torch.Tensor) -> Array:
    return tensor.to("cpu", torch.float64).numpy()


def _float32(tensor: torch.Tensor) -> Array:
    if tensor.dtype is torch.bfloat16:  # its bits are float32's upper half
        upper = tensor.to("cpu").contiguous().view(torch.int16).numpy().view(np.uint16)
        return (upper.astype(np.uint32) << 16).view(np.float32)
    return tensor.to("cpu", torch.float32).numpy()


def _whole_difference(a: torch.Tensor, r: torch.Tensor) -> Array | None:
    """a - r of 64-bit integers modulo 2^64: exact where small, which float64 above 2^53 is not."""
    wide = {torch.int64, torch.uint64}
    if a.dtype not in wide or r.dtype not in wide:
        return None
    return (a.to(r.device).view(torch.int64) - r.view(torch.int64)).cpu().numpy()


def metrics_of(
    sums: Sums, shape: tuple[int, ...], *, left: float | None = None, square: float | None = None
) -> Metrics:
    """The metrics of all sums; `left` is E - X^2 / R where it was summed by itself."""
    nan, count = math.nan, sums.count
    difference, reference = sums.difference, sums.reference
    own = sums.square if square is None else square
    if not count:
        rel_l2, gain, ratio, cosine = nan, nan, nan, nan
    elif difference == 0.0:
        rel_l2, gain, ratio, cosine = 0.0, 1.0, 1.0, 0.0
    elif reference == 0.0:
        rel_l2, gain, ratio, cosine = math.inf, nan, math.inf, nan
    else:
        rel_l2 = math.sqrt(difference / reference)
        gain = 1.0 + sums.shift + sums.cross / reference
        if sums.actual is not None and abs(gain) < _SMALL_GAIN:
            gain = sums.product / reference
        ratio = math.sqrt(own) / math.sqrt(reference)
        similarity = gain / ratio if ratio else 0.0
        if similarity < _WIDE:
            cosine = 1.0 - similarity
        else:
            share = min((_left(sums) if left is None else left) / own, 1.0)
            cosine = share / (1.0 + math.sqrt(1.0 - share))
    return Metrics(
        count=count,
        rel_l2=rel_l2,
        max_abs=sums.peak if count else nan,
        max_abs_index=_unravel(sums.peak_at, shape) if count else (),
        cosine_distance=cosine,
        norm_ratio=ratio,
        gain=gain,
        rms_reference=math.sqrt(reference) / math.sqrt(count) if count else nan,
        nonfinite_actual=sums.nonfinite_actual,
        nonfinite_reference=sums.nonfinite_reference,
    )


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(shape):
        index, position = divmod(index, size)
        place.append(position)
    return tuple(reversed(place))


def same_bits(actual: torch.Tensor, reference: torch.Tensor, *, pages: Pages = NO_PAGES) -> bool:
    """Whether dtype, shape and every byte agree (so 0.0 and -0.0 differ, and NaN equals itself)."""
    if actual is reference:
        return True
    if actual.dtype != reference.dtype or actual.shape != reference.shape:
        return False
    first, second = actual.detach().contiguous(), reference.detach().contiguous()
    if first.device != second.device:
        first = first.to(second.device)
    if not first.numel():
        return True
    if second.device.type != "cpu":
        return torch.equal(_bytes(first), _bytes(second))
    mine, others = _bytes(first), _bytes(second)
    a, b = mine.numpy(), others.numpy()
    if not len(a) % 8:  # eight at a time, where their places in memory allow
        a, b = a.view(np.int64), b.view(np.int64)
    for at in range(0, len(a), _SAME):
        if not bool((a[at : at + _SAME] == b[at : at + _SAME]).all()):
            return False
        pages.read(*(x[at * a.itemsize : (at + _SAME) * a.itemsize] for x in (mine, others)))
    return True


_SAME = 1 << 18
"""Items compared at once: what they give stays in the cache, and the first difference ends it."""


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.resolve_conj().resolve_neg().reshape(-1)  # what it shows, not its memory
    if flat.stride(0) != 1:  # one element that was expanded counts as contiguous
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    return flat.view(torch.uint8)


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether more than one floating-point element all hold one value (NaN is not one value).

    Integers and booleans may well be constant: masks, experts, indices.
    """
    if tensor.numel() < 2 or not tensor.is_floating_point():
        return False
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= CHUNK and tensor.itemsize > 1 and flat.device.type == "cpu":
        values = _float64(flat)
        return bool((values == values[0]).all())
    first = flat[0]
    if tensor.itemsize == 1:  # float8 has no comparison
        flat, first = flat.view(torch.uint8), flat.view(torch.uint8)[0]
    return all(
        bool((flat[start : start + CHUNK] == first).all())
        for start in range(0, flat.numel(), CHUNK)
    )
