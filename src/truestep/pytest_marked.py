"""Which tests are marked `parity`, and what became of each. No torch.

A test that a filter left out, or that the run ended before, leaves no report. So what the
collectors give is kept before any filter sees it, and set against the reports at the end. Under
xdist the workers collect, and say what when they end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

MARK = "parity"

NEVER_REACHED = "never reached: the run ended before it"


@dataclass
class Marked:
    """The marked tests of a run.

    Attributes:
        given: What each collector gave, before any filter.
        tests: Node ids of all marked tests of the files that were collected.
        unknown: Node ids of files whose tests could not be seen, and why.
        selected: Node ids of what is left after all filters, marked or not; None until that is
            known.
        reached: Node ids of what was reported, marked or not.
        outcomes: Why a marked test that ran proves nothing; "" if it is not known to.
        numeric: Tensors whose numbers it compared.
    """

    given: dict[pytest.Collector, list[pytest.Item | pytest.Collector]] = field(
        default_factory=dict
    )
    tests: dict[str, None] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    selected: set[str] | None = None
    reached: set[str] = field(default_factory=set)
    outcomes: dict[str, str] = field(default_factory=dict)
    numeric: dict[str, int] = field(default_factory=dict)

    def keep(self, collector: pytest.Collector, report: pytest.CollectReport) -> None:
        """Keep what a collector gave; to be called before filters are."""
        self.given[collector] = list(report.result or ())
        if report.outcome == "skipped" and isinstance(collector, pytest.File):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped"
            if f"mark.{MARK}" in collector.path.read_text("utf-8", "replace"):
                self.unknown[collector.nodeid] = f"the file was skipped: {reason}"

    def finish_collection(self, items: list[pytest.Item]) -> None:
        """See which tests are marked, now that every mark is set, and which are left."""
        self.selected = {item.nodeid for item in items}
        for collector in list(self.given):
            for item in self._items(collector):
                if item.get_closest_marker(MARK) is not None:
                    self.tests[item.nodeid] = None
        self.given.clear()

    def _items(self, collector: pytest.Collector) -> Iterator[pytest.Item]:
        """Tests of a collector, and of what a filter left out below it.

        Files that were not asked for are left alone. A class that no given node id is in has not
        been collected, and `--last-failed` gives whole files as empty.
        """
        nodes = self.given.get(collector, [])
        emptied = not nodes and collector.config.getoption("lf", False)
        if collector not in self.given or (emptied and isinstance(collector, pytest.File)):
            try:
                nodes = list(collector.collect())
            except (Exception, pytest.skip.Exception) as error:  # whatever importing it raises
                if collector.nodeid not in self.unknown and isinstance(error, Exception):
                    why = (str(error).strip().splitlines() or [""])[0]
                    self.unknown[collector.nodeid] = f"{type(error).__name__}: {why}"[:200]
        for node in nodes:
            if isinstance(node, pytest.Item):
                yield node
            elif node not in self.given and not isinstance(node, pytest.File | pytest.Directory):
                yield from self._items(node)

    def to_controller(self) -> dict[str, Any]:
        """What a worker of xdist tells its controller."""
        return {
            "tests": list(self.tests),
            "unknown": self.unknown,
            "selected": None if self.selected is None else sorted(self.selected),
        }

    def from_worker(self, data: Mapping[str, Any]) -> None:
        """Add what a worker said; all of them collect the same."""
        self.tests.update(dict.fromkeys(data["tests"]))
        self.unknown.update(data["unknown"])
        if data["selected"] is not None:
            self.selected = {*(self.selected or ()), *data["selected"]}

    def report(self, report: pytest.TestReport, *, marked: bool, numeric: int) -> None:
        """Keep what became of a test."""
        self.reached.add(report.nodeid)
        if marked:
            self.tests.setdefault(report.nodeid)
            self.numeric[report.nodeid] = self.numeric.get(report.nodeid, 0) + numeric
            if report.failed:
                self.outcomes.pop(report.nodeid, None)  # that fails the run, and is told by pytest
            elif report.when == "call" or report.skipped:
                self.outcomes[report.nodeid] = _outcome(report)

    def unreached(self) -> list[str]:
        """Selected tests that were not reported."""
        return sorted((self.selected or set()) - self.reached)

    def not_executed(self) -> dict[str, str]:
        """Marked tests that proved nothing, and why."""
        found = dict(self.unknown)
        if self.selected is None:
            found["collection"] = "it did not end: which tests are marked is not known"
        for test in self.tests:
            reason = self._reason(test)
            if reason:
                found[test] = reason
        return found

    def _reason(self, test: str) -> str:
        if test in self.outcomes:
            outcome = self.outcomes[test]
            return "compared no numbers" if not (outcome or self.numeric[test]) else outcome
        if test in self.reached:
            return ""  # it failed
        deselected = self.selected is not None and test not in self.selected
        return "deselected" if deselected else NEVER_REACHED


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed"
    return "skipped" if report.skipped else ""
