"""What an experiment is asked, what a run of it measured, and what came out. Pure: no I/O.

Every record is JSON-able; numbers are in SI units unless their name says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from truestep.experiment.statistics import Outcome
from truestep.verdict import Comparison, Float, Record, Row, Shift, Verdict

SCHEMA_VERSION = 1

ArmName = Literal["baseline", "candidate", "control"]
ARMS: tuple[ArmName, ...] = ("baseline", "candidate", "control")
"""The control is the baseline once more: what it shows is noise."""

Expectation = Literal["faster", "same", "different"]


class PlannedCase(Record):
    """A case by its name in the experiment; `content` makes a `truestep.case.Case`."""

    name: str
    content: dict[str, Any]


class PlannedCell(Record):
    """One combination of the matrix: settings that all arms share.

    `compile` says whether the arms run through torch.compile, `mode` in which mode that is not its
    default; `candidate` holds what only the candidate has, where the matrix itself is the switch;
    `folder` is where it is kept, below the experiment's own.
    """

    name: str
    folder: str = Field(pattern=r"^[^/.\x00][^/\x00]*(/[^/.\x00][^/\x00]*)*$")  # stays below
    settings: dict[str, Any] = Field(default_factory=dict)
    compile: bool = False
    mode: str = ""
    candidate: dict[str, Any] = Field(default_factory=dict)


class Plan(Record):
    """Everything that decides what an experiment runs; a resumed one must have the same.

    Attributes:
        baseline, candidate: Settings of an arm that differ from the case; `compile` among them.
        apply: `file.py:function` of the change in the candidate, and a digest of that file.
        rounds: Rounds to run at least; each runs every arm twice.
        until: Half-width of the interval to go on for; None stops after `rounds`.
        most_rounds: Rounds after which `until` gives up.
        margin: Relative difference in time that still counts as the same speed.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    cases: tuple[PlannedCase, ...]
    cells: tuple[PlannedCell, ...]
    baseline: dict[str, Any] = Field(default_factory=dict)
    candidate: dict[str, Any] = Field(default_factory=dict)
    apply: str = ""
    apply_digest: str = ""
    rounds: int = Field(ge=1)
    until: Float | None = None
    most_rounds: int = Field(ge=1)
    margin: Float
    warmup: int = Field(default=1, ge=0)
    expect: tuple[Expectation, ...] = ()
    seed: int = 0

    @property
    def switch(self) -> str:
        """The change under test in words."""
        parts = [f"{key}={value}" for key, value in self.candidate.items()]
        parts += [f"apply {self.apply.rpartition(':')[2]}"] if self.apply else []
        own = len(self.cells) == 1 and self.cells[0].name
        matrix = any(cell.candidate for cell in self.cells)
        text = ", ".join(parts) or (own or "the matrix" if matrix else "nothing")
        against = ", ".join(f"{key}={value}" for key, value in self.baseline.items())
        return f"{text} against {against}" if against else text


class Sample(Record):
    """One generation: a line of a samples file.

    Attributes:
        session: Which start of the command ran it, from 0; a round that was cut short runs anew.
        place: Position in its round, from 0.
        seconds: Wall time of the whole generation, decoding included.
        stages_s: Of each stage; `step` has one entry a denoise step.
        memory_mib: Peak while it ran; see `memory_kind`.
        forwards: Transformer forwards, counted per sample.
        latent, frames: Digests of the final latent and of the decoded frames, shape and dtype
            included: equal digests are equal bits.
    """

    kind: Literal["sample"] = "sample"
    arm: ArmName
    case: str
    round: int
    session: int
    place: int
    seconds: Float
    stages_s: dict[str, tuple[Float, ...]]
    memory_mib: Float | None = None
    memory_kind: Literal["device", "resident"] = "resident"
    forwards: int
    latent: str
    frames: str


class Failure(Record):
    """What an arm raised, instead of a sample.

    `machine` says that the machine lacks something (a compiler): no fault of the arm.
    """

    kind: Literal["failure"] = "failure"
    arm: ArmName
    case: str = ""
    session: int = 0
    doing: str
    text: str
    machine: bool = False


class Remark(Record):
    """Something that a run found out and a reader must know."""

    kind: Literal["remark"] = "remark"
    session: int = 0
    text: str
    spoils: bool = Field(default=False, description="no speed can be believed because of it")


class Repeat(Record):
    """A generation of an arm that left other bits than the one that was checked, and its judgement.

    Attributes:
        round: None while it warmed up.
        latent, frames: Digests, as of a sample.
        checked: Digest of the final latent that was checked.
        row: The final latent against the baseline's; where the latent is the one that was checked,
            what it was decoded to, against what it was then. None where nothing was kept to
            compare with.
    """

    kind: Literal["repeat"] = "repeat"
    arm: ArmName
    case: str
    round: int | None = None
    session: int = 0
    latent: str
    frames: str
    checked: str
    row: Row | None = None


Line = Annotated[Sample | Failure | Remark | Repeat, Field(discriminator="kind")]
"""A line of a samples file."""


class Sameness(Record):
    """How the candidate's numbers, and the control's, compare with the baseline's for one case.

    Attributes:
        steps: Every stage on the baseline's recorded inputs, against the noise floor.
        final, control_final: The final latent of a free run.
        shift: Whether a stage moved the candidate's, or rounding that grew; where it differs.
        psnr_db, ssim: Decoded frames, worst frame and mean of all; None where shapes differ.
        control_ssim, control_psnr_db: The same of the control.
    """

    schema_version: int = SCHEMA_VERSION
    case: str
    steps: Comparison | None = None
    final: Row | None = None
    control_final: Row | None = None
    shift: Shift | None = None
    psnr_db: Float | None = None
    ssim_worst: Float | None = None
    ssim_mean: Float | None = None
    control_psnr_db: Float | None = None
    control_ssim_worst: Float | None = None


class Speed(Record):
    """Time of an arm over the baseline's: median of paired ratios and its interval.

    `rounds_needed` is an estimate of the rounds in all that would decide; None where it is decided,
    or where there is nothing to go by. `level` is the interval's confidence.
    """

    ratio: Float
    low: Float
    high: Float
    level: Float
    pairs: int
    rounds: int
    outcome: Outcome
    rounds_needed: int | None = None


class ArmSummary(Record):
    """Medians of one arm over all its runs in complete rounds."""

    runs: int
    seconds: Float
    stages_s: dict[str, Float]
    memory_mib: Float | None
    memory_kind: str
    forwards: int
    results: int = Field(description="distinct final latents over repeats of a case, at most")


class CellResult(Record):
    """One row of the table.

    Attributes:
        verdict: Of speed, sameness, control and expectation together.
        sentence: What a person would repeat.
        sameness: Of the latents at steps and at the end, over all cases.
        worst_final: Largest rel_l2 of a final latent, and its multiple of the floor.
        repeats: Every result of an arm that is not, bit by bit, the one that was checked.
        missing: What a complete cell would have and this one has not.
        reasons: Why the verdict is what it is, where it is not a pass.
    """

    cell: PlannedCell
    verdict: Verdict
    sentence: str
    speed: Speed | None = None
    control: Speed | None = None
    arms: dict[str, ArmSummary] = Field(default_factory=dict)
    sameness: Verdict | None = None
    looked_at_cases: int = 0
    worst_final: Float | None = None
    worst_final_ratio: Float | None = None
    first_divergence: str = ""
    ssim_mean: Float | None = None
    ssim_worst: Float | None = None
    psnr_worst_db: Float | None = None
    control_ssim_worst: Float | None = None
    unchanged: bool = Field(
        default=False, description="same bits, forwards, memory and speed: a switch without effect"
    )
    reasons: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    checks: tuple[Sameness, ...] = ()
    samples: tuple[Sample, ...] = ()
    repeats: tuple[Repeat, ...] = ()


class Experiment(Record):
    """The whole experiment: what `--json` writes. Frames lie in files beside it."""

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    verdict: Verdict
    exit_code: int
    sentence: str
    plan: Plan
    environment: dict[str, str] = Field(default_factory=dict)
    cells: tuple[CellResult, ...]
    notes: tuple[str, ...] = ()
    repeat: str = ""

    def __bool__(self) -> bool:
        raise TypeError("an Experiment has no truth value: read .verdict or .exit_code")

    @classmethod
    def of(
        cls,
        plan: Plan,
        cells: Iterable[CellResult],
        *,
        environment: Mapping[str, str],
        notes: Iterable[str] = (),
        tool_version: str = "",
    ) -> Experiment:
        """Bundle cells; the verdict is the worst of theirs."""
        found = tuple(cells)
        verdict = Verdict.worst(cell.verdict for cell in found)
        if len(found) == 1:
            sentence = found[0].sentence
        else:
            counts: dict[str, int] = {}
            for cell in found:
                counts[cell.verdict.value] = counts.get(cell.verdict.value, 0) + 1
            parts = ", ".join(f"{count} {word}" for word, count in counts.items())
            sentence = f"{plan.switch}: {len(found)} cells: {parts}"
        return cls(
            tool_version=tool_version,
            verdict=verdict,
            exit_code=verdict.exit_code,
            sentence=sentence,
            plan=plan,
            environment=dict(environment),
            cells=found,
            notes=tuple(notes),
        )
