"""Gradients that are nothing but rounding: those of the bias of a key, which no softmax sees, or of
a LoRA's first factor while the second is zero.

What is zero but for rounding is no measure of itself: another kernel gives other noise, as large as
all of it. Such a tensor is judged beside others of its size, its anchor: it must stay as small as
it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from truestep.measure.distance import distance
from truestep.training.names import describe
from truestep.training.pulling import BACKWARD

NOISE = 0.02
"""Benign distance (rel_l2) from which a tensor says nothing by itself: rounding in float32 measured
1e-7 to 1e-5 of gradients, in bfloat16 4e-3 to 1e-2."""

_JUDGED = frozenset({BACKWARD, "gradient", "optimizer", "loss"})


def anchors_of(
    recorded: Mapping[str, torch.Tensor], others: Iterable[Mapping[str, torch.Tensor]]
) -> dict[str, float]:
    """Name to the size of the tensors beside it, of those that are noise.

    Args:
        recorded: What was recorded. others: the same under harmless changes.
    """
    sizes: dict[object, float] = defaultdict(float)
    groups = {name: _group(name) for name in recorded}
    for name, tensor in recorded.items():
        if tensor.is_floating_point() and tensor.numel():
            sizes[groups[name]] = max(sizes[groups[name]], _rms(tensor))
    noisy = {
        name
        for name, tensor in recorded.items()
        if tensor.is_floating_point() and tensor.numel() and not bool(tensor.any())
    }
    for other in others:
        for name, value in other.items():
            expected = recorded.get(name)
            if expected is None or expected.shape != value.shape or not value.numel():
                continue
            if distance(value, expected).rel_l2 > NOISE:
                noisy.add(name)
    return {
        name: sizes[groups[name]]
        for name in recorded
        if name in noisy and describe(name).stage in _JUDGED and sizes[groups[name]] > 0
    }


def anchored(
    tensors: Mapping[str, torch.Tensor], anchors: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """Tensors, those of an anchor with as many numbers of its size behind them."""
    return {
        name: _beside(tensor, anchors[name]) if name in anchors else tensor
        for name, tensor in tensors.items()
    }


def _beside(tensor: torch.Tensor, size: float) -> torch.Tensor:
    flat = tensor.reshape(-1)
    anchor = torch.full_like(flat, size)
    anchor[1::2] = -size
    return torch.cat([flat, anchor])


def _group(name: str) -> object:
    place = describe(name)
    if place.stage == BACKWARD:
        return place.stage, place.fqn, place.step
    return "/".join(name.split("/")[: 2 if place.step is not None else 1])


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
