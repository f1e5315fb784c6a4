"""Distances of one tensor pair in one chunked pass, without cancellation.

With d = a - r and the sums S = sum d^2, D = sum d r, R = sum r^2 every metric follows::

    rel_l2          = sqrt(S / R)
    gain            = 1 + D / R                    (least-squares factor from r to a)
    |a|^2           = R + 2 D + S
    cosine distance = (S - (|a| - |r|)^2) / (2 |a| |r|)

so that a difference of 1e-13 reads 1e-13. Chunks are summed in float32 and accumulated in float64;
where float32 cannot carry a chunk (float64 input, overflow, underflow, or a cosine distance that is
a small remainder of a large gain) it is summed in float64.
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

_CANCELLATION = 0.05
"""Below this share of S the cosine's numerator is computed again, from the residual in float64."""

_SMALL_GAIN = 0.3
"""Below this, gain and norm ratio are small remainders and are computed again in float64."""


@dataclass
class _Sums:
    difference: float = 0.0
    cross: float = 0.0
    reference: float = 0.0
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
    metrics = _metrics(sums, tuple(actual.shape))
    if not _cancels(sums, metrics):
        return metrics
    sums = _sum(actual, reference, exact=True)
    metrics = _metrics(sums, tuple(actual.shape))
    if not sums.count or not sums.reference or not _square(sums):
        return metrics
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


def _cancels(sums: _Sums, metrics: Metrics) -> bool:
    """Whether a metric is a small remainder of large sums, which float32 chunks cannot carry."""
    if sums.difference == 0.0 or not sums.count:
        return False
    numerator = metrics.cosine_distance * 2 * math.sqrt(_square(sums) * sums.reference)
    small_angle = not numerator > _CANCELLATION * sums.difference
    return small_angle or abs(metrics.gain) < _SMALL_GAIN or metrics.norm_ratio < _SMALL_GAIN


def _cosine_from_residual(
    actual: torch.Tensor, reference: torch.Tensor, sums: _Sums, gain: float
) -> float:
    """Cosine distance from E = sum (a - gain r)^2, for which 1 - cos^2 = E / |a|^2."""
    residual = 0.0
    with torch.no_grad():
        first, second = actual.detach().reshape(-1), reference.detach().reshape(-1)
        for start in range(0, first.numel(), CHUNK):
            a = first[start : start + CHUNK].to(second.device, torch.float64)
            r = second[start : start + CHUNK].to(torch.float64)
            e = (a - gain * r).masked_fill(~(torch.isfinite(a) & torch.isfinite(r)), 0.0)
            residual += float(torch.dot(e, e))
    share = min(residual / _square(sums), 1.0)
    cosine = math.sqrt(1.0 - share)
    return share / (1.0 + cosine) if gain > 0 else 1.0 + cosine


def _needs_float64(*tensors: torch.Tensor) -> bool:
    wide = {torch.float64, torch.int64, torch.int32, torch.uint64, torch.uint32}
    return any(tensor.dtype in wide for tensor in tensors)


def _sum(actual: torch.Tensor, reference: torch.Tensor, *, exact: bool) -> _Sums:
    sums = _Sums()
    with torch.no_grad():
        first, second = actual.detach().reshape(-1), reference.detach().reshape(-1)
        scratch = torch.empty(2, min(CHUNK, first.numel()), device=second.device)
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
    a, r = a.to(r.device, torch.float64), r.to(torch.float64)
    fine_a, fine_r = torch.isfinite(a), torch.isfinite(r)
    sums.nonfinite_actual += int((~fine_a).sum())
    sums.nonfinite_reference += int((~fine_r).sum())
    fine = fine_a & fine_r
    count = int(fine.sum())
    if not count:
        return
    zero = torch.zeros((), dtype=torch.float64, device=r.device)
    a, r = torch.where(fine, a, zero), torch.where(fine, r, zero)
    d = a - r
    sums.count += count
    sums.difference += float(torch.dot(d, d))
    sums.cross += float(torch.dot(d, r))
    sums.reference += float(torch.dot(r, r))
    largest = d.abs()
    index = int(largest.argmax())
    peak = float(largest[index])
    if peak > sums.peak:
        sums.peak, sums.peak_index = peak, start + index


def _square(sums: _Sums) -> float:
    """|a|^2."""
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
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


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
