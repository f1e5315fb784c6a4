"""Quantised checkpoints: codes with the scale that is stored beside them, as numbers."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch

from truestep.measure.blocks import Packed
from truestep.measure.plain import plain
from truestep.measure.rounding import of_rows, spread

BESIDE = re.compile(r"(?:^|[._])(?:input_scale|scale_input|scaled_fp8)$")
"""What formats with a scale keep beside it, which says nothing of the weights."""

_BNB = 127.0
"""bitsandbytes keeps the largest magnitude of a row, not its scale."""

_HELD = 1 << 26
"""Bytes of a file's tensors whose pages are left in memory."""


def scale_name(name: str, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the stored scale of a tensor, if one of the known names is there.

    Args:
        name: A tensor whose elements are one byte each; others have no scale.
    """
    stem, dot, leaf = name.rpartition(".")
    known = (
        f"{name}_scale",
        f"{name}_scale_inv",
        f"{name}.scale",
        f"{stem}{dot}scale_{leaf}",
        f"{stem}{dot}scale",
        f"{stem}{dot}SCB",
    )
    found = next((stored for stored in known if stored in tensors), None)
    if found is None or packed_of(tensors, name) or tensors[name].itemsize != 1:
        return None
    if found == known[-1] and tensors[name].dtype is not torch.int8:
        return None
    return found


def scale_of(name: str, stored: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What a code of 1 stands for, float64, as `spread` gives it; None where it gives none."""
    value = tensors[stored].detach().to("cpu", torch.float64)
    return spread(value / _BNB if stored.endswith("SCB") else value, tensors[name].shape)


def packed_of(tensors: Mapping[str, torch.Tensor], name: str) -> Packed | None:
    """A tensor in blocks (GGUF), where a side holds it so."""
    packed = getattr(tensors, "packed", None)
    return packed(name) if packed is not None and name in tensors else None


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Size:
    """Shape of a tensor, which is not read for it."""
    found = packed_of(tensors, name)
    if found is not None:
        return torch.Size(found.shape)
    return tensors.stored(name).shape if isinstance(tensors, Numbers) else tensors[name].shape


class Named(Mapping[str, torch.Tensor]):
    """Tensors under the names in `_names`, each read from `tensors` when it is asked for."""

    tensors: Mapping[str, torch.Tensor]
    _names: Mapping[str, object]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def packed(self, name: str) -> Packed | None:
        """A tensor in blocks; None of any other."""
        return packed_of(self.tensors, name) if name in self._names else None

    def release(self, name: str) -> None:
        """Give the pages of a tensor back, where it has any; whoever holds it reads them again."""
        release = getattr(self.tensors, "release", None)
        if release is not None:
            release(name)


class Numbers(Named):
    """Tensors of a checkpoint as the numbers that they stand for; stored scales have no name.

    Tensors of a file are read when they are asked for, and their pages given back soon after.

    Attributes:
        tensors: What the checkpoint holds.
        scales: Name of a tensor of codes to that of its scale.
        coded: Names of what is in codes, with a scale beside them or in blocks.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.scales = {
            name: stored for name in tensors if (stored := scale_name(name, tensors)) is not None
        }
        beside = set(self.scales.values())
        self.coded = {*self.scales, *(name for name in tensors if packed_of(tensors, name))}
        self._names = dict.fromkeys(
            name for name in tensors if name not in beside and not BESIDE.search(name)
        )
        self._held: OrderedDict[str, int] = OrderedDict()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name, slice(None))

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some slices of a tensor along its first axis."""
        found = self.packed(name)
        if found is not None:
            return found.rows(rows)
        tensor = self.stored(name)
        stored = self.scales.get(name)
        if stored is None:
            return tensor[rows] if tensor.ndim else tensor
        scale = scale_of(name, stored, self.tensors)
        part = tensor[rows] if tensor.ndim else tensor
        wide = part.to(torch.float32)
        if scale is None:
            return wide
        each = of_rows(scale, tensor.shape, rows)
        return wide * each.to(torch.float32)

    def stored(self, name: str) -> torch.Tensor:
        """A tensor as the checkpoint holds it: codes without their scale, or bytes of blocks."""
        if name not in self._names:
            raise KeyError(name)
        found = self.packed(name)
        tensor = plain(self.tensors[name], name) if found is None else found.data
        self._hold(name, tensor.numel() * tensor.itemsize)
        return tensor

    def release(self, name: str) -> None:
        super().release(name)
        self._held.pop(name, None)

    def _hold(self, name: str, size: int) -> None:
        self._held.pop(name, None)
        while self._held and sum(self._held.values()) + size > _HELD:
            self.release(next(iter(self._held)))
        self._held[name] = size
