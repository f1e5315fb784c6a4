"""Which modules made an error of a free run, and which were given it.

Works on rows of two traces, in which every module was given what the modules before it made, errors
included. A module has *introduced* an error where its output is beyond the floor, and much further
beyond it than what it was given; what is not much further is *inherited*. Pure: no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from truestep.divergence import ROOT, parent
from truestep.verdict import Divergence, Row, Verdict

JUMP = {"measured": 4.0, "analytic": 16.0, "tolerance": 4.0}
"""An output is introduced where it is this many times further over its floor than all that went
into it. A measured floor knows how much a module amplifies; the analytic one is the same for all,
and a norm, or a sum of terms that nearly cancel, may amplify rounding some ten times."""

_FAILED = (Verdict.DRIFTED, Verdict.INVALID)


def origins(rows: Sequence[Row]) -> list[Row]:
    """Say of every failing row whether its module made the error or was given it.

    Args:
        rows: Rows of modules in order of execution: inputs as a module starts, outputs as it ends.
            Where a module's inputs were not recorded, all that ended before stands for them.

    Returns:
        The rows, with `origin` where they failed.
    """
    found, before = list[Row](), 0.0
    excess = [_excess(row) for row in rows]
    starts: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(rows):
        call, slot = _call(row)
        starts.setdefault(call, index)
        known = before
        if slot == "out" and _call(rows[starts[call]])[1] == "in":
            known = max(
                (
                    excess[at]
                    for at in range(starts[call], index)
                    if _call(rows[at]) == (call, "in") or _inside(rows[at], row)
                ),
                default=0.0,
            )
        if row.verdict in _FAILED:
            limit = JUMP[row.floor.source if row.floor else "analytic"]
            made = excess[index] > limit * known
            row = row.model_copy(update={"origin": "introduced" if made else "inherited"})
        if slot == "out":
            before = max(before, excess[index])
        found.append(row)
    return found


def introduced(rows: Sequence[Row]) -> list[Divergence]:
    """Modules that made an error of their own, in order of execution, each once.

    A module whose *input* is introduced was given something wrong by the code of the module around
    it, which is the one that is named.
    """
    found: dict[str, Divergence] = {}
    for row in rows:
        if row.origin != "introduced":
            continue
        own = row.fqn or ROOT
        slot = _call(row)[1]
        given = slot == "in" and own != ROOT
        at = parent(own) if given else own
        kind = f"before {own}" if given else "given another input" if slot == "in" else None
        place = Divergence(
            name=row.name, stage="module", step=row.step, branch=row.branch, fqn=at, kind=kind
        )
        found.setdefault(at, place)
    return list(found.values())


def _excess(row: Row) -> float:
    """How many times over its floor a row is; 0 where nothing was measured and nothing failed."""
    if row.verdict is Verdict.INVALID:
        return math.inf
    if row.ratio is None or math.isnan(row.ratio):
        return 0.0
    return row.ratio


def _call(row: Row) -> tuple[tuple[str, ...], str]:
    """A row's call (label, step, branch), and `in` or `out`."""
    head, _, slot = row.name.rpartition("/")
    return tuple(head.split("/")), slot.partition(".")[0]


def _inside(row: Row, around: Row) -> bool:
    """Whether a row is an output of a part of another row's module, in its step and branch."""
    if (row.step, row.branch) != (around.step, around.branch) or _call(row)[1] != "out":
        return False
    own, outer = row.fqn or ROOT, around.fqn or ROOT
    return own != outer and (outer == ROOT or own.startswith(f"{outer}."))
