"""Pair the modules that parameters leave open by what they return on the same input.

Sketches (`sketch/module/...`) stand for tensors in one layout; full tensors (`module/...`) are
compared in every layout (`b c f h w` against `b l c`), and as parts of a concatenation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from truestep.keys import Key, key_of
from truestep.pairing.content import CLOSE, candidates, fit, fit_any, is_constant
from truestep.pairing.fused import MARGIN, find_parts
from truestep.pairing.records import Ambiguous, Evidence, Pair, Pairing
from truestep.pairing.state import parent

Tensor = torch.Tensor

ROUNDING = 1e-6
"""Distances below this are alike: a float32 forward written in another way is 1e-7 to 1e-6 away."""

Outputs = dict[str, dict[Key, Tensor]]
"""Module to its outputs, by their keys without the module."""


def pair_activations(
    pairing: Pairing, actual: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> Pairing:
    """Add pairs of modules whose outputs are equal, in any layout.

    Two outputs are equal up to `content.CLOSE` (0.08 of the reference's deviation): a forward in
    bfloat16 is 1e-2 to 5e-2 from the same in float32, unrelated outputs are 1.4 apart.

    Args:
        pairing: What parameters say; its pairs are kept, but for containers.
        actual, reference: Traces on the same input: `module/FQN/STEP/BRANCH/out.N` to tensors, or
            `sketch/module/...` to their sketches. Modules that return the same as one another
            (dropout, identity) pair by their parents, or together where one side has one.

    Returns:
        The pairing with the new pairs; modules of the traces that have none are listed.
    """
    sides = (_outputs(actual), _outputs(reference))
    taken: tuple[set[str], set[str]] = (set(), set())
    for pair in pairing.of("module"):
        if pair.evidence is not Evidence.CONTAINER:
            taken[0].update(pair.actual)
            taken[1].update(pair.reference)
    open_ = tuple(
        {name: found for name, found in side.items() if name not in used}
        for side, used in zip(sides, taken, strict=True)
    )
    groups = _equal(open_[0], open_[1])
    pairs, ambiguous = _resolved(groups, pairing)
    paired = [_names(pairs, 0), _names(pairs, 1)]
    rest = tuple(
        {name: found for name, found in side.items() if name not in used}
        for side, used in zip(open_, paired, strict=True)
    )
    pairs += _concatenated(rest[0], rest[1])
    return _merged(pairing, pairs, ambiguous, open_)


def _outputs(trace: Mapping[str, Tensor]) -> Outputs:
    found: Outputs = {}
    for name in trace:
        key = key_of(name)
        if key.head == "module" and key.prefixes in ((), ("sketch",)):
            tensor = trace[name]
            if tensor.is_floating_point() and not is_constant(tensor):
                place = key.but(fqn=None, call=0)
                found.setdefault(key.label, {})[place] = tensor
    return found


def _distance(own: Mapping[Key, Tensor], theirs: Mapping[Key, Tensor]) -> float | None:
    """Largest distance over all outputs that both have; None where one is another tensor."""
    shared = [key for key in own if key in theirs]
    worst: list[float] = []
    for key in shared:
        a, r = own[key], theirs[key]
        if a.numel() != r.numel():
            return None
        found = fit(a, r) if "sketch" in key.prefixes else fit_any(a, r)
        if found is None or found.scale != 1.0 or found.distance > CLOSE:
            return None
        worst.append(found.rel_l2)
    return max(worst, default=None)


def _equal(own: Outputs, theirs: Outputs) -> list[tuple[list[str], list[str], float]]:
    """Groups of modules that return the same, with the largest distance in each."""
    links: dict[str, dict[str, float]] = {}
    keys = dict.fromkeys(key for outputs in own.values() for key in outputs)
    looked: set[str] = set()
    for key in keys:  # most modules have the first key; some run in other steps only
        mine = {n: o[key] for n, o in own.items() if key in o and n not in looked}
        others = {n: o[key] for n, o in theirs.items() if key in o}
        for name, near in candidates(mine, others):
            looked.add(name)
            for other in near:
                apart = _distance(own[name], theirs[other])
                if apart is not None:
                    links.setdefault(name, {})[other] = apart
    groups: list[tuple[list[str], list[str], float]] = []
    for name, hits in _closest(links).items():
        joined = [g for g in groups if set(g[1]) & set(hits)]
        groups = [g for g in groups if g not in joined]
        mine_ = [*(n for g in joined for n in g[0]), name]
        others_ = list(dict.fromkeys([*(n for g in joined for n in g[1]), *hits]))
        groups.append((mine_, others_, max([*hits.values(), *(g[2] for g in joined)])))
    orders = [{name: i for i, name in enumerate(side)} for side in (own, theirs)]
    return [
        (sorted(left, key=orders[0].__getitem__), sorted(right, key=orders[1].__getitem__), apart)
        for left, right, apart in groups
    ]


def _closest(links: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Drop links to modules that have one, on either side, many times closer."""
    best: dict[tuple[int, str], float] = {}
    for name, hits in links.items():
        for other, apart in hits.items():
            for key in ((0, name), (1, other)):
                best[key] = min(apart, best.get(key, apart))
    limit = {key: MARGIN * max(value, ROUNDING) for key, value in best.items()}
    kept = {
        name: {o: d for o, d in hits.items() if d <= min(limit[0, name], limit[1, o])}
        for name, hits in links.items()
    }
    return {name: hits for name, hits in kept.items() if hits}


def _resolved(
    groups: Sequence[tuple[list[str], list[str], float]], pairing: Pairing
) -> tuple[list[Pair], list[Ambiguous]]:
    """One pair of each group, or several by their parents; else the group is ambiguous."""
    parents = pairing.rename()
    pairs: list[Pair] = []
    ambiguous: list[Ambiguous] = []
    for mine, others, apart in groups:
        left, right = list(mine), list(others)
        if len(left) > 1 or len(right) > 1:
            for name in mine:
                home = parents.get(parent(name))
                near = [o for o in right if home is not None and parent(o) == home]
                rivals = [n for n in left if parent(n) == parent(name)]
                if len(near) == len(rivals) == 1:
                    note = f"alone in {parent(name)} = {home} with this output"
                    pairs.append(_pair((name,), (near[0],), apart, note))
                    left.remove(name)
                    right.remove(near[0])
        if not left or not right:
            continue
        if len(left) == 1 or len(right) == 1:
            several = len(left) + len(right) > 2
            note = "all return the same" if several else ""
            pairs.append(_pair(tuple(left), tuple(right), apart, note))
            continue
        ambiguous.append(
            Ambiguous(
                kind="module", actual=tuple(left), reference=tuple(right), why="equal outputs"
            )
        )
    return pairs, ambiguous


def _concatenated(own: Outputs, theirs: Outputs) -> list[Pair]:
    """Modules that return what several of the other side return, one after the other."""
    pairs: list[Pair] = []
    for index, (wholes, parts) in enumerate(((own, theirs), (theirs, own))):
        first = {n: next(iter(o.items())) for n, o in wholes.items()}
        key = next((k for k, _ in first.values() if "sketch" not in k.prefixes), None)
        if key is None:
            continue
        found = find_parts(
            {n: o[key] for n, o in parts.items() if key in o},
            {n: o[key] for n, o in wholes.items() if key in o},
        )
        for name in dict.fromkeys(part.whole for part in found):
            members = sorted((p for p in found if p.whole == name), key=lambda p: p.place.rows[0])
            size = wholes[name][key].shape[members[0].place.axis]
            covered = sum(len(p.place.rows) for p in members) == size
            if not covered or any(p.fit.scale != 1.0 for p in members):
                continue
            names = tuple(p.part for p in members)
            apart = max(p.fit.rel_l2 for p in members)
            sides = ((name,), names) if index == 0 else (names, (name,))
            places = tuple(f"{p.place} of axis {p.place.axis}" for p in members)
            pairs.append(_pair(sides[0], sides[1], apart, "concatenated", places))
    return pairs


def _pair(
    actual: tuple[str, ...],
    reference: tuple[str, ...],
    apart: float,
    note: str,
    parts: tuple[str, ...] = (),
) -> Pair:
    return Pair(
        kind="module",
        actual=actual,
        reference=reference,
        evidence=Evidence.ACTIVATION,
        parts=parts,
        rel_l2=apart,
        note=note,
    )


def _names(pairs: Iterable[Pair], side: int) -> set[str]:
    return {name for pair in pairs for name in (pair.actual, pair.reference)[side]}


def _merged(
    pairing: Pairing,
    pairs: Sequence[Pair],
    ambiguous: Sequence[Ambiguous],
    traced: tuple[Outputs, ...],
) -> Pairing:
    """The pairing with new pairs in the place of containers and leftovers."""
    new = (_names(pairs, 0), _names(pairs, 1))
    kept = [
        pair
        for pair in pairing.pairs
        if pair.evidence is not Evidence.CONTAINER
        or not (set(pair.actual) & new[0] or set(pair.reference) & new[1])
    ]
    known = tuple(
        _names(kept, side) | {n for g in ambiguous for n in (g.actual, g.reference)[side]}
        for side in (0, 1)
    )
    left = []
    for side, before in enumerate((pairing.unmatched_actual, pairing.unmatched_reference)):
        names = dict.fromkeys([*before, *traced[side]])
        left.append(tuple(n for n in names if n not in new[side] and n not in known[side]))
    return pairing.model_copy(
        update={
            "pairs": (*kept, *pairs),
            "ambiguous": (*pairing.ambiguous, *ambiguous),
            "unmatched_actual": left[0],
            "unmatched_reference": left[1],
        }
    )
