"""How a tensor is shared among ranks, told from the tensors: which axis, which order, what repeats.

A layout has no free parameter but order and padding, is told once at the tensors where a run
begins, and everything after is held against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

ROUNDED = 1e-4
"""Relative difference up to which what ranks repeat is the same but for rounding, in float32."""

_OF_EPS = 4.0
"""The same of coarser dtypes, in units of their precision."""


@dataclass(frozen=True)
class Split:
    """A tensor cut along one axis.

    Attributes:
        axis: Which.
        order: Ranks in the order of their pieces; others repeat what one of these holds.
        lengths: Entries of the axis in each piece, in that order.
        padding: Entries at the end of all pieces that are none of the tensor.
    """

    axis: int
    order: tuple[int, ...]
    lengths: tuple[int, ...]
    padding: int = 0

    def gathered(self, shares: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The whole tensor."""
        whole = torch.cat([shares[rank] for rank in self.order], self.axis)
        return whole.narrow(self.axis, 0, whole.shape[self.axis] - self.padding)

    def fits(self, shares: Mapping[int, torch.Tensor]) -> bool:
        """Whether shares have the sizes of this split."""
        known = [shares[rank].shape for rank in self.order if rank in shares]
        if len(known) < len(self.order) or any(len(shape) <= self.axis for shape in known):
            return False
        others = {shape[: self.axis] + shape[self.axis + 1 :] for shape in known}
        return len(others) == 1 and tuple(shape[self.axis] for shape in known) == self.lengths

    def said(self, what: str, axis: str = "") -> str:
        """As it stands in results."""
        ordered = "" if list(self.order) == sorted(self.order) else " in the order "
        ordered += ", ".join(map(str, self.order)) if ordered else ""
        sizes = "" if len({*self.lengths}) == 1 else f" ({', '.join(map(str, self.lengths))})"
        ends = "the last" if self.padding < self.lengths[-1] else "the last ranks"
        padded = f", padded by {self.padding} on {ends}" if self.padding else ""
        name = axis or f"axis {self.axis}"
        return f"{what}: {name} split over {len(self.order)} ranks{sizes}{ordered}{padded}"


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that rounding may make between ranks of a dtype."""
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return max(ROUNDED, _OF_EPS * eps)


def apart(value: torch.Tensor, other: torch.Tensor) -> float:
    """Relative difference of two tensors; infinite where their shapes differ."""
    if value.shape != other.shape:
        return float("inf")
    if value.dtype == other.dtype and torch.equal(value, other):
        return 0.0
    a, b = value.double(), other.double()
    size = float(b.norm())
    far = float((a - b).norm())
    return far / size if size else (0.0 if far == 0.0 else float("inf"))


def same(value: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two ranks hold the same but for rounding."""
    return apart(value, other) <= max(tolerance(value.dtype), tolerance(other.dtype))


def unique(shares: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
    """Ranks that hold the same, by the first of them."""
    found: dict[int, list[int]] = {}
    for rank in sorted(shares):
        first = next((one for one in found if same(shares[rank], shares[one])), None)
        if first is None:
            found[rank] = [rank]
        else:
            found[first].append(rank)
    return found


def orders(ranks: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Orders in which ranks may hold pieces: forwards, backwards."""
    yield tuple(ranks)
    if len(ranks) > 1:
        yield tuple(reversed(ranks))


def splits(shares: Mapping[int, torch.Tensor], whole: torch.Size | None = None) -> Iterator[Split]:
    """Every way in which shares may be pieces of one tensor.

    Args:
        shares: By rank, each another piece.
        whole: Shape of the tensor, where it is known.
    """
    ranks = sorted(shares)
    shapes = [tuple(shares[rank].shape) for rank in ranks]
    if len({len(shape) for shape in shapes}) > 1:
        return
    differ = [i for i in range(len(shapes[0])) if len({shape[i] for shape in shapes}) > 1]
    if len(differ) > 1:
        return
    for axis in differ or range(len(shapes[0])):
        others = [size for i, size in enumerate(shapes[0]) if i != axis]
        for order in orders(ranks):
            lengths = tuple(shares[rank].shape[axis] for rank in order)
            if whole is None:
                zeros = _zeros(torch.cat([shares[rank] for rank in order], axis), axis)
                wanted = sorted({0, zeros})
            elif [size for i, size in enumerate(whole) if i != axis] == others:
                wanted = [sum(lengths) - whole[axis]]
            else:
                wanted = []
            for padding in wanted:
                if 0 <= padding <= sum(lengths[1:]):
                    yield Split(axis, order, lengths, padding)


def _zeros(value: torch.Tensor, axis: int) -> int:
    """Entries at the end of an axis that are all zero."""
    flat = value.movedim(axis, 0).reshape(value.shape[axis], -1)
    count = 0
    while count < len(flat) and not bool(flat[len(flat) - 1 - count].any()):
        count += 1
    return count


def split_of(shares: Mapping[int, torch.Tensor], whole: torch.Tensor) -> Split | None:
    """The split that makes shares of a tensor that is known; None where none does."""
    best: tuple[float, Split] | None = None
    for split in splits(shares, whole.shape):
        size = apart(split.gathered(shares).to(whole.dtype), whole)
        if best is None or size < best[0]:
            best = (size, split)
    dtype = next(iter(shares.values())).dtype
    return best[1] if best is not None and best[0] <= tolerance(dtype) else None


def ranks_said(ranks: Sequence[int]) -> str:
    """`rank 0`, `ranks 0-3`, `ranks 0, 2`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
