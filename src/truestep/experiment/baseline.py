"""How new runs of a case compare with recorded ones of their cohort. Pure: no I/O, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from truestep.experiment.perf_records import (
    Alternative,
    Cohort,
    MemoryKind,
    MetricRow,
    PerfBatch,
    PerfResult,
    PerfRun,
)
from truestep.experiment.perf_statistics import (
    LEVEL,
    LIMITS,
    Expectation,
    Limit,
    Needed,
    expect,
    needed,
)
from truestep.experiment.statistics import Outcome, median
from truestep.verdict import Verdict

STAGES = ("text", "schedule", "latent", "denoise", "decode")
"""Stages of a run that truestep measured itself, in order; each must be there."""

STEP_SUM_SLACK = 0.05
"""Share by which the steps' sum may differ from the denoise stage, and the stages' sum be above the
whole: what a shared machine does between two readings of the clock."""

STEP_SUM_SLACK_MS = 20.0
"""The same for short runs: one preemption."""

SHARE_JUDGED = 0.01
"""A stage below this share of the whole is judged by the percent rule alone: its interval would
tell of a speed that no one can notice. Its row says so."""


def impossible(run: PerfRun, *, stages: Sequence[str] = (), steps: int | None = None) -> list[str]:
    """What of a run cannot be true, in words; empty where nothing is wrong.

    Args:
        run: The run.
        stages: Stages that must be there, and add up: of a run that was measured here.
        steps: Denoise steps that must be there; None where that is not known.
    """
    every: list[tuple[str, float]] = [("e2e_ms", run.e2e_ms)]
    every += [(f"stages_ms {name}", value) for name, value in run.stages_ms.items()]
    every += [(f"denoise_step_ms {i}", value) for i, value in run.denoise_step_ms.items()]
    every += [("load_ms", run.load_ms)] if run.load_ms is not None else []
    every += [("memory_mib", run.memory_mib)] if run.memory_mib is not None else []
    found = [f"{name} is {value:g}" for name, value in every if not 0 < value < math.inf]
    found += [f"stages_ms {name} is missing" for name in stages if name not in run.stages_ms]
    if steps is not None and len(run.denoise_step_ms) != steps:
        found.append(f"denoise_step_ms has {len(run.denoise_step_ms)} steps, the case {steps}")
    if run.memory_mib is None and run.memory_kind != "unknown":
        found.append("memory_mib is missing")
    return found if found or not stages else list(unequal_sums(run).values())


def unequal_sums(run: PerfRun) -> dict[str, str]:
    """Which parts of a run do not add up to their whole (`steps`, `stages`), and by how much."""
    found = {}
    denoise, total = denoise_stage(run), sum(run.denoise_step_ms.values())
    if denoise is not None and every_step(run):
        value = run.stages_ms[denoise]
        if abs(total - value) > max(STEP_SUM_SLACK * value, STEP_SUM_SLACK_MS):
            found["steps"] = (
                f"the steps sum to {total:.4g} ms, stages_ms {denoise} says {value:.4g}"
            )
    whole = sum(run.stages_ms.values())
    if whole - run.e2e_ms > max(STEP_SUM_SLACK * run.e2e_ms, STEP_SUM_SLACK_MS):
        found["stages"] = f"the stages sum to {whole:.4g} ms, e2e_ms says {run.e2e_ms:.4g}"
    return found


def every_step(run: PerfRun) -> bool:
    """Whether the steps are all there; some files hold samples of them only."""
    steps = run.denoise_step_ms
    return bool(steps) and set(steps) == {str(i) for i in range(len(steps))}


def denoise_stage(run: PerfRun) -> str | None:
    """Name of the stage that holds the denoise steps (`denoise`, `DenoisingStage`)."""
    names = [name for name in run.stages_ms if "denois" in name.lower()]
    return names[0] if len(names) == 1 else None


def numbers(run: PerfRun) -> dict[str, float]:
    """Every number of a run that is set beside a baseline, by the name of its row."""
    found = {"e2e": float(run.e2e_ms), **{k: float(v) for k, v in run.stages_ms.items()}}
    steps = list(run.denoise_step_ms.values())
    if steps:
        found["step median"] = median(steps)
        found["step mean"] = sum(steps) / len(steps)
    if run.memory_mib is not None:
        found["memory"] = float(run.memory_mib)
    if run.load_ms is not None:
        found["load"] = float(run.load_ms)
    return found


def judge(new: Sequence[PerfRun], batches: Sequence[PerfBatch]) -> tuple[MetricRow, ...]:
    """Set new runs beside recorded ones, number by number.

    Intervals have 99 % confidence for the whole run, and 99 % together for everything else.

    Args:
        new: Runs of one process, none impossible.
        batches: Recorded batches of the same cohort that count for the baseline.
    """
    fresh = [numbers(run) for run in new]
    old = [[numbers(run) for run in batch.runs] for batch in batches]
    e2e = median([values["e2e"] for values in fresh])
    denoise = denoise_stage(new[0])
    shared = [n for n in fresh[0] if all(n in v for v in (*fresh, *(v for b in old for v in b)))]
    tested = [
        name
        for name in shared
        if name == "step median"
        or (name in new[0].stages_ms and median([v[name] for v in fresh]) >= SHARE_JUDGED * e2e)
    ]
    rest = 1 - (1 - LEVEL) / max(1, len(tested))
    rows = []
    for name in shared:
        values = [v[name] for v in fresh]
        recorded = [[v[name] for v in batch] for batch in old]
        level = LEVEL if name == "e2e" else rest if name in tested else None
        kind = new[0].memory_kind if name == "memory" else None
        share = median(values) / e2e if name in new[0].stages_ms else None
        rows.append(_row(name, values, recorded, level, _limit(name, denoise, kind), share))
    worst = _worst_step(new, batches)
    return (*rows, *([worst] if worst else []))


def _limit(name: str, denoise: str | None, memory: MemoryKind | None) -> Limit | None:
    if name == "e2e":
        return LIMITS["e2e"]
    if name in ("step median", "step mean"):
        return LIMITS["aggregate"]
    if name == "memory":
        return LIMITS["device_memory" if memory == "device" else "resident_memory"]
    if name == "load":
        return None
    return LIMITS["denoise_stage" if name == denoise else "other_stage"]


def _row(
    name: str,
    values: Sequence[float],
    recorded: Sequence[Sequence[float]],
    level: float | None,
    limit: Limit | None,
    share: float | None,
) -> MetricRow:
    """One number beside its baseline; `share` is a stage's part of the whole run."""
    value = median(values)
    found = expect(recorded, new=len(values), level=level or LEVEL)
    bound = limit.bound(found.base) if limit else None
    outcome = found.outcome(value) if level is not None else Outcome.UNDECIDED
    over = bound is not None and value > bound
    verdict: Verdict | None
    if level is not None:
        apart = share is not None and _apart(values, recorded)
        verdict, note = _decide(found, value, over=over, apart=apart, main=name == "e2e")
    else:
        verdict, note = _by_percent(found, value, over=over)
        if share is not None and not over:
            why = "slower in every run;" if _apart(values, recorded) else "percent rule alone:"
            note = f"{why} {_percent(share)} of run"
    if limit is None:
        verdict = None
        note = "not judged: the disk's cache decides it"
    return MetricRow(
        name=name,
        unit="MiB" if name == "memory" else "ms",
        value=value,
        base=found.base,
        low=found.low if level is not None and found.scope != "none" else None,
        high=found.high if level is not None and found.scope != "none" else None,
        level=level,
        scope=found.scope if level is not None else "none",
        limit=bound,
        outcome=outcome,
        verdict=verdict,
        note=note,
    )


def _apart(values: Sequence[float], recorded: Sequence[Sequence[float]]) -> bool:
    """Whether every new run is slower than every recorded one."""
    return min(values) > max(value for batch in recorded for value in batch)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _by_percent(found: Expectation, value: float, *, over: bool) -> tuple[Verdict, str]:
    """Verdict of one number from its percent rule alone."""
    if over and found.outcome(value) is Outcome.SAME:
        return Verdict.INCONCLUSIVE, "above the percent rule, but the baseline itself varies so"
    return (Verdict.DRIFTED, "above the percent rule") if over else (Verdict.EQUIVALENT, "")


def _decide(
    found: Expectation, value: float, *, over: bool, apart: bool, main: bool
) -> tuple[Verdict, str]:
    """Verdict of one number from its interval and its percent rule.

    Args:
        apart: It is of a stage, and every new run is slower than every recorded one.
        main: It is of the whole run.
    """
    if over:
        return _by_percent(found, value, over=over)
    outcome = found.outcome(value)
    if outcome is Outcome.SLOWER:
        if found.scope == "processes":
            return Verdict.DRIFTED, "slower than the interval"
        return Verdict.INCONCLUSIVE, "slower than the runs, but processes differ too"
    if outcome is Outcome.FASTER:
        return Verdict.EQUIVALENT, "faster than the interval"
    if outcome is Outcome.UNDECIDED:
        if main:
            return Verdict.INCONCLUSIVE, "too few runs for an interval"
        if apart:
            return Verdict.INCONCLUSIVE, "slower in every run; too few runs"
        return Verdict.EQUIVALENT, "percent rule alone: too few runs"
    return Verdict.EQUIVALENT, ""


def _worst_step(new: Sequence[PerfRun], batches: Sequence[PerfBatch]) -> MetricRow | None:
    """The step that is highest over its bound of the percent rule."""
    indices = [
        i
        for i in new[0].denoise_step_ms
        if all(i in run.denoise_step_ms for run in (*new, *(r for b in batches for r in b.runs)))
    ]
    if not indices:
        return None

    def recorded(index: str) -> list[list[float]]:
        return [[run.denoise_step_ms[index] for run in batch.runs] for batch in batches]

    def share(index: str) -> float:
        base = median([median(values) for values in recorded(index)])
        value = median([run.denoise_step_ms[index] for run in new])
        return value / LIMITS["step"].bound(base)

    worst = max(indices, key=share)
    value = median([run.denoise_step_ms[worst] for run in new])
    found = expect(recorded(worst), new=len(new))
    over = share(worst) > 1
    verdict, note = _by_percent(found, value, over=over)
    return MetricRow(
        name=f"step {worst}",
        value=value,
        base=found.base,
        limit=LIMITS["step"].bound(found.base),
        verdict=verdict,
        note=note or f"nearest to the percent rule of {len(indices)} steps",
    )


def check_result(
    new: Sequence[PerfRun],
    batches: Sequence[PerfBatch],
    *,
    cohort: Cohort,
    case_name: str,
    steps: int | None = None,
) -> PerfResult:
    """Judge new runs of one process against the baseline of their cohort.

    Args:
        new: What was measured.
        batches: Recorded batches that count for the baseline; at least one run.
        cohort: Of both.
        case_name: What the user calls the case.
        steps: Denoise steps that a run must have.
    """
    problems = found_impossible(new, batches, cohort=cohort, steps=steps)
    invalid = PerfResult(
        action="check",
        verdict=Verdict.INVALID,
        sentence=f"invalid: {case_name}: {problems[0]}" if problems else "",
        case_name=case_name,
        case_id=cohort.case_id,
        cohort_id=cohort.id,
        cohort=cohort,
        baseline_batches=len(batches),
        baseline_runs=sum(len(batch.runs) for batch in batches),
        problems=tuple(problems),
        hint="measure again; a clock, a stage or the history is wrong",
        runs=tuple(new),
    )
    return invalid if problems else _judged(invalid, judge(new, batches), batches)


def _judged(
    result: PerfResult, rows: tuple[MetricRow, ...], batches: Sequence[PerfBatch]
) -> PerfResult:
    """A result whose runs are possible, with what its rows say."""
    verdict = Verdict.worst(row.verdict for row in rows if row.verdict is not None)
    e2e, name, count = rows[0], result.case_name, len(result.runs)
    faster = e2e.outcome is Outcome.FASTER and verdict is Verdict.EQUIVALENT
    unsure = verdict is Verdict.INCONCLUSIVE
    recorded = [[run.e2e_ms for run in batch.runs] for batch in batches]
    more = needed(recorded, new=count, value=e2e.value) if unsure else None
    passing = [f"; {_slower(row)}" for row in rows if _only_by_percent(row, result.runs, batches)]
    return result.model_copy(
        update={
            "verdict": verdict,
            "sentence": _sentence(verdict, name, rows, faster=faster)
            + "".join(passing[:1] if verdict is Verdict.EQUIVALENT else ()),
            "rows": rows,
            "detectable": min(e2e.limit or math.inf, e2e.high or math.inf) / e2e.base - 1,
            "needed_runs": more.runs if more else None,
            "needed_processes": more.processes if more else None,
            "faster": faster,
            "offer": "truestep perf record CASE  # faster: makes it the new baseline"
            if faster
            else "",
            "hint": _hint(more, runs=count) if unsure else "",
        }
    )


def _only_by_percent(row: MetricRow, new: Sequence[PerfRun], batches: Sequence[PerfBatch]) -> bool:
    """Whether a small stage passes by the percent rule although all its runs are slower."""
    if row.verdict is not Verdict.EQUIVALENT or row.level is not None:
        return False
    if row.name not in new[0].stages_ms:
        return False
    recorded = [[run.stages_ms[row.name] for run in batch.runs] for batch in batches]
    return _apart([run.stages_ms[row.name] for run in new], recorded)


def _slower(row: MetricRow) -> str:
    return f"but {row.name} is {row.change:+.0%}, {row.note}: the percent rule alone judges it"


def _hint(more: Needed | None, *, runs: int) -> str:
    """What would decide an inconclusive check."""
    if more is None:
        return f"truestep perf record CASE --runs {runs}  # more processes, or a quieter machine"
    times = f", in {more.processes} processes" if more.processes > 1 else ""
    each = max(1, math.ceil(more.runs / more.processes))
    said = f"{more.runs} more recorded runs would decide{times}"
    return f"truestep perf record CASE --runs {each}  # {said}"


def found_impossible(
    new: Sequence[PerfRun], batches: Sequence[PerfBatch], *, cohort: Cohort, steps: int | None
) -> list[str]:
    """What of new and recorded runs cannot be true; no runs at all is impossible too."""
    stages = STAGES if cohort.source == "truestep" else ()
    found = [] if new else ["there are no results"]
    for number, run in enumerate(new):
        found += [f"run {number}: {p}" for p in impossible(run, stages=stages, steps=steps)]
    for batch in batches:
        for number, run in enumerate(batch.runs):
            for text in impossible(run, stages=stages, steps=steps):
                found.append(f"history, batch {batch.id}, run {number}: {text}")
    return found


def _sentence(verdict: Verdict, name: str, rows: Sequence[MetricRow], *, faster: bool) -> str:
    deciding = [row for row in rows if row.verdict is verdict]
    e2e = rows[0]
    row = e2e if e2e in deciding else deciding[0]
    text = f"{verdict.value}: {name}: "
    if verdict is Verdict.EQUIVALENT:
        row = e2e
        text += "faster: " if faster else "as fast as its baseline: "
    elif verdict is Verdict.DRIFTED:
        text += "more memory: " if row.name == "memory" else "slower: "
    text += f"{row.name} {amount(row.value)} {row.unit} against {amount(row.base)}"
    text += f" ({row.change:+.1%})"
    if row.low is not None and row.high is not None:
        text += f", expected {amount(row.low)} to {amount(row.high)}"
    if verdict is not Verdict.EQUIVALENT and row.note:
        text += f"; {row.note}"
    others = len(deciding) - 1
    if verdict in (Verdict.DRIFTED, Verdict.INCONCLUSIVE) and others:
        text += f"; {others} other number{'s' if others > 1 else ''} likewise"
    return text


def amount(value: float) -> str:
    """A time or a size with four digits, and thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def missing_result(
    cohort: Cohort, others: Iterable[tuple[Cohort, int]], *, case_name: str
) -> PerfResult:
    """There is no baseline of this cohort: what there is instead, nearest first.

    Args:
        cohort: The one asked for.
        others: Cohorts of the history with the runs that count in each.
        case_name: What the user calls the case.
    """
    found = [
        Alternative(
            cohort=other.id,
            source=other.source,
            case_id=other.case_id,
            runs=runs,
            differences=cohort.differences(other),
        )
        for other, runs in others
    ]
    same = [a for a in found if a.case_id == cohort.case_id]
    shown = sorted(same or found, key=lambda a: len(a.differences))
    if same:
        keys = ", ".join(d.key for d in shown[0].differences[:4])
        what = f"the nearest of {len(same)} differs in {keys}" if keys else "it holds no runs"
    else:
        what = f"the history holds {len(found)} of other cases" if found else "there is no history"
    return PerfResult(
        action="check",
        verdict=Verdict.MISSING,
        sentence=f"missing: {case_name}: no baseline of this cohort; {what}",
        case_name=case_name,
        case_id=cohort.case_id,
        cohort_id=cohort.id,
        cohort=cohort,
        alternatives=tuple(shown),
        hint="truestep perf record CASE",
    )
