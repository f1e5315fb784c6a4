"""Records of what runs of a case cost: runs, batches, cohorts, results. Pure: no I/O, no torch.

Every record is JSON-able. Times are in milliseconds and memory in MiB, as the names say.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from truestep.content import mapping_differences
from truestep.experiment.perf_statistics import Scope
from truestep.experiment.statistics import Outcome
from truestep.verdict import Difference, Float, Record, Verdict

SCHEMA_VERSION = 1

MemoryKind = Literal["device", "resident", "unknown"]

NOT_IDENTITY = ("library.truestep", "variable.", "model.weights")
"""Beginnings of environment keys that do not set cohorts apart: the version under test, settings
that show elsewhere (threads, capability), and weights, whose values cost no time."""


class Cohort(Record):
    """What runs must have in common to be compared: source, case, and machine and libraries.

    `values` holds the environment by dotted key (`device.name`, `library.torch`, `torch.threads`,
    `attention.kernel`, `case.dtype`), or what an imported file says of it.
    """

    source: Literal["truestep", "sglang", "fastvideo"] = "truestep"
    case_id: str
    values: dict[str, str] = Field(default_factory=dict)

    @property
    def id(self) -> str:
        """12 digits of a SHA-256 over everything."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def differences(self, reference: Cohort) -> tuple[Difference, ...]:
        """Keys whose value differs from another cohort's, source and case among them."""
        return mapping_differences(
            {**self.values, "case": self.case_id, "source": self.source},
            {**reference.values, "case": reference.case_id, "source": reference.source},
        )


def cohort_values(environment: Mapping[str, str], *, cores: int, dtype: str) -> dict[str, str]:
    """The part of an environment that belongs to a cohort, with cores and dtype."""
    kept = {k: v for k, v in environment.items() if not k.startswith(NOT_IDENTITY)}
    return dict(sorted({**kept, "machine.cores": str(cores), "case.dtype": dtype}.items()))


class PerfRun(Record):
    """One generation.

    Attributes:
        started: UTC, ISO 8601.
        e2e_ms: Wall time of the whole.
        stages_ms: Of each stage; `denoise` is read from its own pair of clock readings.
        denoise_step_ms: Of each step, by its index as text (SGLang's schema).
        load_ms: Of loading the model, once a process; None where it is not known.
        memory_mib: Peak; see `memory_kind`.
    """

    started: str = ""
    e2e_ms: Float
    stages_ms: dict[str, Float] = Field(default_factory=dict)
    denoise_step_ms: dict[str, Float] = Field(default_factory=dict)
    load_ms: Float | None = None
    memory_mib: Float | None = None
    memory_kind: MemoryKind = "unknown"


class PerfBatch(Record):
    """Runs of one process.

    Attributes:
        baseline: Number of the baseline that it counts for; None: it only shows in the trend.
        complete: Whether the process ended as planned.
        label: What the user, or an imported file, calls it.
    """

    id: int = 0
    started: str = ""
    label: str = ""
    tool_version: str = ""
    baseline: int | None = None
    complete: bool = True
    runs: tuple[PerfRun, ...] = ()


class MetricRow(Record):
    """One number of a check beside its baseline.

    Attributes:
        unit: `ms` or `MiB`.
        value, base: Median of the new runs; median of the recorded batches' medians.
        low, high, level: Where the new median was to be expected.
        scope: `processes`, `runs` (one or two processes: it can only be suspected) or `none`.
        limit: Largest value that the percent rule lets pass.
        outcome: By the interval.
        verdict: None: shown, not judged.
    """

    name: str
    unit: Literal["ms", "MiB"] = "ms"
    value: Float
    base: Float
    low: Float | None = None
    high: Float | None = None
    level: Float | None = None
    scope: Scope = "none"
    limit: Float | None = None
    outcome: Outcome = Outcome.UNDECIDED
    verdict: Verdict | None = None
    note: str = ""

    @property
    def change(self) -> float:
        """Relative to the base; above 0 is slower or more."""
        return self.value / self.base - 1 if self.base else math.nan


class Alternative(Record):
    """A cohort that there is, and in what it differs from the one asked for (actual)."""

    cohort: str
    source: str
    case_id: str
    runs: int
    differences: tuple[Difference, ...] = ()


class PerfResult(Record):
    """What `perf record` or `perf check` found for one case.

    Attributes:
        batch: Number of the batch in the history, of a record.
        detectable: Smallest relative slow-down of the whole that would not have passed.
        needed_runs, needed_processes: What would decide, where it is inconclusive.
        faster: The new runs are faster than the interval.
        offer: What to do about it.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    action: Literal["record", "check"]
    verdict: Verdict
    sentence: str
    case_name: str = ""
    case_id: str = ""
    cohort_id: str = ""
    cohort: Cohort | None = None
    history: str = ""
    batch: int | None = None
    baseline: int | None = None
    baseline_batches: int = 0
    baseline_runs: int = 0
    rows: tuple[MetricRow, ...] = ()
    detectable: Float | None = None
    needed_runs: int | None = None
    needed_processes: int | None = None
    faster: bool = False
    offer: str = ""
    problems: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = ()
    hint: str = ""
    runs: tuple[PerfRun, ...] = ()

    def __bool__(self) -> bool:
        raise TypeError("a PerfResult has no truth value: read .verdict")


class PerfResults(Record):
    """Results of several cases: what `--json` writes."""

    schema_version: int = SCHEMA_VERSION
    verdict: Verdict
    exit_code: int
    results: tuple[PerfResult, ...]
    repeat: str = ""

    @classmethod
    def of(cls, results: Iterable[PerfResult], *, repeat: str = "") -> PerfResults:
        """Bundle results; the verdict is the worst of them."""
        found = tuple(results)
        verdict = Verdict.worst(r.verdict for r in found)
        return cls(verdict=verdict, exit_code=verdict.exit_code, results=found, repeat=repeat)
