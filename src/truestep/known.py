"""The ledger of known failures: drifts that are expected, and stay visible. No torch.

A skipped test says nothing from then on. An entry here says where a case drifts and how far, and
the case is still checked: it passes as a *known failure* while it does just that, and fails when
it is worse, drifts somewhere else, or got better. A ledger (`truestep-known.toml`)::

    [known.red-three]
    reason = "the fused kernel drops the bias of blocks.3.attn2.to_q (issue 41)"
    since = 2026-10-01
    stage = "prediction"
    rel_l2 = 1.2e-2
    tolerance = 1.5

`ratio` in place of `rel_l2` states a multiple of the noise floor. `modality` (`audio` or `video`)
says of which a joint model's drift is. Tensors that belong to no stage are at stage `tensors`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from truestep.errors import UsageError
from truestep.reading import parse_toml, read
from truestep.recording.names import STAGES
from truestep.verdict import Comparison, KnownFailure, Record, Row, Verdict

LEDGER_FILE = "truestep-known.toml"
TABLE = "known"

TENSORS = "tensors"
"""Stage of the tensors that belong to none."""

TOLERANCE = 1.5
"""What is stated may be off by this factor, either way, where an entry does not say: two benign
roundings on top of a drift move it by far less, another fault of its size by more."""


class Entry(Record):
    """One known failure.

    Attributes:
        reason: Why it drifts, and who knows of it.
        since: When it was first seen.
        stage: Where it drifts; see `truestep.recording.names`. modality: of a joint model.
        rel_l2: Its size; the largest of the drifted tensors of that stage.
        ratio: The same in multiples of the noise floor. One of the two is given.
        tolerance: Factor, above 1, by which the measured size may differ, either way.
    """

    reason: str = Field(min_length=1)
    since: date
    stage: str
    modality: Literal["audio", "video"] | None = None
    rel_l2: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tolerance: float = Field(default=TOLERANCE, gt=1, allow_inf_nan=False)

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

    Returns:
        Case name to entry.

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
    unit = "rel_l2" if entry.statistic == "rel_l2" else "x floor"
    both = f"stated {entry.stated:.1e}, measured {measured:.1e} {unit}"
    if not measured <= entry.stated * entry.tolerance:  # NaN is worse
        return "worse", measured, f"worse than known at {entry.place}: {both}"
    if measured < entry.stated / entry.tolerance:
        return "better", measured, f"better than known at {entry.place}: tighten me: {both}"
    since = entry.since.isoformat()
    text = f"known failure at {entry.place} since {since}: {both}: {entry.reason}"
    return "known", measured, text


def _there(row: Row, entry: Entry) -> bool:
    return (row.stage or TENSORS) == entry.stage and row.modality == entry.modality


def _place(row: Row) -> str:
    return (row.stage or TENSORS) + (f" ({row.modality})" if row.modality else "")


def _largest(rows: Iterable[Row], entry: Entry) -> float | None:
    """Largest stated statistic of some rows; None where none has it."""
    if entry.statistic == "ratio":
        found = [row.ratio for row in rows if row.ratio is not None]
    else:
        found = [row.metrics.rel_l2 for row in rows if row.metrics is not None]
    return next((v for v in found if v != v), max(found)) if found else None  # NaN hides nothing
