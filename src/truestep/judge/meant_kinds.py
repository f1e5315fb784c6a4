"""What is wrong with a weight that its quantisation does not explain, where that is plain."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from truestep.judge.meant import BLOCK, Limits, reach_of, unit_ratios
from truestep.measure.quantisers import Quantised

Tensor = torch.Tensor

_ALIKE = 0.3
"""Two weights this near are the same one, quantised: unrelated ones are 1.4 off."""

_NAMED = 3
"""Rows that are named one by one."""


def what_is_wrong(
    trusted: Tensor,
    candidate: Tensor,
    quantised: Quantised | None,
    *,
    limit: Limits,
    eps: float,
    others: Mapping[str, Tensor],
) -> str:
    """What a weight has become, and where it is not what it should be.

    Args:
        trusted, candidate: float32, of one shape.
        quantised: What was to be expected of it; None for what should be as it is.
        limit: Above what it is broken.
        eps: Of the precision that it is kept in.
        others: Trusted weights of other modules, by name.
    """
    bad = ~candidate.isfinite()
    if bool(bad.any()):
        return f"NaN or infinity in {int(bad.sum()):,} numbers"
    reach = reach_of(trusted, candidate, quantised, eps)
    whole = _whole(trusted, candidate, reach, others)
    if whole:
        return whole
    off = (candidate - trusted).abs()
    ratios = unit_ratios(off, reach)
    if "row" not in ratios:
        return _counted("number", torch.nonzero(ratios["number"] > limit.over).flatten())
    peaks = (off / reach).flatten(1)
    rows = (ratios["row"] > limit.over) | (peaks.amax(1) > limit.peak)
    columns = (ratios["column"] > limit.over) | (peaks.amax(0) > limit.peak)
    told = _place(peaks, rows, columns, limit)
    became = _rows_became(trusted, candidate, reach, rows) if int(rows.sum()) <= 64 else ""
    return f"{told}: {became}" if became else told


def _whole(trusted: Tensor, candidate: Tensor, reach: Tensor, others: Mapping[str, Tensor]) -> str:
    """What has become of the whole weight."""
    if not bool(candidate.any()):
        return "all of it is 0"
    gain = _gain(candidate, trusted)
    small = 3 * float(reach.square().sum().sqrt())
    if float((candidate - gain * trusted).norm()) <= small * max(abs(gain), 0.1):
        if abs(gain + 1) < 0.05:
            return "its sign is turned"
        if abs(gain - 1) > 0.02 and bool(
            ((candidate - trusted).abs() > reach).float().mean() > 0.3
        ):
            return f"all of it is scaled by {gain:.3g}"
    if trusted.ndim == 2 and trusted.shape[0] == trusted.shape[1] and _near(candidate, trusted.T):
        return "it is transposed"
    for name, other in others.items():
        if other.shape == trusted.shape and _near(candidate, other.float()):
            return f"it is that of {name}"
    return ""


def _place(peaks: Tensor, rows: Tensor, columns: Tensor, limit: Limits) -> str:
    """Rows, columns or blocks in which it is off."""
    at, across = torch.nonzero(rows).flatten(), torch.nonzero(columns).flatten()
    if len(at) == 1 and len(across) <= BLOCK and peaks.shape[1] > 2 * BLOCK:
        where = torch.nonzero(peaks[at[0]] > 1).flatten()
        where = where if len(where) else across
        if not len(where):  # each number within its reach, and the row as a whole is not
            return f"row {int(at[0])}"
        return f"row {int(at[0])}, columns {int(where.min())} .. {int(where.max())}"
    if len(across) and len(across) * 4 <= peaks.shape[1] and len(across) < len(at):
        return _counted("column", across)
    return _counted("row", at) if len(at) else "in blocks"


def _counted(noun: str, at: Tensor) -> str:
    numbers = [int(each) for each in at]
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    if len(numbers) <= _NAMED:
        return f"{noun}s {', '.join(map(str, numbers))}"
    return f"{len(numbers)} {noun}s, {numbers[0]} .. {numbers[-1]}"


def _rows_became(trusted: Tensor, candidate: Tensor, reach: Tensor, rows: Tensor) -> str:
    """What the rows that are off hold, where it is the same of all of them."""
    own, was = candidate.flatten(1)[rows], trusted.flatten(1)
    if not len(own):
        return ""
    if not bool(own.any()):
        return "0"
    near = _nearest_rows(own, was)
    at = torch.nonzero(rows).flatten()
    if near is not None and not bool((near == at).any()):
        pairs = [f"{int(a)} is row {int(b)}" for a, b in zip(at, near, strict=True)]
        return ", ".join(pairs[:2]) + (f" and {len(pairs) - 2} more" if len(pairs) > 2 else "")
    off = own - was[rows]
    allowed = reach.flatten(1)[rows]
    gains = (own * was[rows]).sum(1) / was[rows].square().sum(1).clamp_min(1e-30)
    left = (own - gains[:, None] * was[rows]).norm(dim=1)
    if bool((left <= 2 * allowed.norm(dim=1)).all()) and bool(((gains - 1).abs() > 0.02).all()):
        low, high = float(gains.min()), float(gains.max())
        text = f"{low:.3g}" if math.isclose(low, high, rel_tol=0.02) else f"{low:.3g} .. {high:.3g}"
        return f"scaled by {text}"
    shift = off.mean(1, keepdim=True)
    if bool(((off - shift).norm(dim=1) <= 0.5 * off.norm(dim=1)).all()):
        return f"shifted by {float(shift.abs().max()):.2g}"
    return ""


def _nearest_rows(own: Tensor, was: Tensor) -> Tensor | None:
    """Of every row the trusted one that it is; None where one is none."""
    apart = torch.cdist(own, was)
    best = apart.argmin(1)
    near = apart.gather(1, best[:, None])[:, 0] <= _ALIKE * was[best].norm(dim=1)
    return best if bool(near.all()) else None


def _near(actual: Tensor, reference: Tensor) -> bool:
    return float((actual - reference).norm()) <= _ALIKE * float(reference.norm())


def _gain(actual: Tensor, reference: Tensor) -> float:
    return float((actual * reference).sum() / reference.square().sum().clamp_min(1e-30))
