"""Faults and harmless twins of truestep's own corpus, under its own check, on this device."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch

import truestep
from bench.accelerator.families import FAULTY, Family, build, small_call
from bench.accelerator.place import Budget, Here, first_line
from truestep.calls.subject import subject_of
from truestep.recording.format import Recording
from truestep.runtime.changes import thread_count
from truestep.testing.corpus import Entry, NotApplicable, faults, twins
from truestep.testing.corpus.editing import denoiser_name
from truestep.testing.corpus.running import is_named, place_of
from truestep.testing.outputs import leaves
from truestep.verdict import Comparison, Verdict

Row = dict[str, Any]
DTYPES = ("bfloat16", "float16")
COUNT = 20
"""Faults, and twins, in each precision."""

UNDECIDED = Verdict.INCONCLUSIVE.value
"""Does not pass, and does not say that it is another model."""


@dataclass(frozen=True)
class Trusted:
    """What candidates are set against.

    Attributes:
        pipe: The trusted pipeline.
        call: What it is called with.
        recording: What it gave, and its noise floor.
        output: What a free run gives.
    """

    pipe: Any
    call: dict[str, Any]
    recording: Recording
    output: torch.Tensor


def rows(here: Here, budget: Budget, *, count: int = COUNT) -> Iterator[Row]:
    """Every entry in every precision; families share them alike."""
    for at, dtype in enumerate(DTYPES):
        half = budget.part(1 / (len(DTYPES) - at))
        for index, family in enumerate(FAULTY):
            share = half.part(1 / (len(FAULTY) - index))
            quota = len(range(index, count, len(FAULTY)))
            where = {"model": family.name, "dtype": dtype}
            what = f"{quota} faults and {quota} twins of {family.name} in {dtype}"
            if not share.allows(what, f"recording of {family.name}"):
                continue
            try:
                entries = _in_turn(family, quota * index)
                with share.spent(f"recording of {family.name}"):
                    trusted = _trusted(family, here, dtype)
                for row in _planted(entries, trusted, quota, share, of=f"{family.name} in {dtype}"):
                    yield {**where, **row}
            except Exception as error:  # whatever one model raises, the others go on
                yield {**where, "failed": first_line(error)}
            here.clear()


def _trusted(family: Family, here: Here, dtype: str) -> Trusted:
    pipe, call = build(family, here, dtype), small_call(family, here)
    trusted = Trusted(pipe, call, truestep.record(pipe, call=call), _output(pipe, call))
    here.wait()
    return trusted


def _planted(
    entries: Sequence[Entry], trusted: Trusted, quota: int, budget: Budget, *, of: str
) -> Iterator[Row]:
    """So many faults and twins that can be judged, as long as there is time: one takes seconds."""
    taken = {"fault": 0, "twin": 0}
    for entry in entries:
        if taken[entry.kind] == quota:
            continue
        if not budget.allows(f"{entry.kind} {entry.name} of {of}"):
            taken[entry.kind] += 1
            continue
        row = planted(entry, trusted)
        taken[entry.kind] += is_counted(row)
        yield row
    for kind, number in taken.items():
        if number < quota:
            budget.cuts.append(f"{quota - number} more {kind}s of {of}: the corpus has none")


def _in_turn(family: Family, start: int) -> list[Entry]:
    """A fault, a twin, a fault, ...; faults inside models first, twins from another one on in each
    family, as all families have the same ones."""
    wrong, right = [*faults(family.name).values()], [*twins(family.name).values()]
    turned = [*right[start % len(right) :], *right[: start % len(right)]]
    both: Sequence[Sequence[Entry]] = (wrong[::-1], turned)
    return [entry for entry in chain(*zip_longest(*both)) if entry is not None]


def planted(entry: Entry, trusted: Trusted) -> Row:
    """What the check says of a copy of the trusted pipeline that an entry changed."""
    row: Row = {"entry": entry.name, "kind": entry.kind}
    try:
        with thread_count(torch.get_num_threads()):  # a change may leave another number
            if entry.kind == "fault":
                row["effect"] = _effect(_changed(entry, trusted), trusted)
            candidate = _changed(entry, trusted)
            result = truestep.check(candidate, trusted.recording, call=trusted.call)
            return {**row, **_said(entry, candidate, result, trusted)}
    except NotApplicable as error:
        return {**row, "not_applicable": str(error)}
    except Exception as error:  # whatever an entry makes of a model, others go on
        return {**row, "failed": first_line(error)}


def _changed(entry: Entry, trusted: Trusted) -> Any:
    candidate = copy.deepcopy(trusted.pipe)
    return entry.apply(candidate) or candidate


def _effect(candidate: Any, trusted: Trusted) -> float | str:
    """rel_l2 of a free run; `inf` where it raises or gives another shape."""
    try:
        made = _output(candidate, trusted.call)
    except Exception:  # the check is asked all the same
        return "inf"
    if made.shape != trusted.output.shape or not bool(torch.isfinite(made).all()):
        return "inf"
    found = float((made - trusted.output).norm() / trusted.output.norm())
    return found if math.isfinite(found) else "inf"


def _output(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    made = leaves(subject_of(pipe, **call).run())
    return torch.cat([tensor.detach().double().flatten() for tensor in made])


def _said(entry: Entry, candidate: Any, result: Comparison, trusted: Trusted) -> Row:
    passed = result.verdict.passed
    place = place_of(result)
    row: Row = {"verdict": result.verdict.value, "passed": passed, "place": place, "module": ""}
    if not passed:
        row["sentence"] = str(result).splitlines()[0]
    if entry.kind == "fault" and not passed:
        row["named"] = is_named(entry, place, denoiser_name(candidate))
    if not passed and " out" in place:
        opened = truestep.check(
            candidate, trusted.recording, call=trusted.call, depth="modules", trusted=trusted.pipe
        )
        first = opened.first_divergence
        row["module"] = (first.fqn or "") if first is not None else ""
    return row


def is_counted(row: Row) -> bool:
    """Whether a row is one that was to be planted: it was judged, and changes anything."""
    return "verdict" in row and row.get("effect") != 0.0


def counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Found, missed and accused, by precision."""
    found = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        judged = [row for row in rows if row["dtype"] == dtype and is_counted(row)]
        wrong = [row for row in judged if row["kind"] == "fault"]
        right = [row for row in judged if row["kind"] == "twin"]
        found[dtype] = {
            "faults": len(wrong),
            "found": sum(not row["passed"] for row in wrong),
            "found_undecided": sum(row["verdict"] == UNDECIDED for row in wrong),
            "missed": sum(row["passed"] for row in wrong),
            "named": sum(bool(row.get("named")) for row in wrong),
            "twins": len(right),
            "accused": sum(not row["passed"] for row in right),
            "accused_undecided": sum(row["verdict"] == UNDECIDED for row in right),
        }
    return found
