"""Judge parameters: nothing computes them, so there is no noise to allow for. Pure: no I/O.

Of one dtype they agree bit for bit or are others. Of two dtypes the coarser must be the finer one
rounded: every element the nearest that its dtype has, or as near (a tie). Codes with a stored scale
must be the nearest to source / scale, up to ties of that division in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from truestep.floors import EPSILON
from truestep.judge.packed import info_of, judged_blocks
from truestep.judge.rows import forget, likely, one_sided, place_fields, row_fields, shape_note
from truestep.keys import Address
from truestep.measure.blocks import Packed
from truestep.measure.distance import distance, same_bits
from truestep.measure.plain import NO_PAGES, Pages, plain
from truestep.measure.rounding import (
    Rounding,
    called,
    expanded,
    nonfinite,
    reach,
    rounded_to,
    rounding,
)
from truestep.pairing.scales import BESIDE, packed_of, scale_name, scale_of
from truestep.verdict import Comparison, Row, Rule, Verdict

RULE = Rule(
    name="weights/1",
    text=(
        "parameters: of one dtype they agree bit for bit, of two the coarser is the other's exact "
        "rounding (ties either way; with a stored scale, of the other over its scale; in blocks, "
        "each code the nearest under its step)"
    ),
)

COARSE = 0.1
"""Largest rel_l2 of codes whose range suits them: int8 0.01, float8 e4m3 0.03, e5m2 0.05."""

_NAMED = re.compile(
    r"(?:^|[._])(?:weight|bias|gamma|beta|kernel|embedding|scale_shift_table|lora_[ABab]|alpha)"
    r"(?:_(?:scale|scale_inv|ih|hh|g|v)(?:_l\d+)?)?$"
    r"|(?:^|[._])(?:running_mean|running_var|num_batches_tracked|scale_weight)$"
)
"""How names of parameters end; those of activations end in modules, slots or stages."""


def are_parameters(names: Iterable[str]) -> bool:
    """Whether most names are those of parameters."""
    listed = [name for name in names if not BESIDE.search(name)]
    return 2 * sum(bool(_NAMED.search(name)) for name in listed) > len(listed)


def compare_parameters(
    actual: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> list[Row]:
    """Judge every parameter of both sides.

    Args:
        actual, reference: Name to tensor. A stored scale of one side that the other does not need
            (`weight_scale`, `scale_weight`, `weight.scale`, `SCB`) is judged with its codes.

    Returns:
        One row a name, in the reference's order, then names that only the actual side has; scales
        that were judged with their codes, and scales of activations, have none.
    """
    used: set[str] = set()
    rows: list[Row] = []
    for name in [*reference, *(name for name in actual if name not in reference)]:
        blocks = packed_of(actual, name), packed_of(reference, name)
        if any(blocks) and name in actual and name in reference:
            rows.append(_of_blocks(name, actual, reference, blocks))
            forget(name, actual, reference)
            continue
        a, r = (
            None if tensor is None else plain(tensor, name)
            for tensor in (actual.get(name), reference.get(name))
        )
        fields = row_fields(name, a, r, Address())
        if a is None or r is None:
            if not BESIDE.search(name):
                rows.append(Row(**fields, **one_sided(a)))
            continue
        scales = [_scale_of(name, side, other) for side, other in _both(actual, reference)]
        used.update(filter(None, scales))
        own, theirs = (
            Codes(tensor, (scale_of(name, stored, side),) if stored else None)
            for tensor, stored, side in zip((a, r), scales, (actual, reference), strict=True)
        )
        pages = Pages(partial(forget, name, actual, reference))
        rows.append(Row(**fields, **judged_pair(own, theirs, pages)))
        forget(name, actual, reference)
    return [row for row in rows if not (row.name in used and None in (row.actual, row.reference))]


def _of_blocks(
    name: str,
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    blocks: tuple[Packed | None, Packed | None],
) -> Row:
    """The row of one name that a side at least holds in blocks."""
    own, theirs = (
        packed or side[name] for packed, side in zip(blocks, (actual, reference), strict=True)
    )
    pages = Pages(partial(forget, name, actual, reference))
    infos = info_of(own), info_of(theirs)
    return Row(**place_fields(name, *infos, Address()), **judged_blocks(own, theirs, pages))


def summed(result: Comparison) -> Comparison:
    """A comparison of such rows, with its rule and, where it passes, its sentence."""
    rounded = [row for row in result.rows if row.verdict is Verdict.EQUIVALENT]
    update: dict[str, Any] = {"rule": RULE}
    if result.verdict is Verdict.EQUIVALENT:
        kinds = ", ".join(sorted({row.note.partition(";")[0] for row in rounded}))
        update["sentence"] = (
            f"equivalent: {len(rounded)} of {len(result.rows)} parameters {kinds}, "
            f"the others agree bit for bit"
        )
    return result.model_copy(update=update)


def _both(
    actual: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> Iterator[tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]]:
    yield actual, reference
    yield reference, actual


def _scale_of(
    name: str, tensors: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]
) -> str | None:
    """Name of the stored scale of a tensor's codes, which the other side lacks."""
    stored = scale_name(name, tensors)
    return None if stored is None or stored in other else stored


class Codes(NamedTuple):
    """A tensor, with what a code of 1 stands for: None, or a scale (None: of an unknown shape)."""

    tensor: torch.Tensor
    scale: tuple[torch.Tensor | None] | None = None


def judged_pair(own: Codes, theirs: Codes, pages: Pages = NO_PAGES) -> dict[str, Any]:
    """Verdict, note and distance of one parameter of both sides.

    Args:
        own, theirs: The actual and the reference tensor, with scales that only one side needs.
        pages: Given back while they are read, where the tensors lie in files.
    """
    actual, reference = own.tensor, theirs.tensor
    if actual.shape != reference.shape:
        return {"verdict": Verdict.INCOMPARABLE, "note": shape_note(actual, reference)}
    if actual.is_complex() or reference.is_complex():
        return {"verdict": Verdict.INVALID, "note": "complex tensors cannot be judged"}
    counts = [nonfinite(actual, pages=pages), nonfinite(reference, pages=pages)]
    for side, (nans, _) in zip(("actual", "reference"), counts, strict=True):
        if nans:
            return {"verdict": Verdict.INVALID, "note": f"{nans:,} NaN in {side}"}
    plain_both = own.scale is None and theirs.scale is None
    if plain_both and same_bits(actual, reference, pages=pages):
        return {"verdict": Verdict.IDENTICAL, "ratio": 0.0, "ratio_metric": "rel_l2"}
    if actual.dtype == reference.dtype:
        if (own.scale is None) != (theirs.scale is None) and same_bits(actual, reference):
            side = "actual" if own.scale is not None else "reference"
            note = f"the same codes, with a stored scale on the {side} side alone"
            return {"verdict": Verdict.DRIFTED, "note": note}
        return _other(actual, reference)
    more = counts[0][1] - counts[1][1]
    if more:
        side = "actual" if more > 0 else "reference"
        note = f"{abs(more):,} values of the {side} side overflowed to infinity"
        return {"verdict": Verdict.INVALID, "note": note}
    if _coarser(own, theirs) is own:
        return _conversion(own, theirs, pages)
    return _conversion(theirs, own, pages)


def _other(actual: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Two tensors of one dtype whose bits differ."""
    metrics = distance(actual, reference)
    if metrics.rel_l2 == 0.0:
        note = f"only signs of zeros differ ({called(actual.dtype)})"
        return {"verdict": Verdict.DRIFTED, "metrics": metrics, "note": note}
    name, narrow = called(actual.dtype), rounded_to(actual, reference)
    parts = [
        likely(metrics),
        f"it is the reference rounded to {called(narrow)}, stored as {name}" if narrow else "",
        f"not the same {name}: {metrics.max_abs:.3g} at most, rel_l2 {metrics.rel_l2:.2g}",
    ]
    note = "; ".join(part for part in parts if part)
    return {"verdict": Verdict.DRIFTED, "metrics": metrics, "note": note}


def _conversion(own: Codes, other: Codes, pages: Pages) -> dict[str, Any]:
    """One tensor in two formats: codes with their scale, and what they round with its own."""
    codes, source = own.tensor, other.tensor
    name = called(codes.dtype) + (" with its scale" if own.scale is not None else "")
    if not codes.is_floating_point() and own.scale is None and source.is_floating_point():
        note = f"{name} codes without a stored scale (weight_scale, scale_weight, SCB)"
        return {"verdict": Verdict.INCOMPARABLE, "note": note}
    if (None,) in (own.scale, other.scale):
        return {"verdict": Verdict.INCOMPARABLE, "note": "a stored scale of a shape not known here"}
    scale, unit = (side.scale[0] if side.scale else None for side in (own, other))
    for each in (scale, unit):
        if each is not None and not bool((each > 0).logical_and(each.isfinite()).all()):
            return {"verdict": Verdict.INVALID, "note": "a stored scale is not a positive number"}
    found = rounding(codes, source, scale, unit=unit, pages=pages)
    if found.off:
        if unit is not None:
            source = source.to(torch.float64) * expanded(unit, source.shape)
        return _misrounded(codes, source, scale, found, name)
    if not found.rel_l2 <= COARSE:
        note = f"rounded to {name}, but so coarsely that rel_l2 is {found.rel_l2:.2g}"
        return {"verdict": Verdict.INCONCLUSIVE, "note": note}
    ties = f"; {found.ties:,} ties rounded the other way" if found.ties else ""
    return {
        "verdict": Verdict.EQUIVALENT,
        "ratio": 0.0,
        "ratio_metric": "rel_l2",
        "note": f"rounded to {name}{ties}",
    }


def _misrounded(
    codes: torch.Tensor,
    source: torch.Tensor,
    scale: torch.Tensor | None,
    found: Rounding,
    name: str,
) -> dict[str, Any]:
    """Codes that are not the nearest; what else they may be."""
    count = f"{found.off:,} of {codes.numel():,} elements are not the nearest {name}"
    metrics = distance(codes, source) if scale is None else None
    between = {codes.dtype, source.dtype} == {torch.bfloat16, torch.float16}
    if between and bool(((codes.double() - source.double()).abs() <= reach(codes, source)).all()):
        note = f"{count}: two roundings of one source may be; compare either with that"
        return {"verdict": Verdict.INCONCLUSIVE, "note": note, "metrics": metrics}
    through = next(
        (
            t
            for t in (torch.bfloat16, torch.float16)
            if not rounding(codes, source.to(t), scale).off
        ),
        None,
    )
    parts = [
        likely(metrics) if metrics else "",
        count,
        f"they are of the other side rounded to {called(through)}" if through else "",
    ]
    fields = {"verdict": Verdict.DRIFTED, "note": "; ".join(part for part in parts if part)}
    return fields | ({"metrics": metrics} if metrics else {})


def _coarser(own: Codes, theirs: Codes) -> Codes:
    """The side that was rounded: codes with a scale, or the dtype with the larger epsilon."""
    if (own.scale is None) != (theirs.scale is None):
        return own if own.scale is not None else theirs
    actual, reference = own.tensor, theirs.tensor
    if actual.is_floating_point() != reference.is_floating_point():
        return theirs if actual.is_floating_point() else own
    if not actual.is_floating_point():
        return own if actual.itemsize <= reference.itemsize else theirs
    own_step, other_step = (EPSILON.get(called(t.dtype), 1.0) for t in (actual, reference))
    return own if own_step >= other_step else theirs
