"""What a trainer does to its weights beside the optimiser's step: zeroes, scales, rounds them, puts
them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from truestep.training.optimizers import EXPLAINS

_NARROW = (torch.bfloat16, torch.float16)
_FEW = 8
"""Weights of which one factor or one rounding is no coincidence."""


def done_after(
    names: Sequence[str],
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
) -> list[str]:
    """What was done to parameters, by what they hold at the end of the step.

    Args:
        names: Of those that are not what they should be.
        actual, reference: Tensors by the names of rows.
    """
    held = [_ends(name, actual, reference) for name in names]
    ends = [end for end in held if end is not None]
    text = "after the optimiser's step the weights are "
    if len(ends) < len(held) or not ends:
        return [f"{text}changed"]
    mine, theirs, begun = (torch.cat(sides) for sides in zip(*ends, strict=True))
    if begun.numel() < _FEW or not bool(theirs.any()):
        return [f"{text}changed"]
    return [text + _how(mine, theirs, begun)]


def _ends(
    name: str, actual: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """A parameter after the step, on both sides, and before it."""
    begun = reference.get(f"weight/{name}")
    own, theirs = (tensors.get(f"after/{name}") for tensors in (actual, reference))
    if begun is None or own is None or theirs is None:
        return None
    if not own.shape == theirs.shape == begun.shape:
        return None
    start = begun.double().flatten()
    return start + own.double().flatten(), start + theirs.double().flatten(), start


def _how(mine: torch.Tensor, theirs: torch.Tensor, begun: torch.Tensor) -> str:
    error = float((mine - theirs).norm())
    size = float(theirs.norm())
    if float(mine.norm()) < 1e-6 * size:
        return "zeroed"
    if float((mine - begun).norm()) < EXPLAINS * float((theirs - begun).norm()):
        return "those before it: what it added is taken back"
    for dtype in _NARROW:
        if float((mine - theirs.to(dtype).double()).norm()) < EXPLAINS * error:
            return f"rounded to {str(dtype).removeprefix('torch.')}"
    factor = float((mine * theirs).sum() / theirs.square().sum())
    if float((mine - factor * theirs).norm()) < EXPLAINS * error:
        return f"multiplied by {factor:.4g}"
    return "changed"
