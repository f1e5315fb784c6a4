"""The ledger of known failures: drifts that are expected, and stay visible. No torch.

A skipped test says nothing from then on. An entry here says where a case drifts and how far, and
the case is still checked: it passes as a *known failure* while it does just that, and fails when
it is worse, drifts somewhere else, or got better. A ledger (`truestep-known.toml`)::

    [known.red-three]
    reason = "the fused kernel drops the bias of blocks.3.attn2.to_q (issue 41)"
    since = 2024-10-01
    stage = "prediction"
    rel_l2 = 1.2e-2
    tolerance = 0.5

`ratio` in place of `rel_l2` states a multiple of the noise floor. `modality` (`audio` or `video`)
says of which a joint model's drift is. Tensors that belong to no stage are at stage `tensors`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from truestep.errors import UsageError
from truestep.keys import STAGES
from truestep.reading import parse_toml, read
from truestep.verdict import Comparison, KnownFailure, Record, Row, Verdict

TABLE = "known"

TENSORS = "tensors"
"""Stage of the tensors that belong to none."""

TOLERANCE = 0.5
"""Share by which what is stated may be off, either way, where an entry does not say, and the most
that it may say: two benign roundings on top of a drift move it by far less, another fault of its
size by more."""

NOTHING_LEFT = 1.0
"""A rel_l2 from which on a tensor could as well be another: whatever fails has that size."""


_FIRST_TO_HAVE_A_DATE = timezone(timedelta(hours=14))


class Entry(Record):
    """One known failure.

    Attributes:
        reason: Why it drifts, and who knows of it.
        since: When it was first seen; a date that has been.
        stage: Where it drifts; see `truestep.keys`. modality: of a joint model.
        rel_l2: Its size; the largest of the drifted tensors of that stage.
        ratio: The same in multiples of the noise floor. One of the two is given.
        tolerance: Share by which the measured size may differ, either way; at most 0.5.
    """

    reason: str
    since: date
    stage: str
    modality: Literal["audio", "video"] | None = None
    rel_l2: float | None = Field(default=None, gt=0, lt=NOTHING_LEFT, allow_inf_nan=False)
    ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tolerance: float = Field(default=TOLERANCE, gt=0, le=TOLERANCE, allow_inf_nan=False)

    @field_validator("reason")
    @classmethod
    def _says_something(cls, reason: str) -> str:
        if not any(character.isalnum() for character in reason):
            raise ValueError("say why it drifts, and who knows of it")
        return reason

    @field_validator("since", mode="before")
    @classmethod
    def _has_been(cls, since: object) -> object:
        """Refuse what pydantic would make a date of (numbers, times), and the future."""
        if isinstance(since, str):
            with suppress(ValueError):
                since = date.fromisoformat(since)
        if not isinstance(since, date) or isinstance(since, datetime):
            raise ValueError("write it as a date that there is: since = 2024-10-01")
        if since > datetime.now(_FIRST_TO_HAVE_A_DATE).date():
            raise ValueError("this date is in the future: say when it was first seen")
        return since

    @model_validator(mode="after")
    def _consistent(self) -> Entry:
        if (self.rel_l2 is None) == (self.ratio is None):
            raise ValueError("state its size as rel_l2 or as ratio, one of the two")
        stages = (*STAGES, "module", "output", "input", TENSORS)
        if self.stage not in stages:
            near = difflib.get_close_matches(self.stage, stages, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no stage {self.stage!r} among {', '.join(stages)}{hint}")
        return self

    @property
    def statistic(self) -> Literal["rel_l2", "ratio"]:
        """Which of the two is stated."""
        return "rel_l2" if self.rel_l2 is not None else "ratio"

    @property
    def stated(self) -> float:
        """The size that is stated."""
        return self.rel_l2 if self.rel_l2 is not None else self.ratio or 0.0

    @property
    def place(self) -> str:
        """Where it drifts, in words."""
        return f"{self.stage} ({self.modality})" if self.modality else self.stage


def read_ledger(path: str | Path, *, cases: Iterable[str] | None = None) -> dict[str, Entry]:
    """Read a ledger of known failures.

    Args:
        path: A TOML file with `[known.CASE]` tables and nothing else.
        cases: Names that entries may have; None where they are not known yet.

    Raises:
        UsageError: It cannot be read, an entry is not valid, or one names no case.
    """
    path = Path(path)
    tables = read(
        path,
        "the ledger of known failures cannot be read",
        parse_toml,
        raises=UsageError,
        hint="it holds [known.CASE] tables with reason, since, stage and rel_l2",
    )
    unknown = sorted(set(tables) - {TABLE})
    if unknown or not isinstance(tables.get(TABLE, {}), dict):
        raise UsageError(
            f"unknown table {unknown[0]!r} in the ledger" if unknown else "known is not a table",
            where=str(path),
            hint="it holds [known.CASE] tables only",
        )
    ledger = {name: _entry(name, table, path) for name, table in tables.get(TABLE, {}).items()}
    if cases is not None:
        check_names(ledger, cases, where=str(path))
    return ledger


def check_names(ledger: Iterable[str], cases: Iterable[str], *, where: str) -> None:
    """Refuse entries that name no case: nothing would ever be judged by them.

    Raises:
        UsageError: There is one.
    """
    known = list(cases)
    stray = [name for name in ledger if name not in known]
    if not stray:
        return
    near = difflib.get_close_matches(stray[0], known, n=1)
    raise UsageError(
        f"{len(stray)} known failure{'s' if len(stray) > 1 else ''} of no case: "
        + ", ".join(repr(name) for name in stray[:5]),
        where=where,
        measured=f"cases: {', '.join(known[:20]) or 'none'}",
        likely=f"did you mean {near[0]!r}?" if near else "the case was renamed or removed",
        hint="rename or delete the entry",
    )


def _entry(name: str, table: object, path: Path) -> Entry:
    try:
        return Entry.model_validate(table)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            key = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}" if key else message)
        raise UsageError(
            f"a known failure is not valid: {lines[0]}",
            where=f"{path}: [known.{name}]",
            measured="\n".join(lines) if len(lines) > 1 else "",
        ) from None


def judged(comparison: Comparison, ledger: Mapping[str, Entry], *names: str) -> Comparison:
    """Judge a comparison by its ledger entry, if it has one under one of its names.

    The verdict stays what it is; `known` holds the judgement, and `exit_code` follows it.
    """
    name = next((name for name in names if name in ledger), None)
    if name is None:
        return comparison
    entry = ledger[name]
    outcome, measured, text = _judge(comparison, entry, name)
    known = KnownFailure(
        name=name,
        outcome=outcome,
        text=text,
        reason=entry.reason,
        since=entry.since.isoformat(),
        stage=entry.stage,
        modality=entry.modality,
        statistic=entry.statistic,
        stated=entry.stated,
        tolerance=entry.tolerance,
        measured=measured,
    )
    if outcome == "not judged":
        return comparison.model_copy(update={"known": known})
    return comparison.model_copy(update={"known": known, "sentence": f"{name}: {text}"})


_Outcome = Literal["known", "worse", "elsewhere", "better", "passes", "not judged"]


def _judge(comparison: Comparison, entry: Entry, name: str) -> tuple[_Outcome, float | None, str]:
    """Outcome, measured size, and both in words."""
    if comparison.verdict.passed:
        text = f"a known failure passes ({comparison.verdict}): delete the entry [known.{name}]"
        return "passes", None, text
    if comparison.verdict is not Verdict.DRIFTED:
        text = f"the known failure is not judged: {comparison.verdict} is not a drift"
        return "not judged", None, text
    unjudged = _unjudged(comparison, entry)
    if unjudged:
        return "not judged", None, f"the known failure is not judged: {unjudged}"
    drifted = [row for row in comparison.rows if row.verdict is Verdict.DRIFTED]
    stray = [row for row in drifted if not _there(row, entry)]
    if stray:
        first, more = stray[0], f" and {len(stray) - 1} more" if len(stray) > 1 else ""
        where = _place(first)
        text = f"drifts elsewhere: {first.name} at {where}{more}; known is {entry.place} only"
        return "elsewhere", _largest(stray, entry), text
    measured = _largest(drifted, entry)
    if measured is None:
        return "worse", None, f"drifts at {entry.place}, and its {entry.statistic} is not known"
    gone = [r.name for r in drifted if r.metrics and not r.metrics.rel_l2 < NOTHING_LEFT]
    if gone:
        text = f"worse than known at {entry.place}: of {gone[0]} nothing is left (rel_l2 1 or more)"
        return "worse", measured, text
    unit = "rel_l2" if entry.statistic == "rel_l2" else "x floor"
    both = f"stated {entry.stated:.1e}, measured {measured:.1e} {unit}"
    factor = 1 + entry.tolerance
    if not measured <= entry.stated * factor:  # NaN is worse
        return "worse", measured, f"worse than known at {entry.place}: {both}"
    if measured < entry.stated / factor:
        return "better", measured, f"better than known at {entry.place}: tighten me: {both}"
    since = entry.since.isoformat()
    count = f"{len(drifted)} tensor{'s' if len(drifted) > 1 else ''}"
    text = f"known failure at {entry.place} since {since}: {count}, {both}: {entry.reason}"
    return "known", measured, text


def _unjudged(comparison: Comparison, entry: Entry) -> str:
    """What besides a drift is wrong, and no ledger expects; empty where nothing is."""
    if comparison.case_differences:
        return f"{comparison.case_differences[0].key} is not the reference's"
    absent = [*comparison.missing, *comparison.unexpected]
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        return f"{absent[0]}{more} is on one side only"
    for row in comparison.rows:
        undecided = row.verdict is Verdict.INCONCLUSIVE and _there(row, entry)
        if not (row.verdict.passed or row.verdict is Verdict.DRIFTED or undecided):
            return f"{row.name} at {_place(row)} is {row.verdict}, which is not a drift"
    return ""


def _there(row: Row, entry: Entry) -> bool:
    return (row.stage or TENSORS) == entry.stage and row.modality == entry.modality


def _place(row: Row) -> str:
    return (row.stage or TENSORS) + (f" ({row.modality})" if row.modality else "")


def _largest(rows: Iterable[Row], entry: Entry) -> float | None:
    """Largest stated statistic of some rows; None where one of them does not have it."""
    if entry.statistic == "ratio":
        found = [row.ratio for row in rows]
    else:
        found = [row.metrics.rel_l2 if row.metrics else None for row in rows]
    values = [value for value in found if value is not None]
    if not values or len(values) < len(found):
        return None
    return next((value for value in values if value != value), max(values))  # NaN hides nothing
