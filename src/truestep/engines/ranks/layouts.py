"""What ranks hold of a tensor that the trusted model made whole, told by its rows.

A row is what stands along the last axis: a token, or one head of it. Rows are told by their
content, so the order in which ranks hold them needs no guess. The order is told once, where
tokens are first shared, and everything after has to keep it or be whole again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from truestep.engines.conventions import as_rank
from truestep.engines.ranks.shares import apart, ranks_said, splits
from truestep.engines.ranks.tracing import Part
from truestep.text import spans

Shares = Mapping[int, torch.Tensor]

MOST_ROWS = 8192
"""Rows that are looked for one by one at most: a distance is taken to each other."""


@dataclass(frozen=True)
class Held:
    """What ranks hold of one tensor.

    Attributes:
        right: Whether that is the trusted model's.
        how: In words.
        known: Whether it could be told at all.
    """

    right: bool
    how: str
    known: bool = True


UNKNOWN = Held(True, "", known=False)


@dataclass
class Layouts:
    """How the ranks of one prediction share tokens and columns, as told so far.

    Attributes:
        tokens: By the length of a sequence, which of its tokens each rank holds; -1 for padding.
        columns: Which of as many pieces of the columns each rank holds.
        groups: Ranks that sum what they have.
        order: Ranks in the order of their pieces of what is no sequence.
    """

    tokens: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    columns: dict[int, int] = field(default_factory=dict)
    groups: list[tuple[int, ...]] = field(default_factory=list)
    order: tuple[int, ...] = ()

    def held(self, part: Part, shares: Shares) -> Held:
        """What ranks hold of an output of the trusted model."""
        whole = part.value
        shares = {rank: as_rank(value, whole.ndim)[0] for rank, value in shares.items()}
        if any(value.ndim != whole.ndim for value in shares.values()):
            return UNKNOWN
        ranks = ranks_said(sorted(shares))
        if all(_near(value, whole, part.tolerance) for value in shares.values()):
            return Held(True, f"repeated on {ranks}")
        found = self._by_tokens(part, shares) or self._by_axis(part, shares)
        found = found or self._by_columns(part, shares)
        found = found or self._by_sum(part, shares) or self._new_tokens(part, shares)
        return found or Held(False, _difference(part, shares))

    def kept(self) -> dict[int, float]:
        """How much of what a rank holds is no padding; the least of all sequences."""
        found: dict[int, float] = {}
        for held in self.tokens.values():
            for rank, rows in held.items():
                share = float((rows >= 0).double().mean()) if len(rows) else 0.0
                found[rank] = min(share, found.get(rank, 1.0))
        return found

    def _by_tokens(self, part: Part, shares: Shares) -> Held | None:
        whole = part.value
        for axis in range(whole.ndim - 1):
            known = self.tokens.get(whole.shape[axis])
            if known is None or any(
                shares[rank].shape[axis] != len(known.get(rank, ())) for rank in shares
            ):
                continue
            if all(_holds(whole, shares[r], axis, known[r], part.tolerance) for r in shares):
                return Held(True, f"tokens split over {ranks_said(sorted(shares))}")
        return None

    def _by_axis(self, part: Part, shares: Shares) -> Held | None:
        """Pieces along an axis of what is no sequence yet: frames or rows of a picture."""
        if part.value.ndim < 4 or len(shares) < 2:
            return None
        for split in splits(shares, part.value.shape):
            if not _near(split.gathered(shares), part.value, part.tolerance):
                continue
            if self.order not in ((), split.order):
                return Held(False, f"pieces in another order than before: {split.order}")
            self.order = split.order
            return Held(True, split.said("output"))
        return None

    def _by_columns(self, part: Part, shares: Shares) -> Held | None:
        whole, count = part.value, len(shares)
        first = next(iter(shares.values()))
        many = whole.shape[-1] // max(first.shape[-1], 1)
        if many < 2 or first.shape[-1] * many != whole.shape[-1]:
            return None
        pieces = whole.chunk(many, -1)
        places: dict[int, int] = {}
        for rank, value in shares.items():
            at = [i for i, one in enumerate(pieces) if _near(value, one, part.tolerance)]
            if not at:
                return None
            places[rank] = self.columns[rank] if self.columns.get(rank) in at else at[0]
        if {*places.values()} != {*range(many)}:
            return Held(False, f"columns of {many} pieces: some are held by none of {count} ranks")
        if self.columns and any(self.columns.get(rank, at) != at for rank, at in places.items()):
            return Held(False, "columns in another order than before")
        self.columns.update(places)
        return Held(True, f"columns split over {ranks_said(sorted(shares))}")

    def _by_sum(self, part: Part, shares: Shares) -> Held | None:
        shapes = {value.shape for value in shares.values()}
        if len(shares) < 2 or shapes != {part.value.shape}:
            return None
        groups = [tuple(sorted(shares)), *self.groups]
        for group in dict.fromkeys(groups):
            inside = [rank for rank in group if rank in shares]
            if len(inside) > 1 and _near(_sum(shares, inside), part.value, part.tolerance):
                return Held(True, f"partial sums of {ranks_said(inside)}")
        return None

    def _new_tokens(self, part: Part, shares: Shares) -> Held | None:
        """The order of tokens, where none is known yet for a sequence of this length."""
        whole = part.value
        axis = whole.ndim - 2
        length = whole.shape[axis] if whole.ndim >= 2 else 0
        if length < 2 or length in self.tokens or whole[..., 0, 0].numel() != 1:
            return None
        rows = whole.reshape(length, -1)
        found: dict[int, torch.Tensor] = {}
        for rank, value in shares.items():
            if value.shape[-1] != whole.shape[-1] or value.shape[axis] > length:
                return None
            found[rank] = matched(value.reshape(value.shape[axis], -1), rows, part.tolerance)
        held = torch.cat(list(found.values()))
        if bool((held < 0).all()):
            return None
        wrong = _coverage(found, length)
        if wrong:
            return Held(False, wrong)
        self.tokens[length] = found
        return Held(True, f"tokens split over {ranks_said(sorted(shares))}{_order(found)}")


def _coverage(found: Mapping[int, torch.Tensor], length: int) -> str:
    """What is wrong with tokens that ranks hold, if they should hold all of them."""
    counts = torch.bincount(torch.cat(list(found.values())).clamp_min(-1) + 1, minlength=length + 1)
    padding = int(counts[0])
    missing = [int(i) for i in (counts[1:] == 0).nonzero()]
    if missing:
        twice = [int(i) for i in (counts[1:] > 1).nonzero()]
        more = f", token {_spans(twice)} by several" if twice else ""
        return f"token {_spans(missing)} of {length} held by no rank{more}"
    for rank, rows in found.items():
        known = (rows >= 0).nonzero()
        last = int(known.max()) if len(known) else -1
        if bool((rows[: last + 1] < 0).any()) and padding > len(rows) // 2:
            return f"rank {rank} holds tokens that are none of the trusted model's"
    return ""


def _order(found: Mapping[int, torch.Tensor]) -> str:
    """In words, what ranks hold."""
    parts = []
    for rank, rows in sorted(found.items()):
        tokens = rows[rows >= 0].tolist()
        padding = len(rows) - len(tokens)
        padded = f" and {padding} of padding" if padding else ""
        parts.append(f"rank {rank}: {_spans(tokens)}{padded}")
    return f" ({'; '.join(parts)})"


def _spans(numbers: Sequence[int]) -> str:
    """`0-5, 12-17`, in the order in which they stand."""
    return spans(numbers, "-", most=4)


def matched(rows: torch.Tensor, known: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Which of the known rows each row is; -1 for none."""
    size = known.double().pow(2).mean().sqrt() * known.shape[-1] ** 0.5
    found = torch.full((len(rows),), -1, dtype=torch.long)
    if len(known) > MOST_ROWS or not len(rows):
        return found
    for start in range(0, len(rows), 1024):
        far = torch.cdist(
            rows[start : start + 1024].double(),
            known.double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        least, at = far.min(1)
        limit = tolerance * torch.maximum(known.double().norm(dim=1)[at], size)
        found[start : start + 1024] = torch.where(least <= limit, at, -1)
    return found


def _holds(
    whole: torch.Tensor, share: torch.Tensor, axis: int, rows: torch.Tensor, tolerance: float
) -> bool:
    kept = (rows >= 0).nonzero()[:, 0]
    expected = whole.index_select(axis, rows[kept])
    return _near(share.index_select(axis, kept), expected, tolerance)


def _near(value: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors agree, in whole and in their worst row."""
    if value.shape != other.shape or apart(value, other) > tolerance:
        return False
    if value.ndim < 2 or not value.numel():
        return True
    far = (value.double() - other.double()).norm(dim=-1)
    usual = float(other.double().norm(dim=-1).pow(2).mean().sqrt())
    return float(far.max()) <= 4 * tolerance * max(usual, 1e-30)


def _sum(shares: Shares, ranks: Iterable[int]) -> torch.Tensor:
    return torch.stack([shares[rank].double() for rank in ranks]).sum(0)


def _difference(part: Part, shares: Shares) -> str:
    """How what ranks hold differs from the trusted model's, as far as it has a name."""
    whole = part.value.double()
    same_shape = {r: v.double() for r, v in shares.items() if v.shape == part.value.shape}
    if len(same_shape) == len(shares) > 1:
        size = float(whole.norm()) or 1.0
        total = _sum(shares, shares)
        alike = all(apart(v, same_shape[min(same_shape)]) < 1e-2 for v in same_shape.values())
        if not alike and whole.ndim > 1:
            rest = (total - whole).reshape(-1, whole.shape[-1])
            constant = float((rest - rest.mean(0)).norm())
            if constant < 4 * part.tolerance * size:
                return "partial sums that were not reduced, each with the bias"
    for rank, value in sorted(same_shape.items()):
        flat, own = whole.reshape(-1), value.reshape(-1)
        gain = float(flat @ own) / max(float(flat @ flat), 1e-30)
        if abs(gain - 1) > 0.05 and float((own - gain * flat).norm()) < 4 * part.tolerance * abs(
            gain
        ) * float(flat.norm()):
            return f"{gain:.3g} times the trusted model's on rank {rank}"
        rows = whole.reshape(-1, whole.shape[-1])
        rest = own.reshape(rows.shape) - rows
        if (
            whole.ndim > 1
            and float(rest.mean(0).norm()) > 0.05 * float(rows.norm()) / len(rows) ** 0.5
            and float((rest - rest.mean(0)).norm()) < 4 * part.tolerance * float(rows.norm())
        ):
            return f"the same vector is added to every token on rank {rank}: a bias too many"
        if whole.ndim == 3 and rows.shape[0] <= MOST_ROWS:
            at = matched(own.reshape(rows.shape), rows, part.tolerance)
            if bool((at >= 0).all()) and len({*at.tolist()}) == len(at):
                return f"tokens in another order on rank {rank}: {_spans(at.tolist())}"
    wrong = [
        rank for rank, value in sorted(shares.items()) if apart(value, part.value) > part.tolerance
    ]
    return f"not the trusted model's on {ranks_said(wrong)}"
