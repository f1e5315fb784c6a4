"""pytest plugin: the `truestep` fixture, its options, and the marker `parity`. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from truestep.comparison.latent_gate import SliceSpec
    from truestep.known import Entry
    from truestep.parity.component import Parity
    from truestep.references.store import Place, Store
    from truestep.verdict import Comparison

STATE = pytest.StashKey["_Session"]()
CHECKS = pytest.StashKey["_Checks"]()
LEDGER: pytest.StashKey[Mapping[str, Entry]] = pytest.StashKey()


@dataclass
class _Checks:
    """What one test compared."""

    comparisons: list[str] = field(default_factory=list)
    numeric: int = 0
    used: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)


@dataclass
class _Session:
    """What the whole run compared; under xdist only the controller's is filled."""

    comparisons: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    written: list[str] = field(default_factory=list)
    parity_run: set[str] = field(default_factory=set)
    not_executed: dict[str, str] = field(default_factory=dict)
    deselected: int = 0
    parity: list[dict[str, Any]] = field(default_factory=list)
    not_collected: dict[str, str] = field(default_factory=dict)
    ledgers: list[str] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    known: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)


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
        "--truestep-require-executed",
        action="store_true",
        help="fail unless every test marked parity ran and compared numbers",
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
    config.stash[STATE] = _Session()
    known = config.getoption("truestep_known")
    if known:
        from truestep.errors import UsageError
        from truestep.known import read_ledger

        try:
            config.stash[LEDGER] = read_ledger(known)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None


class TruestepFixture:
    """Compares what a test made with its stored reference. One instance a test."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._node = request.node
        self._config = request.config
        self._checks: _Checks = request.node.stash.setdefault(CHECKS, _Checks())

    @property
    def store(self) -> Store:
        """The reference folder."""
        from truestep.references.store import Store

        return Store(_root(self._config))

    def check(
        self,
        actual: object,
        *,
        name: str = "",
        tolerance: float | None = None,
        device_class: str | None = None,
        attention: str = "any",
        tier: str = "default",
    ) -> Comparison:
        """Judge a tensor, an array or a mapping of them against the test's reference.

        Args:
            actual: What the test made.
            name: Tells several checks of one test apart.
            tolerance: Limit on rel_l2; default the analytic floor of the dtype.
            device_class: Where it was made; default from the tensor's device.
            attention: Attention back-end that was really used.
            tier: Quality tier.

        Returns:
            The comparison, if it passed.

        Raises:
            EquivalenceError: It did not.
            ReferenceNotFoundError: There is none; the candidate is written beside its place.
        """
        from truestep.comparison.api import compare
        from truestep.comparison.sources import load

        tensors = load(actual, label="actual").tensors
        place = self._place(name, tensors, device_class, attention, tier)
        reference = self._reference(place, tensors, {})
        if reference is None:
            return self._written(place)
        return self._judge(compare(tensors, reference, tolerance=tolerance), place, name)

    def check_latent(
        self,
        latent: Any,
        *,
        name: str = "",
        slice_spec: SliceSpec | str | None = None,
        slice_cosine_threshold: float = 5e-3,
        full_cosine_threshold: float = 1e-2,
        device_class: str | None = None,
        attention: str = "any",
        tier: str = "default",
    ) -> Comparison:
        """Gate a latent of any engine; see `truestep.check_latent` and `check`."""
        from truestep.comparison.latent_gate import check_latent, slice_for
        from truestep.comparison.sources import load

        tensor = next(iter(load(latent, label="latent").tensors.values()))
        spec = slice_for(tensor, slice_spec)
        tensors = {"latent/final": tensor, "signature": spec.cut(tensor)}
        place = self._place(name, {"latent/final": tensor}, device_class, attention, tier)
        settings = {"slice_spec": spec.model_dump(mode="json")}
        reference = self._reference(place, tensors, settings)
        if reference is None:
            return self._written(place)
        result = check_latent(
            tensor,
            reference,
            slice_spec=spec,
            slice_cosine_threshold=slice_cosine_threshold,
            full_cosine_threshold=full_cosine_threshold,
        )
        return self._judge(result, place, name)

    def check_parity(self, parity: Parity) -> Comparison:
        """Run a component parity case; see `truestep.parity`.

        Returns:
            The comparison, if the numbers agree and prove parity.

        Raises:
            EquivalenceError: The numbers differ.
            ParityError: They agree, but prove nothing or may no longer pass.
            Exception: Whatever a load path raised; only a typed missing part skips the test.
        """
        from truestep.errors import ComponentMissingError
        from truestep.parity.running import Run, run_parity
        from truestep.parity.session import entry_of, fill_packet

        keep = self._config.getoption("truestep_parity_keep")
        path = Path(self._node.path)
        run = Run(parity, path.parent, path, Path(keep) if keep else None)
        try:
            return run_parity(run)
        except ComponentMissingError as error:
            pytest.skip(str(error))
        finally:
            if run.comparison is not None:
                self._checks.comparisons.append(run.comparison.to_json())
                self._checks.numeric += sum(r.metrics is not None for r in run.comparison.rows)
            if self._config.getoption("truestep_parity"):
                fill_packet(run)
            self._checks.parity.append(entry_of(run))

    def _place(
        self,
        name: str,
        tensors: Mapping[str, Any],
        device_class: str | None,
        attention: str,
        tier: str,
    ) -> Place:
        from truestep.environment import device_class as class_of
        from truestep.references.store import Place

        if device_class is None:
            first = next(iter(tensors.values()), None)
            device_class = class_of(str(first.device)) if first is not None else "cpu"
        return Place(reference_id(self._node.nodeid, name), tier, device_class, attention)

    def _reference(
        self, place: Place, tensors: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> Path | None:
        """The stored reference; None where this run writes it."""
        from truestep.errors import ReferenceNotFoundError
        from truestep.recording.judging import refuse_empty_content

        store, update = self.store, self._config.getoption("truestep_update")
        path = store.root / place.name
        self._checks.used.append(place.name)
        if update == "all" or (update == "new" and not path.exists()):
            refuse_empty_content(tensors, where=place.case_id)
            store.save(_recording(tensors, place, settings), place, update=True)
            self._checks.written.append(place.name)
            return None
        if path.exists():
            return store.verified(place)
        candidate = path.with_name(path.name + ".candidate")
        _recording(tensors, place, settings).save(candidate)
        raise ReferenceNotFoundError(
            "this check has no reference yet",
            where=str(path),
            measured=f"what the test made was written to {candidate.name} beside it",
            hint=f"pytest {self._node.nodeid!r} --truestep-update",
        )

    def _written(self, place: Place) -> Comparison:
        from truestep.verdict import Comparison, Rule, Side, Verdict

        return Comparison(
            verdict=Verdict.IDENTICAL,
            sentence="the reference was written by this run",
            rule=Rule(name="update", text="--truestep-update"),
            case_id=place.case_id,
            actual=Side(label=self._node.nodeid),
            reference=Side(label=place.name),
        )

    def _judge(self, comparison: Comparison, place: Place, name: str) -> Comparison:
        from truestep.errors import EquivalenceError
        from truestep.known import judged
        from truestep.verdict import assert_equivalent

        entry = "::".join(part for part in (self._node.nodeid, name) if part)
        self._checks.names.append(entry)
        comparison = judged(comparison, self._config.stash.get(LEDGER, {}), entry)
        named = comparison.model_copy(
            update={
                "case_id": place.case_id,
                "hint": comparison.hint
                or f"to accept the change: pytest {self._node.nodeid!r} --truestep-update=all",
                "repeat": f"pytest {self._node.nodeid!r}",
            }
        )
        self._checks.comparisons.append(named.to_json())
        self._checks.numeric += sum(row.metrics is not None for row in named.rows)
        if named.known is None:
            return assert_equivalent(named)
        if not named.known.accepted:
            raise EquivalenceError(named)
        self._checks.known.append(named.sentence)
        return named


def _recording(tensors: Mapping[str, Any], place: Place, settings: Mapping[str, Any]) -> Any:
    from datetime import datetime, timezone

    from truestep.environment import Environment, library_version
    from truestep.recording.capture import tensor_table
    from truestep.recording.format import Recording
    from truestep.recording.manifest import Manifest

    manifest = Manifest(
        tool_version=library_version("truestep") or "",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        level="full",
        case_id=place.case_id,
        settings=dict(settings),
        environment=dict(Environment.current("cpu" if place.device_class == "cpu" else None)),
        tensors=tensor_table(tensors),
    )
    return Recording.in_memory(tensors, manifest)


def reference_id(nodeid: str, name: str) -> str:
    """File name of a check's reference: readable, and as unique as the test and the name."""
    full = f"{nodeid}::{name}"
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", f"{nodeid.rsplit('/', 1)[-1]} {name}").strip("-")
    return f"{slug[:100]}-{hashlib.sha256(full.encode()).hexdigest()[:10]}"


def _root(config: pytest.Config) -> Path:
    given = config.getoption("truestep_references")
    return Path(given) if given else config.rootpath / "truestep-references"


@pytest.fixture
def truestep(request: pytest.FixtureRequest) -> TruestepFixture:
    """Compare what a test made with its reference: `truestep.check(x, name=...)`."""
    return TruestepFixture(request)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    checks = item.stash.get(CHECKS, _Checks())
    if report.when == "call" or report.outcome == "skipped":
        report.truestep = {  # type: ignore[attr-defined]  # plain data: xdist sends it to the controller
            "comparisons": checks.comparisons,
            "used": checks.used,
            "written": checks.written,
            "numeric": checks.numeric,
            "names": checks.names,
            "known": checks.known,
            "parity": item.get_closest_marker("parity") is not None,
            "evidence": [
                {**entry, "test": report.nodeid.partition("::")[2], "result": _result(report)}
                for entry in checks.parity
            ],
        }
    if report.longrepr is not None and item.get_closest_marker("parity"):
        _hide_tokens(report)
    return report


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


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[STATE].deselected += len(items)


class _Collector:
    """Gathers what the tests report; registered where the terminal is."""

    def __init__(self, state: _Session) -> None:
        self._state = state

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data: dict[str, Any] | None = getattr(report, "truestep", None)
        if data is None:
            return
        state = self._state
        state.comparisons += data["comparisons"]
        state.used.update(data["used"])
        state.written += data["written"]
        state.parity += data["evidence"]
        state.names.update(data["names"])
        state.known += data["known"]
        if data["parity"]:
            state.parity_run.add(report.nodeid)
            reason = _not_executed(report, data["numeric"])
            if reason:
                state.not_executed[report.nodeid] = reason

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.fspath:
            why = (report.longreprtext.strip().splitlines() or ["error"])[-1]
            self._state.not_collected[report.nodeid] = why


def _not_executed(report: pytest.TestReport, numeric: int) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed"
    if report.outcome == "skipped":
        return "skipped"
    return "" if numeric else "compared no numbers"


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(_Collector(session.config.stash[STATE]))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput"):
        return
    state = config.stash[STATE]
    if config.getoption("truestep_require_executed") and (
        state.not_executed or not state.parity_run
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    state.stray = _stray(config, state)
    if state.stray and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.getoption("truestep_parity"):
        from datetime import date

        from truestep.parity.session import write_entries

        failed = {str(config.rootpath / name): why for name, why in state.not_collected.items()}
        written, unwritten = write_entries(state.parity, failed, date.today())
        state.ledgers = [str(path) for path in written]
        state.unwritten = [str(error) for error in unwritten]
        if unwritten:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    report, json_path = config.getoption("truestep_report"), config.getoption("truestep_json")
    if not (report or json_path):
        return
    from truestep.verdict import Comparison, Results

    comparisons = [Comparison.model_validate_json(text) for text in state.comparisons]
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
    listed = (state.comparisons, state.written, unused, state.ledgers, state.unwritten, state.stray)
    if not (required or any(listed)):
        return
    terminalreporter.section("truestep")
    count = len(state.comparisons)
    terminalreporter.line(f"{count} comparison{'' if count == 1 else 's'}")
    for name in state.written:
        terminalreporter.line(f"written: {name}")
    for name in unused:
        terminalreporter.line(f"unused reference: {name}")
    for text in state.known:
        terminalreporter.line(f"KNOWN FAILURE {text}", yellow=True)
    for name in state.stray:
        terminalreporter.line(f"KNOWN FAILURE OF NO CHECK {name}: delete the entry", red=True)
    if required:
        for nodeid, reason in state.not_executed.items():
            terminalreporter.line(f"NOT EXECUTED {nodeid}: {reason}", red=True)
        if not state.parity_run:
            terminalreporter.line("NOT EXECUTED: no test marked parity ran", red=True)
    for path in state.ledgers:
        terminalreporter.line(f"ledger: {os.path.relpath(path)}")
    for text in state.unwritten:
        terminalreporter.line(f"NOT WRITTEN {text}", red=True)
    report = config.getoption("truestep_report")
    if report and state.comparisons:
        terminalreporter.line(f"report: {report}")


def _unused(config: pytest.Config, state: _Session) -> list[str]:
    """References that no test of a complete run asked for; nothing after a partial one."""
    if not _complete(config, state) or not state.used:
        return []
    from truestep.references.store import Store

    return [p.name for p in Store(_root(config)).places() if p.name not in state.used]


def _stray(config: pytest.Config, state: _Session) -> list[str]:
    """Known failures that no check of a complete run is named as; nothing after a partial one."""
    ledger = config.stash.get(LEDGER, {})
    return [n for n in ledger if n not in state.names] if _complete(config, state) else []


def _complete(config: pytest.Config, state: _Session) -> bool:
    return config.args_source is not pytest.Config.ArgsSource.ARGS and not state.deselected
