"""Tensors as they enter a comparison: their own bytes, whatever class they are of."""

from __future__ import annotations

from collections.abc import Callable

import torch

from truestep.errors import UsageError


def plain(tensor: torch.Tensor, name: str = "a value") -> torch.Tensor:
    """A tensor without its graph and without what a subclass makes of its operations.

    It shares the memory of the one given. A subclass may overload what compares and copies
    (`__torch_function__`, `__eq__`), so that it agrees with anything.

    Raises:
        UsageError: Its elements are not its own memory: sharded, quantised by a library, fake.
    """
    kind = type(tensor)
    if kind is torch.Tensor:
        return tensor.detach()
    if is_wrapped(tensor):
        raise UsageError(
            f"{name} is a {kind.__name__}, whose elements only its own class can read",
            hint="give a plain tensor: tensor.full_tensor(), or tensor.dequantize()",
        )
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements are what its own class makes of others, as quantised ones are."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def inside(tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """The plain tensors that a wrapped one is made of, by name; None where its class does not say.

    Source:
        `__tensor_flatten__`, by which torch.compile takes such classes apart.
    """
    if not is_wrapped(tensor):
        return {"": tensor}
    if not hasattr(tensor, "__tensor_flatten__"):
        return None
    found: dict[str, torch.Tensor] = {}
    for name in tensor.__tensor_flatten__()[0]:
        inner = inside(getattr(tensor, name))
        if inner is None:
            return None
        found |= {f"{name}.{key}".rstrip("."): part for key, part in inner.items()}
    return found


class Pages:
    """Gives pages of a mapped file back while tensors in it are read in chunks.

    Whoever reads them again gets them from the file: only what is resident changes.
    """

    HELD = 1 << 25
    """Bytes that are read before they are given back."""

    def __init__(self, release: Callable[[], None] | None = None) -> None:
        """Args:
        release: Gives back all pages of what is read; None where nothing is mapped.
        """
        self._release, self._read = release, 0

    def read(self, *chunks: torch.Tensor) -> None:
        """Say what has been read."""
        if self._release is None:
            return
        self._read += sum(chunk.numel() * chunk.itemsize for chunk in chunks)
        if self._read > self.HELD:
            self._release()
            self._read = 0


NO_PAGES = Pages()
"""For tensors in memory."""
