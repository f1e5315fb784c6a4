"""Memory that lent weights are made in, and who has it (see `truestep.runtime.lent`)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch

PIECE = 1 << 24
"""Bytes of a weight that are cast at once."""


class Buffers:
    """Memory that weights are made in, one after the other.

    Hundreds of weights a forward, allocated and freed between activations, would leave the heap in
    pieces, several times as large as all that is in use.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lock = Lock()

    def take(self, size: int) -> torch.Tensor:
        """Bytes, at least so many; whoever takes them owns them until they are given back.

        Whoever keeps a few does not keep many.
        """
        most = 2 * size if size <= PIECE else math.inf
        with self._lock:
            for at, buffer in enumerate(self._free):
                if size <= buffer.numel() <= most:
                    return self._free.pop(at)
        return torch.empty(size, dtype=torch.uint8)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Let others have a buffer. The largest is kept, and small ones to cast in."""
        with self._lock:
            *others, largest = sorted((*self._free, buffer), key=torch.Tensor.numel)
            self._free = [*(each for each in others if each.numel() <= PIECE), largest]

    def clear(self) -> None:
        """Hold nothing that nobody uses."""
        self._free = []


def holders_of(tensor: torch.Tensor) -> int:
    """How many hold the memory of a tensor."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return count


def address(tensor: Any) -> int:
    """Where a tensor's elements begin; 0 where they are nowhere, as those of a sparse one."""
    try:
        start: int = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return address(torch._C._functorch.get_unwrapped(tensor)) if is_transformed(tensor) else 0
    return start


def place_of(value: Any) -> object:
    """Where a tensor lies; nothing of anything else."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return object()
    try:
        return value.untyped_storage().data_ptr() or object()
    except (RuntimeError, NotImplementedError):  # of a class that has no storage
        return object()


def is_transformed(tensor: Any) -> bool:
    """Whether a tensor is a part of another within `torch.vmap` or `torch.func`."""
    if torch.compiler.is_compiling():  # where nothing says so
        return False
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped


def out_of_transforms() -> AbstractContextManager[Any]:
    """What is made is no part of a transform of a function: it is the same for all parts."""
    if torch._C._functorch.maybe_current_level() is None:
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    cleared: AbstractContextManager[Any] = temporarily_clear_interpreter_stack()
    return cleared
