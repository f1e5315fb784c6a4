"""Pair the parameters of two implementations by their names, their content and their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from truestep.pairing import structure
from truestep.pairing.content import Fit, candidates, fit, is_constant
from truestep.pairing.fused import MARGIN, Part, Place, find_parts, find_run
from truestep.pairing.records import Evidence
from truestep.pairing.rename import renamed
from truestep.pairing.rows import (
    LEAST,
    common_dtype,
    exact_fit,
    found_parts,
    hashed,
    parts_by_rows,
    same_wholes,
)
from truestep.pairing.scales import Numbers
from truestep.pairing.state import Chosen, Match, State, Unit, parent

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
    _by_rows(state)
    if _scales(state):  # few rows of codes are those of their source; what is beside them may be
        structure.by_neighbours(state)
    _by_content(state)
    _inside_larger(state)
    if _scales(state):
        _exchanged_halves(state)
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


def _scales(state: State) -> list[set[str]]:
    """Names of what is in codes, of each side that has any."""
    sides = state.actual, state.reference
    return [side.coded for side in sides if isinstance(side, Numbers) and side.coded]


def _by_rows(state: State) -> None:
    """Tensors that are bit for bit one of the other side, or rows of one, once cast alike.

    Of codes, where both sides keep such; their scales are judged apart.
    """
    coded = _scales(state)
    left_out = coded[0] if len(coded) == 1 else set()
    sides = [
        Chosen(side, [name for name in side if name not in left_out])
        for side in (_open(state, "actual"), _open(state, "reference"))
    ]
    dtype = common_dtype(*sides)
    own, theirs = (
        {n: rows for n in side if (rows := hashed(side, n, dtype)) is not None} for side in sides
    )
    for name, other in same_wholes(own, theirs):
        state.add(Unit(name), Unit(other), exact_fit(state.actual[name], state.reference[other]))
    for whole_side, part_side in (("actual", "reference"), ("reference", "actual")):
        parts, wholes = (_open(state, side) for side in (part_side, whole_side))
        mine, others = (own, theirs) if part_side == "actual" else (theirs, own)
        places = parts_by_rows(
            {name: mine[name] for name in parts if name in mine},
            {name: others[name] for name in wholes if name in others},
        )
        found = found_parts(parts, wholes, places)
        _take_all(state, found, whole_side)
    _permuted_vectors(state, dtype)


def _permuted_vectors(state: State, dtype: torch.dtype | None) -> None:
    """Vectors that hold another's numbers in the order that rows of matrices were found in."""
    orders = dict.fromkeys(
        match.actual.place.rows
        for match in state.matches
        if match.actual.place
        and match.reference.place is None
        and max(match.actual.place.rows) < len(match.actual.place.rows)
    )
    if not orders:
        return
    own, theirs = (_vectors_of(state, side) for side in ("actual", "reference"))
    for rows in orders:
        place, count = Place(0, rows), len(rows)
        turned = {n: place.of(state.actual[n]) for n, size in own.items() if size == count}
        others = Chosen(state.reference, [n for n, size in theirs.items() if size == count])
        hashes = [
            {n: h for n in side if (h := hashed(side, n, dtype)) is not None}
            for side in (turned, others)
        ]
        for name, other in same_wholes(*hashes):
            hit = exact_fit(turned[name], state.reference[other], Evidence.FUSED)
            state.add(Unit(name, place), Unit(other), hit)
            del own[name], theirs[other]


def _vectors_of(state: State, side: str) -> dict[str, int]:
    """Vectors that no pair has touched, and their lengths."""
    shapes = state.shapes[side]
    names = (unit.name for unit in state.free(side) if unit.place is None)
    return {n: shapes[n][0] for n in names if len(shapes[n]) == 1 and shapes[n][0] >= LEAST}


def _by_content(state: State) -> None:
    """Tensors that hold the same numbers as one tensor of the other side, and no second one."""
    sides = []
    for side, tensors in (("actual", state.actual), ("reference", state.reference)):
        units = [unit for unit in state.free(side) if not state.constant(unit, side=side)]
        sides.append(Chosen(tensors, [unit.name for unit in units]))
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
        _take_all(state, found, whole_side)
        wholes, parts = (_open(state, side) for side in (whole_side, part_side))
        for part in _runs(parts, wholes):
            _take(state, part, whole_side)


def _exchanged_halves(state: State) -> None:
    """Codes whose two halves are the other's, exchanged: scale and shift of a last norm."""
    own, theirs = ([u for u in state.free(s) if u.place is None] for s in ("actual", "reference"))
    for unit in own:
        shape = state.shapes["actual"][unit.name]
        if not shape or shape[0] % 2 or state.constant(unit, side="actual"):
            continue
        half = shape[0] // 2
        turned = Unit(unit.name, Place(0, (*range(half, shape[0]), *range(half))))
        found = [
            other
            for other in theirs
            if state.shapes["reference"][other.name] == shape and state.fit(turned, other)
        ]
        if len(found) == 1 and (hit := state.fit(turned, found[0])) is not None:
            state.add(turned, found[0], hit, Evidence.FUSED)
            theirs.remove(found[0])


def _open(state: State, side: str) -> Chosen:
    """Tensors that no pair has touched and that are not constant."""
    tensors = state.actual if side == "actual" else state.reference
    units = (unit for unit in state.free(side) if unit.place is None)
    return Chosen(tensors, [u.name for u in units if not state.constant(u, side=side)])


def _take(state: State, part: Part, whole_side: str) -> None:
    """Pair a part with its place; the scale is always from the reference to the actual side."""
    larger, smaller = Unit(part.whole, part.place), Unit(part.part)
    if whole_side == "actual":
        state.add(larger, smaller, part.fit)
    else:
        state.add(smaller, larger, replace(part.fit, scale=1 / part.fit.scale))


def _take_all(state: State, parts: Sequence[Part], whole_side: str) -> None:
    """Pair parts with their places, then the vectors beside them."""
    for part in parts:
        _take(state, part, whole_side)
    for whole in dict.fromkeys(part.whole for part in parts):
        beside = [_sibling(state, part, whole_side) for part in parts if part.whole == whole]
        # Where one does not lie as its matrix does, each is sought by itself.
        for vector in beside if None not in beside else ():
            assert vector is not None
            _take(state, vector, whole_side)


def _sibling(state: State, part: Part, whole_side: str) -> Part | None:
    """The vector (bias) beside a fused matrix, where it lies as the matrix' rows do."""
    part_side = "reference" if whole_side == "actual" else "actual"
    tensors = {"actual": state.actual, "reference": state.reference}
    size = state.shapes[whole_side][part.whole][part.place.axis]
    larger = _vectors(state.shapes[whole_side], parent(part.whole), size)
    smaller = _vectors(state.shapes[part_side], parent(part.part), len(part.place.rows))
    if len(larger) != 1 or len(smaller) != 1:
        return None
    place = Place(0, part.place.rows)
    free = state.is_free(Unit(larger[0], place), side=whole_side)
    if not (free and state.is_free(Unit(smaller[0]), side=part_side)):
        return None
    whole, own = tensors[whole_side][larger[0]], tensors[part_side][smaller[0]]
    hit = fit(place.of(whole), own)
    if hit is None:
        return None  # its content differs: left to exclusion
    kind = hit.evidence
    if is_constant(own):
        kind = Evidence.STRUCTURE
    elif kind is Evidence.EQUAL:
        kind = Evidence.FUSED
    return Part(larger[0], smaller[0], place, 0, replace(hit, evidence=kind))


def _vectors(shapes: Mapping[str, torch.Size], module: str, size: int) -> list[str]:
    return [name for name, shape in shapes.items() if parent(name) == module and shape == (size,)]


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
