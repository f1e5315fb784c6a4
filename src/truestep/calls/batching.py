"""A model's call with a neighbour in its batch: what a server, or batched guidance, makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from truestep.calls.rebuilding import Swaps, laid_over
from truestep.calls.values import encode


class NoBatchError(ValueError):
    """A call that cannot be made with a neighbour."""


def with_neighbour(
    proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Make a call with every sample twice, the second time moved along its last axis.

    Samples lie along the first axis, as many as the first argument of measured numbers with two
    axes or more has there, or of ids where there is none. Arguments of another length, such as
    positions, belong to all of them.

    Args:
        proceed: Makes the call.
        args, kwargs: What it is given.

    Returns:
        What it gives, without the neighbours.

    Raises:
        NoBatchError: It takes no batch, or gives something else than one row a sample.
    """
    given = [*_tensors(args), *_tensors(dict(kwargs))]
    direct = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    wide = [tensor for tensor in direct if tensor.ndim > 1]
    first = next((t for t in wide if is_measured(t)), next(iter(wide), None))
    if first is None:
        raise NoBatchError("no sample is among its arguments")
    size = first.shape[0]
    both = {
        id(t): torch.cat([t, t.roll(1, dims=-1) if t is first or is_measured(t) else t])
        for t in given
        if t.ndim and t.shape[0] == size
    }
    swaps = Swaps(both, {})
    more = {name: laid_over(value, swaps, (name,)) for name, value in kwargs.items()}
    try:
        output = proceed(*laid_over(args, swaps, ()), **more)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise NoBatchError(f"{type(error).__name__}: {error}"[:100]) from error
    found = _tensors(output)
    if not found or any(not t.ndim or t.shape[0] != 2 * size for t in found):
        raise NoBatchError("it does not give a row for each sample")
    return laid_over(output, Swaps({id(t): t[:size].contiguous() for t in found}, {}), ())


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def collect(path: tuple[str, ...], tensor: torch.Tensor) -> str:
        found.append(tensor)
        return ""

    encode(value, collect)
    return found


def is_measured(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers that a rounding may have moved.

    Whole numbers are ids, positions and masks; one number is a setting, also where it stands for
    every sample of a batch: a timestep moved by one unit turns its embedding by far more.
    """
    if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.itemsize < 2:
        return False
    finite = bool(torch.isfinite(tensor).all())
    if not finite or bool((tensor == tensor.round()).all()):
        return False
    return tensor.ndim > 1 or bool((tensor != tensor[0]).any())
