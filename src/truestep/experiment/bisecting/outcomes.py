"""What a run of the command says of its point: good, bad, or nothing that can be judged. Pure.

Exit codes are truestep's own: 0 is the same model, 1 another one. Everything else (a usage error, a
missing reference, `inconclusive`, a signal, 125 as `git bisect` has it) judges nothing. Nor does a
failure of another kind than the bad end's: a commit that raises ImportError on the way to one that
has drifted is not where it drifted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from truestep.experiment.bisecting.search import Outcome

_HEADLINE = re.compile(
    r"^(?:PASSED (?:identical|equivalent)|FAILED (?:drifted|invalid|unmet)|KNOWN|MISSING"
    r"|INCOMPARABLE|UNDECIDED)\b"
)
_ENDED = re.compile(r"^ProcessEndedError: invalid\b")
_RAISED = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception|Warning|Exit|Interrupt|Failure))(?::|$)")

MOST_SAID = 6
"""Lines of an answer that are kept: verdict, place, cause."""

_CODES = {
    2: "a usage error, or a file that cannot be read",
    3: "missing or incomparable",
    4: "inconclusive",
    125: "the command asks to skip it",
    126: "the command cannot be run",
    127: "the command was not found",
}
"""Exit codes that judge nothing, in words."""


@dataclass(frozen=True)
class Judged:
    """An outcome, and of a point that was skipped why."""

    outcome: Outcome
    reason: str = ""


def said(stdout: str) -> tuple[str, ...]:
    """truestep's answer in what a command printed: from its first failure on, or its last headline;
    else the last line that is not empty."""
    lines = [line.rstrip() for line in stdout.splitlines() if line.strip()]
    heads = [at for at, line in enumerate(lines) if _HEADLINE.match(line)]
    failed = [at for at in heads if lines[at].startswith("FAILED")]
    start = [*failed[:1], *heads[-1:], len(lines) - 1][0]
    return tuple(lines[start:][:MOST_SAID] if heads else lines[-1:])


def kind_of_failure(stdout: str, stderr: str) -> str:
    """Of what kind a failure is: `FAILED drifted`, all such where there are several cases, the
    exception that ended a program, or nothing that can be told."""
    heads = {head[0] for line in stdout.splitlines() if (head := _HEADLINE.match(line))}
    failed = sorted(head for head in heads if head.startswith("FAILED"))
    if failed:
        return ", ".join(failed)
    lines = [line for line in stderr.splitlines() if line.strip()]
    if any(_ENDED.match(line) for line in lines):
        return "FAILED invalid"
    raised = _RAISED.match(lines[-1]) if lines else None
    return raised[1].rpartition(".")[2] if raised else ""


def judged(exit_code: int, failure: str, *, expected: str | None) -> Judged:
    """The outcome of a run.

    Args:
        exit_code: Of the command; 128 and a signal's number where one ended it.
        failure: `kind_of_failure`.
        expected: That of the bad end; None while it is not known.
    """
    if exit_code == 0:
        return Judged(Outcome.GOOD)
    if exit_code != 1:
        signal = f"ended by signal {exit_code - 128}" if exit_code > 128 else "judges nothing"
        return Judged(Outcome.SKIPPED, f"exit {exit_code}: {_CODES.get(exit_code, signal)}")
    if expected is not None and failure != expected:
        here, there = failure or "exit 1", expected or "exit 1"
        return Judged(Outcome.SKIPPED, f"fails otherwise ({here}) than the bad end ({there})")
    return Judged(Outcome.BAD)
