"""What lies otherwise than its kind: layers out of order, rows in another one, parts apart.

For checkpoints, which are loaded by their names: there the content of a parameter is right only at
its place. Implementations of a model may number and lay out what they hold as they like.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch

from truestep.pairing.fused import Place
from truestep.pairing.state import (
    AGREEMENT,
    Match,
    State,
    Unit,
    ancestors,
    inside,
    parent,
    relative,
)
from truestep.pairing.structure import forward, habits_of, numbered_layer


def mark_misplaced(state: State) -> None:
    """Mark pairs that are right by their content, and not by their place."""
    for mark in (_layers, _other_layers, _kinds, _modules, _orders, _apart):
        mark(state)


def _mark(match: Match, note: str) -> None:
    """Say of a pair where it should be; what was said first stays."""
    if not match.misplaced:
        match.odd = match.misplaced = True
        match.note = note


def _lists(state: State) -> dict[tuple[str, str], dict[int, int]]:
    """For two lists of layers that correspond: which layer of one is which of the other."""
    found: dict[tuple[str, str], dict[int, int]] = {}
    for scope, target in forward(state).items():
        if numbered_layer(scope) and numbered_layer(target):
            own, theirs = scope.rpartition("."), target.rpartition(".")
            found.setdefault((own[0], theirs[0]), {})[int(own[2])] = int(theirs[2])
    return found


def _ordered(layers: Mapping[int, int]) -> tuple[set[int], bool]:
    """The most layers that lie in one order, and whether that is the other way round."""
    forward, back = (_longest(layers, sign) for sign in (1, -1))
    return (back, True) if len(back) > len(forward) else (forward, False)


def _longest(layers: Mapping[int, int], sign: int) -> set[int]:
    """The longest run of layers whose places grow (or fall), gaps left out."""
    best: list[list[int]] = []  # of each length, the one that ends first
    ends: list[int] = []
    for layer in sorted(layers):
        value = sign * layers[layer]
        at = bisect_left(ends, value)
        chain = [*(best[at - 1] if at else []), layer]
        best[at : at + 1], ends[at : at + 1] = [chain], [value]
    return set(best[-1]) if best else set()


def reversed_lists(state: State) -> list[tuple[str, str]]:
    """Lists of layers that the two sides number from opposite ends."""
    return [names for names, layers in _lists(state).items() if _ordered(layers)[1]]


def _layers(state: State) -> None:
    """Layers that do not lie in the order of the others changed places."""
    moved: dict[str, str] = {}
    for (own, theirs), layers in _lists(state).items():
        kept, _ = _ordered(layers)
        moved |= {
            f"{own}.{layer}": f"{theirs}.{place}"
            for layer, place in layers.items()
            if layer not in kept and len(layers) > 2
        }
    for match in state.matches:
        scope = next((s for s in ancestors(match.actual.name) if s in moved), None)
        if scope is not None and inside(match.reference.name, moved[scope]):
            _mark(match, f"{scope} holds the content of {moved[scope]}, out of order")


def _other_layers(state: State) -> None:
    """Pairs that lie in another layer of a list than the rest of their layer does."""
    where = forward(state)
    for match in state.matches:
        for scope in ancestors(match.actual.name):
            target = where.get(scope, "")
            if not (numbered_layer(scope) and numbered_layer(target)):
                continue
            container, _, layer = target.rpartition(".")
            rest = relative(match.reference.name, container).split(".")
            inner = inside(match.reference.name, container)
            if inner and rest[0].isdecimal() and rest[0] != layer:
                found = f"{container}.{rest[0]}" if container else rest[0]
                _mark(match, f"holds the content of {found}, where the rest of {scope} is {target}")
                break


_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")
"""A number that is a part of a name by itself."""


def _kinds(state: State) -> None:
    """Names that mean one thing in some layers, and another in others.

    A number in a name may tell two things apart (`mlp.0` and `mlp.2`), and one layer may lack a
    name that the others have: then it means nothing.
    """
    for side, other in (("reference", "actual"), ("actual", "reference")):
        names = getattr(state, other)
        kinds: dict[object, list[Match]] = {}
        for match in state.matches:
            unit = getattr(match, side)
            shape = state.shapes[side][unit.name]
            kinds.setdefault((_NUMBER.sub("*", unit.name), unit.place, shape), []).append(match)
        for members in kinds.values():
            told = [_NUMBER.sub("*", getattr(match, other).name) for match in members]
            meanings = Counter(told)
            if len(meanings) in (1, len(members)) or _by_number(members, side, told):
                continue
            usual, count = meanings.most_common(1)[0]
            settled = count >= max(AGREEMENT * len(members), 2)
            for match, meaning in zip(members, told, strict=True):
                wanted = _filled(usual, getattr(match, other).name)
                if (meaning != usual and wanted in names) or not settled:
                    _mark(match, f"{getattr(match, side).name} is {usual} in other layers")


def _by_number(members: Sequence[Match], side: str, told: Sequence[str]) -> bool:
    """Whether numbers of the names decide what they mean, as an index of a role does.

    That is one of them, or all but the first: a list of attentions, with scales of queries and of
    keys, in each layer. The layer is never part of several: of one layer alone it is a fault.
    """
    numbers = [_NUMBER.findall(getattr(match, side).name) for match in members]
    count = len(numbers[0])
    for places in [*((place,) for place in range(count)), tuple(range(1, count))]:
        meant: dict[tuple[str, ...], set[str]] = {}
        for found, meaning in zip(numbers, told, strict=True):
            meant.setdefault(tuple(found[place] for place in places), set()).add(meaning)
        if len(meant) < len(members) and all(len(each) == 1 for each in meant.values()):
            return True
    return False


def _filled(pattern: str, name: str) -> str | None:
    """A pattern with the numbers of a name."""
    numbers = _NUMBER.findall(name)
    if pattern.count("*") != len(numbers):
        return None
    left = iter(numbers)
    return re.sub(r"\*", lambda _: next(left), pattern)


def _modules(state: State) -> None:
    """Weight and bias of one module that come from two, where each has both."""
    for side, other in (("actual", "reference"), ("reference", "actual")):
        names = getattr(state, other)
        held: dict[str, list[Match]] = {}
        for match in state.matches:
            if match.actual.place is None and match.reference.place is None:
                held.setdefault(parent(getattr(match, side).name), []).append(match)
        for module, members in held.items():
            for first, second in combinations(members[:8] if module else [], 2):
                one, two = (getattr(match, other).name for match in (first, second))
                if parent(one) == parent(two) or _leaf(one) == _leaf(two):
                    continue  # two weights: a list of parameters, of two modules by right
                both = (f"{parent(one)}.{_leaf(two)}", f"{parent(two)}.{_leaf(one)}")
                if any(name in names for name in both):
                    note = f"{module} would be of two modules: {one} and {two}"
                    _mark(first, note)
                    _mark(second, note)
    for match in state.matches:
        leaves = {_leaf(match.actual.name), _leaf(match.reference.name)}
        if leaves == {"weight", "bias"}:
            _mark(match, "a weight is a bias on the other side")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _orders(state: State) -> None:
    """What is laid out, or permuted, otherwise than its kind in the other layers.

    Where as many layers say one thing as another, all of them: one is wrong.
    """
    where = forward(state)
    kinds: dict[object, list[Match]] = {}
    for match in state.matches:
        shapes = (
            state.shapes["actual"][match.actual.name],
            state.shapes["reference"][match.reference.name],
        )
        for habit, _ in habits_of(match, where):
            kind = habit.containers, habit.actual[0], habit.reference[0], shapes
            kinds.setdefault(kind, []).append(match)
    for members in kinds.values():
        orders = Counter(_order(match) for match in members)
        usual, count = orders.most_common(1)[0]
        settled = count >= max(AGREEMENT * len(members), 2)
        if not settled and len({order[:2] for order in orders}) < 2:
            continue  # layouts alone: an axis of one element more, in half of the layers
        for match in members:
            other = next((order for order in orders if order != _order(match)), usual)
            odd = _order(match) != usual if settled else len(orders) > 1
            if odd:
                _mark(match, f"in other layers: {_order_text(usual if settled else other)}")


def _apart(state: State) -> None:
    """Parts of fused or permuted modules whose parameters (weight and bias) do not lie alike."""
    for side, other in (("actual", "reference"), ("reference", "actual")):
        found: dict[tuple[str, str], list[Match]] = {}
        for match in state.matches:
            whole, part = getattr(match, side), getattr(match, other)
            if part.place is None and not (whole.place and whole.place.axis):
                found.setdefault((parent(whole.name), parent(part.name)), []).append(match)
        for members in found.values():
            _of_module(state, members, side)


def _of_module(state: State, members: Sequence[Match], side: str) -> None:
    placed = {getattr(match, side).place for match in members} - {None}
    if not placed or (len(placed) == 1 and all(getattr(m, side).place for m in members)):
        return
    rows = {len(place.rows) for place in placed}
    whole = [m for m in members if getattr(m, side).place is None]
    apart = [m for m in members if m not in whole]
    for match in whole:  # a permuted matrix beside a vector that is as it was
        shape = state.shapes[side][getattr(match, side).name]
        if shape and shape[0] in rows and not _same_in(state, match, apart, side):
            apart.append(match)
    if len(apart) < 2:
        return
    words = [f"{m.reference.name} at [{getattr(m, side).place or 'all'}]" for m in apart]
    for match in apart:
        _mark(match, f"not in one place of the {side} side: {', '.join(words)}")


def _same_in(state: State, match: Match, placed: Sequence[Match], side: str) -> bool:
    """Whether a unit's numbers are the same in the order that its neighbours lie in."""
    unit = getattr(match, side)
    for other in placed:
        place = getattr(other, side).place
        if place is not None and len(place.rows) == state.shapes[side][unit.name][0]:
            moved = Unit(unit.name, Place(0, place.rows))
            units = (moved, match.reference) if side == "actual" else (match.actual, moved)
            if state.fit(*units) is None:
                return False
    return True


_SAME = {"query": "q", "key": "k", "value": "v", "embedding": "embed", "embedder": "embed"}


def against_names(state: State) -> list[str]:
    """Pairs of kinds whose names say that they are exchanged, in all layers alike.

    Content that agrees everywhere is no proof of its place: names that share more words crosswise
    are told.
    """
    kinds: dict[tuple[str, str], torch.Size] = {}
    for match in state.matches:
        if not (match.actual.place or match.reference.place):
            names = tuple(_NUMBER.sub("*", u.name) for u in (match.actual, match.reference))
            kinds.setdefault((names[0], names[1]), state.shapes["actual"][match.actual.name])
    told = []
    for (first, second), (one, two) in combinations(kinds, 2):
        if kinds[first, second] != kinds[one, two] or _leaf(first) != _leaf(one):
            continue
        straight = _shared(first, second) + _shared(one, two)
        if _shared(first, two) + _shared(one, second) > straight:
            told.append(f"{first} is {second} and {one} is {two}")
    return told + _roles(state)


def _roles(state: State) -> list[str]:
    """Fused projections that do not hold queries, keys and values in this order, by their names."""
    told: dict[str, None] = {}
    for side, other in (("actual", "reference"), ("reference", "actual")):
        found: dict[str, list[tuple[int, str]]] = {}
        for match in state.matches:
            place, name = getattr(match, side).place, getattr(match, other).name
            words = [_SAME.get(word, word) for word in re.split(r"[._]+", name)]
            role = next((word for word in words[::-1] if word in ("q", "k", "v")), "")
            if place is not None and role and _leaf(name) == "weight":
                whole = getattr(match, side).name
                found.setdefault(whole, []).append((place.rows[0], role))
        for whole, parts in found.items():
            order = "".join(role for _, role in sorted(parts))
            if order in ("kqv", "kvq", "qvk", "vqk", "vkq"):
                told[f"{_NUMBER.sub('*', whole)} holds {', '.join(order)} in this order"] = None
    return list(told)


def _shared(name: str, other: str) -> int:
    """Words that two names have in common."""
    words = ({_SAME.get(w, w) for w in re.split(r"[._*]+", text) if w} for text in (name, other))
    return len(set.intersection(*words))


def _order(match: Match) -> tuple[Place | None, Place | None, str]:
    return match.actual.place, match.reference.place, match.layout


def _order_text(order: tuple[Place | None, Place | None, str]) -> str:
    own, theirs, layout = order
    words = [
        f"[{own}] of the actual side" if own else "",
        f"[{theirs}] of the reference" if theirs else "",
        layout,
    ]
    return ", ".join(word for word in words if word) or "as it is"
