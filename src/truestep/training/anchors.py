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
    tensors: Mapping[str, torch.Tensor],
    recorded: Mapping[str, torch.Tensor],
    anchors: Mapping[str, float],
) -> dict[str, torch.Tensor]:
    """Tensors as they are judged: those of an anchor with as many numbers of its size behind them.

    Behind every other gradient and step of an optimiser stand two numbers of its own size. Adam's
    first step holds one value everywhere where the gradient has one sign, and then it does not, by
    one rounding: neither is a fault.

    Args:
        tensors: By name. recorded: what each is judged by.
        anchors: Name to size; see `anchors_of`.
    """
    return {
        name: _with_anchor(name, tensor, recorded.get(name), anchors)
        for name, tensor in tensors.items()
    }


def _with_anchor(
    name: str, tensor: torch.Tensor, expected: torch.Tensor | None, anchors: Mapping[str, float]
) -> torch.Tensor:
    judged = describe(name).stage in _JUDGED and tensor.is_floating_point() and tensor.numel() > 1
    if not judged or expected is None or expected.shape != tensor.shape:
        return tensor
    if name in anchors:
        return _beside(tensor, anchors[name], tensor.numel())
    size = _rms(expected)
    return _beside(tensor, size, 2) if size > 0 else tensor


def _beside(tensor: torch.Tensor, size: float, count: int) -> torch.Tensor:
    anchor = tensor.new_full((count,), size)
    anchor[1::2] = -size
    return torch.cat([tensor.reshape(-1), anchor])


def _group(name: str) -> object:
    place = describe(name)
    if place.stage == BACKWARD:
        return place.stage, place.fqn, place.step
    return "/".join(name.split("/")[: 2 if place.step is not None else 1])


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
