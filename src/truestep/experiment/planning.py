"""From options to a plan: cells of the matrix, cases, arms. Everything is validated here, before
any model is loaded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from truestep.call_case import COMPILE_MODES
from truestep.case import Case
from truestep.errors import CaseError, UsageError
from truestep.experiment.prompts import pinned
from truestep.experiment.records import ArmName, Plan, PlannedCase, PlannedCell

COMPILE = "compile"
"""A switch of arms and cells that is no setting of a case: run through torch.compile."""

_ON = {"true": "on", "1": "on", "false": "off", "0": "off"}

_LOADED = ("model", "revision", "dtype", "settings")
"""What the cases of one experiment must have in common: only loading can honour it."""


def parse_matrix(dimensions: Sequence[str]) -> list[PlannedCell]:
    """Every combination of `KEY=VALUE,VALUE` dimensions; none is one cell without settings.

    Raises:
        UsageError: A dimension has no key or no values, or a key or value comes twice.
    """
    axes: dict[str, list[str]] = {}
    for text in dimensions:
        key, equals, values = text.partition("=")
        if not equals or not key:
            raise UsageError(
                f"--matrix needs KEY=VALUE,VALUE, got {text!r}",
                hint="e.g. --matrix dtype=float32,bfloat16 --matrix compile=off,on",
            )
        found = [value.strip() for value in values.split(",")]
        if not all(found):
            raise UsageError(
                f"--matrix {key} has no values"
                if found == [""]
                else f"--matrix {text}: a value is empty",
                hint=f"e.g. --matrix {key}=A,B",
            )
        if key in axes:
            raise UsageError(f"--matrix {key} is given twice")
        twice = [value for value in found if found.count(value) > 1]
        if twice:
            raise UsageError(f"--matrix {key}={twice[0]} is given twice")
        axes[key] = found
    return [
        _cell(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]


def _cell(values: Mapping[str, str]) -> PlannedCell:
    settings = {key: _plain(value) for key, value in values.items() if key != COMPILE}
    mode = switch(values.get(COMPILE, "off"), where="--matrix")
    own = ", ".join(f"{key}={value}" for key, value in values.items())
    name = "_".join(f"{key}={value}" for key, value in values.items() if key != COMPILE)
    folder = re.sub(r"[^\w.=-]+", "-", name) or "as-is"
    above = {"off": "eager", "on": "compile"}.get(mode, f"compile-{mode}")
    return PlannedCell(
        name=own or "as it is",
        folder=f"{above}/{folder}",
        settings=settings,
        compile=mode != "off",
        mode="" if mode in ("off", "on") else mode,
    )


def switch(value: object, *, where: str) -> str:
    """`off`, `on`, or a mode of torch.compile.

    Raises:
        UsageError: It is something else.
    """
    found = _ON.get(str(value).lower(), str(value).lower())
    if found not in COMPILE_MODES:
        raise UsageError(
            f"compile = {value!r}: it is on or off, or a mode of torch.compile",
            where=where,
            measured=f"its modes: {', '.join(COMPILE_MODES[2:])}",
        )
    return found


def _plain(value: str) -> str | None:
    return None if value.lower() == "none" else value


def planned_cases(cases: Mapping[str, Case], *, most: int | None = None) -> tuple[PlannedCase, ...]:
    """Cases of one model as an experiment keeps them.

    Raises:
        UsageError: There is none, or they are of several models, precisions or settings.
    """
    if most is not None and most < 1:
        raise UsageError(f"--num-prompts {most}: at least one is needed")
    chosen = dict(itertools.islice(cases.items(), most))
    if not chosen:
        raise UsageError("there is no case to run")
    first_name, first = next(iter(chosen.items()))
    for name, case in chosen.items():
        for key in _LOADED:
            if getattr(case, key) != getattr(first, key):
                raise UsageError(
                    f"the cases of one experiment share a model and its settings: {key} differs",
                    where=f"{name} and {first_name}",
                    hint="run them one by one, each with its own --output",
                )
    return tuple(PlannedCase(name=name, content=content_of(case)) for name, case in chosen.items())


def content_of(case: Case) -> dict[str, Any]:
    """A case as JSON that `Case(**content)` reads back, wherever it is read."""
    content = case.model_dump(mode="json")
    if case.model_path != case.__class__(**content).model_path:  # relative to its case file
        content["model"] = str(case.model_path.resolve())
    return content


def pinned_cases(model: str, *, most: int | None = None) -> dict[str, Case]:
    """The five prompts for a bare model; see `truestep.experiment.prompts`."""
    cases = [
        Case(model=model, prompt=prompt, seed=seed) for seed, prompt in enumerate(pinned(model))
    ]
    return {case.id: case for case in cases[:most]}


def arm_case(
    planned: PlannedCase,
    cell: PlannedCell,
    own: Mapping[str, Any],
    *,
    option: str = "--set",
) -> tuple[Case, str]:
    """A case as one arm runs it in one cell, and how it is compiled: `off`, `on`, a mode.

    Raises:
        CaseError: A setting is unknown or a value is not possible; it says which option gave it.
    """
    case = Case(**planned.content)
    for where, changes in ((_where(cell), cell.settings), (_shown(option, own), own)):
        values = {key: value for key, value in changes.items() if key != COMPILE}
        try:
            case = case.replace(**values)
        except CaseError as error:
            error.where = where
            raise
    of_cell = cell.mode or ("on" if cell.compile else "off")
    mode = switch(own.get(COMPILE, of_cell), where=option)
    return case.replace(compile="off"), mode  # an arm is compiled once its change is made


def _where(cell: PlannedCell) -> str:
    return f"--matrix, cell {cell.name}"


def _shown(option: str, own: Mapping[str, Any]) -> str:
    return " ".join(f"{option} {key}={value}" for key, value in own.items()) or option


def validate(
    cases: Iterable[PlannedCase],
    cells: Iterable[PlannedCell],
    *,
    baseline: Mapping[str, Any],
    candidate: Mapping[str, Any],
    apply: str,
    alike: bool,
) -> None:
    """Refuse what cannot mean anything, before any compute.

    Args:
        cases, cells: Everything that would run.
        baseline, candidate: Settings of the arms.
        apply: The change in the candidate, if there is one.
        alike: Two equal arms are wanted (`--expect same`).

    Raises:
        CaseError: A setting or value is not possible in some cell.
        UsageError: The arms do not differ.
    """
    cells = tuple(cells)
    of_cells = any(cell.candidate for cell in cells)
    if not (baseline or candidate or apply or alike or of_cells):
        raise UsageError(
            "the arms do not differ: there is no switch to test",
            hint="give --set KEY=VALUE, --apply FILE.py:FUNCTION, or --expect same for an A/A run",
        )
    for planned in cases:
        for cell in cells:
            ours, compiled = arm_case(planned, cell, baseline, option="--vs")
            theirs, also = arm_case(planned, cell, {**candidate, **cell.candidate}, option="--set")
            _refuse_masked(cell, {**baseline, **candidate})
            equal = (ours, compiled) == (theirs, also)
            if equal and not apply and not alike:
                raise UsageError(
                    "the arms do not differ: the candidate is the baseline",
                    where=_where(cell) if cell.settings or cell.compile else planned.name,
                    measured=f"{_shown('--set', candidate)} is what the baseline has already",
                    hint="give another value, or --expect same for an A/A run",
                )


def _refuse_masked(cell: PlannedCell, own: Mapping[str, Any]) -> None:
    for key in own:
        if key in cell.settings:
            raise UsageError(
                f"{key} is both in --matrix and in an arm: one would hide the other",
                where=_where(cell),
            )


def own_settings(plan: Plan, arm: ArmName, cell: PlannedCell) -> Mapping[str, Any]:
    """Settings of an arm in a cell; the control's are the baseline's."""
    return {**plan.candidate, **cell.candidate} if arm == "candidate" else plan.baseline


def matrix_alone(dimensions: Sequence[str]) -> tuple[dict[str, Any], list[PlannedCell]]:
    """A matrix that is the switch itself: the settings of the baseline, which has the first value
    of each dimension, and a cell for every other combination, of its own candidate.

    Raises:
        UsageError: As `parse_matrix`; or there is but one combination.
    """
    first, *others = parse_matrix(dimensions)
    if not others:
        raise UsageError(
            "the arms do not differ: the matrix has one value",
            measured=first.name,
            hint="e.g. --matrix compile=off,on",
        )
    cells = [
        PlannedCell(name=cell.name, folder=cell.folder, candidate=_values(cell)) for cell in others
    ]
    return {key: value for key, value in _values(first).items() if _named(key, dimensions)}, [
        cell.model_copy(
            update={"candidate": {k: v for k, v in cell.candidate.items() if _named(k, dimensions)}}
        )
        for cell in cells
    ]


def _values(cell: PlannedCell) -> dict[str, Any]:
    """Settings of a cell, compile among them."""
    return {**cell.settings, COMPILE: cell.mode or ("on" if cell.compile else "off")}


def _named(key: str, dimensions: Sequence[str]) -> bool:
    return any(text.partition("=")[0] == key for text in dimensions)
