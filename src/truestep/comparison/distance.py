"""Distances of one tensor pair in one chunked pass, without cancellation.

With d = a - r and the sums S = sum d^2, D = sum d r, R = sum r^2 every metric follows::

    rel_l2          = sqrt(S / R)
    gain            = 1 + D / R                    (least-squares factor from r to a)
    |a|^2           = R + 2 D + S
    cosine distance = (S - (|a| - |r|)^2) / (2 |a| |r|)

so that a difference of 1e-13 reads 1e-13. Chunks are summed in float32 and accumulated in float64;
where float32 cannot carry a chunk (float64 input, overflow, underflow, or a cosine distance that is
a small remainder of a large gain) it is summed in float64, scaled by a power of two where squares
would leave float64's range too. Differences of 64-bit integers are taken before they are rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from truestep.verdict import Metrics

CHUNK = 65_536
"""Elements a chunk: operands, difference and products (1.25 MB in float32) stay in the L2 cache."""

_SAFE_SQUARES = (1e-25, 1e30)
"""Sums of squares outside this range may have lost terms to float32 underflow or overflow."""

_SAFE_SQUARES_64 = (1e-280, 1e300)
"""The same for float64; beyond it both sides are scaled by 2^600 or 2^-600, which is exact."""

_CANCELLATION, _CANCELLATION_64 = 0.25, 1e-6
"""Below this share of S, summed in float32 and in float64, the cosine's numerator is computed again
from the residual, in float64."""

_WIDE = 0.5
"""Below this cosine similarity its distance is 1 minus it: nothing cancels."""

_SMALL_GAIN = 0.3
"""Below this, gain and norm ratio are small remainders and are computed again in float64."""


@dataclass
class _Sums:
    difference: float = 0.0
    cross: float = 0.0
    actual: float | None = None  # sum a^2 and sum a r, where all chunks were summed in float64
    product: float = 0.0
    reference: float = 0.0
    nonzero: bool = False  # of chunks summed in float64
    peak: float = -1.0
    peak_index: int = 0
    count: int = 0
    nonfinite_actual: int = 0
    nonfinite_reference: int = 0


def distance(actual: torch.Tensor, reference: torch.Tensor) -> Metrics:
    """Measure how far a tensor is from a reference of the same shape.

    Args:
        actual: Any shape, real, any device; integers and booleans count as numbers.
        reference: Same shape, any real dtype.

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
    sums = _sum(actual, reference, exact=_needs_float64(actual, reference))
    power = _power(sums)
    if power:
        return _scaled(actual, reference, power)
    metrics = _metrics(sums, tuple(actual.shape))
    if not sums.count or not sums.difference or not sums.reference:
        return metrics
    if min(abs(metrics.gain), metrics.norm_ratio) < _SMALL_GAIN and sums.actual is None:
        sums = _sum(actual, reference, exact=True)
        metrics = _metrics(sums, tuple(actual.shape))
    if not _square(sums) or not _small_angle(sums, metrics):
        return metrics
    similarity = metrics.gain / metrics.norm_ratio
    if similarity < _WIDE:
        cosine = 1.0 - similarity
    else:
        cosine = _cosine_from_residual(actual, reference, sums, metrics.gain)
    return metrics.model_copy(update={"cosine_distance": cosine})


def distance_to_itself(tensor: torch.Tensor) -> Metrics:
    """What `distance` says of a tensor and its bit-equal copy; quicker for small ones."""
    if not tensor.is_floating_point() or tensor.itemsize == 1 or not 0 < tensor.numel() <= CHUNK:
        return distance(tensor, tensor)
    norm = float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
    if not _SAFE_SQUARES[0] < norm * norm < _SAFE_SQUARES[1]:  # zero, tiny, huge or not finite
        return distance(tensor, tensor)
    sums = _Sums(reference=norm * norm, peak=0.0, count=tensor.numel())
    return _metrics(sums, tuple(tensor.shape))


def _small_angle(sums: _Sums, metrics: Metrics) -> bool:
    """Whether the cosine's numerator is a smaller remainder of S than the sums can carry."""
    limit = _CANCELLATION if sums.actual is None else _CANCELLATION_64
    numerator = metrics.cosine_distance * 2 * math.sqrt(_square(sums)) * math.sqrt(sums.reference)
    return not numerator > limit * sums.difference


def _cosine_from_residual(
    actual: torch.Tensor, reference: torch.Tensor, sums: _Sums, gain: float
) -> float:
    """Cosine distance from E = min over g of sum (a - g r)^2, for which 1 - cos^2 = E / |a|^2.

    The gain may be off by the rounding of float32 sums: what is left of r in e = a - gain r is
    taken out, E = |e|^2 - (e r)^2 / |r|^2.
    """
    residual = cross = square = 0.0
    with torch.no_grad():
        first, second = actual.detach().reshape(-1), reference.detach().reshape(-1)
        for start in range(0, first.numel(), CHUNK):
            a = first[start : start + CHUNK].to(second.device, torch.float64)
            r = second[start : start + CHUNK].to(torch.float64)
            e = torch.sub(a, r, alpha=gain)
            part = float(torch.dot(e, e))
            if not math.isfinite(part):
                fine = torch.isfinite(a) & torch.isfinite(r)
                e, r = e.masked_fill(~fine, 0.0), r.masked_fill(~fine, 0.0)
                part = float(torch.dot(e, e))
            residual += part
            cross += float(torch.dot(e, r))
            square += float(torch.dot(r, r))
    residual = max(residual - cross * (cross / square), 0.0)
    share = min(residual / _square(sums), 1.0)
    return share / (1.0 + math.sqrt(1.0 - share))


def _power(sums: _Sums) -> int:
    """Power of two to scale both sides by, so that their squares fit float64; 0 if they do."""
    low, high = _SAFE_SQUARES_64
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


def _sum(actual: torch.Tensor, reference: torch.Tensor, *, exact: bool) -> _Sums:
    sums = _Sums()
    with torch.no_grad():
        first, second = actual.detach().reshape(-1), reference.detach().reshape(-1)
        scratch = torch.empty(2, min(CHUNK, first.numel()), device=second.device)
        if exact:
            sums.actual = 0.0
        for start in range(0, first.numel(), CHUNK):
            a, r = first[start : start + CHUNK], second[start : start + CHUNK]
            if exact or not _add_fast(sums, a, r, start, scratch):
                _add_exact(sums, a, r, start)
    return sums


def _add_fast(
    sums: _Sums, a: torch.Tensor, r: torch.Tensor, start: int, scratch: torch.Tensor
) -> bool:
    """Add a chunk summed in float32; False, and nothing added, where that is not safe."""
    a, r = a.to(r.device, torch.float32), r.to(torch.float32)
    d, product = scratch[0, : len(r)], scratch[1, : len(r)]
    torch.sub(a, r, out=d)
    low, high = torch.aminmax(d)
    # Multiply and sum: torch sums pairwise, while a BLAS dot of equal terms drifts by 1.6e-5.
    pairs = ((d, d), (d, r), (r, r))
    totals = [torch.mul(first, second, out=product).sum() for first, second in pairs]
    dd, dr, rr, least, most = torch.stack([*totals, low, high]).tolist()
    safe_low, safe_high = _SAFE_SQUARES
    if not (dd == 0.0 or safe_low < dd < safe_high) or not (rr == 0.0 or safe_low < rr < safe_high):
        return False
    peak = max(abs(least), abs(most))
    if (dd == 0.0 and peak > 0.0) or not math.isfinite(peak) or (rr == 0.0 and bool(r.any())):
        return False
    sums.difference += dd
    sums.cross += dr
    sums.reference += rr
    sums.count += len(d)
    if peak > sums.peak:
        sums.peak = peak
        sums.peak_index = start + int((d.argmax() if most >= -least else d.argmin()).item())
    return True


def _add_exact(sums: _Sums, a: torch.Tensor, r: torch.Tensor, start: int) -> None:
    """Add a chunk in float64, leaving out and counting what is not finite."""
    whole = _whole_difference(a.to(r.device), r)
    a, r = a.to(r.device, torch.float64), r.to(torch.float64)
    aa, rr = float(torch.dot(a, a)), float(torch.dot(r, r))
    if not math.isfinite(aa + rr):  # not finite, or finite and huge
        fine_a, fine_r = torch.isfinite(a), torch.isfinite(r)
        sums.nonfinite_actual += int((~fine_a).sum())
        sums.nonfinite_reference += int((~fine_r).sum())
        fine = fine_a & fine_r
        sums.count -= int((~fine).sum())
        a, r = a.masked_fill(~fine, 0.0), r.masked_fill(~fine, 0.0)
        aa, rr = float(torch.dot(a, a)), float(torch.dot(r, r))
        if not fine.any():
            sums.count += len(a)
            return
    d = a - r
    if whole is not None:
        d = torch.where(d.abs() < 2.0**52, whole.to(torch.float64), d)
    sums.count += len(a)
    sums.nonzero = sums.nonzero or aa + rr > 0.0 or bool(a.any()) or bool(r.any())
    if sums.actual is not None:
        sums.actual += aa
        sums.product += float(torch.dot(a, r))
    sums.difference += float(torch.dot(d, d))
    sums.cross += float(torch.dot(d, r))
    sums.reference += rr
    low, high = (float(value) for value in torch.aminmax(d))
    peak = max(abs(low), abs(high))
    if peak > sums.peak:
        sums.peak = peak
        sums.peak_index = start + int((d.argmax() if high >= -low else d.argmin()).item())


def _whole_difference(a: torch.Tensor, r: torch.Tensor) -> torch.Tensor | None:
    """a - r of 64-bit integers modulo 2^64: exact where small, which float64 above 2^53 is not."""
    wide = {torch.int64, torch.uint64}
    if a.dtype not in wide or r.dtype not in wide:
        return None
    return a.view(torch.int64) - r.view(torch.int64)


def _square(sums: _Sums) -> float:
    """|a|^2; summed itself where it may be a small remainder of R + 2 D + S."""
    if sums.actual is not None:
        return sums.actual
    return max(sums.reference + 2 * sums.cross + sums.difference, 0.0)


def _metrics(sums: _Sums, shape: tuple[int, ...]) -> Metrics:
    nan = math.nan
    if not sums.count:
        return Metrics(
            count=0,
            rel_l2=nan,
            max_abs=nan,
            max_abs_index=(),
            cosine_distance=nan,
            norm_ratio=nan,
            gain=nan,
            rms_reference=nan,
            nonfinite_actual=sums.nonfinite_actual,
            nonfinite_reference=sums.nonfinite_reference,
        )
    difference, reference = sums.difference, sums.reference
    norm_a, norm_r = math.sqrt(_square(sums)), math.sqrt(reference)
    if difference == 0.0:
        rel_l2, gain, ratio, cosine = 0.0, 1.0, 1.0, 0.0
    elif norm_r == 0.0:
        rel_l2, gain, ratio, cosine = math.inf, nan, math.inf, nan
    else:
        rel_l2 = math.sqrt(difference / reference)
        gain = 1.0 + sums.cross / reference
        if sums.actual is not None and abs(gain) < _SMALL_GAIN:
            gain = sums.product / reference
        ratio = norm_a / norm_r
        # |a| - |r| from the difference of squares, which does not cancel
        gap = (2 * sums.cross + difference) / (norm_a + norm_r)
        numerator = difference - gap * gap
        cosine = max(numerator, 0.0) / (2 * norm_a * norm_r) if norm_a else 1.0
    return Metrics(
        count=sums.count,
        rel_l2=rel_l2,
        max_abs=sums.peak,
        max_abs_index=_unravel(sums.peak_index, shape),
        cosine_distance=cosine,
        norm_ratio=ratio,
        gain=gain,
        rms_reference=norm_r / math.sqrt(sums.count),
        nonfinite_actual=sums.nonfinite_actual,
        nonfinite_reference=sums.nonfinite_reference,
    )


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(shape):
        index, position = divmod(index, size)
        place.append(position)
    return tuple(reversed(place))


def same_bits(actual: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether dtype, shape and every byte agree (so 0.0 and -0.0 differ, and NaN equals itself)."""
    if actual.dtype != reference.dtype or actual.shape != reference.shape:
        return False
    first, second = actual.detach().contiguous(), reference.detach().contiguous()
    if first.device != second.device:
        first = first.to(second.device)
    if not first.numel():
        return True
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
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
    first = flat[0]
    if tensor.itemsize == 1:  # float8 has no comparison
        flat, first = flat.view(torch.uint8), flat.view(torch.uint8)[0]
    return all(
        bool((flat[start : start + CHUNK] == first).all())
        for start in range(0, flat.numel(), CHUNK)
    )
