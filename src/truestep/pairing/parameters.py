"""Pair the parameters of two implementations by their names, their content and their places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from truestep.pairing import structure
from truestep.pairing.content import Fit, candidates, fit, is_constant
from truestep.pairing.fused import MARGIN, Part, Place, find_parts, find_run
from truestep.pairing.records import Evidence
from truestep.pairing.rename import renamed
from truestep.pairing.state import Match, State, Unit, parent

Tensor = torch.Tensor


def pair_parameters(
    actual: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    *,
    rename: Mapping[str, str] | None = None,
) -> State:
    """Pair tensors of two state dicts; see `truestep.pairing.pair_modules`.

    What a rename map or equal names say comes first, then content that has one place only, then
    what the places of all these leave no choice about.
    """
    state = State(actual, reference)
    _by_name(state, rename or {})
    _by_content(state)
    _inside_larger(state)
    structure.settle(state)
    return state


def _by_name(state: State, rename: Mapping[str, str]) -> None:
    """Names that a map pairs, whatever they hold; equal names that hold the same."""
    for name in state.actual:
        target = renamed(name, rename)
        if target is not None and target in state.reference:
            state.add_by(Unit(name), Unit(target), Evidence.RENAME)
    taken = {match.reference.name for match in state.matches}
    for unit in state.free("actual"):
        if unit.name in state.reference and unit.name not in taken:
            found = state.fit(unit, Unit(unit.name))
            if found is not None:
                state.add(unit, Unit(unit.name), found, Evidence.NAME)


def _by_content(state: State) -> None:
    """Tensors that hold the same numbers as one tensor of the other side, and no second one."""
    sides = []
    for side, tensors in (("actual", state.actual), ("reference", state.reference)):
        units = [unit for unit in state.free(side) if not state.constant(unit, side=side)]
        sides.append({unit.name: tensors[unit.name] for unit in units})
    found: dict[str, dict[str, Fit]] = {}
    back: dict[str, dict[str, Fit]] = {}
    for name, others in candidates(*sides):
        for other in others:
            hit = state.fit(Unit(name), Unit(other))
            if hit is not None:
                found.setdefault(name, {})[other] = hit
                back.setdefault(other, {})[name] = hit
    for name, hits in found.items():
        best = _clear(hits)
        if best is not None and _clear(back[best]) == name:
            state.add(Unit(name), Unit(best), hits[best])


def _clear(hits: Mapping[str, Fit]) -> str | None:
    """The closest, if no other is nearly as close."""
    ordered = sorted(hits, key=lambda name: hits[name].distance)
    if len(ordered) > 1 and hits[ordered[1]].distance <= MARGIN * hits[ordered[0]].distance:
        return None
    return ordered[0]


def _inside_larger(state: State) -> None:
    """Tensors that are a part of a larger one: matrices by their rows, then what goes with them."""
    for whole_side, part_side in (("actual", "reference"), ("reference", "actual")):
        wholes, parts = (_open(state, side) for side in (whole_side, part_side))
        found = find_parts(parts, wholes)
        for part in found:
            _take(state, part, whole_side)
        for part in found:
            _siblings(state, part, whole_side)
        wholes, parts = (_open(state, side) for side in (whole_side, part_side))
        for part in _runs(parts, wholes):
            _take(state, part, whole_side)


def _open(state: State, side: str) -> dict[str, Tensor]:
    """Tensors that no pair has touched and that are not constant."""
    tensors = state.actual if side == "actual" else state.reference
    units = (unit for unit in state.free(side) if unit.place is None)
    return {unit.name: tensors[unit.name] for unit in units if not state.constant(unit, side=side)}


def _take(state: State, part: Part, whole_side: str) -> None:
    """Pair a part with its place; the scale is always from the reference to the actual side."""
    larger, smaller = Unit(part.whole, part.place), Unit(part.part)
    if whole_side == "actual":
        state.add(larger, smaller, part.fit)
    else:
        state.add(smaller, larger, replace(part.fit, scale=1 / part.fit.scale))


def _siblings(state: State, part: Part, whole_side: str) -> None:
    """Vectors beside a fused matrix (biases) lie where the matrix' rows do."""
    part_side = "reference" if whole_side == "actual" else "actual"
    tensors = {"actual": state.actual, "reference": state.reference}
    size = tensors[whole_side][part.whole].shape[part.place.axis]
    larger = _vectors(tensors[whole_side], parent(part.whole), size)
    smaller = _vectors(tensors[part_side], parent(part.part), len(part.place.rows))
    if len(larger) != 1 or len(smaller) != 1:
        return
    place = Unit(larger[0], Place(0, part.place.rows))
    if not (
        state.is_free(place, side=whole_side) and state.is_free(Unit(smaller[0]), side=part_side)
    ):
        return
    whole, own = tensors[whole_side][larger[0]], tensors[part_side][smaller[0]]
    hit = fit(place.place.of(whole), own) if place.place else None
    if hit is None:
        return  # its content differs: left to exclusion
    kind = hit.evidence
    if is_constant(own):
        kind = Evidence.STRUCTURE
    elif kind is Evidence.EQUAL:
        kind = Evidence.FUSED
    assert place.place is not None
    _take(
        state,
        Part(larger[0], smaller[0], place.place, 0, replace(hit, evidence=kind)),
        whole_side,
    )


def _vectors(tensors: Mapping[str, Tensor], module: str, size: int) -> list[str]:
    return [
        name
        for name, tensor in tensors.items()
        if parent(name) == module and tensor.ndim == 1 and tensor.numel() == size
    ]


def _runs(parts: Mapping[str, Tensor], wholes: Mapping[str, Tensor]) -> list[Part]:
    """Vectors that are one run of one longer vector."""
    found: list[Part] = []
    for name, part in parts.items():
        hits = []
        for whole, tensor in wholes.items():
            run = find_run(part, tensor)
            if run is not None:
                hits.append(Part(whole, name, run[0], 0, run[1]))
        if len(hits) == 1:
            found.append(hits[0])
    claims: dict[tuple[str, int], int] = {}
    for hit in found:
        for row in hit.place.rows:
            claims[hit.whole, row] = claims.get((hit.whole, row), 0) + 1
    return [hit for hit in found if all(claims[hit.whole, row] == 1 for row in hit.place.rows)]


def matched(state: State) -> list[Match]:
    """All pairs, in the order of the actual side."""
    order = {name: index for index, name in enumerate(state.actual)}
    return sorted(state.matches, key=lambda match: order[match.actual.name])
