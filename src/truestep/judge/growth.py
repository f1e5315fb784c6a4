"""Which modules made an error of a free run, and which were given it.

Works on rows of two traces, in which every module was given what the modules before it made, errors
included. A module has *introduced* an error where its output is beyond the floor, and much further
beyond it than what it was given; what is not much further is *inherited*. Pure: no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from truestep.judge.divergence import ROOT, around, parent
from truestep.keys import Key, key_of
from truestep.pairing.rename import numbered
from truestep.verdict import GIVEN, Divergence, Row, Verdict

JUMP = {"measured": 4.0, "analytic": 16.0, "tolerance": 4.0}
"""An output is introduced where it is this many times further over its floor than all that went
into it. A measured floor knows how much a module amplifies; the analytic one is the same for all,
and a norm, or a sum of terms that nearly cancel, may amplify rounding some ten times."""

ANOTHER = 0.08
"""Two outputs that are further apart are of other things, or badly wrong: see `content.CLOSE`."""

ARRIVES = 1e-2
"""An error of which this share arrives in what is around it is diluted there, not undone."""

_FAILED = (Verdict.DRIFTED, Verdict.INVALID)

Spot = tuple[str, int | None, str | None]
"""A module in one step and branch."""


@dataclass(frozen=True)
class Inside:
    """Rows of two traces, those inside of modules that agree apart.

    Attributes:
        rows: What is judged.
        undone: Rows that differ inside of a module whose own output agrees: its parts are others,
            or have other names.
        unseen: Rows that one side lacks since it recorded nothing inside of a module.
    """

    rows: tuple[Row, ...]
    undone: tuple[Row, ...] = ()
    unseen: tuple[Row, ...] = ()


def gross(row: Row) -> bool:
    """Whether the two sides of a failing row hardly are one tensor."""
    if row.verdict is Verdict.INCOMPARABLE:
        return row.actual is not None and row.reference is not None
    if row.verdict not in _FAILED or row.metrics is None:
        return False
    limits_only = math.isnan(row.metrics.max_abs)  # moments: rel_l2 is at least what it says
    return limits_only or not row.metrics.rel_l2 <= ANOTHER


def agreeing(rows: Iterable[Row]) -> dict[Spot, bool]:
    """Of every module that both sides have, whether all that it returns agrees up to the bound."""
    found: dict[Spot, bool] = {}
    for row in rows:
        if _call(row)[1] == "out" and row.actual is not None and row.reference is not None:
            spot = (row.fqn or ROOT, row.step, row.branch)
            found[spot] = found.get(spot, True) and _agrees(row)
    return found


def inside(rows: Sequence[Row]) -> Inside:
    """Set apart what differs inside of modules that agree: nobody is accused below those.

    What is undone before the module returns is a matter of its parts. An error of a tensor that is
    evidently the same, and that arrives in what the module returns, where it is merely too small
    to be seen, decides nothing either way. Parts that differ so in one layer do in all others.
    """
    agree, errors = agreeing(rows), _errors(rows)
    undecided = {
        (row.fqn or ROOT, row.step, row.branch)
        for row in rows
        if _call(row)[1] == "out" and not row.verdict.passed
    }
    both = {spot[0] for spot in agree}
    opened = (
        {holder for row in rows if row.actual is not None for holder in around(row.fqn or ROOT)},
        {holder for row in rows if row.reference is not None for holder in around(row.fqn or ROOT)},
    )
    kept, undone, unseen = list[Row](), list[Row](), list[Row]()
    for row in rows:
        chain = [(fqn, row.step, row.branch) for fqn in _holders(row)]
        agreed = next((spot for spot in chain if agree.get(spot)), None)
        shut = next((spot[0] for spot in chain if spot[0] in both), None)
        side = 0 if row.actual is None else 1 if row.reference is None else None
        if side is not None and shut is not None and shut not in opened[side]:
            unseen.append(row)
        elif row.verdict.passed or agreed is None:
            kept.append(row)
        elif row.verdict is Verdict.INCONCLUSIVE and agreed in undecided:
            kept.append(row)  # undecided inside of what is undecided
        elif _diluted(row, errors.get(agreed, 0.0)):
            note = f"too small in {agreed[0]}, which agrees, to be seen there"
            unsure = {"verdict": Verdict.INCONCLUSIVE, "note": _joined(row.note, note)}
            kept.append(row.model_copy(update=unsure))
        else:
            undone.append(row)
    other = {_layer(row) for row in undone if gross(row)}
    other -= {_layer(row) for row in kept if row.verdict.passed}
    undone += [row for row in kept if gross(row) and _layer(row) in other]
    gone = {row.name for row in undone}
    return Inside(tuple(row for row in kept if row.name not in gone), tuple(undone), tuple(unseen))


def _agrees(row: Row) -> bool:
    """Whether a row passed, or is undecided and not over its bound."""
    bound = row.floor.bound if row.floor else 0.0
    undecided = row.verdict is Verdict.INCONCLUSIVE and row.ratio is not None
    return row.verdict.passed or (undecided and (row.ratio or 0.0) <= bound)


def _holders(row: Row) -> list[str]:
    """Modules that may undo what a row shows, the nearest first: an input's own, and all around."""
    own = [row.fqn or ROOT] if _call(row)[1] == "in" else []
    return own + [fqn for fqn in around(row.fqn or ROOT) if fqn not in own]


def _errors(rows: Iterable[Row]) -> dict[Spot, float]:
    """L2 norm of the error of every module's outputs."""
    found: dict[Spot, float] = {}
    for row in rows:
        if _call(row)[1] == "out":
            spot = (row.fqn or ROOT, row.step, row.branch)
            found[spot] = max(found.get(spot, 0.0), _error(row))
    return found


def _error(row: Row) -> float:
    metrics = row.metrics
    if metrics is None or not math.isfinite(metrics.rel_l2):
        return 0.0
    return metrics.rel_l2 * metrics.rms_reference * math.sqrt(metrics.count)


def _diluted(row: Row, outside: float) -> bool:
    """Whether a row is plainly wrong, and its error still there in what is around it."""
    if row.verdict is not Verdict.DRIFTED or row.floor is None or row.metrics is None:
        return False
    if row.metrics.rel_l2 > ANOTHER:
        return False
    return (row.ratio or 0.0) > JUMP[row.floor.source] and outside >= ARRIVES * _error(row)


def _layer(row: Row) -> tuple[str, str]:
    """What a row is in every layer of its kind."""
    place = numbered(row.fqn or ROOT)
    return place[0] if place else row.fqn or ROOT, key_of(row.name).name


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


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
    starts: dict[Key, int] = {}
    given: dict[Spot, float] = {}
    for index, row in enumerate(rows):
        call, slot = _call(row)
        starts.setdefault(call, index)
        spots = [(fqn, row.step, row.branch) for fqn in around(row.fqn or ROOT)]
        known = max([before, *(given.get(spot, 0.0) for spot in spots)])
        if slot == "in":
            spot = (row.fqn or ROOT, row.step, row.branch)
            given[spot] = max(given.get(spot, 0.0), excess[index])
        if slot == "out" and _call(rows[starts[call]])[1] == "in":
            known = max(
                (
                    excess[at]
                    for at in range(starts[call], index)
                    if _call(rows[at]) == (call, "in") or _inside(rows[at], row)
                ),
                default=0.0,
            )
        if row.verdict in _FAILED or gross(row):
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
        kind = f"before {own}" if given else GIVEN if slot == "in" else None
        kind = _joined(kind or "", row.note) if row.verdict is Verdict.INCOMPARABLE else kind
        place = Divergence(
            name=row.name, stage="module", step=row.step, branch=row.branch, fqn=at, kind=kind
        )
        found.setdefault(at, place)
    return list(found.values())


def _excess(row: Row) -> float:
    """How many times over its floor a row is; 0 where nothing was measured and nothing failed."""
    if row.verdict is Verdict.INVALID or (row.verdict is Verdict.INCOMPARABLE and gross(row)):
        return math.inf
    if row.ratio is None or math.isnan(row.ratio):
        return 0.0
    return row.ratio


def _call(row: Row) -> tuple[Key, str]:
    """A row's call (module, step, branch), and `in` or `out`."""
    key = key_of(row.name)
    return key.but(name=""), key.name.partition(".")[0]


def _inside(row: Row, outer: Row) -> bool:
    """Whether a row is an output of a part of another row's module, in its step and branch."""
    if (row.step, row.branch) != (outer.step, outer.branch) or _call(row)[1] != "out":
        return False
    own, holder = row.fqn or ROOT, outer.fqn or ROOT
    return own != holder and (holder == ROOT or own.startswith(f"{holder}."))
