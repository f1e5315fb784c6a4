"""A place between calls of which only a part differs: the same hypotheses about that part alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from truestep.replay.causes.guesses import LEAST
from truestep.replay.causes.material import Handed

Box = list[tuple[int, int]]
"""Of each axis, where what differs begins, and where it ends."""


def part_of(scene: Handed) -> Iterator[Handed]:
    """The smallest part of a tensor that holds all that differs, where that is not the whole: some
    tokens, a frame, one sample of a batch.

    It is the same at every step, so that the rest is known to agree.
    """
    if not scene.same_sizes:
        return
    first = scene.failing[0].reference
    if any(one.reference.shape != first.shape for one in scene.failing):
        return
    differs = torch.stack([_apart(one.actual, one.reference) for one in scene.failing]).any(0)
    box: Box = []
    for axis in range(first.dim()):
        others = tuple(other for other in range(first.dim()) if other != axis)
        found = (differs.amax(others) if others else differs).nonzero()
        if not len(found):
            return
        box.append((int(found[0]), int(found[-1]) + 1))
    whole = [(0, size) for size in first.shape]
    if box == whole:
        return
    where = [
        f"{low} to {high - 1} of axis {axis}" if high - low > 1 else f"{low} of axis {axis}"
        for axis, ((low, high), full) in enumerate(zip(box, whole, strict=True))
        if (low, high) != full
    ]
    failing = [
        replace(one, actual=_cut(one.actual, box), reference=_cut(one.reference, box))
        for one in scene.failing
    ]
    label = f"{scene.argument}, places {', '.join(where)},"
    yield replace(scene, failing=failing, label=label)


def _apart(actual: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    size = float(reference.abs().max().clamp_min(actual.abs().max()))
    return (actual - reference).abs() > LEAST * size


def _cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for axis, (low, high) in enumerate(box):
        tensor = tensor.narrow(axis, low, high - low)
    return tensor
