"""Verdicts, and the result of a comparison as one record: `docs/schema/comparison-1.json` is
generated from these models. Pure: no I/O, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, ClassVar, Literal

from pydantic import Field

from truestep.explanations import Cause as Cause
from truestep.explanations import Divergence as Divergence
from truestep.explanations import Elsewhere as Elsewhere
from truestep.explanations import Meant as Meant
from truestep.explanations import Profile as Profile
from truestep.explanations import Recheck as Recheck
from truestep.many import Column, Many, Numbers, Split, Texts
from truestep.records import Cost as Cost
from truestep.records import Float as Float
from truestep.records import FrameTriple as FrameTriple
from truestep.records import GateResult as GateResult
from truestep.records import KnownFailure as KnownFailure
from truestep.records import Light as Light
from truestep.records import Media as Media
from truestep.records import MediaEvidence as MediaEvidence
from truestep.records import Record as Record
from truestep.records import Rule as Rule
from truestep.records import RuleChange as RuleChange
from truestep.records import Shift as Shift
from truestep.records import Sound as Sound
from truestep.records import SoundMetrics as SoundMetrics
from truestep.text import visible

SCHEMA_VERSION = 1

GIVEN = "given another input"
"""How the kind of a divergence begins where the whole model was given what it should not be."""


class Verdict(str, Enum):
    """Outcome of a comparison. Has no truth value: compare with a member or read `exit_code`."""

    IDENTICAL = "identical"
    EQUIVALENT = "equivalent"
    DRIFTED = "drifted"
    INVALID = "invalid"
    UNMET = "unmet"
    MISSING = "missing"
    INCOMPARABLE = "incomparable"
    INCONCLUSIVE = "inconclusive"

    __str__ = str.__str__

    def __bool__(self) -> bool:
        raise TypeError(
            "a Verdict has no truth value: compare it (verdict is Verdict.EQUIVALENT), "
            "read verdict.exit_code, or call assert_equivalent()"
        )

    @property
    def exit_code(self) -> int:
        """Process exit code: 0 same, 1 different or invalid, 3 not comparable, 4 inconclusive."""
        return _EXIT[self]

    @property
    def passed(self) -> bool:
        """True for `identical` and `equivalent`."""
        return self.exit_code == 0

    @classmethod
    def worst(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """The verdict that stands for several: exit code 1, 3, 4, 0; none at all is `invalid`."""
        found = set(verdicts)
        return next((v for v in _SEVERITY if v in found), cls.INVALID)


_EXIT = {
    Verdict.IDENTICAL: 0,
    Verdict.EQUIVALENT: 0,
    Verdict.DRIFTED: 1,
    Verdict.INVALID: 1,
    Verdict.UNMET: 1,
    Verdict.MISSING: 3,
    Verdict.INCOMPARABLE: 3,
    Verdict.INCONCLUSIVE: 4,
}
_PASSED = (Verdict.IDENTICAL, Verdict.EQUIVALENT)
_MEANT = (Verdict.DRIFTED, Verdict.INCONCLUSIVE)
_FAILING = tuple(verdict for verdict, code in _EXIT.items() if code != 0)
_SEVERITY = (
    Verdict.INVALID,
    Verdict.DRIFTED,
    Verdict.UNMET,
    Verdict.INCOMPARABLE,
    Verdict.MISSING,
    Verdict.INCONCLUSIVE,
    Verdict.EQUIVALENT,
    Verdict.IDENTICAL,
)


class Difference(Record):
    """One key whose value differs between the two sides."""

    key: str
    actual: str
    reference: str


class TensorInfo(Light):
    """Shape and dtype of one side of a row."""

    dtype: str
    shape: tuple[int, ...]


class Metrics(Light):
    """Distances of one tensor pair, relative to the reference (see `truestep.measure.distance`)."""

    count: int
    rel_l2: Float
    max_abs: Float
    max_abs_index: tuple[int, ...]
    cosine_distance: Float
    norm_ratio: Float
    gain: Float
    rms_reference: Float
    nonfinite_actual: int = 0
    nonfinite_reference: int = 0


class FloorUsed(Light):
    """The noise floor that a row was judged with.

    `rel_l2` is the floor of that metric; `max_abs` is relative to the reference's rms. `bound` is
    the multiple of the floor above which a result is `drifted`; between 1 and `bound` it is
    `inconclusive`. `source` is `measured`, `analytic` or `tolerance`.
    """

    rel_l2: Float
    max_abs: Float
    bound: Float
    source: str
    pair: str
    runs: int = 0
    detail: str = ""


class Statistic(Light):
    """One structure statistic of a residual, over the reference's rms (see `truestep.judge.rule`).

    `floor` is its largest benign value, `bound` the multiple above which it is drifted.
    """

    name: str
    value: Float
    floor: Float
    bound: Float
    ratio: Float


class Row(Light):
    """One tensor of a comparison."""

    name: str
    verdict: Verdict
    stage: str = ""
    step: int | None = None
    branch: str | None = None
    fqn: str | None = None
    modality: str | None = Field(
        default=None, description="audio or video, where the tensors have both and it is of one"
    )
    actual: TensorInfo | None = None
    reference: TensorInfo | None = None
    metrics: Metrics | None = None
    floor: FloorUsed | None = None
    ratio: Float | None = Field(default=None, description="the deciding statistic / its floor")
    ratio_metric: str | None = Field(default=None, description="the statistic that `ratio` is of")
    statistics: tuple[Statistic, ...] = Field(default=(), description="structure of the residual")
    origin: Literal["", "introduced", "inherited"] = Field(
        default="", description="of a failing row of a module: made in it, or given to it"
    )
    note: str = ""

    @property
    def detectable(self) -> float | None:
        """Smallest rel_l2 that would have been called `drifted` here; None without a floor."""
        return self.floor.rel_l2 * self.floor.bound if self.floor else None


class _Measures(Many[Metrics]):
    """Distances of many pairs."""

    kind = Metrics
    fields = tuple(Metrics.model_fields)
    how: ClassVar[Mapping[str, Callable[[], Column]]] = dict.fromkeys(
        ("rel_l2", "max_abs", "cosine_distance", "norm_ratio", "gain", "rms_reference"), Numbers
    )


class Rows(Many[Row]):
    """Rows of a comparison. There may be a million: a `Row` is made when it is asked for."""

    kind = Row
    fields = tuple(Row.model_fields)
    how: ClassVar[Mapping[str, Callable[[], Column]]] = {
        "name": Texts,
        "metrics": lambda: Split(_Measures()),
        "ratio": Numbers,
        "statistics": list,
    }

    def having(self, *verdicts: Verdict) -> Rows:
        """The rows of some verdicts."""
        return self.take([at for at, v in enumerate(self.each("verdict")) if v in verdicts])

    def one_sided(self) -> list[bool]:
        """Of every row, whether one of the two sides lacks it."""
        sides = self.each("actual", "reference")
        return [(actual is None) is not (reference is None) for actual, reference in sides]


def detectable(rows: Iterable[Row]) -> float | None:
    """Smallest rel_l2 that would have been called `drifted` in any stage of these rows.

    A stage that was also replayed in a higher precision (`float32/...`) counts as seen there.
    """
    rows, high = Rows.of(rows), ("float32/", "float64/")
    raised = {
        stage
        for name, stage, floor in rows.each("name", "stage", "floor")
        if floor and name.startswith(high)
    }
    seen = (
        floor.rel_l2 * floor.bound
        for name, stage, floor in rows.each("name", "stage", "floor")
        if floor and (stage not in raised or name.startswith(high))
    )
    return max(seen, default=None)


class Modality(Record):
    """What became of the tensors of one modality, where there are several.

    `worst` is the tensor of the largest ratio to its floor, or the first failing one without.
    """

    name: str
    verdict: Verdict
    tensors: int
    failing: int
    worst_ratio: Float | None = None
    worst: str = ""


class Side(Record):
    """What one side of the comparison was."""

    label: str
    path: str | None = None
    sha256: str | None = None
    environment: dict[str, str] = Field(default_factory=dict)


class Comparison(Record):
    """Result of `compare`, `check` and `check_latent`.

    Attributes:
        verdict: The outcome; its `exit_code` is the process's.
        sentence: What a person would repeat.
        rows: Every tensor of both sides, in execution order.
        missing: Tensors that only the reference has. unexpected: only the actual side has.
        first_divergence: Where it broke, or None.
        modalities: Audio and video apart, where the tensors have both.
        looked_at, not_looked_at: Coverage in words.
        known: What the ledger of known failures says of it, if it has an entry.
        rule_changes: What decides here and was changed since the promoted state.
        evidence: What was seen where the two sides are finished media.
        shift: Of a free run whose end differs: whether a stage made that, or rounding that grew.
        expect: What the change was for; `drifted` has exit code 0 where that is `different`.
        meant: What a declared change explains; it has the exit code, but for what is `invalid`.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    verdict: Verdict
    sentence: str
    rows: Rows = Field(default=(), validate_default=True)
    rule: Rule
    first_divergence: Divergence | None = None
    modalities: tuple[Modality, ...] = ()
    case_id: str | None = None
    case: dict[str, Any] | None = None
    test: str = Field(default="", description="node id of the test that compared")
    prompt: str = Field(default="", description="what the test generated by, where it says so")
    actual: Side
    reference: Side
    case_differences: tuple[Difference, ...] = ()
    environment_differences: tuple[Difference, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    looked_at: tuple[str, ...] = ()
    not_looked_at: tuple[str, ...] = ()
    gates: tuple[GateResult, ...] = ()
    known: KnownFailure | None = None
    expect: Literal["same", "different"] | None = None
    rule_changes: tuple[RuleChange, ...] = ()
    rules_since: str = Field(default="", description="commit compared with; empty: none was")
    cost: Cost | None = None
    media: tuple[Media, ...] = ()
    evidence: MediaEvidence | None = None
    shift: Shift | None = None
    meant: Meant | None = None
    notes: tuple[str, ...] = ()
    hint: str = ""
    repeat: str = Field(default="", description="the command that repeats this comparison")

    def __bool__(self) -> bool:
        raise TypeError(
            "a Comparison has no truth value: read .verdict or call assert_equivalent()"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary; NaN and infinities are strings."""
        return dict(json.loads(self.to_json()))

    def to_json(self, *, indent: int | None = None) -> str:
        """Strict JSON (no NaN literals) that `docs/schema/comparison-1.json` describes."""
        return self.model_dump_json(indent=indent)

    @property
    def exit_code(self) -> int:
        """The verdict's exit code, or what a declared change, a ledger entry (0 as stated, else 1)
        or `expect` makes of it."""
        if self.meant is not None and self.verdict in (*_PASSED, *_MEANT):
            return self.meant.exit_code
        if self.expect == "different" and self.verdict is Verdict.DRIFTED:
            return 0
        if self.known is None or self.known.outcome == "not judged":
            return self.verdict.exit_code
        return 0 if self.known.accepted else 1

    @property
    def failing(self) -> Rows:
        """Rows that did not pass, in execution order."""
        return Rows.of(self.rows).having(*_FAILING)

    @property
    def causes(self) -> Rows:
        """Failing rows to list: the first divergence, what else was introduced, what decided.

        What a module was given by the one before it is only counted, and so is what is undecided or
        missing beside that; unless nothing else failed.
        """
        return self._causes(self.failing)

    def _causes(self, failing: Rows) -> Rows:
        first = self.first_divergence.name if self.first_divergence else None
        told = [origin != "inherited" for origin in failing.each("origin")]
        if any(failing.each("origin")):
            fails = self.exit_code == 1
            rest = zip(told, failing.each("verdict"), failing.one_sided(), strict=True)
            told = [
                listed and verdict is not Verdict.INCONCLUSIVE and not (fails and alone)
                for listed, verdict, alone in rest
            ]
        late = [
            4 * (name != first) + 2 * (origin != "introduced") + (verdict is not self.verdict)
            for name, origin, verdict in failing.each("name", "origin", "verdict")
        ]
        chosen = [at for at, listed in enumerate(told) if listed] or range(len(failing))
        return failing.take(sorted(chosen, key=late.__getitem__))

    def uncounted(self, shown: int) -> str:
        """What a list of so many of the causes leaves out: `3 more failed, 12 inherited`."""
        failing = self.failing
        causes = self._causes(failing)
        names, rest = Texts(), Rows()
        if len(causes) < len(failing):
            for name in causes.each("name"):
                names.append(name)
            others = enumerate(failing.each("name"))
            rest = failing.take(at for at, name in others if names.find(name) is None)
        inherited = sum(origin == "inherited" for origin in rest.each("origin"))
        alone = sum(rest.one_sided())
        counts = {
            "more failed" if self.exit_code == 1 else "more": len(causes) - shown,
            "inherited": inherited,
            "on one side only": alone,
            "undecided": len(rest) - inherited - alone,
        }
        return ", ".join(f"{count} {word}" for word, count in counts.items() if count)

    @property
    def detectable(self) -> float | None:
        """Smallest rel_l2 that would have been called `drifted` in any stage that was judged."""
        return detectable(self.rows)

    def explain(self) -> tuple[str, str, str, str, str]:
        """The five parts of an error message: what, where, measured, likely, hint."""
        where = f"first divergence: {self.first_divergence}" if self.first_divergence else ""
        return self.sentence, where, self.table(limit=8), "", self.hint

    def table(self, *, limit: int = 20) -> str:
        """Failing rows as an aligned text table, with one line that accounts for the rest."""
        shown = self.causes[:limit]
        if not self.rows:
            return "no tensors were compared"
        lines = [("tensor", "verdict", "rel_l2", "floor", "ratio", "note")] if shown else []
        for row in shown:
            metrics, floor = row.metrics, row.floor
            lines.append(
                (
                    visible(row.name),
                    row.verdict.value,
                    f"{metrics.rel_l2:.1e}" if metrics else "-",
                    f"{floor.rel_l2:.1e}" if floor else "-",
                    f"{row.ratio:.3g}" if row.ratio is not None else "-",
                    visible(row.note),
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(6)] if lines else []
        text = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        more = self.uncounted(len(shown))
        rows = Rows.of(self.rows)
        within = rows.having(*_PASSED)
        worst = max((r for r in within.each("ratio") if r is not None), default=None)
        both = rows.each("metrics.nonfinite_actual", "metrics.nonfinite_reference")
        nonfinite = sum(bool(actual or reference) for actual, reference in both)
        text.append(
            (f"{more}; " if more else "")
            + f"{len(within)} within the floor"
            + (f" (worst ratio {worst:.2g})" if worst is not None else "")
            + f"; {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            + f"{nonfinite} non-finite"
        )
        return "\n".join(text)

    def __str__(self) -> str:
        what, where, measured, _, hint = self.explain()
        word = f"{self.verdict.value}: "
        head = what if what.startswith(word) else word + what
        return "\n".join(
            [visible(head)]
            + ([f"  {visible(where)}"] if where else [])
            + [f"  {line}" for line in measured.split("\n")]
            + [f"  rule: {visible(self.rule.text)}"]
            + ([f"hint: {visible(hint)}"] if hint else [])
        )


class Results(Record):
    """Several comparisons as one result file; what `--json` writes."""

    schema_version: int = SCHEMA_VERSION
    verdict: Verdict
    exit_code: int
    comparisons: tuple[Comparison, ...]

    @classmethod
    def of(cls, comparisons: Iterable[Comparison]) -> Results:
        """Bundle comparisons; the verdict is the worst of them, and so is the exit code."""
        found = tuple(comparisons)
        verdict = Verdict.worst(c.verdict for c in found)
        codes = {c.exit_code for c in found} or {verdict.exit_code}
        code = next(code for code in (1, 3, 4, 0) if code in codes)
        return cls(verdict=verdict, exit_code=code, comparisons=found)
