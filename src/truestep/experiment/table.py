"""From what lies in an experiment's folder to its table: one row a cell, one verdict each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from truestep.case import Case
from truestep.environment import library_version
from truestep.experiment import repeats as others
from truestep.experiment.records import (
    ARMS,
    ArmSummary,
    CellResult,
    Experiment,
    Failure,
    Plan,
    PlannedCell,
    Remark,
    Repeat,
    Sameness,
    Sample,
    Speed,
)
from truestep.experiment.statistics import (
    LEVEL,
    Interval,
    Outcome,
    interval,
    median,
    outcome,
    paired_ratios,
    rounds_for_width,
    rounds_to_decide,
    within,
)
from truestep.experiment.store import Store
from truestep.judge.shift import MOVED
from truestep.verdict import Verdict

_RUNS = 2 * len(ARMS)


def summarise(store: Store) -> Experiment:
    """Make the table of whatever is in the folder.

    Raises:
        FileFormatError: There is no plan in it.
    """
    plan = store.plan()
    cells = [_cell(store, plan, cell) for cell in plan.cells]
    return Experiment.of(
        plan,
        cells,
        environment=store.environment(),
        tool_version=library_version("truestep") or "",
    )


def complete_rounds(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The samples of every complete round in the order they ran, by round.

    A round that was cut short and run anew counts once, in its complete form.
    """
    groups: dict[tuple[int, int], dict[int, Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.round, sample.session), {})[sample.place] = sample
    whole = {
        number: [group[place] for place in range(_RUNS)]
        for (number, _), group in sorted(groups.items())
        if set(group) == set(range(_RUNS))
    }
    return [whole[number] for number in sorted(whole)]


def speed_of(rounds: Sequence[Sequence[Sample]], plan: Plan, arm: str) -> Speed:
    """An arm's time over the baseline's."""
    runs = [[(s.arm, s.seconds) for s in found] for found in rounds]
    found = interval(paired_ratios(runs, actual=arm, reference="baseline"))
    said = outcome(found, margin=plan.margin)
    needed = None
    if said is Outcome.UNDECIDED:
        needed = rounds_to_decide(found, rounds=len(rounds), margin=plan.margin)
    elif plan.until is not None and found.half_width > plan.until:
        needed = rounds_for_width(found, rounds=len(rounds), width=plan.until)
    return Speed(
        ratio=found.ratio,
        low=found.low,
        high=found.high,
        level=LEVEL,
        pairs=found.pairs,
        rounds=len(rounds),
        outcome=said,
        rounds_needed=needed,
    )


def _cell(store: Store, plan: Plan, cell: PlannedCell) -> CellResult:
    lines, damaged = store.lines(cell)
    samples = [line for line in lines if isinstance(line, Sample)]
    rounds = complete_rounds(samples)
    used = [sample for found in rounds for sample in found]
    checks, missing, notes = _checks(store, plan, cell)
    last = max((line.session for line in lines), default=-1)
    failed = [f for f in lines if isinstance(f, Failure) and f.session == last]
    remarks = [line for line in lines if isinstance(line, Remark)]
    repeats = tuple(line for line in lines if isinstance(line, Repeat))
    notes += [r.text for r in remarks if not r.spoils]
    if len(rounds) < plan.rounds:
        missing = (*missing, f"{plan.rounds - len(rounds)} of {plan.rounds} rounds")
    speed = speed_of(rounds, plan, "candidate") if rounds else None
    control = speed_of(rounds, plan, "control") if rounds else None
    arms = {arm: _summary(used, arm) for arm in ARMS if any(s.arm == arm for s in used)}
    found = others.verdict_with(_latents(checks), repeats)
    result = CellResult(
        cell=cell,
        verdict=Verdict.INCONCLUSIVE,
        sentence="",
        speed=speed,
        control=control,
        arms=arms,
        sameness=found,
        looked_at_cases=len(checks),
        missing=missing,
        notes=(*dict.fromkeys(notes), *damaged),
        checks=checks,
        samples=tuple(samples),
        repeats=repeats,
        **_numbers(checks, repeats),
    )
    result = result.model_copy(update={"unchanged": _unchanged(result)})
    spoiled = list(dict.fromkeys(r.text for r in remarks if r.spoils))
    verdict, reasons = _verdict(result, plan, failed, spoiled)
    result = result.model_copy(update={"verdict": verdict, "reasons": tuple(reasons)})
    return result.model_copy(update={"sentence": sentence(result, plan)})


def _checks(
    store: Store, plan: Plan, cell: PlannedCell
) -> tuple[tuple[Sameness, ...], tuple[str, ...], list[str]]:
    """How the numbers compare, case by case; made anew from the files where a check is missing."""
    found, missing, notes = [], [], []
    for planned in plan.cases:
        case = Case(**planned.content).id
        check = store.check(cell, case)
        absent = [arm for arm in ARMS if not store.media(cell, arm, case).exists()]
        if check is None and set(absent) <= {"control"}:
            from truestep.experiment.judging import sameness

            check = sameness(case, {arm: store.tensors(cell, arm, case) for arm in ARMS})
            notes.append(f"{planned.name}: the stages were not checked, the final latent was")
        if check is None:
            missing.append(f"{planned.name}: latents and frames of {', '.join(absent) or 'an arm'}")
            continue
        if absent:
            missing.append(f"{planned.name}: frames of {', '.join(absent)}")
        if check.shift is not None:
            notes.append(f"{planned.name}: {check.shift.text} ({check.shift.ladder})")
        found.append(check)
    return tuple(found), tuple(missing), notes


def _summary(samples: Sequence[Sample], arm: str) -> ArmSummary:
    own = [sample for sample in samples if sample.arm == arm]
    stages: dict[str, list[float]] = {}
    results: dict[str, set[str]] = {}
    for sample in own:
        results.setdefault(sample.case, set()).add(sample.latent)
        for stage, times in sample.stages_s.items():
            stages.setdefault(stage, []).extend(times)
    memory = [sample.memory_mib for sample in own if sample.memory_mib is not None]
    return ArmSummary(
        runs=len(own),
        seconds=median([sample.seconds for sample in own]),
        stages_s={stage: median(times) for stage, times in stages.items()},
        memory_mib=max(memory) if memory else None,
        memory_kind=own[0].memory_kind,
        forwards=round(median([float(sample.forwards) for sample in own])),
        results=max(len(found) for found in results.values()),
    )


def _latents(checks: Sequence[Sameness]) -> Verdict | None:
    found = [check.steps.verdict for check in checks if check.steps is not None]
    found += [_of_end(check) for check in checks if check.final is not None]
    return Verdict.worst(found) if found else None


def _of_end(check: Sameness) -> Verdict:
    """The verdict on a final latent; where its stages say what moved it, that counts."""
    assert check.final is not None
    if check.shift is None or check.final.verdict not in MOVED:
        return check.final.verdict
    found = {"benign shift": Verdict.EQUIVALENT, "undecided": Verdict.INCONCLUSIVE}
    return found.get(check.shift.outcome, check.final.verdict)


def _numbers(checks: Sequence[Sameness], repeats: Sequence[Repeat]) -> dict[str, object]:
    """Worst and mean values over all cases."""
    finals = [check.final for check in checks if check.final is not None]
    finals += others.finals(repeats)
    measured = [row for row in finals if row.metrics is not None]
    ratios = [row.ratio for row in finals if row.ratio is not None]
    diverged = next(
        (
            c.steps.first_divergence
            for c in checks
            if c.steps is not None and c.steps.first_divergence is not None
        ),
        None,
    )

    def values(name: str) -> list[float]:
        found = [getattr(check, name) for check in checks]
        return [value for value in found if value is not None and not math.isnan(value)]

    means = values("ssim_mean")
    return {
        "worst_final": max((row.metrics.rel_l2 for row in measured if row.metrics), default=None),
        "worst_final_ratio": max(ratios, default=None),
        "first_divergence": str(diverged) if diverged else others.divergence(repeats),
        "ssim_mean": math.fsum(means) / len(means) if means else None,
        "ssim_worst": min(values("ssim_worst"), default=None),
        "psnr_worst_db": min(values("psnr_db"), default=None),
        "control_ssim_worst": min(values("control_ssim_worst"), default=None),
    }


def _unchanged(result: CellResult) -> bool:
    """Whether the switch shows in nothing: bits, forwards or speed."""
    if result.sameness is not Verdict.IDENTICAL or result.speed is None or result.repeats:
        return False
    if result.speed.outcome in (Outcome.FASTER, Outcome.SLOWER):
        return False
    base, candidate = result.arms["baseline"], result.arms["candidate"]
    return base.forwards == candidate.forwards and base.results == candidate.results == 1


def nothing_text(result: CellResult) -> str:
    """What is said of a switch that shows in nothing."""
    if result.speed is not None and result.speed.outcome is Outcome.SAME:
        return "the switch changed nothing: same bits, forwards and speed"
    return "the switch changed nothing so far: same bits and forwards, and the speed is not decided"


def _verdict(
    result: CellResult, plan: Plan, failures: Sequence[Failure], spoiled: Sequence[str]
) -> tuple[Verdict, list[str]]:
    """One verdict for speed, sameness, control and expectation, and the reasons for it.

    What failed counts before what differs, and that before what is not decided.
    """
    if failures:
        machine = all(failure.machine for failure in failures)
        return (Verdict.MISSING if machine else Verdict.INVALID), [*map(_raised, failures)]
    wrong, reasons, unsure = _sameness(result, plan)
    unsure += [*spoiled, *_control(result)]
    if result.unchanged and {"faster", "different"} & set(plan.expect):
        unsure.append(nothing_text(result))
    else:
        unmet, undecided = _expected(result, plan)
        wrong += [Verdict.UNMET] * bool(unmet)
        reasons += unmet
        unsure += undecided
    if result.missing:
        unsure.append("it is not complete: " + "; ".join(result.missing))
    if wrong:
        return Verdict.worst(wrong), [*reasons, *unsure]
    if unsure or result.sameness is None:
        return Verdict.INCONCLUSIVE, unsure
    if "different" in plan.expect:  # as expected: the numbers are not in question
        return Verdict.EQUIVALENT, []
    return result.sameness, []


def _sameness(result: CellResult, plan: Plan) -> tuple[list[Verdict], list[str], list[str]]:
    """What is wrong with the latents, why, and what is not decided about them."""
    same = result.sameness
    wrong: list[Verdict] = []
    reasons, unsure = [], []
    if same is Verdict.INVALID or (same is Verdict.DRIFTED and "different" not in plan.expect):
        wrong.append(same)
        where = f" (first divergence: {result.first_divergence})" if result.first_divergence else ""
        reasons.append(f"the latents are {same.value}{where}")
    elif same in (Verdict.INCOMPARABLE, Verdict.MISSING):
        wrong.append(same)
        reasons.append(_shapes(result))
    elif same is None or (same is Verdict.INCONCLUSIVE and "different" not in plan.expect):
        unsure.append("whether the latents are the same is not decided")
    if any(c.control_final and not c.control_final.verdict.passed for c in result.checks):
        unsure.append("the A/A control gives other latents than the baseline, beyond the floor")
    return wrong, reasons, [*unsure, *others.undecided(result.samples, result.repeats)]


def _raised(failure: Failure) -> str:
    text = failure.text.splitlines()[0]
    if failure.machine:
        return f"torch.compile does not work on this machine: {text}"
    where = f"{failure.doing} {failure.case}".rstrip()
    return f"the {failure.arm} raised while {where}: {text}"


def _shapes(result: CellResult) -> str:
    for check in result.checks:
        row = check.final
        if row and row.actual and row.reference and row.actual.shape != row.reference.shape:
            own, theirs = (list(side.shape) for side in (row.actual, row.reference))
            return f"the arms give other shapes: latents {own} and {theirs} (candidate, baseline)"
    return "the arms cannot be compared"


def _control(result: CellResult) -> list[str]:
    control = result.control
    if control is None or control.outcome not in (Outcome.FASTER, Outcome.SLOWER):
        return []
    return [
        f"the A/A control shows a difference where there is none ({ratio_text(control)}): "
        "no ratio of this cell can be believed"
    ]


def _expected(result: CellResult, plan: Plan) -> tuple[list[str], list[str]]:
    """What is not as expected, and what is not decided."""
    failed, unsure = [], []
    speed = result.speed
    if "different" in plan.expect and result.sameness in (Verdict.IDENTICAL, Verdict.EQUIVALENT):
        failed.append(f"expected different, the latents are {result.sameness.value}")
    if speed is None:
        return failed, ["no complete round was timed"]
    told_apart = speed.outcome in (Outcome.FASTER, Outcome.SLOWER)
    if "faster" in plan.expect and speed.outcome in (Outcome.SLOWER, Outcome.SAME):
        failed.append(f"expected faster, it {speed_text(speed)}")
    elif "same" in plan.expect and told_apart:
        found = Interval(speed.ratio, speed.low, speed.high, speed.pairs)
        if not within(found, margin=plan.margin):
            failed.append(f"expected same, it {speed_text(speed)}")
    elif speed.outcome is Outcome.UNDECIDED and plan.expect != ("different",):
        unsure.append(undecided_text(speed))
    if speed.outcome is not Outcome.UNDECIDED and speed.rounds_needed is not None:
        unsure.append(
            f"the interval is wider than asked for; about {speed.rounds_needed} rounds would do"
        )
    return failed, unsure


def undecided_text(speed: Speed) -> str:
    """Why the speed is not decided, and what would decide it."""
    if not math.isfinite(speed.high):
        return f"{speed.rounds} rounds are too few for an interval: 4 are the least"
    if speed.rounds_needed is None:
        return "the speed is not decided"
    return f"the speed is not decided; about {speed.rounds_needed} rounds would decide"


def ratio_text(speed: Speed) -> str:
    """`1.031 (1.012 to 1.050)`."""
    if not math.isfinite(speed.high):
        return f"{speed.ratio:.3f}"
    return f"{speed.ratio:.3f} ({speed.low:.3f} to {speed.high:.3f})"


def speed_text(speed: Speed) -> str:
    """`is 1.31 times faster (1.28 to 1.34)`."""
    if speed.outcome is Outcome.FASTER:
        return (
            f"is {1 / speed.ratio:.3f} times faster ({1 / speed.high:.3f} to {1 / speed.low:.3f})"
        )
    if speed.outcome is Outcome.SLOWER:
        return f"is {speed.ratio:.3f} times slower ({speed.low:.3f} to {speed.high:.3f})"
    if speed.outcome is Outcome.SAME:
        return f"is as fast, {ratio_text(speed)}"
    return f"is not decided in speed, {ratio_text(speed)}"


def sentence(result: CellResult, plan: Plan) -> str:
    """What a person would repeat of a cell; the first reason, where it is not a pass."""
    parts = []
    if result.speed is not None:
        parts.append(f"{plan.switch} {speed_text(result.speed)}")
    reason = result.reasons[0] if result.reasons else ""
    if result.sameness is not None and not reason.startswith("the latents are"):
        parts.append(f"latents {result.sameness.value}")
    text = f"{result.verdict.value}: {', '.join(parts) or plan.switch}"
    for known in (", it is ", "the speed is not decided; ", "the speed is not decided"):
        reason = reason.partition(known)[0 if known[0] == "," else 2] if known in reason else reason
    return f"{text}; {reason}" if reason else text
