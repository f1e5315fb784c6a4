"""From paired parameters to paired modules: what holds the same parameters is the same module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from truestep.pairing.records import Ambiguous, Evidence, Pair
from truestep.pairing.state import Match, ancestors, inside, parent, scopes


@dataclass
class _Side:
    """Modules of one side: their parameters, everything inside counted, and their children."""

    held: dict[str, frozenset[str]]
    modules: list[str]
    used: set[str] = field(default_factory=set)

    def children(self, module: str) -> list[str]:
        """Direct children in the order of their definition."""
        return [name for name in self.modules if name and parent(name) == module]


def pair_from_parameters(
    matches: Sequence[Match],
    actual: Iterable[str],
    reference: Iterable[str],
    *,
    actual_modules: Sequence[str] | None = None,
    reference_modules: Sequence[str] | None = None,
    ambiguous: Sequence[Ambiguous] = (),
) -> tuple[list[Pair], list[str], list[str]]:
    """Pair modules whose parameters are all paired.

    Args:
        matches: Pairs of parameters.
        actual, reference: All parameter names.
        actual_modules, reference_modules: All modules in the order of their definition, where
            known: those without parameters pair by their position between paired siblings.
        ambiguous: Groups of parameters: a module that holds all of a group has its counterpart.

    Returns:
        The pairs, and the modules of either side that have none.
    """
    sides = (_side(actual, actual_modules), _side(reference, reference_modules))
    forth: dict[str, set[str]] = {}
    back: dict[str, set[str]] = {}
    for match in matches:
        forth.setdefault(match.actual.name, set()).add(match.reference.name)
        back.setdefault(match.reference.name, set()).add(match.actual.name)
    for group in ambiguous:
        members = [
            {name.partition(" [")[0] for name in side} for side in (group.actual, group.reference)
        ]
        for names, others, links in (
            (members[0], members[1], forth),
            (members[1], members[0], back),
        ):
            for name in names:
                links.setdefault(name, set()).update(others)
    odd = {n for m in matches if m.odd for n in (m.actual.name, m.reference.name)}
    pairs = _equal_sets(sides, forth, back)
    pairs += _covers(sides, forth, back)
    pairs += _mostly(sides, matches)
    pairs += _positions(sides, pairs)
    marked = [_marked(pair, sides, odd) for pair in pairs]
    left = [[name or "(model)" for name in s.modules if name not in s.used] for s in sides]
    return marked, left[0], left[1]


def _side(names: Iterable[str], modules: Sequence[str] | None) -> _Side:
    held: dict[str, set[str]] = {}
    for name in names:
        for scope in ancestors(name):
            held.setdefault(scope, set()).add(name)
    listed = list(dict.fromkeys([*(modules or ()), *sorted(held)]))
    if "" not in held:
        listed = [name for name in listed if name]
    return _Side({name: frozenset(held.get(name, ())) for name in listed}, listed)


def _image(names: Iterable[str], to: Mapping[str, set[str]]) -> frozenset[str] | None:
    """Where parameters are on the other side; None if one is not paired."""
    found: set[str] = set()
    for name in names:
        if name not in to:
            return None
        found |= to[name]
    return frozenset(found)


def _equal_sets(
    sides: tuple[_Side, _Side], forth: Mapping[str, set[str]], back: Mapping[str, set[str]]
) -> list[Pair]:
    """Modules whose parameters are exactly those of a module of the other side."""
    own, theirs = sides
    chains: dict[frozenset[str], list[str]] = {}
    for name in theirs.modules:
        if theirs.held[name]:
            chains.setdefault(theirs.held[name], []).append(name)
    mine: dict[frozenset[str], list[str]] = {}
    for name in own.modules:
        if own.held[name]:
            mine.setdefault(own.held[name], []).append(name)
    pairs = []
    for held, group in mine.items():
        image = _image(held, forth)
        if image is None or image not in chains or _image(image, back) != held:
            continue
        pairs += _chain(sorted(group, key=len), sorted(chains[image], key=len), sides)
    return pairs


def _chain(group: Sequence[str], others: Sequence[str], sides: tuple[_Side, _Side]) -> list[Pair]:
    """Pair modules around the same parameters: owner with owner, outermost with outermost."""
    own, theirs = sides
    links: list[tuple[str, str]] = []
    owners = [
        names[-1] if any(parent(p) == names[-1] for p in side.held[names[-1]]) else None
        for names, side in ((group, own), (others, theirs))
    ]
    left, right = list(group), list(others)
    if owners[0] is not None and owners[1] is not None:
        links.append((left.pop(), right.pop()))
    while left and right:
        links.append((left.pop(0), right.pop(0)))
    pairs = [_module((a,), (r,), Evidence.PARAMETERS) for a, r in links]
    # A wrapper of one module, or a bare list: it holds the same, its output may be another.
    inner = links[0] if links else (group[-1], others[-1])
    pairs += [_module((a,), (inner[1],), Evidence.CONTAINER) for a in left]
    pairs += [_module((inner[0],), (r,), Evidence.CONTAINER) for r in right]
    own.used.update(group)
    theirs.used.update(others)
    return pairs


def _covers(
    sides: tuple[_Side, _Side], forth: Mapping[str, set[str]], back: Mapping[str, set[str]]
) -> list[Pair]:
    """Modules whose parameters are those of several modules (and single ones) together."""
    pairs: dict[tuple[tuple[str, ...], tuple[str, ...]], Pair] = {}
    for index, to in ((0, forth), (1, back)):
        side, other = sides[index], sides[1 - index]
        for name in side.modules:
            if name in side.used or not side.held[name]:
                continue
            image = _image(side.held[name], to)
            if image is None:
                continue
            cover = _cover(image, other)
            returned = _image(image, (back, forth)[index])
            if returned != side.held[name]:
                continue  # it shares a fused parameter with a sibling: paired from that side
            names = ((name,), cover) if index == 0 else (cover, (name,))
            pairs.setdefault(names, _module(names[0], names[1], Evidence.PARAMETERS))
            side.used.add(name)
            other.used.update(cover)
    return list(pairs.values())


def _mostly(sides: tuple[_Side, _Side], matches: Sequence[Match]) -> list[Pair]:
    """Modules of which some parameter has no pair, but whose others lie in one another; odd."""
    own, theirs = sides
    forth = scopes((m.actual.name, m.reference.name) for m in matches)
    back = scopes((m.reference.name, m.actual.name) for m in matches)
    pairs = []
    for name in own.modules:
        other = forth.get(name)
        if name in own.used or other is None or other in theirs.used or back[other] != name:
            continue
        note = "some of their parameters have no pair"
        pair = _module((name,), (other,), Evidence.STRUCTURE)
        pairs.append(pair.model_copy(update={"odd": True, "note": note}))
        own.used.add(name)
        theirs.used.add(other)
    return pairs


def _cover(image: frozenset[str], side: _Side) -> tuple[str, ...]:
    """The outermost modules that hold nothing else, and the parameters that none of them holds."""
    fitting = [name for name in side.modules if side.held[name] and side.held[name] <= image]
    outer = [n for n in fitting if not any(n != o and inside(n, o) for o in fitting)]
    held = frozenset[str]().union(*(side.held[name] for name in outer))
    return (*outer, *sorted(image - held))


def _positions(sides: tuple[_Side, _Side], pairs: Sequence[Pair]) -> list[Pair]:
    """Modules without parameters: alone between the same two siblings on both sides."""
    own, theirs = sides
    found: list[Pair] = []
    links = {
        p.actual[0]: p.reference[0]
        for p in pairs
        if len(p.actual) == len(p.reference) == 1 and p.evidence is not Evidence.CONTAINER
    }
    back = {r: a for a, r in links.items()}
    for a, r in links.items():
        first = _gaps(own, a, set(links))
        second = _gaps(theirs, r, set(back))
        for (left, right), names in first.items():
            others = second.get((links.get(left, left), links.get(right, right)), [])
            if len(names) == len(others) == 1 and (left or right):
                found.append(_module((names[0],), (others[0],), Evidence.POSITION))
                own.used.add(names[0])
                theirs.used.add(others[0])
    return found


def _gaps(side: _Side, module: str, paired: set[str]) -> dict[tuple[str, str], list[str]]:
    """Children without a pair by the paired siblings before and after them, empty at the ends."""
    found: dict[tuple[str, str], list[str]] = {}
    children = side.children(module)
    for index, name in enumerate(children):
        if side.held[name] or name in side.used:
            continue
        before = [c for c in children[:index] if c in paired or side.held[c]]
        after = [c for c in children[index:] if c in paired or side.held[c]]
        around = (before[-1] if before else "", after[0] if after else "")
        found.setdefault(around, []).append(name)
    return found


def _module(actual: tuple[str, ...], reference: tuple[str, ...], evidence: Evidence) -> Pair:
    return Pair(kind="module", actual=actual, reference=reference, evidence=evidence)


def _marked(pair: Pair, sides: tuple[_Side, _Side], odd: set[str]) -> Pair:
    """A module with an odd parameter of its own, on either side, is odd."""
    for side, names in zip(sides, (pair.actual, pair.reference), strict=True):
        held = {p for name in names for p in side.held.get(name, ()) if parent(p) == name}
        found = sorted(odd & (held | set(names)))
        if found and not pair.odd:
            return pair.model_copy(update={"odd": True, "note": f"odd: {', '.join(found)}"})
    return pair
