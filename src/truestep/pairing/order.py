"""What lies otherwise than its kind: layers out of order, rows in another one, parts apart.

For checkpoints, which are loaded by their names: there the content of a parameter is right only at
its place. Implementations of a model may number and lay out what they hold as they like.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

from truestep.pairing.fused import Place
from truestep.pairing.state import AGREEMENT, Match, State, ancestors, inside, parent
from truestep.pairing.structure import forward, habits_of, numbered_layer


def mark_misplaced(state: State) -> None:
    """Mark pairs that are right by their content, and not by their place."""
    _mark_layers(state)
    _mark_orders(state)
    _mark_apart(state)


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


def _mark_layers(state: State) -> None:
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
            match.odd = match.misplaced = True
            match.note = f"{scope} holds the content of {moved[scope]}, out of order"


def _mark_orders(state: State) -> None:
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
            if odd and not match.misplaced:
                match.odd = match.misplaced = True
                match.note = f"in other layers: {_order_text(usual if settled else other)}"


def _mark_apart(state: State) -> None:
    """Mark parts of fused modules whose parameters (weight and bias) do not lie alike in it."""
    for side, other in (("actual", "reference"), ("reference", "actual")):
        found: dict[tuple[str, str], list[Match]] = {}
        for match in state.matches:
            whole, part = getattr(match, side), getattr(match, other)
            if whole.place is not None and not whole.place.axis:
                found.setdefault((parent(whole.name), parent(part.name)), []).append(match)
        for members in found.values():
            if len({getattr(match, side).place for match in members}) > 1:
                words = [f"{m.reference.name} at [{getattr(m, side).place}]" for m in members]
                for match in members:
                    match.odd = match.misplaced = True
                    match.note = f"not in one place of the {side} side: {', '.join(words)}"


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
