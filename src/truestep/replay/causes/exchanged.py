"""What a call is given as other recorded tensors than the reference's, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from truestep.replay.causes.guesses import Guess, apart
from truestep.replay.causes.material import Handed, Piece
from truestep.replay.causes.relations import LEAST_VALUES

Tensor = torch.Tensor

ZEROS = "zeros"

MOST_PARTS = 16
"""Nothing is handed on that is put together of more recorded tensors."""


@dataclass(frozen=True)
class Part:
    """A part of a tensor that is a recorded one.

    Attributes:
        value: As it was recorded, in the part's shape.
        piece: Which one; None of zeros.
    """

    value: Tensor
    piece: Piece | None

    @property
    def said(self) -> str:
        """It, for people."""
        return ZEROS if self.piece is None else self.piece.said


def exchanged(scene: Handed) -> Iterator[Guess]:
    """Made of other recorded tensors, or of the same in another order; no number is left open."""
    texts, made, kinds = [], [], []
    for at, one in enumerate(scene.failing):
        if one.actual.dim() < 2 or len(one.actual.unique()) < LEAST_VALUES:
            return
        shelf = Shelf(scene, at, one.limit)
        mine = shelf.parts(one.actual)
        if mine is None:
            return
        whole, parts = mine
        theirs = shelf.parts(one.reference)
        kind, text = _said(parts, theirs[1] if theirs is not None else ())
        if not kind:
            return
        texts.append(text)
        kinds.append(kind)
        made.append(whole)
    yield Guess(kinds[0], f"{scene.argument} is made of {texts[0]}", made)


def _said(mine: Sequence[Part], theirs: Sequence[Part]) -> tuple[str, str]:
    """Kind and text of what differs; nothing where the same tensors are in the same places."""
    ours, others = [part.said for part in mine], [part.said for part in theirs]
    if ours == others:
        return "", ""
    if sorted(ours) == sorted(others):
        return "order", f"the same parts in another order: {_few(ours)}; first is {others[0]}"
    if len(ours) == len(others):
        pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.said != b.said]
        layers = all(_is_layer(a, b) for a, b in pairs)
        listed = [f"{a.said}, the reference's of {b.said}" for a, b in pairs]
        return "text layer" if layers else "another tensor", _few(listed)
    if not others:
        return "another tensor", f"{_few(ours)}; the reference's is of no recorded tensor"
    left = [name for name in others if name not in ours]
    kind = "part missing" if len(ours) < len(others) else "another tensor"
    lacks = f", without {_few(left)}" if left else ""
    return kind, f"{_few(ours)}{lacks}"


def _is_layer(mine: Part, theirs: Part) -> bool:
    """Whether both are of one encoder, of other layers."""
    pieces = (mine.piece, theirs.piece)
    of = {piece.key.component for piece in pieces if piece is not None}
    return len(of) == 1 and all("hidden_state" in part.said for part in (mine, theirs))


def _few(names: Sequence[str]) -> str:
    once = list(dict.fromkeys(names))
    more = f" and {len(once) - 2} more" if len(once) > 2 else ""
    return "; ".join(once[:2]) + more


class Shelf:
    """Recorded tensors before a place, by their shapes without leading ones."""

    def __init__(self, scene: Handed, at: int, limit: float) -> None:
        self._limit, self._material = limit, scene.material
        self._by_shape: dict[tuple[int, ...], list[Piece]] = {}
        self._read: dict[str, Tensor | None] = {}
        for piece in scene.pieces(at):
            shape = scene.material.shape(piece)
            if len(shape) > 1:
                self._by_shape.setdefault(_plain(shape), []).append(piece)

    def parts(self, tensor: Tensor) -> tuple[Tensor, list[Part]] | None:
        """A tensor as recorded ones side by side; None where some of it is in none."""
        found = self._whole(tensor)
        if found is not None:
            return found.value, [found]
        if tensor.dim() > 1 and 1 < tensor.shape[0] <= MOST_PARTS:
            rows = self._joined([self.parts(row) for row in tensor.split(1)], 0)
            if rows is not None:
                return rows
        for axis in dict.fromkeys((tensor.dim() - 1, tensor.dim() - 2, 1)):
            if 0 < axis < tensor.dim():
                found_parts = self._along(tensor, axis)
                if found_parts is not None:
                    return self._joined([(part.value, [part]) for part in found_parts], axis)
        return None

    def _joined(
        self, parts: Sequence[tuple[Tensor, list[Part]] | None], axis: int
    ) -> tuple[Tensor, list[Part]] | None:
        there = [part for part in parts if part is not None]
        if len(there) < len(parts) or not there:
            return None
        return torch.cat([value for value, _ in there], axis), [p for _, ps in there for p in ps]

    def _whole(self, tensor: Tensor) -> Part | None:
        """The recorded tensor that it is."""
        for piece in self._by_shape.get(_plain(tensor.shape), ()):
            value = self._tensor(piece)
            if value is None or value.numel() != tensor.numel():
                continue
            value = value.reshape(tensor.shape)
            if _near(value, tensor, self._limit):
                return Part(value, piece)
        return Part(torch.zeros_like(tensor), None) if not bool(tensor.any()) else None

    def _along(self, tensor: Tensor, axis: int) -> list[Part] | None:
        """Parts one after the other along an axis, the widest first."""
        parts: list[Part] = []
        at, size = 0, tensor.shape[axis]
        widths = self._widths(tensor, axis)
        while at < size and len(parts) < MOST_PARTS:
            for width in widths:
                if at + width > size:
                    continue
                part = self._whole(tensor.narrow(axis, at, width))
                if part is not None and part.piece is not None:
                    break
            else:
                rest = tensor.narrow(axis, at, size - at)
                if not parts or bool(rest.any()):
                    return None
                return [*parts, Part(torch.zeros_like(rest), None)]
            parts.append(part)
            at += width
        return parts if at == size else None

    def _widths(self, tensor: Tensor, axis: int) -> list[int]:
        """Sizes that recorded tensors of the other axes' sizes have along one, the largest
        first."""
        shape = _plain(tensor.shape)
        place = axis - (tensor.dim() - len(shape))
        if place < 0:
            return []
        widths = {
            other[place]
            for other in self._by_shape
            if len(other) == len(shape)
            and other[:place] + other[place + 1 :] == shape[:place] + shape[place + 1 :]
        }
        return sorted(widths, reverse=True)

    def _tensor(self, piece: Piece) -> Tensor | None:
        if piece.stored not in self._read:
            self._read[piece.stored] = self._material.read(piece)
        return self._read[piece.stored]


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without leading ones."""
    sizes = list(shape)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


def _near(value: Tensor, tensor: Tensor, limit: float) -> bool:
    """Whether two tensors are the same; the first numbers of most say that they are not."""
    first, other = float(value.flatten()[0]), float(tensor.flatten()[0])
    if abs(first - other) > 1e-2 * max(abs(first), abs(other)) + 1e-6:
        return False
    return apart(value, tensor) <= limit
