"""What the trusted model makes inside of one call: the outputs of its modules, and its attention's.

Each comes with how far rounding moves it: the same call is made on inputs moved by one unit of
their precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from truestep.engines.ranks.shares import apart
from truestep.engines.trusted import Denoiser

ATTENTION = ("queries", "keys", "values", "attention")
"""What attention is given, and what it gives: `b s h d`."""

BETWEEN_IMPLEMENTATIONS = 5e-6
"""Relative difference of modules of right engines in float32, as measured (docs/engines.md)."""

ROOM = 8.0
"""So many times what rounding does is still rounding: kernels differ by more than one unit."""


@dataclass(frozen=True)
class Part:
    """What the trusted model made in one place.

    Attributes:
        module: Name of the module; empty for the model itself.
        what: `output`, or what attention is given or gives inside of that module.
        number: Of the module's call in this call of the model.
        value: The tensor; of attention `b s h d`.
        tolerance: Relative difference that rounding may make.
    """

    module: str
    what: str
    number: int
    value: torch.Tensor
    tolerance: float

    @property
    def label(self) -> str:
        """As it stands in results."""
        own = f"`{self.module}`" if self.module else "the model's output"
        return own if self.what == "output" else f"{self.what} of {own}"


def trusted_parts(denoiser: Denoiser, tensors: Mapping[str, torch.Tensor]) -> list[Part]:
    """Everything that a trusted denoiser makes of tensors, in the order in which it is made."""
    made = _traced(denoiser, tensors)
    moved = _traced(denoiser, {name: _moved(value) for name, value in tensors.items()})
    found = []
    for (place, value), (_, other) in zip(made, moved, strict=True):
        unit = max(BETWEEN_IMPLEMENTATIONS, _unit(value.dtype) / 2)
        tolerance = ROOM * max(unit, min(apart(other, value), 1.0))
        found.append(Part(*place, value, min(tolerance, 0.25)))
    return found


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _moved(value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point() or value.numel() < 2:
        return value
    signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (value * (1 + signs * _unit(value.dtype))).to(value.dtype)


_Place = tuple[str, str, int]


def _traced(
    denoiser: Denoiser, tensors: Mapping[str, torch.Tensor]
) -> list[tuple[_Place, torch.Tensor]]:
    found: list[tuple[_Place, torch.Tensor]] = []
    counts: dict[str, int] = {}
    inside: list[str] = []

    def keep(place: _Place, value: Any) -> None:
        tensor = first_tensor(value)
        if tensor is not None and tensor.is_floating_point():
            found.append((place, tensor.detach().clone()))

    with _hooks(denoiser.model, inside, counts, keep), _Attention(inside, counts, keep):
        denoiser(**tensors)
    return found


Keep = Callable[[_Place, Any], None]


@contextmanager
def _hooks(
    model: torch.nn.Module, inside: list[str], counts: dict[str, int], keep: Keep
) -> Iterator[None]:
    handles = []

    def before(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def after(name: str) -> Callable[..., None]:
        def over(_module: Any, _given: Any, output: Any) -> None:
            inside.pop()
            number = counts.get(name, 0)
            counts[name] = number + 1
            keep((name, "output", number), output)

        return over

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name)))
        handles.append(module.register_forward_hook(after(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Attention(TorchFunctionMode):
    """Keeps what attention is given and gives."""

    def __init__(self, inside: Sequence[str], counts: Mapping[str, int], keep: Keep) -> None:
        super().__init__()
        self._inside, self._counts, self._keep = inside, counts, keep

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.scaled_dot_product_attention:
            values = [*args, *(kwargs or {}).values()][:3]
            name = self._inside[-1] if self._inside else ""
            number = self._counts.get(name, 0)
            for what, value in zip(ATTENTION, (*values, output), strict=False):
                self._keep((name, what, number), value.transpose(1, 2))
        return output


def first_tensor(value: Any) -> torch.Tensor | None:
    """The first tensor in an output."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((one for one in map(first_tensor, value) if one is not None), None)
    return None
