"""Whether what a module pulls back is the derivative of what it computes: by differences.

No reference takes part: a module is moved a little along one direction, and the change of its
output along the recorded gradient is what its own gradient must say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from truestep.errors import FOREIGN
from truestep.training.pulling import Pulled, Recorded, pull
from truestep.training.running import Whole
from truestep.training.step import parameters

STEPS = (1e-2, 3e-3)
"""Lengths of the difference, beside the size of what is moved. Two of them: where they do not agree
nothing is said."""

SAME = 0.02
"""Two slopes that agree to this share of the larger are one. A function that is not smooth, or that
rounds, differs from its tangent by less at such steps, or at the two of them in itself."""


@dataclass(frozen=True)
class Slope:
    """A derivative along one direction, both ways."""

    pulled: float
    numeric: float

    @property
    def agrees(self) -> bool:
        """Whether the two are one."""
        return _same(self.pulled, self.numeric)


def slope(
    whole: Whole, key: tuple[str, int], recorded: Recorded, *, only: str = ""
) -> Slope | None:
    """The derivative of a module along a drawn direction of its inputs and parameters.

    Args:
        whole: Whose module. key: of the call. recorded: what it is given.
        only: Slot that is moved alone, if so: `in.x` or `w.NAME`.

    Returns:
        None where it cannot be told: the module raises, or differences of two lengths disagree.
    """
    call, module = whole.calls.get(key), whole.modules.get(key[0])
    if call is None or module is None or not recorded.pulled:
        return None
    try:
        found, own = _directions(whole, key, recorded, only=only)
        pulled = sum(
            float((own[slot].double().cpu() * d.double().cpu()).sum()) for slot, d in found.items()
        )
        directions = {slot: d for slot, d in found.items() if slot in recorded.given}
        moved = {slot: d for slot, d in found.items() if slot not in directions}
        numeric = [_difference(whole, key, recorded, directions, moved, length) for length in STEPS]
    except FOREIGN:
        return None
    if not found or not _same(*numeric):
        return None
    return Slope(pulled, numeric[1])


def of_other_function(
    whole: Whole,
    key: tuple[str, int],
    recorded: Recorded,
    *,
    slot: str,
    reference: torch.Tensor,
) -> bool:
    """Whether a gradient that is not the recorded one is that of the module's own forward.

    Then its backward is right, and its forward is another function, which agrees where it was
    looked at: a LoRA's scale moves nothing while its second factor is zero.

    Args:
        slot: Of the gradient: `in.x` or `w.NAME`. reference: the recorded one.
    """
    found = slope(whole, key, recorded, only=slot)
    if found is None or not found.agrees:
        return False
    moved, _ = _directions(whole, key, recorded, only=slot)
    direction = moved.get(slot)
    if direction is None or direction.shape != reference.shape:
        return False
    expected = float((reference.double().cpu() * direction.double().cpu()).sum())
    return not _same(expected, found.numeric)


def _directions(
    whole: Whole, key: tuple[str, int], recorded: Recorded, *, only: str = ""
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Slot to its drawn direction and to its gradient."""
    module = whole.modules[key[0]]
    generator = torch.Generator("cpu").manual_seed(0)
    own = pull(module, whole.calls[key], recorded).backward
    tensors = {path: recorded.given[path] for path in sorted(recorded.wants)}
    tensors |= {f"w.{name}": p.detach() for name, p in parameters(module)}
    found = {
        slot: _direction(tensor, generator)
        for slot, tensor in tensors.items()
        if slot in own and only in ("", slot) and tensor.is_floating_point()
    }
    return found, own


def _same(first: float, second: float) -> bool:
    return abs(first - second) <= SAME * max(abs(first), abs(second), 1e-30)


def _direction(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    size = float(tensor.detach().double().square().mean().sqrt()) or 1.0
    return (drawn * size).to(tensor.device, tensor.dtype)


def _difference(
    whole: Whole,
    key: tuple[str, int],
    recorded: Recorded,
    directions: dict[str, torch.Tensor],
    moved: dict[str, torch.Tensor],
    length: float,
) -> float:
    """Central difference of the outputs, along the gradients that were recorded of them."""
    sides = []
    for sign in (length, -length):
        given = {
            path: tensor + sign * directions[path] if path in directions else tensor
            for path, tensor in recorded.given.items()
        }
        sides.append(_value(whole, key, replace(recorded, given=given), moved, sign))
    return (sides[0] - sides[1]) / (2 * length)


def _value(
    whole: Whole,
    key: tuple[str, int],
    recorded: Recorded,
    moved: dict[str, torch.Tensor],
    sign: float,
) -> float:
    module = whole.modules[key[0]]
    held = dict(parameters(module))
    kept = {slot: held[slot.removeprefix("w.")].detach().clone() for slot in moved}
    try:
        with torch.no_grad():
            for slot, direction in moved.items():
                held[slot.removeprefix("w.")].data.add_(direction, alpha=sign)
        made: Pulled = pull(module, whole.calls[key], replace(recorded, wants=frozenset()))
    finally:
        for slot, value in kept.items():
            held[slot.removeprefix("w.")].data.copy_(value)
    return sum(
        float((made.forward[path].double() * gradient.double()).sum())
        for path, gradient in recorded.pulled.items()
        if path in made.forward
    )
