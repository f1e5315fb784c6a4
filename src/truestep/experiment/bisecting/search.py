"""Find the first bad point of a line, by questions: a generator asks, whoever drives it answers.

Point 0 is the good end and point n the bad one; the n points after the good end are suspects. Pure:
what a point is and how it is probed is not known here.

Both ends are asked twice before anything else, then the line is halved, and at last the pair that
was found is asked again in the other order, with the points beside it as far as the budget goes: an
outcome that hangs on what ran before, on chance, or that turns back, shows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any, Generic, Literal, TypeVar

P = TypeVar("P", bound=Hashable)

Why = Literal["good end", "bad end", "again", "search", "confirm", "around"]

MOST_AROUND = 3
"""Probes beside the found pair, at most: each is a run of the user's command."""

_PAIR = 2
"""Probes that are kept for asking the found pair again."""


class Outcome(str, Enum):
    """What is known of a point from one run."""

    GOOD = "good"
    BAD = "bad"
    SKIPPED = "skipped"

    __str__ = str.__str__


@dataclass(frozen=True)
class Question(Generic[P]):
    """A point to be probed, and why; see `fresh`."""

    point: P
    why: Why

    @property
    def fresh(self) -> bool:
        """Whether only a run of the command is an answer: it is asked to see the same again."""
        return self.why in ("again", "confirm")


@dataclass(frozen=True)
class Answer:
    """An outcome, and whether the command ran for it: what was remembered costs nothing."""

    outcome: Outcome
    ran: bool = True


Kind = Literal["found", "narrowed", "ends", "two outcomes", "unjudged", "turns", "spent"]


@dataclass(frozen=True)
class Conclusion(Generic[P]):
    """What came of a search; only `found` names a culprit.

    Attributes:
        kind: `narrowed`: one of `suspects`, those between cannot be judged or the budget is spent;
            `ends`: they do not differ; `two outcomes`: the same point was good and bad;
            `unjudged`: a point that has to be known was skipped; `turns`: the line is good again
            after it was bad; `spent`: too few probes for even that.
        point: The first bad point; of the other kinds the one that it is about.
        before: The last good one; of `turns`, a good one after `point`.
        suspects: All points that may be the first bad one.
    """

    kind: Kind
    point: P | None = None
    before: P | None = None
    suspects: tuple[P, ...] = ()


class Stop(Exception):  # noqa: N818 - it ends a search, and is no error
    """A search cannot go on; carries what it comes to."""

    def __init__(self, conclusion: Conclusion[Any]) -> None:
        super().__init__(conclusion.kind)
        self.conclusion = conclusion


def budget(suspects: int) -> int:
    """Probes that a search may take: 2 log2 n + 4."""
    return 4 + math.floor(2 * math.log2(max(suspects, 1)))


Asking = Generator[Question[P], Answer, Outcome]
Search = Generator[Question[P], Answer, Conclusion[P]]


@dataclass
class Memory(Generic[P]):
    """What is known of each point, and how many probes may still be asked.

    Attributes:
        limit: Runs of the command in all.
        used: Those that there were.
        seen: Of each point all outcomes, in order.
    """

    limit: int
    used: int = 0
    seen: dict[P, list[Outcome]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Probes that may still be asked."""
        return self.limit - self.used

    def ask(self, point: P, why: Why) -> Asking[P]:
        """Probe a point.

        Raises:
            Stop: The budget is spent, or this outcome is not the one that the point had.
        """
        if self.left <= 0:
            raise Stop(Conclusion("spent", point))
        answer = yield Question(point, why)
        self.used += answer.ran
        before = self.seen.setdefault(point, [])
        before.append(answer.outcome)
        if {Outcome.GOOD, Outcome.BAD} <= {*before}:
            raise Stop(Conclusion("two outcomes", point))
        if len({*before}) > 1:
            raise Stop(Conclusion("unjudged", point))
        return answer.outcome

    def known(self, point: P) -> Outcome | None:
        """The outcome of a point that was asked."""
        return self.seen[point][-1] if point in self.seen else None


def search(suspects: int, *, limit: int | None = None, ends_known: bool = False) -> Search[int]:
    """Ask for the first bad of points 1 to `suspects`, where point 0 is good.

    Args:
        suspects: How many points may be the first bad one; the last of them is the bad end.
        limit: Runs of the command; None is `budget`.
        ends_known: Both ends were probed already, by the search that led to this one.
    """
    memory = Memory[int](budget(suspects) if limit is None else limit)
    try:
        if ends_known:
            memory.seen.update({0: [Outcome.GOOD], suspects: [Outcome.BAD]})
        else:
            yield from ask_ends(memory, 0, suspects, narrowing=halvings(suspects))
        low, high = yield from narrow(memory, 0, suspects, lambda point: point)
        yield from confirm(memory, good=low, bad=high)
        if high - low > 1:
            return Conclusion("narrowed", high, low, tuple(range(low + 1, high + 1)))
        yield from _look_around(memory, low, high, suspects)
        if memory.left >= _PAIR:
            yield from confirm(memory, good=low, bad=high)
        return Conclusion("found", high, low, (high,))
    except Stop as stop:
        return stop.conclusion


def halvings(suspects: int) -> int:
    """Probes after which of so many suspects one is left."""
    return math.ceil(math.log2(max(suspects, 1)))


def ask_ends(memory: Memory[P], good: P, bad: P, *, narrowing: int) -> Generator[
    Question[P], Answer, None
]:  # fmt: skip
    """Ask both ends, and again in the other order; where the budget is too small for that, the
    found pair, which is asked again at last, says whether outcomes last.

    Args:
        narrowing: Probes that come after these.
    """
    for point, why, expected in ((good, "good end", Outcome.GOOD), (bad, "bad end", Outcome.BAD)):
        outcome = yield from memory.ask(point, why)  # type: ignore[arg-type]
        if outcome is Outcome.SKIPPED:
            raise Stop(Conclusion("unjudged", point))
        if outcome is not expected:
            if memory.left:  # by chance, or always?
                yield from memory.ask(point, "again")
            raise Stop(Conclusion("ends", point))
    for point in (bad, good):
        if memory.left > narrowing + _PAIR:
            yield from memory.ask(point, "again")


def narrow(
    memory: Memory[P], low: int, high: int, at: Callable[[int], P], *, kept: int = _PAIR
) -> Generator[Question[P], Answer, tuple[int, int]]:
    """Halve what lies between a good and a bad place, as far as places can be judged.

    Args:
        at: What is probed for a place.
        kept: Probes that are left over.

    Returns:
        The last place known to be good and the first known to be bad; what is between them is
        unknown, because it cannot be judged or the budget is spent.
    """
    skipped: set[int] = set()
    while high - low > 1 and memory.left > kept:
        place = choose(low, high, skipped)
        if place is None:
            break
        outcome = memory.known(at(place))
        if outcome is None:
            outcome = yield from memory.ask(at(place), "search")
        if outcome is Outcome.SKIPPED:
            skipped.add(place)
        elif outcome is Outcome.GOOD:
            low = place
        else:
            high = place
    return low, high


def choose(low: int, high: int, skipped: set[int]) -> int | None:
    """The place to probe next: the middle, but away from places that could not be judged.

    What does not build often does not build beside it either: an eighth of the line is left
    between, half as much where there is no such place, and so on.
    """
    middle = (low + high) / 2
    inside = [place for place in skipped if low < place < high]
    distance = max((high - low) // 8, 1) if inside else 0
    while True:
        places = (
            place
            for place in range(low + 1, high)
            if all(abs(place - other) > distance for other in inside)
            or (not distance and place not in skipped)
        )
        best = min(places, key=lambda place: (abs(place - middle), place), default=None)
        if best is not None or not distance:
            return best
        distance //= 2


def confirm(memory: Memory[P], *, good: P, bad: P) -> Generator[Question[P], Answer, None]:
    """Ask the found pair again, in the order in which it was not asked; each at least twice.

    Raises:
        Stop: An outcome is another one now.
    """
    order = [*memory.seen]
    pair = sorted((good, bad), key=lambda point: -order.index(point))
    asked_twice = all(len(memory.seen[point]) > 1 for point in pair)
    if asked_twice and memory.left < _PAIR:
        return
    for point in pair:
        yield from memory.ask(point, "confirm")


def _look_around(
    memory: Memory[int], low: int, high: int, last: int
) -> Generator[Question[int], Answer, None]:
    """Ask points beside the pair and far behind it: is it good before, and bad ever after?

    Raises:
        Stop: The line turns more than once.
    """
    for _ in range(min(memory.left, MOST_AROUND)):
        unknown = [point for point in range(1, last) if point not in memory.seen]
        point = _telling(unknown, sorted(memory.seen), low, high)
        if point is None:
            return
        outcome = yield from memory.ask(point, "around")
        behind = outcome is Outcome.GOOD and point > high
        if behind or (outcome is Outcome.BAD and point < low):
            if memory.left:  # by chance, as it once was, or always?
                yield from memory.ask(point, "confirm")
            raise Stop(Conclusion("turns", *((high, point) if behind else (point, low))))


def _telling(unknown: Sequence[int], seen: Sequence[int], low: int, high: int) -> int | None:
    """The point that says most of a turn: the neighbours, then the middle of the widest gap."""
    for beside in (high + 1, low - 1):
        if beside in unknown:
            return beside
    gaps = [(after - before, before, after) for before, after in pairwise(seen)]
    width, before, after = max(gaps, default=(0, 0, 0), key=lambda gap: (gap[0], gap[1]))
    return (before + after) // 2 if width > 1 else None
