"""pytest plugin: the `truestep` fixture, its options, and the marker `parity`. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from truestep.guard import Watched, fork
from truestep.pytest_failures import told
from truestep.pytest_fixture import (
    CHECKS,
    LATE,
    LEDGER,
    Checks,
    Compared,
    TruestepFixture,
    raise_failures,
)
from truestep.pytest_marked import MARK, NEVER_REACHED, Marked
from truestep.pytest_references import reference_root
from truestep.pytest_rules import RunRules, rules_of
from truestep.pytest_updates import kept_lines, remove_stale

STATE = pytest.StashKey["_Session"]()
WATCHED: pytest.StashKey[Watched | None] = pytest.StashKey()

RUNS_IN = "TRUESTEP_PYTEST_PID"
"""Variable that tells a run within a test of another from one in a process of its own."""


@dataclass
class _Session:
    """What the whole run compared; under xdist only the controller's is filled.

    Attributes:
        began, ended: Whether the session did, in order. failed: whether it proves nothing.
    """

    marked: Marked = field(default_factory=Marked)
    comparisons: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    written: list[str] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    deselected: int = 0
    parity: list[dict[str, Any]] = field(default_factory=list)
    not_collected: dict[str, str] = field(default_factory=dict)
    ledgers: list[str] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    known: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    began: bool = False
    ended: bool = False
    failed: bool = False
    files: set[str] = field(default_factory=set)
    rules: RunRules = field(default_factory=RunRules)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("truestep", "is it still the same model?")
    group.addoption(
        "--truestep-update",
        nargs="?",
        const="new",
        choices=("new", "all"),
        help="write references: new (default) adds missing ones, all replaces every one used",
    )
    group.addoption(
        "--truestep-references",
        metavar="DIR",
        help="reference folder (default: truestep-references in the root folder)",
    )
    group.addoption("--truestep-report", metavar="PATH", help="write an HTML report")
    group.addoption("--truestep-json", metavar="PATH", help="write the results as JSON")
    group.addoption(
        "--truestep-known",
        metavar="FILE.toml",
        help='ledger of known failures, [known."test_file.py::test_name"]: a drift as stated '
        "there passes, and says so",
    )
    group.addoption(
        "--truestep-locked",
        nargs="?",
        const="",
        metavar="REV",
        help="fail where markers or limits of tests, known failures or references were changed "
        "since REV (default: where this branch began, as git knows it)",
    )
    group.addoption(
        "--truestep-require-executed",
        action="store_true",
        help="fail unless every test marked parity in the files given ran and compared numbers",
    )
    group.addoption(
        "--truestep-parity",
        action="store_true",
        help="write what the parity tests prove into parity.toml and the packets beside them",
    )
    group.addoption(
        "--truestep-parity-keep",
        metavar="DIR",
        help="keep the recordings of both sides of every parity test",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "parity(scope, coverage): a port is compared with the official implementation; "
        "scope names the component, coverage is production_loader, "
        "implementation_subcomponent or both",
    )
    if config.getoption("truestep_update") and os.environ.get("CI"):
        raise pytest.UsageError(
            "--truestep-update is refused where CI is set: references are promoted by a person, "
            "not by a failing run"
        )
    config.stash[STATE], config.stash[LATE] = _Session(), []
    known = config.getoption("truestep_known")
    if known:
        from truestep.errors import UsageError
        from truestep.judge.known import read_ledger

        try:
            config.stash[LEDGER] = read_ledger(known)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, object, object]:
    """Go on in a child process where the run must not end with 0 unjudged, before any test file."""
    options = early_config.known_args_namespace
    inner = os.environ.get(RUNS_IN) == str(os.getpid()) or "PYTEST_XDIST_WORKER" in os.environ
    if (options.truestep_require_executed or options.truestep_parity) and not inner:
        early_config.stash[WATCHED] = fork("pytest")
    os.environ[RUNS_IN] = str(os.getpid())
    try:
        return (yield)
    except Exception:  # pytest tells it and ends with this code
        _judged(early_config, pytest.ExitCode.USAGE_ERROR)
        raise


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(
    config: pytest.Config,
) -> Generator[None, int | pytest.ExitCode | None, int | pytest.ExitCode | None]:
    try:
        code = yield
    except Exception:
        _judged(config, pytest.ExitCode.USAGE_ERROR)
        raise
    state = config.stash.get(STATE, _Session())
    unjudged = state.began and not state.ended and _must_reach(config)
    if not code and (state.failed or unjudged):
        code = pytest.ExitCode.TESTS_FAILED
    _judged(config, int(code or 0))
    return code


def _judged(config: pytest.Config, exit_code: int) -> None:
    watched = config.stash.get(WATCHED, None)
    if watched is not None:
        watched.judged(exit_code)


def _must_reach(config: pytest.Config) -> bool:
    """Whether a test that the run does not reach fails it."""
    return bool(
        config.getoption("truestep_require_executed") or config.getoption("truestep_parity")
    )


@pytest.fixture
def truestep(request: pytest.FixtureRequest) -> Iterator[TruestepFixture]:
    """Compare what a test made with its reference: `truestep.check(x, name=...)`."""
    fixture = TruestepFixture(request)
    yield fixture
    fixture.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    except (pytest.skip.Exception, pytest.xfail.Exception):
        raise_failures(item)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    try:
        result = yield
    except (pytest.skip.Exception, pytest.xfail.Exception):
        raise_failures(item)
        raise
    if not getattr(item, "_excinfo", None):  # unittest keeps what a test raised: see the report
        raise_failures(item)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    checks = item.stash.get(CHECKS, Checks())
    if checks.failures and report.skipped and not _expected_to_fail(item, report):
        # Skipped where no hook of a phase could see it: by unittest, or in a subtest.
        call.excinfo = pytest.CallInfo.from_call(lambda: raise_failures(item), call.when).excinfo
        report = pytest.TestReport.from_item_and_call(item, call)
    if CHECKS in item.stash or item.get_closest_marker(MARK) is not None:
        told(item, call, report)
    if call.excinfo is not None:
        checks.failures.clear()  # told by this report, whichever they are
    compared, checks.compared = checks.compared, Compared()
    data = vars(compared) | {"marked": item.get_closest_marker(MARK) is not None}
    data["evidence"] = [
        {**entry, "test": report.nodeid.partition("::")[2], "result": _result(report)}
        for entry in compared.parity
    ]
    report.truestep = data  # type: ignore[attr-defined]  # read by _Collector
    if report.longrepr is not None and item.get_closest_marker("parity"):
        _hide_tokens(report)
    return report


def _expected_to_fail(item: pytest.Item, report: pytest.TestReport) -> bool:
    """Whether a mark says that the test fails, and it did so: its drift is the failure meant."""
    unittest = getattr(getattr(item, "obj", None), "__unittest_expecting_failure__", False)
    marked = unittest or item.get_closest_marker("xfail") is not None
    return marked and hasattr(report, "wasxfail")


def _result(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xpassed" if report.outcome == "passed" else "xfailed"
    return report.outcome


def _hide_tokens(report: pytest.TestReport) -> None:
    """Keep access tokens out of what is printed of a failed parity test."""
    from truestep.parity.redaction import redact

    text = report.longreprtext
    if redact(text) != text and not isinstance(report.longrepr, tuple):
        report.longrepr = redact(text)
    report.sections = [(name, redact(body)) for name, body in report.sections]


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    _at(collector.config, f"while {collector.nodeid or 'the session'} was collected")
    report = yield
    if collector.config.getoption("truestep_require_executed"):
        collector.config.stash[STATE].marked.keep(collector, report)
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[STATE].marked.finish_collection(session.items)


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[STATE].deselected += len(items)


def _at(config: pytest.Config, place: str) -> None:
    watched = config.stash.get(WATCHED, None)
    if watched is not None:
        watched.at(place)


class _Collector:
    """Gathers what the tests report; registered where the terminal is."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._state = config.stash[STATE]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        _at(self._config, nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        state = self._state
        data: Mapping[str, Any] = getattr(report, "truestep", None) or {}
        marked, numeric = data.get("marked", False), data.get("numeric", 0)
        state.files.add(report.nodeid.partition("::")[0])
        state.marked.report(report, marked=marked, numeric=numeric)
        if not data:  # xdist's own of a worker that crashed, or a subtest's
            return
        state.comparisons += data["comparisons"]
        state.used.update(data["used"])
        state.written += data["written"]
        state.kept += map(tuple, data["kept"])
        state.parity += data["evidence"]
        state.names.update(data["names"])
        state.known += data["known"]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.fspath:
            why = (report.longreprtext.strip().splitlines() or ["error"])[-1]
            self._state.not_collected[report.nodeid] = why

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a worker of xdist saw; one that crashed says nothing."""
        said = getattr(node, "workeroutput", {}).get("truestep")
        if said is not None:
            self._state.marked.from_worker(said["marked"])
            self._config.stash[LATE] += said["late"]
            self._state.deselected = max(self._state.deselected, said["deselected"])


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[STATE].began = True
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Collector(session.config))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    state = config.stash[STATE]
    if hasattr(config, "workeroutput"):
        config.workeroutput["truestep"] = {
            "marked": state.marked.to_controller(),
            "late": config.stash[LATE],
            "deselected": state.deselected,
        }
        return
    state.ended = True
    state.stray = _stray(config, state)
    state.failed = bool(state.stray or config.stash[LATE] or _not_executed(config, state))
    state.rules = rules_of(config, state.files)
    state.failed |= bool(state.rules.refused)
    if _complete(config, state) and state.used:
        remove_stale(reference_root(config), state.used)
    if config.getoption("truestep_parity"):
        from datetime import date

        from truestep.parity.session import write_entries

        failed = {str(config.rootpath / name): why for name, why in state.not_collected.items()}
        written, unwritten = write_entries(state.parity, failed, date.today())
        state.ledgers = [str(path) for path in written]
        state.unwritten = [str(error) for error in unwritten]
        state.failed |= bool(unwritten)
    if state.failed and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    report, json_path = config.getoption("truestep_report"), config.getoption("truestep_json")
    if not (report or json_path):
        return
    from truestep.verdict import Comparison, Results

    every = (Comparison.model_validate_json(text) for text in state.comparisons)
    comparisons = [state.rules.told(comparison) for comparison in every]
    if report and comparisons:
        from truestep.report import html

        html.write_many(report, comparisons)
    if json_path:
        from truestep.files import write_text

        write_text(json_path, Results.of(comparisons).model_dump_json(indent=2), "the result")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    state = config.stash[STATE]
    required = config.getoption("truestep_require_executed")
    unused = _unused(config, state)
    rules = state.rules.lines()
    kept = kept_lines(state.kept, state.rules)
    listed = (state.comparisons, state.written, kept, unused, state.ledgers, state.unwritten, rules)
    if not (required or state.failed or any(listed)):
        return
    terminalreporter.section("truestep")
    count = len(state.comparisons)
    terminalreporter.line(f"{count} comparison{'' if count == 1 else 's'}")
    for name in state.written:
        terminalreporter.line(f"written: {name}")
    for text in kept:
        terminalreporter.line(text, yellow=True)
    for name in unused:
        terminalreporter.line(f"unused reference: {name}")
    for text in state.known:
        terminalreporter.line(f"KNOWN FAILURE {text}", yellow=True)
    for name in state.stray:
        terminalreporter.line(f"KNOWN FAILURE OF NO CHECK {name}: delete the entry", red=True)
    for text in rules:
        terminalreporter.line(text, red=bool(state.rules.refused), yellow=not state.rules.refused)
    for name in config.stash[LATE]:
        terminalreporter.line(f"ENDED AFTER ITS TEST {name}", red=True)
    for text in _not_executed(config, state):
        terminalreporter.line(f"NOT EXECUTED{text}", red=True)
    if required and config.stash.get(WATCHED, None) is None:
        terminalreporter.line("not guarded: a test that ends the process ends this run as it likes")
    for path in state.ledgers:
        terminalreporter.line(f"ledger: {os.path.relpath(path)}")
    for text in state.unwritten:
        terminalreporter.line(f"NOT WRITTEN {text}", red=True)
    report = config.getoption("truestep_report")
    if report and state.comparisons:
        terminalreporter.line(f"report: {report}")


def _not_executed(config: pytest.Config, state: _Session) -> list[str]:
    """What had to run and did not, and why; nothing where nothing has to."""
    if config.getoption("truestep_require_executed"):
        found = [f" {name}: {why}" for name, why in state.marked.not_executed().items()]
        return found if state.marked.outcomes else [*found, ": no test marked parity ran"]
    if config.getoption("truestep_parity"):
        return [f" {name}: {NEVER_REACHED}" for name in state.marked.unreached()]
    return []


def _unused(config: pytest.Config, state: _Session) -> list[str]:
    """References that no test of a complete run asked for; nothing after a partial one."""
    if not _complete(config, state) or not state.used:
        return []
    from truestep.recording.store import Store

    return [p.name for p in Store(reference_root(config)).places() if p.name not in state.used]


def _stray(config: pytest.Config, state: _Session) -> list[str]:
    """Known failures that no check of a complete run is named as; nothing after a partial one."""
    ledger = config.stash.get(LEDGER, {})
    return [n for n in ledger if n not in state.names] if _complete(config, state) else []


def _complete(config: pytest.Config, state: _Session) -> bool:
    partial = config.args_source is pytest.Config.ArgsSource.ARGS or state.deselected
    ended = state.marked.selected is not None and not state.marked.unreached()
    return ended and not partial and not config.getoption("lf", False)
