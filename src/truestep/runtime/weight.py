"""A weight that is made when it is used, and which of them stay in memory: those of one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock

import torch

from truestep.runtime.buffers import PIECE, Buffers


@dataclass
class Lent:
    """A weight that is made when it is used.

    Attributes:
        like: What it seems to be: shape, strides and dtype, without memory (on `meta`).
        device: Where it seems to be.
        write: Writes its elements from one to before another, in the order of memory, into a flat
            tensor of so many.
        source: What it is a cast of, where that is in memory.
        content: What says which weight it is without making it; None if nothing does.
        beside: Bytes from a multiple of 64 at which it lies, as in a mapped file: which kernel runs
            depends on it.
        kept: The weight itself, once something wrote into it or kept a view of it.
        model, stays: Which model it is of, and what lets that stay in memory while it runs.
        resident: The weight itself, while it does.
    """

    like: torch.Tensor
    device: torch.device
    write: Callable[[torch.Tensor, int, int], None]
    source: torch.Tensor | None = None
    content: object = None
    beside: int = 0
    kept: torch.Tensor | None = None
    model: object = None
    stays: Resident | None = None
    resident: torch.Tensor | None = None

    def come(self) -> torch.Tensor | None:
        """The weight where it is in memory now, and where it is to stay there from now on."""
        if self.kept is None and self.stays is not None:
            self.stays.let_in(self)
        return self.resident if self.kept is None else self.kept

    def tensor(self, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """The weight in memory: in a buffer or, without one, in memory of its own."""
        if self.kept is not None:
            return self.kept
        with torch.inference_mode(False), torch.enable_grad():  # others may write into its views
            if self.resident is not None:
                return self.resident.detach()  # of a form of its own
            if buffer is None and self.source is not None:
                return self.source.to(self.like.dtype)
            if buffer is None:
                buffer = torch.empty(self.room, dtype=torch.uint8, device=self.device)
            flat = buffer[self.beside : self.room].view(self.like.dtype)
            with torch.no_grad():
                self.write(flat, 0, self.like.numel())
            return flat.as_strided(self.like.shape, self.like.stride(), flat.storage_offset())

    @property
    def size(self) -> int:
        """Bytes of the weight."""
        return self.like.numel() * self.like.itemsize

    @property
    def room(self) -> int:
        """Bytes of memory that it is made in."""
        return self.beside + self.size


@dataclass
class Resident:
    """The model that is in memory.

    Attributes:
        model: Which one it is.
        weights: Those of its weights that were used.
    """

    model: object = None
    weights: list[Lent] = field(default_factory=list)
    _one_at_a_time: RLock = field(default_factory=RLock)

    def let_in(self, weight: Lent) -> None:
        """Before a weight is used: what is of another model goes, and this one stays."""
        with self._one_at_a_time:
            if weight.model != self.model:
                self.leave()
                self.model = weight.model
            if weight.resident is None and weight.kept is None:
                weight.resident = weight.tensor()
                self.weights.append(weight)

    def leave(self) -> None:
        """Drop the weights of the model that is in memory; those that code has changed stay."""
        for weight in self.weights:
            weight.resident = None
        self.weights.clear()


def cast(
    weight: Lent | torch.Tensor, dtype: torch.dtype, device: torch.device, buffers: Buffers
) -> Lent:
    """A weight, lent or in memory, in another dtype or on another device.

    Args:
        buffers: What pieces of a lent one are cast in.
    """
    if isinstance(weight, torch.Tensor):
        data = weight
        like = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="meta")
        flat = data.as_strided((data.numel(),), (1,), data.storage_offset())

        def copy(into: torch.Tensor, start: int, stop: int) -> None:
            into.copy_(flat[start:stop])

        return Lent(like.to(dtype), device, copy, source=data)
    inner = weight

    def write(into: torch.Tensor, start: int, stop: int) -> None:
        kept = inner.come()
        if kept is not None:
            into.copy_(kept.as_strided((kept.numel(),), (1,), kept.storage_offset())[start:stop])
        elif into.dtype == inner.like.dtype and into.device == inner.device:
            inner.write(into, start, stop)
        else:
            count = PIECE // inner.like.itemsize
            buffer = buffers.take(PIECE)
            piece = buffer[:PIECE].view(inner.like.dtype)
            for at in range(start, stop, count):
                end = min(at + count, stop)
                inner.write(piece[: end - at], at, end)
                into[at - start : end - start].copy_(piece[: end - at])
            buffers.give_back(buffer)

    content = None if inner.content is None else (inner.content, dtype)
    return Lent(inner.like.to(dtype), device, write, content=content)
