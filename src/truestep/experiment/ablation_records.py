"""What an ablation between two profiles found, and a matrix of profiles. Pure: no I/O, no torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from truestep.verdict import Divergence, Float, Record, Verdict

SCHEMA_VERSION = 1

MODALITIES = ("video", "audio")


class Choice(Record):
    """A control in which two profiles differ, with both values and their sources.

    Attributes:
        stage: The stage whose arithmetic it decides.
    """

    control: str
    stage: str
    from_value: str
    from_source: str
    to_value: str
    to_source: str


class Kept(Record):
    """A control in which the profiles differ and which the case sets itself: it is not switched."""

    control: str
    value: str
    from_value: str
    to_value: str


class EndDistance(Record):
    """Final latent of a free run, of one modality, against the reference profile's.

    Attributes:
        rel_l2: Of the whole latent, relative to the reference's; None if it cannot be measured.
        floor: The same under benign variation of the reference, and never below rounding.
        multiple: `rel_l2` over `floor`.
        note: Why a verdict is what it is, where that is not `rel_l2` alone.
    """

    modality: str
    verdict: Verdict
    rel_l2: Float | None = None
    floor: Float | None = None
    multiple: Float | None = None
    note: str = ""


class StageDistance(Record):
    """Worst tensor of a stage that was fed the reference's inputs, where it is not bit-equal.

    Attributes:
        multiple: The deciding statistic over its floor.
    """

    stage: str
    modality: str | None = None
    name: str
    verdict: Verdict
    rel_l2: Float | None = None
    multiple: Float | None = None


class EndRun(Record):
    """A free run with some controls switched."""

    controls: tuple[str, ...]
    verdict: Verdict
    ends: tuple[EndDistance, ...]

    def end(self, modality: str) -> EndDistance | None:
        """Its distance in a modality."""
        return next((end for end in self.ends if end.modality == modality), None)

    def rel_l2(self, modality: str) -> float | None:
        """Likewise the number alone."""
        found = self.end(modality)
        return found.rel_l2 if found else None


class Switch(Record):
    """The reference profile with one control switched, and all before it in the order.

    Attributes:
        stages_verdict, stages_sentence: Of every stage on the reference's inputs.
        first: Where that first diverged.
        stages: Stages that are not bit-equal there.
        alone: Free run with this control switched.
        together: Free run with this and all before it switched.
        reason: Why it changes nothing, or nothing but rounding, where that is known.
    """

    choice: Choice
    stages_verdict: Verdict
    stages_sentence: str
    first: Divergence | None = None
    stages: tuple[StageDistance, ...] = ()
    alone: EndRun
    together: EndRun
    reason: str = ""

    @property
    def hidden(self) -> bool:
        """Whether a stage drifted, and the end of a free run is within its floor all the same."""
        return not self.stages_verdict.passed and self.alone.verdict.passed

    @property
    def first_stage(self) -> str:
        """Name of the stage where it first diverged; `-` where it did not."""
        return (self.first.stage or self.first.name) if self.first else "-"


class Share(Record):
    """What of the distance between two profiles one control accounts for, in one modality.

    Attributes:
        alone: Distance with this control switched.
        alone_share: That over the sum of all such distances.
        increment: What the cumulative distance grew by when it was switched too; may be negative.
        increment_share: That over the distance of the two profiles: these add up to 1.
    """

    control: str
    modality: str
    verdict: Verdict
    alone: Float
    alone_multiple: Float | None
    alone_share: Float | None
    increment: Float
    increment_share: Float | None


class Attribution(Record):
    """The distance between two profiles in one modality, shared out; largest effect first.

    Attributes:
        total: Distance of the two profiles, relative to the reference's latent.
        sum_alone: Sum of the distances of single switches.
        remainder: `total` less that: what single switches do not say, because effects overlap,
            cancel or amplify each other.
    """

    modality: str
    total: Float
    total_multiple: Float | None
    sum_alone: Float
    remainder: Float
    shares: tuple[Share, ...]


class Ablation(Record):
    """Result of `truestep ab ablate CASE --from A --to B`.

    Attributes:
        reference, candidate: The profiles A and B.
        order: Controls in the order in which they were switched together.
        switches: One for each, in that order.
        whole: Free run of profile B.
        attributions: By modality.
        kept: Controls that the case sets itself.
        explained: Whether the run with all controls switched equals that of profile B bit for bit:
            every stage's tensors, the final latents, frames and sound.
        compared: How many tensors that were.
        mismatch: The first that differs.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    sentence: str
    reference: str
    candidate: str
    case_id: str
    case: dict[str, Any]
    order: tuple[str, ...]
    switches: tuple[Switch, ...]
    whole: EndRun
    attributions: tuple[Attribution, ...]
    kept: tuple[Kept, ...] = ()
    explained: bool
    compared: int
    mismatch: str = ""
    rule: str
    floor_runs: int
    forwards: int
    environment: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    repeat: str = ""

    @property
    def exit_code(self) -> int:
        """0 where the controls explain the difference, else 1."""
        return 0 if self.explained else 1


class MatrixCell(Record):
    """Distance of one profile from another.

    Attributes:
        leading: By modality, the control that on its own moves the end furthest, and by how many
            floors; absent where none moves it at all.
    """

    reference: str
    candidate: str
    run: EndRun
    leading: dict[str, str] = Field(default_factory=dict)


class Matrix(Record):
    """Result of `truestep ab ablate CASE --all`: every profile against every other.

    Attributes:
        profiles: Those that can run the case.
        cells: Every ordered pair of them.
        left_out: Profiles that cannot, and why.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    sentence: str
    case_id: str
    case: dict[str, Any]
    profiles: tuple[str, ...]
    cells: tuple[MatrixCell, ...]
    left_out: dict[str, str] = Field(default_factory=dict)
    kept: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    repeat: str = ""

    @property
    def exit_code(self) -> int:
        """0: a matrix measures, and judges nothing."""
        return 0

    def cell(self, reference: str, candidate: str) -> MatrixCell | None:
        """The cell of a pair; None for a profile against itself."""
        return next(
            (c for c in self.cells if (c.reference, c.candidate) == (reference, candidate)), None
        )
