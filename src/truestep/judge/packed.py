"""Judge weights in blocks (GGUF): every code the nearest under its own steps. Pure: no I/O."""

from __future__ import annotations

from typing import Any

import torch

from truestep.judge.rows import shape_note, tensor_info
from truestep.measure.blocks import Packed, nearest
from truestep.measure.distance import distance, same_bits
from truestep.measure.plain import NO_PAGES, Pages
from truestep.measure.rounding import nonfinite
from truestep.verdict import TensorInfo, Verdict

Weights = Packed | torch.Tensor


def info_of(weights: Weights) -> TensorInfo | None:
    """What a row says of one side."""
    if isinstance(weights, Packed):
        return TensorInfo(dtype=weights.format.name, shape=tuple(weights.shape))
    return tensor_info(weights)


def judged_blocks(own: Weights, theirs: Weights, pages: Pages = NO_PAGES) -> dict[str, Any]:
    """Verdict, note and distance of one parameter, which one side at least holds in blocks.

    Two of one format agree byte by byte. Of two formats, and of blocks and numbers, the coarser is
    right where each code is the nearest to the other's numbers under the steps of its block.

    Args:
        own, theirs: The actual and the reference side.
        pages: Given back while they are read, where they lie in files.
    """
    shapes = tuple(own.shape), tuple(theirs.shape)
    if [n for n in shapes[0] if n != 1] != [n for n in shapes[1] if n != 1]:
        note = shape_note(*(torch.empty(shape, device="meta") for shape in shapes))
        return {"verdict": Verdict.INCOMPARABLE, "note": note}
    coarse = [side.format.coarse if isinstance(side, Packed) else 0.0 for side in (own, theirs)]
    codes, source = (own, theirs) if coarse[0] >= coarse[1] else (theirs, own)
    assert isinstance(codes, Packed)
    if isinstance(source, Packed) and source.format is codes.format:
        return _of_one_format(own, theirs, pages)
    numbers = source.rows(slice(None)) if isinstance(source, Packed) else source
    if sum(nonfinite(numbers)):
        side = "reference" if source is theirs else "actual"
        return {"verdict": Verdict.INVALID, "note": f"NaN or infinity in {side}"}
    found = nearest(codes, numbers, pages.read)
    name = codes.format.name
    if found.broken:
        note = f"{found.broken:,} blocks of {name} have a scale that is not finite"
        return {"verdict": Verdict.INVALID, "note": note}
    if found.off:
        count = f"{found.off:,} of {numbers.numel():,} codes are not the nearest {name}"
        if isinstance(source, Packed):
            note = f"{count} of the other's {source.format.name}: compare either with its source"
            return {"verdict": Verdict.INCONCLUSIVE, "note": note}
        return {"verdict": Verdict.DRIFTED, "note": f"{count}; rel_l2 {found.rel_l2:.2g}"}
    if not found.rel_l2 <= codes.format.coarse:
        note = f"rounded to {name}, but so coarsely that rel_l2 is {found.rel_l2:.2g}"
        return {"verdict": Verdict.INCONCLUSIVE, "note": note}
    return {
        "verdict": Verdict.EQUIVALENT,
        "ratio": 0.0,
        "ratio_metric": "rel_l2",
        "note": f"rounded to {name}",
    }


def _of_one_format(own: Weights, theirs: Weights, pages: Pages) -> dict[str, Any]:
    assert isinstance(own, Packed)
    assert isinstance(theirs, Packed)
    if same_bits(own.data.reshape(-1), theirs.data.reshape(-1), pages=pages):
        return {"verdict": Verdict.IDENTICAL, "ratio": 0.0, "ratio_metric": "rel_l2"}
    metrics = distance(own.rows(slice(None)), theirs.rows(slice(None)).reshape(own.shape))
    if metrics.nonfinite_actual or metrics.nonfinite_reference:
        return {"verdict": Verdict.INVALID, "note": "NaN or infinity in its blocks"}
    note = f"not the same {own.format.name}: {metrics.max_abs:.3g} at most"
    return {"verdict": Verdict.DRIFTED, "metrics": metrics, "note": note}
