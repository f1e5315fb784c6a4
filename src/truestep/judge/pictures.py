"""Pictures of 8 bits judged, where all else of a run is out of sight. Pure: no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from truestep.judge.rows import build_comparison, compare_tensors
from truestep.verdict import Comparison, FloorUsed, Row, Rule, Side, Verdict

UNSEEN = "everything before the pictures: text, schedule, predictions and latents"
"""What no verdict on pictures can be of."""

_LEVEL = "rounding to 8 bits"

_RULE = Rule(
    name="levels/1",
    text="pictures of 8 bits: equal is identical; all else is inconclusive, for no benign run was "
    "measured and a small fault rounds away as noise does",
)


def compare_pictures(
    actual: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    *,
    labels: tuple[str, str] = ("actual", "reference"),
) -> Comparison:
    """Judge pictures without a measured floor: what 8 bits can tell, and no more.

    Args:
        actual, reference: `c h w`, whole numbers from 0 to 255, in one order.
        labels: What the two sides are called.

    Returns:
        `identical` for equal pictures, else `inconclusive`: a picture alone does not tell a fault
        from rounding, which grows over the steps before it, nor a small fault from none.
    """
    sides = [{f"picture/{i:04d}": p.float() for i, p in enumerate(s)} for s in (actual, reference)]
    rows = [_of_levels(row, sides) for row in compare_tensors(*sides)]
    result = build_comparison(
        rows,
        actual=Side(label=labels[0]),
        reference=Side(label=labels[1]),
        looked_at=(f"{len(rows)} picture{'s' if len(rows) != 1 else ''} of 8 bits",),
        not_looked_at=(UNSEEN,),
    )
    return result.model_copy(update={"rule": _RULE})


def _of_levels(row: Row, sides: Sequence[Mapping[str, torch.Tensor]]) -> Row:
    if row.verdict in (Verdict.IDENTICAL, Verdict.MISSING, Verdict.INCOMPARABLE):
        return row
    ours, theirs = (side[row.name].double() for side in sides)
    if not (torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return row
    off = float((ours - theirs).abs().max())
    rms = float(theirs.square().mean().sqrt())
    least = 1 / rms if rms else math.inf
    floor = FloorUsed(rel_l2=least, max_abs=least, bound=1.0, source="analytic", pair=_LEVEL)
    note = f"off by {off:.0f} of 255 levels at most, and no benign run says what is usual"
    return row.model_copy(
        update={
            "verdict": Verdict.INCONCLUSIVE,
            "floor": floor,
            "ratio": off,
            "ratio_metric": "levels",
            "statistics": (),
            "note": note,
        }
    )
