"""From options to a plan of `ab --quality`: prompts, seeds, candidates; refused before any run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truestep.case import Case
from truestep.errors import UsageError
from truestep.experiment.planning import arm_case, planned_cases
from truestep.experiment.prompts import pinned
from truestep.experiment.quality import digits_judge as judge
from truestep.experiment.quality.records import QualityPlan
from truestep.experiment.quality.statistics import LEAST_PROMPTS
from truestep.experiment.records import PlannedCase, PlannedCell
from truestep.reading import read

PROMPTS = 32
"""Prompts where none are given: see the power in `bench/results/quality.md`."""

SEEDS = 4
"""Seeds of every prompt, likewise."""

FEWER = (0.75, 0.5, 0.25)
"""Shares of the baseline's steps that a frontier is set beside."""

FEWEST_STEPS = 2
_APART = 1_000
"""Seeds between two prompts: seeds of one do not become those of the next."""


def prompt_cases(model: str, prompts: Sequence[str]) -> dict[str, Case]:
    """Cases of one model, one a prompt, with seeds of their own.

    Raises:
        UsageError: A prompt comes twice: it would count as two witnesses.
    """
    twice = [prompt for at, prompt in enumerate(prompts) if prompt in prompts[:at]]
    if twice:
        raise UsageError(f"the prompt {twice[0]!r} is given twice")
    cases = [
        Case(model=model, prompt=prompt, seed=_APART * at) for at, prompt in enumerate(prompts)
    ]
    return {case.id: case for case in cases}


def prompts_for(model: str) -> tuple[str, ...]:
    """Prompts of a bare model: the 160 of the digits in an even order, five of any other."""
    return judge.prompts() if model == "builtin:digits" else pinned(model)


def prompts_in(path: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines and those that begin with # are left out.

    Raises:
        FileFormatError: It cannot be read.
        UsageError: It holds none.
    """
    text = read(path, "the file of prompts cannot be read", lambda data: data.decode("utf-8"))
    found = [line.strip() for line in text.splitlines()]
    found = [line for line in found if line and not line.startswith("#")]
    if not found:
        raise UsageError("the file of --prompts holds no prompt", where=str(path))
    return tuple(found)


def cases_of(cases: Mapping[str, Case], *, most: int) -> tuple[PlannedCase, ...]:
    """The cases of an experiment, each a prompt of its own.

    Raises:
        UsageError: There are too few, two have the same prompt, or one makes several clips.
    """
    chosen = planned_cases(cases, most=most)
    if len(chosen) < LEAST_PROMPTS:
        raise UsageError(
            f"quality is judged over prompts: {len(chosen)} cannot decide anything",
            measured=f"{LEAST_PROMPTS} are the least, {PROMPTS} decide most changes",
            hint="give --prompts FILE, one a line",
        )
    seen: dict[str, str] = {}
    for planned in chosen:
        prompt = str(planned.content["prompt"])
        if prompt in seen:
            raise UsageError(
                "two cases have the same prompt: seeds of one prompt are no two witnesses",
                where=f"{seen[prompt]} and {planned.name}",
                hint="give --seeds N: every prompt is run from N seeds",
            )
        seen[prompt] = planned.name
        if (planned.content.get("settings") or {}).get("videos_per_prompt") not in (None, 1):
            raise UsageError(
                "videos_per_prompt makes several clips at once: seeds are run one by one here",
                where=planned.name,
                hint="give --seeds N: every prompt is run from N seeds",
            )
    return chosen


def alone(candidate: Mapping[str, Any]) -> PlannedCell:
    """The one candidate of an experiment without a matrix."""
    name = ", ".join(f"{key}={value}" for key, value in candidate.items())
    return PlannedCell(name=name or "the change", folder="candidate", candidate=dict(candidate))


def with_candidate(cells: Sequence[PlannedCell], own: Mapping[str, Any]) -> list[PlannedCell]:
    """Cells of a matrix as candidates: what was shared by all arms in `ab` is the candidate's here.

    Raises:
        UsageError: A key is both in the matrix and in --set.
    """
    found = []
    for cell in cells:
        values = {**cell.settings, **cell.candidate}
        if cell.compile:
            values["compile"] = cell.mode or "on"
        both = sorted(values.keys() & own.keys())
        if both:
            raise UsageError(
                f"{both[0]} is both in --matrix and in --set: one would hide the other"
            )
        folder = re.sub(r"[^\w.=-]+", "-", cell.folder)
        found.append(PlannedCell(name=cell.name, folder=folder, candidate={**own, **values}))
    return found


def fewer_steps(
    cases: Sequence[PlannedCase], cells: Sequence[PlannedCell], baseline: Mapping[str, Any]
) -> list[PlannedCell]:
    """The baseline with fewer steps, as candidates; those that a cell is already are left out."""
    steps = arm_case(cases[0], alone({}), baseline)[0].steps
    taken = {str(cell.candidate.get("steps")) for cell in cells if len(cell.candidate) == 1}
    wanted = dict.fromkeys(max(FEWEST_STEPS, round(share * steps)) for share in FEWER)
    return [
        PlannedCell(name=f"steps={n}", folder=f"fewer-steps={n}", candidate={"steps": n})
        for n in wanted
        if n < steps and str(n) not in taken
    ]


def is_fewer_steps(cell: PlannedCell) -> bool:
    """Whether a candidate is the baseline with other steps and nothing else."""
    return set(cell.candidate) == {"steps"}


def validate(plan: QualityPlan) -> None:
    """Refuse what cannot mean anything.

    Raises:
        CaseError: A setting or value is not possible.
        UsageError: A candidate is the baseline, or generates something of another size.
    """
    for cell in plan.cells:
        ours = arm_case(plan.cases[0], _bare(cell), plan.baseline, option="--vs")
        own = {**plan.baseline, **cell.candidate}
        theirs = arm_case(plan.cases[0], _bare(cell), own, option="--set")
        applied = bool(plan.apply) and not cell.folder.startswith("fewer-steps=")
        if ours == theirs and not applied:
            raise UsageError(
                "the arms do not differ: the candidate is the baseline",
                where=cell.name,
                hint="give --set KEY=VALUE or --apply FILE.py:FUNCTION",
            )
        for key in ("height", "width", "num_frames", "prompt", "seed", "model"):
            if getattr(ours[0], key) != getattr(theirs[0], key):
                raise UsageError(
                    f"{key} differs between the arms: they would not share their noise",
                    where=cell.name,
                    hint=f"drop {key}",
                )


def _bare(cell: PlannedCell) -> PlannedCell:
    return cell.model_copy(update={"settings": {}, "candidate": {}, "compile": False, "mode": ""})
