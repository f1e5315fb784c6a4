"""Records of a bisect: every probe, and what came of them. Pure: no I/O, no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from truestep.experiment.bisecting.search import Outcome
from truestep.records import Float, Record

SCHEMA_VERSION = 1

Axis = Literal["commits", "packages", "environment", "weights"]


class Attempt(Record):
    """One answer to one question.

    Attributes:
        point: What was probed, in words. key: by its content.
        why: `good end`, `bad end`, `again`, `search`, `confirm` or `around`.
        exit_code: Of the command; 128 and a signal's number where one ended it; None where it could
            not be run.
        failure: Of what kind the failure is.
        reason: Why it was skipped.
        said: Lines of the command's answer.
        ran: Whether the command ran for it; else the verdict was kept by an earlier bisect.
        resumed: Whether it ran before this start of the bisect.
    """

    point: str
    key: str
    why: str
    outcome: Outcome
    exit_code: int | None = None
    failure: str = ""
    reason: str = ""
    said: tuple[str, ...] = ()
    seconds: Float = 0.0
    ran: bool = True
    resumed: bool = False


class Culprit(Record):
    """What made the difference.

    Attributes:
        name: A commit's hash, a package with its version, a variable, a tensor or a module.
        text: In words: the subject of a commit, both values of a variable.
        before: The last good one, likewise by name.
        files: That a commit changed.
    """

    name: str
    text: str = ""
    before: str = ""
    files: tuple[str, ...] = ()


class Bisection(Record):
    """What `truestep bisect` writes with --json.

    Attributes:
        verdict: `found`, or `inconclusive` with the reason in the sentence.
        exit_code: 0 or 4.
        axis: What was searched.
        good, bad: The ends, in words.
        suspects: How many points or changes may have made the difference, n.
        probes: Runs of the command, those of an earlier start counted.
        limit: Runs that the search may have taken.
        culprits: One, or a set that is needed together; of `inconclusive` all that are left.
        bad_said, good_said: The command's answer at the culprit, and at the last good point.
        notes: What is not isolated, and what else was seen.
    """

    schema_version: int = SCHEMA_VERSION
    tool_version: str = ""
    verdict: Literal["found", "inconclusive"]
    exit_code: int
    sentence: str
    axis: Axis
    good: str
    bad: str
    suspects: int
    probes: int
    limit: int
    culprits: tuple[Culprit, ...] = ()
    bad_said: tuple[str, ...] = ()
    good_said: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    notes: tuple[str, ...] = ()
    next: str = Field(default="", description="the command that comes next")
    repeat: str = ""

    @property
    def skipped(self) -> tuple[Attempt, ...]:
        """Points that could not be judged, each once."""
        found = {each.key: each for each in self.attempts if each.outcome is Outcome.SKIPPED}
        return tuple(found.values())

    @property
    def seconds(self) -> float:
        """That all runs of the command took."""
        return sum(each.seconds for each in self.attempts if each.ran)
