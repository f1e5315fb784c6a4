"""Pair two implementations of one model, parameters first, and say what decided each pair."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from truestep.errors import UsageError
from truestep.pairing import structure
from truestep.pairing.modules import pair_from_parameters
from truestep.pairing.parameters import matched, pair_parameters
from truestep.pairing.records import Evidence, Pair, Pairing
from truestep.pairing.state import Match

Tensor = torch.Tensor
Weights = Mapping[str, Tensor] | torch.nn.Module


def pair_modules(
    actual: Weights, reference: Weights, *, rename: Mapping[str, str] | None = None
) -> Pairing:
    """Pair the parameters and modules of two implementations of one model.

    A pair is claimed where a rename map or equal names say so, where two tensors hold the same
    numbers (in another layout, precision or scale, or one inside the other) and no third one does,
    or where the places of the pairs around it leave one choice. Everything else is listed. A
    tensor whose content is found nowhere, or in the wrong place, does not mislead the others: it
    is paired by its place, and marked odd.

    Args:
        actual, reference: State dicts or modules. Of a module, the parts without parameters are
            known too, and pair by their position between paired siblings.
        rename: Actual names to reference names, of modules or parameters, `*` for one part.

    Returns:
        Pairs, ambiguous groups and what is left over.

    Raises:
        UsageError: A side has no tensors, or a rename rule cannot mean anything.
    """
    states = tuple(
        _state(side, what) for side, what in ((actual, "actual"), (reference, "reference"))
    )
    kept = tuple(_untied(state) for state in states)
    state = pair_parameters(kept[0][0], kept[1][0], rename=rename)
    matches = matched(state)
    groups, left, right = structure.ambiguous(state)
    names = [_modules(side) for side in (actual, reference)]
    modules, more, others = pair_from_parameters(
        matches,
        kept[0][0],
        kept[1][0],
        actual_modules=names[0],
        reference_modules=names[1],
        ambiguous=groups,
    )
    return Pairing(
        pairs=(*_records(matches, kept[0][1], kept[1][1]), *modules),
        ambiguous=tuple(groups),
        unmatched_actual=(*left, *more),
        unmatched_reference=(*right, *others),
    )


def _state(side: Weights, what: str) -> dict[str, Tensor]:
    found = side.state_dict() if isinstance(side, torch.nn.Module) else side
    tensors = {
        name: tensor.detach().float() if _narrow(tensor) else tensor.detach()
        for name, tensor in found.items()
        if isinstance(tensor, torch.Tensor) and not tensor.is_complex()
    }
    if not tensors:
        raise UsageError(f"the {what} side has no tensors to pair")
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise UsageError(
            f"the {what} side holds no numbers", where=meta[0], measured="a tensor on `meta`"
        )
    return tensors


def _narrow(tensor: Tensor) -> bool:
    """8-bit floats know few operations: they are paired as the float32 numbers they are."""
    return tensor.is_floating_point() and tensor.itemsize == 1


def _untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Keep one name of each tensor that has several, and all names of those."""
    names: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        names.setdefault(place if tensor.numel() else (name,), []).append(name)
    kept = {group[0]: tensors[group[0]] for group in names.values()}
    return kept, {group[0]: tuple(group) for group in names.values()}


def _modules(side: Weights) -> list[str] | None:
    if not isinstance(side, torch.nn.Module):
        return None
    return [name for name, _ in side.named_modules()]


def _records(
    matches: list[Match], own: Mapping[str, tuple[str, ...]], theirs: Mapping[str, tuple[str, ...]]
) -> list[Pair]:
    """One record a pair; the parts of one tensor together in one."""
    groups: dict[tuple[str, str], list[Match]] = {}
    for match in matches:
        if match.actual.place:
            key = ("actual", match.actual.name)
        elif match.reference.place:
            key = ("reference", match.reference.name)
        else:
            key = ("", match.actual.name)
        groups.setdefault(key, []).append(match)
    return [_record(group, side, own, theirs) for (side, _), group in groups.items()]


def _record(
    group: list[Match],
    side: str,
    own: Mapping[str, tuple[str, ...]],
    theirs: Mapping[str, tuple[str, ...]],
) -> Pair:
    if side:
        group = sorted(group, key=lambda m: _rows(m, side)[0])
    worst = max(group, key=lambda m: (m.odd, m.distance, abs(m.scale - 1.0)))
    tied = [
        name
        for table, unit in ((own, worst.actual), (theirs, worst.reference))
        for name in table[unit.name][1:]
    ]
    notes = [m.note if len(group) == 1 else f"{_part(m, side)}: {m.note}" for m in group if m.note]
    notes += [f"tied: {', '.join(tied)}"] if tied else []
    layouts = dict.fromkeys(m.layout for m in group if m.layout)
    evidence = worst.evidence
    if side and evidence is Evidence.STRUCTURE:
        evidence = max((m.evidence for m in group), key=lambda e: e is Evidence.FUSED)
    return Pair(
        kind="parameter",
        actual=tuple(dict.fromkeys(n for m in group for n in own[m.actual.name])),
        reference=tuple(dict.fromkeys(n for m in group for n in theirs[m.reference.name])),
        evidence=evidence,
        parts=tuple(_place(m, side) for m in group) if side else (),
        layout=", ".join(layouts),
        rel_l2=worst.rel_l2,
        scale=worst.scale,
        odd=any(m.odd for m in group),
        note="; ".join(dict.fromkeys(notes)),
    )


def _rows(match: Match, side: str) -> tuple[int, ...]:
    place = match.actual.place if side == "actual" else match.reference.place
    return place.rows if place else ()


def _place(match: Match, side: str) -> str:
    """Where a part is: `0:192`, with the axis where it is not the first."""
    place = match.actual.place if side == "actual" else match.reference.place
    if place is None:
        return ""
    return f"{place} of axis {place.axis}" if place.axis else str(place)


def _part(match: Match, side: str) -> str:
    return match.reference.name if side == "actual" else match.actual.name
