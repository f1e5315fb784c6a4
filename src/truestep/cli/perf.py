"""`truestep perf`: a history of what a case costs, and whether it costs more now."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from truestep.cli.brief import brief_option
from truestep.cli.cases import PROMPT, choose_cases
from truestep.cli.common import (
    case_options,
    end,
    file_option,
    give,
    json_option,
    print_screen,
    progress_bar,
    verbose,
    verbose_option,
)
from truestep.cli.words import spell_out, spelled
from truestep.report.perf import print_import, print_results
from truestep.screen import rows
from truestep.text import quoted, say, visible

if TYPE_CHECKING:
    from truestep.case import Case
    from truestep.experiment.perf_measuring import Session
    from truestep.experiment.perf_records import Cohort, PerfBatch, PerfResult, PerfRun

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT_HISTORY = Path("truestep-references") / "perf.sqlite"

_history = click.option(
    "--history",
    type=click.Path(path_type=Path),
    default=DEFAULT_HISTORY,
    show_default=True,
    help="SQLite file of all runs.",
)


def _json(function: Command) -> Command:
    """`-v`, `--json [PATH]` and `--brief [PATH]`."""
    return verbose_option(brief_option(json_option(function)))


_runs = click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Generations to measure, after one that is not.",
)


@click.group("perf")
def command() -> None:
    """Keep what a case costs, and say whether it costs more now.

    Runs are compared within a cohort: the same case on the same machine, libraries, threads and
    attention kernel.
    """


@command.command("record")
@case_options
@_runs
@click.option("--label", default="", help="What to call these runs: a commit, a date.")
@click.option("--fresh", is_flag=True, help="Begin a new baseline: earlier runs count no more.")
@_history
@_json
def record(  # 9 parameters: the options of the verb
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    runs: int,
    label: str,
    fresh: bool,
    history: Path,
    json_path: str | None,
) -> None:
    """Measure cases and add the runs to the history.

    Three processes (three calls) are needed before a slow-down below the percent rule can be told
    from how processes differ. Runs that are faster than the baseline's interval begin a new one;
    runs that are slower show in the trend but do not count, unless --fresh is given.
    """
    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)

    def each(name: str, case: Case) -> PerfResult:
        return _record(name, case, runs=runs, label=label, fresh=fresh, path=history)

    end(_run_each(cases, each, json_path))


@command.command("check")
@case_options
@_runs
@_history
@_json
def check(
    names: tuple[str, ...],
    case_file: Path,
    prompt: str | None,
    tier: str,
    runs: int,
    history: Path,
    json_path: str | None,
) -> None:
    """Measure cases and judge them against the history of the same cohort.

    Judged by interval (is the new median where the cohort's own runs let it be expected?) and by
    the percent rule max(base * (1 + rel), base + pad). Nothing is added to the history.
    """
    cases = choose_cases(names, case_file=case_file, prompt=prompt, tier=tier)

    def each(name: str, case: Case) -> PerfResult:
        return _check(name, case, runs=runs, path=history)

    end(_run_each(cases, each, json_path))


@command.command("show")
@click.argument("name", required=False, metavar="[CASE]")
@file_option
@click.option("--tier", default="default", show_default=True, help="Tier of the case.")
@_history
@click.option("--report", type=click.Path(path_type=Path), help="Write the trend as HTML.")
@verbose_option
@json_option
def show(
    name: str | None,
    case_file: Path,
    tier: str,
    history: Path,
    report: Path | None,
    json_path: str | None,
) -> None:
    """Print the trend: median and interval of every recorded batch.

    CASE is a name in the case file, a case id or its beginning, or an imported scenario; none is
    all.
    """
    from truestep.environment import library_version
    from truestep.experiment.history import open_history
    from truestep.report import trend

    wanted = _case_ids(name, case_file, tier)
    if not history.is_file():
        _nothing_to_show(name, history, [], case_file)
    with open_history(history, create=False) as found:
        every = [(cohort, found.batches(cohort)) for cohort, _ in found.cohorts()]
    chosen = [
        (c, batches)
        for c, batches in every
        if batches and (wanted is None or any(c.case_id.startswith(w) for w in wanted))
    ]
    if not chosen:
        _nothing_to_show(name, history, [c for c, _ in every], case_file)
    made = trend.build(chosen, history=str(history), tool_version=library_version("truestep") or "")
    if report is not None:
        trend.write(report, made)

    def show() -> None:
        told = trend.lines(made, verbose=verbose())
        print_screen(made.sentence, rows(told), ending=[f"report: {report}" if report else ""])

    give(made, json_path=json_path, show=show, what="the trend")


@command.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@_history
@verbose_option
@json_option
def import_(files: tuple[Path, ...], history: Path, json_path: str | None) -> None:
    """Add other tools' numbers to the history, as cohorts of their own.

    FILE is SGLang's perf_baselines.json or a FastVideo performance result. All files are read
    before anything is kept: a malformed one imports nothing.
    """
    from truestep.experiment.history import open_history
    from truestep.experiment.perf_importing import PerfImport, read_file
    from truestep.verdict import Verdict

    read = [read_file(path) for path in files]
    items = [item for _, found in read for item in found]
    with open_history(history) as opened:
        new = opened.import_all(items)
    left_out = sum(len(file.left_out) for file, _ in read)
    verdict = Verdict.INVALID if left_out or not items else Verdict.EQUIVALENT
    known = len(items) - new
    sentence = f"imported {new} batches of {len(files)} file{'s' if len(files) > 1 else ''}"
    sentence += f"; {known} were there already" if known else ""
    sentence += f"; {left_out} left out: their numbers cannot be true" if left_out else ""
    result = PerfImport(
        verdict=verdict,
        exit_code=verdict.exit_code,
        sentence=sentence if items or left_out else "invalid: there was nothing to import",
        history=str(history),
        files=tuple(file for file, _ in read),
        new=new,
        known=known,
    )
    give(result, json_path=json_path, show=lambda: print_import(result, verbose=verbose()))
    end(result.exit_code)


def _run_each(
    cases: Mapping[str, Case], each: Callable[[str, Case], PerfResult], json_path: str | None
) -> int:
    """Do something with every case; one that breaks must not cost the others' results."""
    from truestep.errors import TruestepError

    results: list[PerfResult] = []
    for name, case in cases.items():
        try:
            result = each(name, case)
            told = {key: spell_out(getattr(result, key), name) for key in ("hint", "offer")}
            results.append(result.model_copy(update=told))
        except TruestepError as error:
            spelled(error, name)
            if len(cases) == 1:
                raise
            text = f"BROKEN {visible(name)}: {type(error).__name__}: {error}"
            say(text, err=True, lines=True)
    code = _finish(results, json_path) if results else 2
    return code if len(results) == len(cases) else 2


def _record(name: str, case: Case, *, runs: int, label: str, fresh: bool, path: Path) -> PerfResult:
    """Measure and keep each run as soon as it is known; then say for what the batch counts."""
    from truestep.experiment.baseline import check_result, found_impossible
    from truestep.experiment.history import open_history
    from truestep.experiment.perf_records import PerfResult
    from truestep.verdict import Verdict

    version, now = _version_and_time()
    with open_history(path) as history:
        session = _session(name, case)
        cohort = session.cohort
        before = history.baseline(cohort)
        batch = history.begin(cohort, started=now, label=label, tool_version=version)
        measured: list[PerfRun] = []
        problems: list[str] = []
        for run in _measured(session, name, runs):
            measured.append(run)
            problems = found_impossible([run], (), cohort=cohort, steps=case.steps)
            if problems:
                break
            history.add(batch, run)
        judged = (
            check_result(measured, before, cohort=cohort, case_name=name, steps=case.steps)
            if before and not problems
            else None
        )
        number, words = _baseline_of(judged, before, fresh=fresh)
        if not problems:
            history.finish(batch, baseline=number)
        counting = history.baseline(cohort)
    result = PerfResult(
        tool_version=version,
        action="record",
        verdict=Verdict.INVALID if problems else Verdict.EQUIVALENT,
        sentence=f"invalid: {name}: {problems[0]}; it was not kept"
        if problems
        else f"recorded {name}: {_spread(measured)}; {words}",
        case_name=name,
        case_id=cohort.case_id,
        cohort_id=cohort.id,
        cohort=cohort,
        history=str(path),
        batch=batch,
        problems=tuple(problems),
        runs=tuple(measured),
    )
    if problems:
        return result
    rows = judged.rows if judged is not None else ()
    return _counted(result.model_copy(update={"baseline": number, "rows": rows}), counting)


def _counted(result: PerfResult, counting: list[PerfBatch]) -> PerfResult:
    """A record that was kept, with the batches that now count for the baseline."""
    processes = len(counting)
    notes = _busy()
    if result.baseline is not None and processes < 3:
        more = "1 more call" if processes == 2 else f"{3 - processes} more calls"
        notes.append(
            f"{more} of this command until a slow-down below the percent rule can be told from "
            "how processes differ"
        )
    return result.model_copy(
        update={
            "baseline_batches": processes,
            "baseline_runs": sum(len(batch.runs) for batch in counting),
            "notes": tuple(notes),
        }
    )


def _baseline_of(
    judged: PerfResult | None, before: list[PerfBatch], *, fresh: bool
) -> tuple[int | None, str]:
    """For which baseline a recorded batch counts, and that in words."""
    from truestep.experiment.statistics import Outcome

    latest = max((b.baseline or 0 for b in before), default=0)
    if judged is None or not judged.rows:
        return latest + 1, "the first of this cohort"
    e2e = judged.rows[0]
    change = f"{e2e.change:+.1%} against the baseline before"
    if fresh:
        return latest + 1, f"the new baseline ({change})"
    if e2e.outcome is Outcome.FASTER:
        return latest + 1, f"the new baseline: faster ({change})"
    if judged.verdict.exit_code == 1:
        return None, f"not counted: it has drifted ({change}); --fresh makes it the baseline"
    return latest, f"added to the baseline ({change})"


def _check(name: str, case: Case, *, runs: int, path: Path) -> PerfResult:
    """The history is looked up before anything is measured, once the kernel is known."""
    from truestep.experiment.baseline import check_result, missing_result
    from truestep.experiment.history import open_history

    version, _ = _version_and_time()
    baseline: list[PerfBatch] = []
    others: list[tuple[Cohort, int]] = []
    if path.is_file():
        with open_history(path, create=False) as history:
            others = history.cohorts()  # an unreadable history is told before a model is loaded
    session = _session(name, case)
    if path.is_file():
        with open_history(path, create=False) as history:
            baseline = history.baseline(session.cohort)
    if not baseline:
        result = missing_result(session.cohort, others, case_name=name)
    else:
        measured = list(_measured(session, name, runs))
        result = check_result(
            measured, baseline, cohort=session.cohort, case_name=name, steps=case.steps
        )
    return result.model_copy(
        update={"tool_version": version, "history": str(path), "notes": tuple(_busy())}
    )


def _busy() -> list[str]:
    """What is to be said of a machine that others use: the load of the last minute."""
    from truestep.experiment.perf_measuring import cores

    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not a POSIX system, or it cannot tell
        return []
    count = cores()
    if load <= count + 1:  # this process's own share
        return []
    return [f"the machine is busy: load {load:.1f} on {count} core{'s' if count > 1 else ''}"]


def _session(name: str, case: Case) -> Session:
    from truestep.experiment.perf_measuring import start_session

    return start_session(case, name=name)


def _measured(session: Session, name: str, runs: int) -> Iterator[PerfRun]:
    from truestep.experiment.perf_measuring import measure

    with progress_bar() as progress:
        for number in range(runs):
            yield measure(session, name=name)
            progress(f"{name}: runs", number + 1, runs)


def _version_and_time() -> tuple[str, str]:
    from datetime import datetime, timezone

    from truestep.environment import library_version

    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return library_version("truestep") or "", now


def _spread(runs: list[PerfRun]) -> str:
    from truestep.experiment.baseline import amount
    from truestep.experiment.statistics import median

    times = sorted(run.e2e_ms for run in runs)
    text = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, median {amount(median(times))} ms"
    return f"{text} ({amount(times[0])} to {amount(times[-1])})"


def _case_ids(name: str | None, case_file: Path, tier: str) -> list[str] | None:
    """What case ids may begin with; None is all."""
    from truestep.case import load_cases

    if name is None:
        return None
    if case_file.exists():
        cases = load_cases(case_file, tier=tier)
        if name in cases:
            return [cases[name].id]
    return [name]


def _nothing_to_show(
    name: str | None, history: Path, cohorts: list[Cohort], case_file: Path
) -> None:
    """Raise what says that there are no runs to show."""
    from truestep.errors import FileFormatError, ReferenceNotFoundError

    if not history.is_file():
        raise FileFormatError(
            "there is no history",
            where=str(history),
            hint=_instead(name, history, case_file, others=False),
        )
    ids = list(dict.fromkeys(cohort.case_id for cohort in cohorts))
    more = f", and {len(ids) - 6} more" if len(ids) > 6 else ""
    raise ReferenceNotFoundError(
        f"the history holds no runs of {name!r}" if name else "the history holds no runs",
        where=str(history),
        measured=f"it holds: {', '.join(ids[:6])}{more}" if ids else "",
        hint=_instead(name, history, case_file, others=bool(ids)),
    )


def _instead(name: str | None, history: Path, case_file: Path, *, others: bool) -> str:
    """What to type where the history has no runs of what is asked for."""
    from truestep.case import CASE_FILE, load_cases

    there = "" if history == DEFAULT_HISTORY else f" --history {quoted(str(history))}"
    if case_file.is_file() and (name is None or name in load_cases(case_file)):
        said = f" {quoted(name)}" if name else ""
        said += "" if case_file == Path(CASE_FILE) else f" --file {quoted(str(case_file))}"
        return f"truestep perf record{said + there}  # makes one"
    if others:
        return f"truestep perf show{there}  # shows all that there are"
    return f"truestep perf record --prompt '{PROMPT}'{there}  # a case without a file"


def _finish(results: list[PerfResult], json_path: str | None) -> int:
    """Print results and write JSON; the exit code of the worst verdict."""
    from truestep.environment import command_line
    from truestep.experiment.perf_records import PerfResults

    bundle = PerfResults.of(results, repeat=command_line())
    if os.environ.get("RANK", "0") != "0":  # torchrun: the first process speaks for all
        return bundle.exit_code
    give(bundle, json_path=json_path, show=lambda: print_results(bundle, verbose=verbose()))
    return bundle.exit_code
