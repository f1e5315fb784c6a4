"""Hypotheses read off what a module gives: the reference's, in another size, order or sign."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from truestep.replay.causes.scene import Hypothesis, Scene, hooked, mapped
from truestep.replay.isolation import laid_out

Tensor = torch.Tensor


def hypotheses(scene: Scene) -> Iterator[Hypothesis]:
    """What would make the reference's outputs the candidate's; solved for where it has a value."""
    what = f"what `{scene.fqn}` gives"
    actual, expected = _first(scene)
    if actual is None or expected is None:
        return
    size = (expected * expected).sum()
    if not size or not actual.isfinite().all():
        return
    if not actual.any():
        yield Hypothesis("zero", f"{what} is zero", _after(torch.zeros_like))
        return
    factor = ((actual * expected).sum() / size).item()
    yield Hypothesis(
        "scaled",
        f"{what} is {factor:.6g} times the reference's",
        _after(lambda tensor: tensor * factor),
    )
    for axis in range(expected.ndim):
        length = expected.shape[axis]
        yield Hypothesis(
            "order", f"{what} runs backwards along axis {axis}", _after(_flipped(axis))
        )
        if length % 2 == 0:
            yield Hypothesis(
                "order",
                f"{what} has its halves along axis {axis} exchanged",
                _after(_rolled(length // 2, axis)),
            )
        index = _elsewhere(actual, expected, axis)
        if index is not None:
            shown = " ".join(str(i) for i in index[:8]) + (" ..." if len(index) > 8 else "")
            text = f"{what} has along axis {axis} the reference's places {shown}"
            yield Hypothesis("order", text, _after(_taken(index, axis)))
        for by in (1, -1) if length > 2 else ():
            yield Hypothesis(
                "order", f"{what} is one place further along axis {axis}", _after(_rolled(by, axis))
            )


def _elsewhere(actual: Tensor, expected: Tensor, axis: int) -> list[int] | None:
    """Where along an axis the reference has what the candidate gives, place by place; None where
    it does not have it, or has it where it belongs."""
    rows = [side.movedim(axis, 0).flatten(1) for side in (actual, expected)]
    count, width = rows[0].shape
    if not 1 < count <= _PLACES or width < 2:
        return None
    apart, nearest = torch.cdist(rows[0], rows[1]).min(1)
    if apart.max() > _SAME * rows[1].norm(dim=1).max():
        return None
    found = nearest.tolist()
    return None if torch.equal(rows[1][nearest], rows[1]) else found


_PLACES, _SAME = 4096, 1e-6
"""Places along an axis that are looked through, and how near a place's values are the same."""


def _taken(index: Sequence[int], axis: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        fits = tensor.ndim > axis and tensor.shape[axis] == len(index)
        return tensor.index_select(axis, torch.tensor(index)) if fits else tensor

    return change


def _first(scene: Scene) -> tuple[Tensor | None, Tensor | None]:
    for slot, expected in scene.expected.items():
        actual = scene.actual.get(slot)
        laid = None if actual is None else laid_out(actual, expected)
        if laid is not None and expected.is_floating_point():
            return laid.double(), expected.double()
    return None, None


def _flipped(axis: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.flip(axis) if tensor.ndim > axis else tensor


def _rolled(by: int, axis: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.roll(by, axis) if tensor.ndim > axis else tensor


def _after(change: Callable[[Tensor], Tensor]) -> Callable[[torch.nn.Module], Any]:
    def after(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return mapped(lambda tensor: change(tensor).to(tensor.dtype), output)

    return lambda module: hooked(module, after=after)
