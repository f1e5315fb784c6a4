"""Which modules made an error of a free run, and which were given it.

Works on rows of two traces, in which every module was given what the modules before it made, errors
included. A module has *introduced* an error where its output is beyond the floor, and much further
beyond it than what it was given; what is not much further is *inherited*. Pure: no I/O.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from truestep.judge.divergence import ROOT, around, parent
from truestep.keys import key_of
from truestep.many import Texts
from truestep.pairing.rename import numbered
from truestep.verdict import GIVEN, Divergence, Row, Rows, Verdict

JUMP = {"measured": 4.0, "analytic": 16.0, "tolerance": 4.0}
"""An output is introduced where it is this many times further over its floor than all that went
into it. A measured floor knows how much a module amplifies; the analytic one is the same for all,
and a norm, or a sum of terms that nearly cancel, may amplify rounding some ten times."""

ANOTHER = 0.08
"""Two outputs that are further apart are of other things, or badly wrong: see `content.CLOSE`."""

ARRIVES = 1e-2
"""An error of which this share arrives in what is around it is diluted there, not undone."""

_FAILED = (Verdict.DRIFTED, Verdict.INVALID)


@dataclass(frozen=True)
class Inside:
    """Rows of two traces, those inside of modules that agree apart.

    Attributes:
        rows: What is judged.
        undone: Rows that differ inside of a module whose own output agrees: its parts are others,
            or have other names.
        unseen: Rows that one side lacks since it recorded nothing inside of a module.
    """

    rows: Rows
    undone: Rows
    unseen: Rows


class _Spots:
    """Modules in one step and branch each, by number: that of the first row that is of one."""

    def __init__(self, rows: Rows) -> None:
        self._texts = Texts()
        for place in rows.each("fqn", "step", "branch"):
            self._texts.append(_spot(*place))
        self.of = array("i", (self._texts.find(text) or 0 for text in self._texts))

    def find(self, fqn: str, step: int | None, branch: str | None) -> int | None:
        """The number of one, if any row is of it."""
        return self._texts.find(_spot(fqn, step, branch))


def _spot(fqn: str | None, step: int | None, branch: str | None) -> str:
    return f"{step}/{fqn or ROOT}/{branch!r}"


def _slots(rows: Rows) -> list[str]:
    """Of every row, whether it is what a module is given (`in`) or returns (`out`)."""
    return [sys.intern(key_of(name).name.partition(".")[0]) for name in rows.each("name")]


def gross(rows: Rows) -> Iterator[bool]:
    """Whether the two sides of failing rows hardly are one tensor."""
    fields = ("verdict", "actual", "reference", "metrics.rel_l2", "metrics.max_abs")
    for verdict, actual, reference, rel_l2, max_abs in rows.each(*fields):
        if verdict is Verdict.INCOMPARABLE:
            yield actual is not None and reference is not None
        elif verdict not in _FAILED or rel_l2 is None:
            yield False
        else:  # of moments alone, rel_l2 is at least what it says
            yield math.isnan(max_abs) or not rel_l2 <= ANOTHER


def agreeing(rows: Rows) -> dict[str, bool]:
    """Of every module that both sides have, whether all that it returns agrees up to the bound."""
    found: dict[str, bool] = {}
    sides = rows.each("fqn", "actual", "reference")
    for slot, agrees, (fqn, actual, reference) in zip(
        _slots(rows), _agree(rows), sides, strict=True
    ):
        if slot == "out" and actual is not None and reference is not None:
            found[fqn or ROOT] = found.get(fqn or ROOT, True) and agrees
    return found


def inside(rows: Sequence[Row]) -> Inside:
    """Set apart what differs inside of modules that agree: nobody is accused below those.

    What is undone before the module returns is a matter of its parts. An error of a tensor that is
    evidently the same, and that arrives in what the module returns, where it is merely too small
    to be seen, decides nothing either way. Parts that differ so in one layer do in all others.
    """
    rows = Rows.of(rows)
    kept, undone, unseen, unsure = _apart(rows)
    if unsure:
        verdicts, notes = enumerate(rows.each("verdict")), enumerate(rows.each("note"))
        rows = rows.replaced(
            verdict=(Verdict.INCONCLUSIVE if at in unsure else found for at, found in verdicts),
            note=(_too_small(note, unsure[at]) if at in unsure else note for at, note in notes),
        )
    apart = bytearray(gross(rows))
    if any(apart[at] for at in undone):
        layers = [_layer(fqn, key_of(name).name) for fqn, name in rows.each("fqn", "name")]
        passed = [verdict.passed for verdict in rows.each("verdict")]
        other = {layers[at] for at in undone if apart[at]}
        other -= {layers[at] for at in kept if passed[at]}
        more = [at for at in kept if apart[at] and layers[at] in other]
        undone.extend(more)
        kept = array("i", sorted({*kept} - {*more})) if more else kept
    return Inside(rows.take(kept), rows.take(undone), rows.take(unseen))


def _too_small(note: str, holder: str) -> str:
    return _joined(note, f"too small in {holder}, which agrees, to be seen there")


def _apart(rows: Rows) -> tuple[array[int], array[int], array[int], dict[int, str]]:
    """Places of rows that are judged, undone, unseen; and what hides errors too small for it."""
    spots, slots = _Spots(rows), _slots(rows)
    agree, undecided, errors = _returned(rows, spots, slots)
    fqns = [fqn or ROOT for fqn in rows.each("fqn")]
    lacks = bytearray(_lacks(rows))
    both = {
        fqn
        for fqn, slot, lack in zip(fqns, slots, lacks, strict=True)
        if slot == "out" and not lack
    }
    opened = [
        {fqn for fqn, lack in zip(fqns, lacks, strict=True) if lack != side} for side in (1, 2)
    ]
    opened = [{holder for fqn in side for holder in around(fqn)} for side in opened]
    kept, undone, unseen = array("i"), array("i"), array("i")
    unsure: dict[int, str] = {}
    diluted = _arriving(rows)
    places = zip(rows.each("verdict", "step", "branch"), diluted, strict=True)
    for at, ((verdict, step, branch), least) in enumerate(places):
        chain = _holders(fqns[at], slots[at] == "in")
        shut = next((fqn for fqn in chain if fqn in both), None)
        if lacks[at] and shut is not None and shut not in opened[lacks[at] - 1]:
            unseen.append(at)
            continue
        numbers = () if verdict.passed else ((fqn, spots.find(fqn, step, branch)) for fqn in chain)
        agreed = next(((f, n) for f, n in numbers if n is not None and agree[n] > 0), None)
        if agreed is None:
            kept.append(at)
        elif verdict is Verdict.INCONCLUSIVE and undecided[agreed[1]]:
            kept.append(at)  # undecided inside of what is undecided
        elif errors[agreed[1]] >= least:
            unsure[at] = agreed[0]
            kept.append(at)
        else:
            undone.append(at)
    return kept, undone, unseen, unsure


def _lacks(rows: Rows) -> Iterator[int]:
    """Of every row the side that lacks it: 1 the actual one, 2 the reference, 0 neither."""
    for actual, reference in rows.each("actual", "reference"):
        yield 1 if actual is None else 2 if reference is None else 0


def _returned(
    rows: Rows, spots: _Spots, slots: Sequence[str]
) -> tuple[array[int], bytearray, array[float]]:
    """Of the outputs at every spot: whether they agree, are undecided, and their error's L2 norm.

    That they agree is -1 where no output is of both sides.
    """
    agree, undecided = array("b", [-1]) * len(rows), bytearray(len(rows))
    errors = array("d", bytes(8 * len(rows)))
    sides = rows.each("verdict", "actual", "reference")
    found = zip(spots.of, slots, _agree(rows), _errors(rows), sides, strict=True)
    for spot, slot, agrees, error, (verdict, actual, reference) in found:
        if slot != "out":
            continue
        errors[spot] = max(errors[spot], error)
        undecided[spot] |= not verdict.passed
        if actual is not None and reference is not None:
            agree[spot] = agrees and agree[spot] != 0
    return agree, undecided, errors


def _agree(rows: Rows) -> Iterator[bool]:
    """Whether rows passed, or are undecided and not over their bound."""
    for verdict, ratio, floor in rows.each("verdict", "ratio", "floor"):
        bound = floor.bound if floor else 0.0
        undecided = verdict is Verdict.INCONCLUSIVE and ratio is not None
        yield verdict.passed or (undecided and ratio <= bound)


@cache
def _holders(fqn: str, given: bool) -> list[str]:
    """Modules that may undo what a row shows, the nearest first: an input's own, and all around."""
    own = [fqn] if given else []
    return own + [holder for holder in around(fqn) if holder not in own]


def _errors(rows: Rows) -> Iterator[float]:
    """L2 norm of the error of every row."""
    for rel_l2, rms, count in rows.each("metrics.rel_l2", "metrics.rms_reference", "metrics.count"):
        finite = rel_l2 is not None and math.isfinite(rel_l2)
        yield rel_l2 * rms * math.sqrt(count) if finite else 0.0


def _arriving(rows: Rows) -> Iterator[float]:
    """What must be found around a row that is plainly wrong for its error to be still there.

    Not a number where it is not plainly wrong, or another tensor.
    """
    fields = rows.each("verdict", "floor", "ratio", "metrics.rel_l2")
    for error, (verdict, floor, ratio, rel_l2) in zip(_errors(rows), fields, strict=True):
        judged = verdict is Verdict.DRIFTED and floor is not None and rel_l2 is not None
        plain = judged and not rel_l2 > ANOTHER and (ratio or 0.0) > JUMP[floor.source]
        yield ARRIVES * error if plain else math.nan


@cache
def _layer(fqn: str | None, slot: str) -> tuple[str, str]:
    """What a row is in every layer of its kind."""
    place = numbered(fqn or ROOT)
    return place[0] if place else fqn or ROOT, slot


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def origins(rows: Sequence[Row]) -> Rows:
    """Say of every failing row whether its module made the error or was given it.

    Args:
        rows: Rows of modules in order of execution: inputs as a module starts, outputs as it ends.
            Where a module's inputs were not recorded, all that ended before stands for them.

    Returns:
        The rows, with `origin` where they failed.
    """
    rows = Rows.of(rows)
    spots, slots, starts = _Spots(rows), _slots(rows), _starts(rows)
    places = list(rows.each("fqn", "step", "branch"))
    excess = array("d", _excess(rows))
    given, before = array("d", bytes(8 * len(rows))), 0.0
    found = list(rows.each("origin"))
    failed = zip(rows.each("verdict", "floor"), gross(rows), strict=True)
    for at, ((verdict, floor), apart) in enumerate(failed):
        (fqn, step, branch), slot = places[at], slots[at]
        if slot == "in":
            given[spots.of[at]] = max(given[spots.of[at]], excess[at])
        if verdict in _FAILED or apart:
            if slot == "out" and slots[starts[at]] == "in":
                inner = range(starts[at], at)
                own = (n for n in inner if slots[n] == "in" and starts[n] == starts[at])
                parts = (n for n in inner if slots[n] == "out" and _part(places[n], places[at]))
                known = max((excess[n] for n in (*own, *parts)), default=0.0)
            else:
                holders = (spots.find(holder, step, branch) for holder in around(fqn or ROOT))
                known = max([before, *(given[n] for n in holders if n is not None)])
            limit = JUMP[floor.source if floor else "analytic"]
            found[at] = "introduced" if excess[at] > limit * known else "inherited"
        if slot == "out":
            before = max(before, excess[at])
    return rows.replaced(origin=found)


def _starts(rows: Rows) -> array[int]:
    """Of every row the first that is of the same call: module, step and branch."""
    calls = Texts()
    for name in rows.each("name"):
        calls.append(str(key_of(name).but(name="")))
    return array("i", (calls.find(call) or 0 for call in calls))


def introduced(rows: Sequence[Row]) -> list[Divergence]:
    """Modules that made an error of their own, in order of execution, each once.

    A module whose *input* is introduced was given something wrong by the code of the module around
    it, which is the one that is named.
    """
    found: dict[str, Divergence] = {}
    rows = Rows.of(rows)
    places = enumerate(rows.each("origin"))
    for row in rows.take(at for at, origin in places if origin == "introduced"):
        own = row.fqn or ROOT
        slot = key_of(row.name).name.partition(".")[0]
        given = slot == "in" and own != ROOT
        at = parent(own) if given else own
        kind = f"before {own}" if given else GIVEN if slot == "in" else None
        kind = _joined(kind or "", row.note) if row.verdict is Verdict.INCOMPARABLE else kind
        place = Divergence(
            name=row.name, stage="module", step=row.step, branch=row.branch, fqn=at, kind=kind
        )
        found.setdefault(at, place)
    return list(found.values())


def _excess(rows: Rows) -> Iterator[float]:
    """How many times over its floor a row is; 0 where nothing was measured and nothing failed."""
    for verdict, ratio, apart in zip(
        rows.each("verdict"), rows.each("ratio"), gross(rows), strict=True
    ):
        if verdict is Verdict.INVALID or (verdict is Verdict.INCOMPARABLE and apart):
            yield math.inf
        else:
            yield 0.0 if ratio is None or math.isnan(ratio) else ratio


_Place = tuple[str | None, int | None, str | None]
"""A module (none: the whole model) in one step and branch."""


def _part(inner: _Place, outer: _Place) -> bool:
    """Whether a module is a part of another one, in its step and branch."""
    if inner[1:] != outer[1:]:
        return False
    own, holder = inner[0] or ROOT, outer[0] or ROOT
    return own != holder and (holder == ROOT or own.startswith(f"{holder}."))
