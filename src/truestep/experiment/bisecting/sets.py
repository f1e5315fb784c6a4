"""Find a smallest set of changes that makes a good state bad: delta debugging, by questions.

Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (2002), whose result is
1-minimal: without any one of its changes the state is good. Instead of halves and their complements
prefixes are asked, as for a minimal set over a monotone predicate (Marques-Silva, Janota, Belov,
2013, "progression"): each change that is needed costs log2 n probes, and one that does it alone
costs no more than a commit of as many.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

from truestep.experiment.bisecting.search import (
    Answer,
    Conclusion,
    Memory,
    Outcome,
    Question,
    Search,
    Stop,
    ask_ends,
    budget,
    confirm,
    halvings,
    narrow,
)

Chosen = tuple[int, ...]
"""Changes that are made, by number, in order."""


def minimal(changes: int, *, limit: int | None = None, ends_known: bool = False) -> Search[Chosen]:
    """Ask for a smallest set of changes that is bad, where none of them is good.

    Args:
        changes: How many there are; all of them together are bad.
        limit: Runs of the command; None is `budget`, and `log2 n + 3` more for each change but one
            that is needed.
        ends_known: None and all of them were probed already.

    Returns:
        `point` is the set, `before` the largest set that was good without its last change.
        `narrowed`: the set is bad, and smaller ones may be.
    """
    every = tuple(range(changes))
    memory = Memory[Chosen](budget(changes) if limit is None else limit)
    more = 3 + halvings(changes) if limit is None else 0
    try:
        if ends_known:
            memory.seen.update({(): [Outcome.GOOD], every: [Outcome.BAD]})
        else:
            yield from ask_ends(memory, (), every, narrowing=1 + halvings(changes))
        needed, before, blocks = yield from _needed(memory, changes, more)
        yield from confirm(memory, good=before, bad=needed)
        if blocks:
            return Conclusion("narrowed", needed, before, (needed,))
        smaller = yield from _one_minimal(memory, needed, more)
        return Conclusion("found", smaller, before, (smaller,))
    except Stop as stop:
        if stop.conclusion.kind == "spent" and _known_bad(memory):
            smallest = min(_known_bad(memory), key=len)
            return Conclusion("narrowed", smallest, None, (smallest,))
        return stop.conclusion


def _known_bad(memory: Memory[Chosen]) -> list[Chosen]:
    return [chosen for chosen, seen in memory.seen.items() if Outcome.BAD in seen]


def _needed(
    memory: Memory[Chosen], changes: int, more: int
) -> Generator[Question[Chosen], Answer, tuple[Chosen, Chosen, bool]]:
    """Changes that are needed, one after the other: the last of the shortest prefix that is bad.

    Returns:
        The set; the set without its last change that was good; whether changes in it could not be
        told apart, as what is between them cannot be judged.
    """
    needed: Chosen = ()
    before: Chosen = ()
    upper, blocks = changes, False
    while upper:
        kept = needed

        def at(length: int, kept: Chosen = kept) -> Chosen:
            return _joined(kept, range(length))

        low, high = yield from narrow(memory, 0, upper, at)
        before = at(low)
        blocks = blocks or high - low > 1
        needed = _joined(needed, range(low, high))
        upper = low
        if not upper:
            break
        outcome = memory.known(needed)
        if outcome is None:
            outcome = yield from memory.ask(needed, "search")
        if outcome is Outcome.BAD:
            break
        memory.limit += more
    return needed, before, blocks


def _joined(chosen: Chosen, others: Iterable[int]) -> Chosen:
    return tuple(sorted({*chosen, *others}))


def _one_minimal(
    memory: Memory[Chosen], needed: Chosen, more: int
) -> Generator[Question[Chosen], Answer, Chosen]:
    """The set without changes that it does not need after all."""
    for change in needed if len(needed) > 1 else ():
        without = tuple(other for other in needed if other != change)
        outcome = memory.known(without)
        if outcome is None:
            memory.limit += bool(more)
            outcome = yield from memory.ask(without, "confirm")
        if outcome is Outcome.BAD:
            needed = without
    return needed
