"""What an id of a brief stands for: one record of a result, by its position in the JSON."""

from __future__ import annotations

import re
from typing import Any

from truestep.errors import UsageError
from truestep.experiment.ablation_records import Ablation, Matrix
from truestep.experiment.perf_records import PerfResult, PerfResults
from truestep.experiment.quality.records import Quality, QualityCell
from truestep.experiment.records import CellResult, Experiment, Sameness
from truestep.records import Record
from truestep.report.items import items_of
from truestep.report.results_file import AnyResult
from truestep.text import listed, nearest
from truestep.verdict import Comparison, Results

PARTS: dict[type[Record], dict[str, str]] = {
    Results: {"c": "comparisons"},
    Comparison: {
        "r": "rows",
        "n": "notes",
        "g": "gates",
        "d": "case_differences",
        "e": "environment_differences",
        "f": "evidence.findings",
        "l": "rule_changes",
        "x": "media",
    },
    Experiment: {"c": "cells", "n": "notes"},
    CellResult: {
        "q": "reasons",
        "m": "missing",
        "n": "notes",
        "k": "checks",
        "s": "samples",
        "b": "repeats",
    },
    Quality: {"c": "candidates", "n": "notes", "v": "votes"},
    QualityCell: {"q": "reasons", "r": "rows"},
    Sameness: {"c": "steps"},
    Ablation: {"c": "switches", "n": "notes", "k": "attributions"},
    Matrix: {"k": "cells", "n": "notes"},
    PerfResults: {"c": "results"},
    PerfResult: {"r": "rows", "p": "problems", "n": "notes", "a": "alternatives", "s": "runs"},
}
"""Of a record, the letter of each of its lists."""

_PART = re.compile(r"([a-z])(\d{1,9})")


def detail(result: AnyResult, name: str) -> dict[str, Any]:
    """What an id stands for, as plain data; lists in it that have ids of their own are counted.

    Args:
        name: `c0.r12`; `r12` where the result has one part alone.

    Raises:
        UsageError: There is no such id.
    """
    parts = name.split(".")
    whole = isinstance(result, Comparison)
    single = whole or len(items_of(result)) == 1
    if single and parts[0][:1] not in ("c", "") and _letter(result, parts[0]) is None:
        parts = ["c0", *parts]
    found: Any = result
    if whole and parts[0] == "c0":
        parts = parts[1:]
    for part in parts:
        found = _step(found, part, name, result)
    told = _bare(found) if isinstance(found, Record) else {"text": found}
    item = next((i for i in items_of(result) if i.id == name), None)
    return told if item is None else {**told, "next": item.next, "decide": item.decide}


def _letter(record: Any, part: str) -> str | None:
    """The list that a part of an id names."""
    match = _PART.fullmatch(part)
    lists = PARTS.get(type(record), {})
    return lists.get(match[1]) if match else None


def _step(record: Any, part: str, name: str, result: AnyResult) -> Any:
    field = _letter(record, part)
    match = _PART.fullmatch(part)
    if field is None or match is None:
        raise _none(name, result, f"{part!r} is no part of a {type(record).__name__}")
    found = record
    for attribute in field.split("."):
        found = getattr(found, attribute, None)
    values = (found,) if isinstance(found, Record) else (found or ())
    at = int(match[2])
    if at >= len(values):
        raise _none(name, result, f"there are {len(values)} {field} there")
    return values[at]


def _none(name: str, result: AnyResult, why: str) -> UsageError:
    ids = [proof.id for item in items_of(result) for proof in item.evidence]
    ids = [*(item.id for item in items_of(result)), *ids]
    near = nearest(name, ids)
    measured = f"{why}; {near}" if near else why
    return UsageError(
        f"no part of the result is called {name!r}",
        measured=measured,
        likely=f"ids: {listed(ids, 12)}",
    )


def _bare(record: Record) -> dict[str, Any]:
    """A record as plain data, without lists that have ids of their own, and without pictures."""
    lists = {
        field.partition(".")[0]: letter for letter, field in PARTS.get(type(record), {}).items()
    }
    counted = set(lists) - {"notes"}
    plain = record.model_dump(mode="json", exclude=counted)
    told = {k: _without_pictures(v) for k, v in plain.items() if v not in (None, "", [], {})}
    for key in counted:
        value = getattr(record, key)
        count = 1 if isinstance(value, Record) else len(value or ())
        if count:
            told[key] = f"{count}: {lists[key]}0 to {lists[key]}{count - 1}"
    return told


def _without_pictures(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("data:"):
        return f"{value.partition(',')[0]}, {len(value):,} characters"
    if isinstance(value, list):
        return [_without_pictures(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_pictures(each) for key, each in value.items()}
    return value


def lines(told: Any, indent: str = "") -> list[str]:
    """Plain data as lines: a key and its value, what is nested below it."""
    if not isinstance(told, dict):
        return [f"{indent}{told}"]
    found = []
    for key, value in told.items():
        nested = value if isinstance(value, list) else [value]
        if value and all(isinstance(each, dict) for each in nested):
            found.append(f"{indent}{key}")
            for each in nested:
                found += lines(each, indent + "  ")
        elif isinstance(value, list) and any(isinstance(each, str) for each in value):
            found.append(f"{indent}{key}")
            found += [f"{indent}  {each}" for each in value]
        else:
            found.append(f"{indent}{key:<18} {value}")
    return found
