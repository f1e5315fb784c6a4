"""What `ab --quality` is asked, what it measured, and what came out. Pure: no I/O, no torch."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

from pydantic import Field

from truestep.experiment.records import PlannedCase, PlannedCell
from truestep.verdict import Float, Record

SCHEMA_VERSION = 1

Mechanism = Literal["skip", "cache", "batch", "collapse", "quantise"]
"""What a change may have to do before anything is claimed of it."""

MECHANISMS: dict[Mechanism, str] = {
    "skip": "blocks or forwards skipped",
    "cache": "cache hits",
    "batch": "steps whose passes ran as one",
    "collapse": "forwards with collapsed text",
    "quantise": "layers quantised",
}


class Standing(str, Enum):
    """Outcome of a change that is meant: is it still good enough? Has no truth value."""

    IDENTICAL = "identical"
    EQUIVALENT = "equivalent"
    IN_DISTRIBUTION = "equivalent-in-distribution"
    DEGRADED = "degraded"
    INVALID = "invalid"
    UNMET = "unmet"
    INCONCLUSIVE = "inconclusive"

    __str__ = str.__str__

    def __bool__(self) -> bool:
        raise TypeError("a Standing has no truth value: compare it, or read its exit_code")

    @property
    def exit_code(self) -> int:
        """Process exit code: 0 good enough, 1 not, or nothing happened, 4 inconclusive."""
        return _EXIT[self]

    @property
    def passed(self) -> bool:
        """Whether it is good enough."""
        return self.exit_code == 0

    @classmethod
    def worst(cls, found: tuple[Standing, ...]) -> Standing:
        """The one that stands for several; none at all is `invalid`."""
        return next((standing for standing in _SEVERITY if standing in found), cls.INVALID)


_EXIT = {
    Standing.IDENTICAL: 0,
    Standing.EQUIVALENT: 0,
    Standing.IN_DISTRIBUTION: 0,
    Standing.DEGRADED: 1,
    Standing.INVALID: 1,
    Standing.UNMET: 1,
    Standing.INCONCLUSIVE: 4,
}
_SEVERITY = (
    Standing.INVALID,
    Standing.DEGRADED,
    Standing.UNMET,
    Standing.INCONCLUSIVE,
    Standing.IN_DISTRIBUTION,
    Standing.EQUIVALENT,
    Standing.IDENTICAL,
)


class QualityPlan(Record):
    """Everything that decides what is generated and how it is judged.

    Attributes:
        cases: One a prompt; seed `s` of it is the case's own plus `s`.
        cells: The candidates; `candidate` of each holds what it alone has.
        baseline: Settings of the baseline that differ from the case.
        mechanisms: What every candidate must have done; by its settings more may be.
        metrics: Names of `--metric`, and digests of what they are.
        margin: Share of the spread between seeds; `margins` are in units of a score instead.
        broken: Highest share of prompts that may be newly broken.
        two_sided: Whether better by more than the margin is no pass either.
        frontier: Whether cells are set beside each other, fewer steps among them.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    cases: tuple[PlannedCase, ...]
    cells: tuple[PlannedCell, ...]
    seeds: int = Field(ge=3)
    baseline: dict[str, Any] = Field(default_factory=dict)
    apply: str = ""
    apply_digest: str = ""
    mechanisms: tuple[Mechanism, ...] = ()
    metrics: dict[str, str] = Field(default_factory=dict)
    margin: Float = Field(gt=0)
    margins: dict[str, Float] = Field(default_factory=dict)
    broken: Float = Field(gt=0, lt=1)
    two_sided: bool = False
    frontier: bool = False
    seed: int = 0


class Acted(Record):
    """What a candidate's mechanism did in one generation.

    Attributes:
        forwards, baseline_forwards: Of the denoiser, counted per sample.
        blocks_skipped: Of each step: blocks that the baseline ran and this did not, in the forwards
            that both ran. Empty where steps cannot be paired.
        cache_hits: Of each step: texts' keys and values that were kept.
        batched: Steps whose passes ran as one forward.
        collapsed: Forwards that attended to padded text as to one key.
        quantised: Layers whose weights are in fewer bits than the baseline's.
        fallbacks: Why something that the settings ask for was not done.
    """

    forwards: int = 0
    baseline_forwards: int = 0
    blocks_skipped: tuple[int, ...] = ()
    cache_hits: tuple[int, ...] = ()
    batched: int = 0
    collapsed: int = 0
    quantised: int = 0
    fallbacks: tuple[str, ...] = ()

    def count(self, mechanism: Mechanism) -> int:
        """How often a mechanism acted."""
        skipped = sum(self.blocks_skipped)
        return {
            "skip": skipped + max(0, self.baseline_forwards - self.forwards),
            "cache": sum(self.cache_hits) + skipped,
            "batch": self.batched,
            "collapse": self.collapsed,
            "quantise": self.quantised,
        }[mechanism]


class Clip(Record):
    """One generation, as a line of a file.

    Attributes:
        cell: Folder of the cell; empty of the baseline.
        case: Number of the prompt; `seed` that of the seed.
        seconds: Wall time, decoding included.
        place: Position among the arms of this prompt and seed.
        latent, decoded: Digests of the final latent, and of what it is decoded to.
        drift: rel_l2 of the final latent from the baseline's; None of the baseline.
        nonfinite: Numbers of latent and frames that are NaN or infinite.
        readings: Numbers of every metric.
        broken: Detectors that found something.
        mutated: Of the baseline: numbers of every metric under every mutation.
        planted: Of the baseline: whether each detector found its own damage.
        raised: What the arm raised instead; all else is empty then.
    """

    cell: str = ""
    case: int
    seed: int
    seconds: Float
    place: int = 0
    frames: int = 1
    latent: str
    decoded: str = ""
    drift: Float | None = None
    nonfinite: int = 0
    readings: dict[str, tuple[Float, ...]] = Field(default_factory=dict)
    broken: tuple[str, ...] = ()
    mutated: dict[str, dict[str, tuple[Float, ...]]] = Field(default_factory=dict)
    planted: dict[str, bool] = Field(default_factory=dict)
    acted: Acted | None = None
    raised: str = ""


class Vote(Record):
    """Whether a metric may vote, and what it has shown to see.

    Attributes:
        killed: Mutations of the baseline's own clips that it calls degraded.
        survived: Those that it does not.
        reason: Why it has no vote; empty where it has one.
        margin: In units of the score; `spread` between seeds that it is a share of. Without a
            `share` it was declared, or is a hundredth of what a clip of nothing loses.
        lost_below: Half the way from the baseline to what black, noise or the wrong prompt score:
            a clip below has lost what was asked for. None where the baseline itself is there.
    """

    metric: str
    killed: tuple[str, ...] = ()
    survived: tuple[str, ...] = ()
    reason: str = ""
    margin: Float = 0.0
    spread: Float = 0.0
    share: Float | None = None
    lost_below: Float | None = None

    @property
    def votes(self) -> bool:
        """Whether it votes."""
        return not self.reason


class MetricRow(Record):
    """A metric of one candidate: means, and the paired difference with one-sided 95 % bounds.

    Attributes:
        finding: `equivalent` (both sides), `better`, `not worse`, `degraded` or `undecided`.
        needed: Prompts that would decide.
        worst_*: Mean of the worst decile of the prompts, each by its worst seed: difference.
        worst_prompts: Prompts as bad as the baseline's worst decile, in candidate and baseline;
            `worst_high` is the exact upper bound of the candidate's rate.
    """

    metric: str
    finding: str
    baseline: Float
    candidate: Float
    difference: Float
    low: Float
    high: Float
    margin: Float
    p_worse: Float
    p_better: Float
    p_degraded: Float
    needed: int | None = None
    worst_difference: Float
    worst_low: Float
    worst_high: Float
    worst_prompts: tuple[int, int]
    worst_rate_high: Float
    worst_p: Float
    lowest: tuple[str, ...] = Field(default=(), description="the prompts that lost most")


class Broken(Record):
    """Prompts with a broken clip; bounds are exact, one-sided, at 95 %."""

    detectors: tuple[str, ...]
    refused: dict[str, str] = Field(default_factory=dict)
    baseline: int
    candidate: int
    new: int
    prompts: int
    high: Float
    new_high: Float
    p_more: Float
    kinds: dict[str, int] = Field(default_factory=dict)
    names: tuple[str, ...] = ()


class Point(Record):
    """A candidate on the frontier: value and 90 % interval (one-sided 95 % bounds) of each axis.

    Attributes:
        speed: How many times as fast as the baseline, paired.
        drift: rel_l2 of the final latent beyond what a harmless change of the baseline gives.
        quality: The lowest difference of a voting metric, in its margins: below -1 is degraded.
        metric: The metric that is.
        dominated: A candidate that is shown to be no worse in any and better in one.
        fewer_steps: Whether it is the baseline with fewer steps.
    """

    name: str
    standing: Standing
    speed: Float
    speed_low: Float
    speed_high: Float
    drift: Float
    drift_low: Float
    drift_high: Float
    quality: Float
    quality_low: Float
    quality_high: Float
    metric: str
    dominated: str = ""
    fewer_steps: bool = False


class QualityCell(Record):
    """One candidate, judged."""

    cell: PlannedCell
    standing: Standing
    sentence: str
    reasons: tuple[str, ...] = ()
    rows: tuple[MetricRow, ...] = ()
    broken: Broken | None = None
    mechanisms: dict[str, int] = Field(default_factory=dict)
    acted: Acted | None = None
    needed: int | None = None
    point: Point | None = None
    missing: int = 0


class Quality(Record):
    """The whole: what `--json` writes."""

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    standing: Standing
    exit_code: int
    sentence: str
    quality: QualityPlan
    prompts: int
    votes: tuple[Vote, ...] = ()
    unseen: tuple[str, ...] = Field(default=(), description="mutations that no voter kills")
    candidates: tuple[QualityCell, ...]
    environment: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    clips: tuple[Clip, ...] = ()
    next: str = ""
    repeat: str = ""

    def __bool__(self) -> bool:
        raise TypeError("a Quality has no truth value: read .standing or .exit_code")
