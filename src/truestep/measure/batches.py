"""Measure many small pairs at once, each as `distance` and `bulk` would by itself, bit for bit.

A call of torch or numpy costs more than a small tensor does. Pairs of one shape and of the same
dtypes are rows of two matrices here, and numpy takes a row's sum of products as it takes that of
two vectors. What is not plain (not finite, cancelled, out of range) is left to those functions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from truestep.measure.distance import (
    CANCELLATION_64,
    SAFE_SQUARES,
    SAFE_SQUARES_64,
    SMALL,
    Array,
    Sums,
    metrics_of,
)
from truestep.measure.structure import bulk_of
from truestep.verdict import Metrics

FLOATING = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_WHOLE = {8: torch.int64, 4: torch.int32, 2: torch.int16}

FEW = 4
"""Fewer pairs of one kind are measured one by one."""

MOST = 1 << 18
"""Elements a matrix: 2 MB in float64, which stay in a cache."""

Pair = tuple[torch.Tensor, torch.Tensor]
_dots = getattr(np, "vecdot", None)  # of numpy 2; another sum of products rounds otherwise


@dataclass(frozen=True)
class Found:
    """What was measured of one pair.

    Attributes:
        same: Every bit agrees.
        metrics: As `distance` gives them.
        constant: Of each side, whether it holds one value everywhere.
        bulk: As `bulk` gives it; None of a pair that is the same, and where it was not asked for.
    """

    same: bool
    metrics: Metrics
    constant: tuple[bool, bool]
    bulk: Mapping[str, float] | None


def is_small(pair: Pair) -> bool:
    """Whether a pair can be measured with others."""
    a, r = pair
    return (
        a.dtype in FLOATING
        and r.dtype in FLOATING
        and 2 <= r.numel() <= SMALL
        and a.shape == r.shape
        and a.device.type == r.device.type == "cpu"
        and a.layout is r.layout is torch.strided
    )


def measured_together(pairs: Sequence[Pair], *, bulk: bool) -> list[Found | None]:
    """Measure pairs, those of a kind at once.

    Args:
        pairs: `is_small`, plain tensors.
        bulk: Also measure `bulk`.

    Returns:
        What was found of each, in order; None of a pair that is to be measured by itself.
    """
    found: list[Found | None] = [None] * len(pairs)
    kinds: dict[tuple[object, ...], list[int]] = defaultdict(list)
    if _dots is None:
        return found
    for at, (a, r) in enumerate(pairs):
        kinds[r.shape, a.dtype, r.dtype].append(at)
    for places in kinds.values():
        each = max(MOST // pairs[places[0]][1].numel(), FEW)
        for start in range(0, len(places), each):
            part = places[start : start + each]
            if len(part) >= FEW:
                for at, one in zip(part, _rows([pairs[at] for at in part], bulk), strict=True):
                    found[at] = one
    return found


def _rows(pairs: Sequence[Pair], with_bulk: bool) -> list[Found | None]:
    shape = tuple(pairs[0][1].shape)
    with torch.no_grad(), np.errstate(all="ignore"):
        a, r = (torch.stack(side).reshape(len(pairs), -1) for side in zip(*pairs, strict=True))
        same = _same(a, r)
        x, y = (side.to(torch.float64).numpy() for side in (a, r))
        constant = [(side == side[:, :1]).all(1).tolist() for side in (x, y)]
        sums = _sums(x, y, same)
        apart = np.flatnonzero(~same)
        small = dict(zip(apart.tolist(), _bulks(x[apart], y[apart]), strict=True))
    return [
        None
        if one is None or (with_bulk and not equal and small[at] is None)
        else Found(
            same=equal,
            metrics=metrics_of(one, shape),
            constant=(own, theirs),
            bulk=small[at] if with_bulk and not equal else None,
        )
        for at, (equal, one, own, theirs) in enumerate(
            zip(same.tolist(), sums, *constant, strict=True)
        )
    ]


def _same(a: torch.Tensor, r: torch.Tensor) -> Array:
    if a.dtype != r.dtype:
        return np.zeros(len(a), bool)
    whole = _WHOLE[a.itemsize]
    found: Array = (a.view(whole) == r.view(whole)).all(1).numpy()
    return found


def _sums(x: Array, y: Array, same: Array) -> list[Sums | None]:
    """Sums of every row, as those of `distance` and `distance_to_itself`; None where those take a
    second look."""
    assert _dots is not None
    d = x - y
    size = np.abs(d)
    places = size.argmax(1)
    peaks = np.take_along_axis(size, places[:, None], 1)[:, 0]
    xx, yy, xy, ee, ey = (_dots(*pair) for pair in ((x, x), (y, y), (x, y), (d, d), (d, y)))
    largest = np.maximum(ee, yy)
    low, high = SAFE_SQUARES_64
    plain = np.isfinite(xx + yy) & (largest > low) & (largest < high)
    plain &= (
        (ee == 0.0) | (yy == 0.0) | ~(np.maximum(ee - ey * (ey / yy), 0) < CANCELLATION_64 * ee)
    )
    least, most = SAFE_SQUARES
    plain = np.where(same, (yy > least) & (yy < most), plain)
    columns = (plain, same, xx, yy, xy, ee, ey, peaks, places)
    count = y.shape[1]
    return [
        None
        if not fine
        else Sums(reference=yy, actual=yy, peak=0.0, count=count)
        if equal
        else Sums(ee, ey, yy, actual=xx, product=xy, peak=peak, peak_at=at, count=count)
        for fine, equal, xx, yy, xy, ee, ey, peak, at in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]


def _bulks(x: Array, y: Array) -> list[Mapping[str, float] | None]:
    """`bulk` of every row; None of one that holds zeros, of which fewer elements count."""
    assert _dots is not None
    found: list[Mapping[str, float] | None] = [None] * len(y)
    size = np.abs(y)
    middle = (y.shape[1] - 1) // 2
    most = np.partition(size, middle, axis=1)[:, middle : middle + 1]
    chosen = size <= most
    counts = np.where((size > 0).all(1), chosen.sum(1), 0)
    for count in np.unique(counts[counts > 0]).tolist():
        at = np.flatnonzero(counts == count)
        a, r = (side[at][chosen[at]].reshape(len(at), count) / most[at] for side in (x, y))
        e = a - r
        columns = (_dots(*pair).tolist() for pair in ((e, e), (e, r), (r, r), (a, a)))
        for row, ee, er, rr, aa in zip(at.tolist(), *columns, strict=True):
            found[row] = bulk_of(ee, er, rr, aa, count)
    return found
