"""What ranks exchange: whether each collective does what it says, and on what.

The arithmetic of a collective is held against what all ranks gave to it. What it is given is held
against the tensors of the trusted model around it: rows are told by their content, whatever order
of axes the engine sends them in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from truestep.engines.ranks.events import Event
from truestep.engines.ranks.layouts import MOST_ROWS, Held, matched
from truestep.engines.ranks.shares import apart, tolerance
from truestep.engines.ranks.tracing import Part

Shares = Mapping[int, torch.Tensor]

CLOSE = 0.6
"""Median distance to the nearest row, relative, up to which rows are wrong ones of a tensor and not
of something else: rows that have nothing in common are 1.4 apart."""

_ALONG = ("all_gather_single", "all_gather_tensor")
"""They gather along an axis of the caller's choice."""

_MOST = 2048
"""Rows of a rank that are looked for: of more, as many evenly spread."""


def broken(event: Event, given: Shares, made: Shares) -> str:
    """What a collective did otherwise than it says; empty where it did that, or nobody can say."""
    ranks = event.ranks
    if any(rank not in given for rank in ranks) or len(ranks) < 2:
        return ""
    values = [given[rank] for rank in ranks]
    if len({value.shape for value in values}) > 1:
        return ""
    expected: dict[int, torch.Tensor] = {}
    if event.name == "all_reduce" and event.said("op") in ("sum", ""):
        total = torch.stack([value.double() for value in values]).sum(0)
        expected = dict.fromkeys(ranks, total)
    elif event.name.startswith("all_gather"):
        flat = torch.cat([value.reshape(-1) for value in values])
        expected = dict.fromkeys(ranks, flat)
    for rank, whole in expected.items():
        own = made.get(rank)
        if own is None or own.numel() != whole.numel():
            continue
        gathered_along = event.name in _ALONG
        if gathered_along:
            own, whole = own.reshape(-1).sort().values, whole.reshape(-1).sort().values
        far = apart(own.reshape(-1).double(), whole.reshape(-1).double())
        if far > tolerance(values[0].dtype):
            return f"rank {rank} is left with something else than what all ranks gave"
    return ""


@dataclass(frozen=True)
class _Likeness:
    part: Part
    median: float
    whole: Mapping[int, float]


def exchanged(
    shares: Shares, parts: Sequence[Part], *, kept: Mapping[int, float], sums: bool
) -> Held | None:
    """What of the trusted model's tensors ranks exchange.

    Args:
        shares: What ranks gave, or were left with.
        parts: The trusted model's tensors around it.
        kept: How much of what a rank holds is no padding, by rank; all where it is not said.
        sums: Whether these may be parts of sums, and their rows nobody's.

    Returns:
        None where it is none of them.
    """
    best: _Likeness | None = None
    for part in parts:
        found = _likeness(part, shares)
        if found is not None and (best is None or found.median < best.median):
            best = found
    if best is None:
        return None
    wrong = [rank for rank, share in best.whole.items() if share < 0.5 * kept.get(rank, 1.0)]
    if not wrong:
        return Held(True, f"{best.part.label}")
    if sums or (best.median > CLOSE and len(wrong) == len(shares)):
        return None
    who = ", ".join(map(str, wrong))
    return Held(False, f"{best.part.label} of rank {who} not the trusted model's")


def _likeness(part: Part, shares: Shares) -> _Likeness | None:
    width = part.value.shape[-1]
    known = part.value.reshape(-1, width)
    if width < 4 or len(known) > MOST_ROWS or len(known) < 2:
        return None
    medians, whole = [], {}
    size = float(known.double().norm(dim=1).median()) or 1.0
    for rank, value in shares.items():
        if value.ndim < 2 or not value.numel() or value.shape[-1] % width:
            return None
        rows = value.reshape(-1, width)
        rows = rows[rows.abs().amax(1) > 0]  # padding
        if not len(rows):
            return None
        rows = rows[:: max(1, len(rows) // _MOST)]
        far = torch.cdist(rows.double(), known.double()).amin(1) / size
        medians.append(float(far.median()))
        at = matched(rows, known, part.tolerance)
        whole[rank] = float((at >= 0).double().mean())
    return _Likeness(part, max(medians), whole)


def rows_of(part: Part, shares: Shares) -> dict[int, torch.Tensor]:
    """Which rows of a tensor each rank was left with, once each, in their order; by rank."""
    known = part.value.reshape(-1, part.value.shape[-1])
    found = {}
    for rank, value in shares.items():
        at = matched(value.reshape(-1, known.shape[-1]), known, part.tolerance)
        found[rank] = at[at >= 0].unique()
    return found


def uneven_share(part: Part, shares: Shares, tokens: Mapping[int, torch.Tensor]) -> str:
    """What is wrong with the heads and tokens that ranks are left with; empty where nothing is.

    Args:
        part: Of attention, `b s h d`.
        shares: What ranks are left with.
        tokens: Which tokens each rank holds outside of attention.
    """
    _, length, heads, _ = part.value.shape
    for rank, rows in rows_of(part, shares).items():
        if not len(rows):
            continue
        own_tokens, own_heads = (rows // heads).unique(), (rows % heads).unique()
        full = len(own_tokens) == length
        mine = tokens.get(rank)
        local = mine is not None and torch.equal(
            own_tokens, mine[mine >= 0].sort().values.to(own_tokens)
        )
        if len(own_tokens) * len(own_heads) != len(rows):
            return f"rank {rank} has other heads of some tokens than of others"
        if not full and not local:
            return f"rank {rank} has {len(own_tokens)} of {length} tokens, and not its own"
        if local and not full and len(own_heads) != heads:
            return f"rank {rank} has {len(own_heads)} of {heads} heads of its own tokens alone"
    return ""
