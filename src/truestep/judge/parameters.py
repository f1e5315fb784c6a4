"""Judge parameters: nothing computes them, so there is no noise to allow for. Pure: no I/O.

Of one dtype they agree bit for bit or are others. Of two dtypes the coarser must be the finer one
rounded: every element the nearest that its dtype has, or as near (a tie). Codes with a stored scale
must be the nearest to source / scale, up to ties of that division in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from truestep.floors import EPSILON
from truestep.judge.rows import forget, likely, one_sided, row_fields, shape_note
from truestep.keys import Address
from truestep.measure.distance import distance, same_bits
from truestep.measure.plain import plain
from truestep.measure.rounding import (
    Rounding,
    called,
    nonfinite,
    reach,
    rounded_to,
    rounding,
    spread,
)
from truestep.verdict import Comparison, Row, Rule, Verdict

RULE = Rule(
    name="weights/1",
    text=(
        "parameters: of one dtype they agree bit for bit, of two the coarser is the other's exact "
        "rounding (ties either way; with a stored scale, of the other over its scale)"
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

_BESIDE = re.compile(r"(?:^|[._])(?:input_scale|scale_input|scaled_fp8)$")
"""What formats with a scale keep beside it, which says nothing of the weights."""

_BNB = 127.0
"""bitsandbytes keeps the largest magnitude of a row, not its scale."""


def are_parameters(names: Iterable[str]) -> bool:
    """Whether most names are those of parameters."""
    listed = [name for name in names if not _BESIDE.search(name)]
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
        a, r = (
            None if tensor is None else plain(tensor, name)
            for tensor in (actual.get(name), reference.get(name))
        )
        fields = row_fields(name, a, r, Address())
        if a is None or r is None:
            if not _BESIDE.search(name):
                rows.append(Row(**fields, **one_sided(a)))
            continue
        scales = [_scale_of(name, side, other) for side, other in _both(actual, reference)]
        used.update(stored for stored, _ in filter(None, scales))
        rows.append(Row(**fields, **_judged(a, r, *(found and found[1] for found in scales))))
        forget(name, actual, reference)
    return [row for row in rows if not (row.name in used and None in (row.actual, row.reference))]


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
) -> tuple[str, torch.Tensor] | None:
    """The stored scale of a tensor's codes, which the other side lacks: its name and its value."""
    stem, dot, leaf = name.rpartition(".")
    for stored in (
        f"{name}_scale",
        f"{name}_scale_inv",
        f"{name}.scale",
        f"{stem}{dot}scale_{leaf}",
        f"{stem}{dot}scale",
    ):
        if stored in tensors and stored not in other and tensors[name].itemsize == 1:
            return stored, tensors[stored].detach().to("cpu", torch.float64)
    stored = f"{stem}{dot}SCB"
    if stored in tensors and stored not in other and tensors[name].dtype is torch.int8:
        return stored, tensors[stored].detach().to("cpu", torch.float64) / _BNB
    return None


def _judged(
    actual: torch.Tensor,
    reference: torch.Tensor,
    own: torch.Tensor | None,
    theirs: torch.Tensor | None,
) -> dict[str, Any]:
    """Verdict and note of one pair, with the scales of both sides."""
    if actual.shape != reference.shape:
        return {"verdict": Verdict.INCOMPARABLE, "note": shape_note(actual, reference)}
    if actual.is_complex() or reference.is_complex():
        return {"verdict": Verdict.INVALID, "note": "complex tensors cannot be judged"}
    counts = [nonfinite(actual), nonfinite(reference)]
    for side, (nans, _) in zip(("actual", "reference"), counts, strict=True):
        if nans:
            return {"verdict": Verdict.INVALID, "note": f"{nans:,} NaN in {side}"}
    if own is None and theirs is None and same_bits(actual, reference):
        return {"verdict": Verdict.IDENTICAL, "ratio": 0.0, "ratio_metric": "rel_l2"}
    if actual.dtype == reference.dtype:
        if (own is None) != (theirs is None) and same_bits(actual, reference):
            side = "actual" if own is not None else "reference"
            note = f"the same codes, with a stored scale on the {side} side alone"
            return {"verdict": Verdict.DRIFTED, "note": note}
        return _other(actual, reference)
    more = counts[0][1] - counts[1][1]
    if more:
        side = "actual" if more > 0 else "reference"
        note = f"{abs(more):,} values of the {side} side overflowed to infinity"
        return {"verdict": Verdict.INVALID, "note": note}
    if _coarser(actual, reference, own, theirs) is actual:
        return _conversion(actual, own, reference, theirs)
    return _conversion(reference, theirs, actual, own)


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


def _conversion(
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    source: torch.Tensor,
    unit: torch.Tensor | None,
) -> dict[str, Any]:
    """One tensor in two formats: codes with their scale, and what they round with its own."""
    name = called(codes.dtype) + (" with its scale" if scale is not None else "")
    if not codes.is_floating_point() and scale is None and source.is_floating_point():
        note = f"{name} codes without a stored scale (weight_scale, scale_weight, SCB)"
        return {"verdict": Verdict.INCOMPARABLE, "note": note}
    each, step = spread(scale, codes.shape), spread(unit, codes.shape)
    if (scale is not None and each is None) or (unit is not None and step is None):
        return {"verdict": Verdict.INCOMPARABLE, "note": "a stored scale of a shape not known here"}
    for scales in (each, step):
        if scales is not None and not bool((scales > 0).logical_and(scales.isfinite()).all()):
            return {"verdict": Verdict.INVALID, "note": "a stored scale is not a positive number"}
    if step is not None:
        source = source.to(torch.float64) * step
    found = rounding(codes, source, each)
    if found.off:
        return _misrounded(codes, source, each, found, name)
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


def _coarser(
    actual: torch.Tensor,
    reference: torch.Tensor,
    own: torch.Tensor | None,
    theirs: torch.Tensor | None,
) -> torch.Tensor:
    """The side that was rounded: codes with a scale, or the dtype with the larger epsilon."""
    if (own is None) != (theirs is None):
        return actual if own is not None else reference
    if actual.is_floating_point() != reference.is_floating_point():
        return reference if actual.is_floating_point() else actual
    if not actual.is_floating_point():
        return actual if actual.itemsize <= reference.itemsize else reference
    own_step, other_step = (EPSILON.get(called(t.dtype), 1.0) for t in (actual, reference))
    return actual if own_step >= other_step else reference
