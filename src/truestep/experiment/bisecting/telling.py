"""What a search came to, in words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from truestep.experiment.bisecting.records import Attempt, Axis, Bisection, Culprit
from truestep.experiment.bisecting.search import Conclusion, Outcome, P
from truestep.text import short

NOUNS: dict[Axis, str] = {
    "commits": "commit",
    "packages": "version",
    "environment": "variable",
    "weights": "weight",
}
"""What a suspect of an axis is called."""

_MOST_NAMED = 3
_LONGEST = 160

INCONCLUSIVE = 4


@dataclass(frozen=True)
class Ends:
    """The ends of an axis, in words, and how many suspects are between them."""

    axis: Axis
    good: str
    bad: str
    suspects: int


@dataclass(frozen=True)
class Answered:
    """What a search came to.

    Attributes:
        attempts: All answers, in order.
        culprits: What made the difference; where it is open, all that may have.
        keys: Of the first bad point and the last good one, by content, where they are known.
        next: The command that comes next.
    """

    ends: Ends
    attempts: Sequence[Attempt]
    limit: int
    culprits: Sequence[Culprit] = ()
    keys: tuple[str, str] = ("", "")
    notes: Sequence[str] = ()
    next: str = ""


def told(answered: Answered, sentence: str, *, found: bool) -> Bisection:
    """The result, with the command's answers on both sides."""
    ends, attempts = answered.ends, tuple(answered.attempts)
    bad, good = answered.keys
    return Bisection(
        verdict="found" if found else "inconclusive",
        exit_code=0 if found else INCONCLUSIVE,
        sentence=sentence,
        axis=ends.axis,
        good=ends.good,
        bad=ends.bad,
        suspects=ends.suspects,
        probes=sum(attempt.ran for attempt in attempts),
        limit=answered.limit,
        culprits=tuple(answered.culprits),
        bad_said=_said(attempts, bad, Outcome.BAD),
        good_said=_said(attempts, good, Outcome.GOOD),
        attempts=attempts,
        notes=tuple(answered.notes),
        next=answered.next,
    )


def _said(attempts: Sequence[Attempt], key: str, outcome: Outcome) -> tuple[str, ...]:
    lines = [a.said for a in attempts if a.key == key and a.outcome is outcome]
    return lines[-1] if lines else ()


def why_open(
    conclusion: Conclusion[P],
    label: Callable[[P], str],
    attempts: Sequence[Attempt],
    noun: str,
    *,
    limit: int,
) -> str:
    """Why there is no answer, in a sentence.

    Args:
        label: Of a point, in words.
        attempts: The last of them is what ended the search.
        noun: What a suspect is called.
    """
    last = attempts[-1]
    point = label(conclusion.point) if conclusion.point is not None else ""
    if conclusion.kind == "two outcomes":
        outcomes = ", ".join(str(a.outcome) for a in attempts if a.key == last.key)
        return f"not a {noun}: the same point gives two outcomes: {point}: {outcomes}"
    if conclusion.kind == "ends":
        return _ends_alike(last, point)
    if conclusion.kind == "unjudged":
        before = [a for a in attempts if a.key == last.key][:-1]
        if last.why in ("good end", "bad end"):
            return f"the {last.why}, {point}, cannot be judged: {last.reason}{_words(last)}"
        seen = ", ".join(dict.fromkeys(str(a.outcome) for a in before))
        return f"{point} was {seen}, and then could not be judged: {last.reason or last.outcome}"
    if conclusion.kind == "turns":
        after = label(conclusion.before) if conclusion.before is not None else ""
        return f"not one {noun}: bad at {point}, and good again at {after}"
    if conclusion.kind == "narrowed":
        return _narrowed(conclusion, label, attempts, noun, limit)
    return f"{limit} probes are too few to know both ends"


def _ends_alike(last: Attempt, point: str) -> str:
    if last.outcome is Outcome.GOOD:
        return f"the ends do not differ: the bad end, {point}, is good"
    return f"the ends do not differ: the good end, {point}, fails{_words(last)}"


def _words(attempt: Attempt) -> str:
    """What the command said, behind a sentence."""
    return f" ({short(attempt.said[0].strip(), _LONGEST)})" if attempt.said else ""


def _narrowed(
    conclusion: Conclusion[P],
    label: Callable[[P], str],
    attempts: Sequence[Attempt],
    noun: str,
    limit: int,
) -> str:
    labels = [label(point) for point in conclusion.suspects]
    shown = "; ".join(labels[:_MOST_NAMED])
    more = f"; and {len(labels) - _MOST_NAMED} more" if len(labels) > _MOST_NAMED else ""
    skipped = {a.point for a in attempts if a.outcome is Outcome.SKIPPED}
    if skipped >= {*labels[:-1]}:
        why = "those before the last cannot be judged"
    else:
        why = f"the {limit} probes are spent"
    if len(labels) == 1:
        return f"{labels[0]} together, or fewer of them: what is between cannot be judged"
    return f"one of these {len(labels)} {noun}s: {shown}{more}; {why}"
