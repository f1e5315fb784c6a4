"""Which frame of one video is which of another: shifts, lost, swapped, repeated frames. Pure.

An order of frames is believed only where it explains the difference: what is left of the mean
square is a quarter at most (`EXPLAINS`), and a tenth at most of what the frames themselves vary by
(`LEFT`), so that no order is found between two videos that are not of one content.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

EXPLAINS = 4.0
"""By how much the mean square of a difference must fall: 6 dB, half of the rms."""

LEFT = 0.1
"""Of the variance of what is explained, that may be left."""

SIDE = 32
"""Pixels of the sides of the reduced frames that orders are looked for among."""

LARGEST_JUMP = 16
"""Frames, most, that are lost or added at one place."""

BETWEEN = 0.07
"""Frames, mean over a clip, that its frames may lie between two of the reference: motion that is
faster or ahead by a part of a frame is no order of frames. Orders beneath an encoder at crf 36 lie
0.05 off at most, motion that is ahead by 0.9 frames 0.1 (tests/measure/test_aligning.py)."""

_STILL = 16.0
"""A frame repeats the one before it where it moves by this factor less (mean square) than the
reference does there."""

_DARK = 2.0
"""Standard deviation in levels at or below which a frame is uniform: the loss of H.264 at crf 35
on a uniform frame stays below 1 (tests/measure/test_aligning.py)."""

_CONTENT = 8.0
"""Standard deviation from which on a frame has content beside one that is uniform."""


@dataclass(frozen=True)
class Order:
    """Frames of the reference that frames of the actual side are.

    Attributes:
        kind: `frame shift`, `lost frames`, `added frames`, `reversed`, `swapped frames`,
            `other order` or `repeated frames`.
        partners: Of each frame of the actual side, its frame of the reference; -1 for none.
        value: Frames that it is shifted by, or that are lost or added; else frames concerned.
        frames: Frames of the actual side that it is about.
    """

    kind: str
    partners: tuple[int, ...]
    value: int
    frames: tuple[int, ...]


def reduced(frames: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Frames averaged over areas to at most `side` pixels a side, `f c h w` float32 in [0, 255].

    Args:
        frames: `f h w c` uint8.
    """
    height, width = (min(int(n), side) for n in frames.shape[1:3])
    parts = [
        torch.nn.functional.adaptive_avg_pool2d(frame.permute(2, 0, 1).float(), (height, width))
        for frame in frames
    ]
    return torch.stack(parts)


def squares(actual: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean square difference of every frame of one side from every one of the other, `f g`.

    Args:
        actual, reference: `f c h w` and `g c h w` float32, of one size.
    """
    a, r = (side.flatten(1).double() for side in (actual, reference))
    return torch.cdist(a, r, compute_mode="donot_use_mm_for_euclid_dist").square() / a.shape[1]


def straight(actual: int, reference: int) -> tuple[int, ...]:
    """Each frame with the one of its number."""
    return tuple(at if at < reference else -1 for at in range(actual))


def explains(before: float, after: float, variance: float) -> bool:
    """Whether a difference is explained: see `EXPLAINS` and `LEFT`. All are mean squares."""
    return before > 0 and after * EXPLAINS <= before and after <= LEFT * variance


def between(actual: torch.Tensor, reference: torch.Tensor, partners: Sequence[int]) -> float:
    """How far frames lie from their partners on the way to the next frames, in frames: mean of the
    absolute value.

    By least squares along half of the difference of the frames after and before the partner, whose
    noise is not that of the partner. Frames where next to nothing moves say nothing.

    Args:
        actual, reference: `f c h w`, reduced.
        partners: Of each frame of the actual side.
    """
    inner = [(at, to) for at, to in enumerate(partners) if 0 < to < len(reference) - 1]
    moves = {at: (reference[to + 1] - reference[to - 1]).double() / 2 for at, to in inner}
    power = {at: float(move.square().sum()) for at, move in moves.items()}
    least = 0.05 * max(power.values(), default=0.0)
    offsets = [
        abs(float(((actual[at] - reference[to]).double() * moves[at]).sum())) / power[at]
        for at, to in inner
        if power[at] > least
    ]
    return sum(offsets) / len(offsets) if offsets else 0.0


def steps(frames: torch.Tensor) -> list[float]:
    """Mean square by which each frame differs from the one before it; infinite for the first.

    Args:
        frames: `f c h w`, reduced.
    """
    moved = (frames[1:] - frames[:-1]).double().square().flatten(1).mean(1)
    return [math.inf, *moved.tolist()]


def order_of(matrix: torch.Tensor, variance: float, moved: Sequence[float]) -> Order | None:
    """The simplest order of frames that explains the difference; None where none does.

    Args:
        matrix: As `squares` gives it.
        variance: Mean square of what the reference's frames vary by, within a frame.
        moved: As `steps` gives it, of the actual side.
    """
    count, total = matrix.shape
    base = straight(count, total)
    best: tuple[float, Order] | None = None
    for order in _orders(matrix, moved):
        used = [at for at in order.frames if order.partners[at] >= 0 and base[at] >= 0]
        before, after = _cost(matrix, base, used), _cost(matrix, order.partners, used)
        everywhere = [at for at, partner in enumerate(order.partners) if partner >= 0]
        left = _cost(matrix, order.partners, everywhere)
        if explains(before, after, variance) and (best is None or 2 * left < best[0]):
            best = (left, order)
    return best[1] if best else None


def _cost(matrix: torch.Tensor, partners: Sequence[int], frames: Sequence[int]) -> float:
    """Mean square over some frames, each with its partner."""
    chosen = [partners[at] for at in frames]
    return float(matrix[list(frames), chosen].mean()) if frames else 0.0


def _orders(matrix: torch.Tensor, moved: Sequence[float]) -> Iterator[Order]:
    """Orders to try, the simplest first."""
    count, total = matrix.shape
    shift = _shift(matrix)
    if shift is not None:
        yield shift
    if count == total:
        yield from _swaps(matrix)
    yield from _jump(matrix)
    repeats = _repeats(matrix, moved)
    if repeats is not None:
        yield repeats
    if count == total and count > 2:
        back = tuple(range(count - 1, -1, -1))
        yield Order("reversed", back, count, tuple(range(count)))
        yield from _assignment(matrix)


def _shift(matrix: torch.Tensor) -> Order | None:
    """The whole video moved by the number of frames at which it fits best; half of it overlaps."""
    count, total = matrix.shape
    most = min(min(count, total) // 2, max(count, total) - 2)
    moved = [k for k in range(-most, most + 1) if k]
    if not moved:
        return None
    means = {k: float(torch.diagonal(matrix, offset=k).mean()) for k in moved}
    least = min(means.values())
    best = min((k for k in moved if means[k] <= least * 1.01 + 1e-9), key=abs)
    partners = tuple(at + best if 0 <= at + best < total else -1 for at in range(count))
    return Order("frame shift", partners, best, tuple(range(count)))


def _jump(matrix: torch.Tensor) -> Iterator[Order]:
    """Frames up to some place as they are, and all from there on moved by a few."""
    count, total = matrix.shape
    plain = torch.diagonal(matrix)
    best: tuple[float, int, int] | None = None
    for k in range(-LARGEST_JUMP, LARGEST_JUMP + 1):
        moved = torch.diagonal(matrix, offset=k)
        length = len(moved)
        if not k or length < 2:
            continue
        first = max(-k, 0)  # the actual frame that the moved diagonal begins with
        after = torch.zeros(count + 1, dtype=matrix.dtype)
        after[first : first + length] = moved.flip(0).cumsum(0).flip(0)
        before = torch.cat([torch.zeros(1, dtype=matrix.dtype), plain.cumsum(0)])
        for at in range(max(1, first), min(first + length, len(plain)) - 1):
            mean = float(before[at] + after[at]) / (at + first + length - at)
            if best is None or mean < best[0]:
                best = (mean, at, k)
    if best is None:
        return
    _, at, k = best
    partners = tuple(i if i < at else (i + k if 0 <= i + k < total else -1) for i in range(count))
    kind = "lost frames" if k > 0 else "added frames"
    yield Order(kind, partners, abs(k), tuple(range(at, count)))


def _swaps(matrix: torch.Tensor) -> Iterator[Order]:
    """Pairs of frames in each other's place: those that gain most, a quarter of all at most."""
    count = len(matrix)
    plain = torch.diagonal(matrix)
    crossed = (matrix + matrix.T).triu(1)
    gain = (plain[:, None] + plain[None, :]).triu(1) - EXPLAINS * crossed
    gain = torch.where(torch.ones_like(gain).triu(1) > 0, gain, -torch.inf)
    partners, moved = list(range(count)), list[int]()
    for place in gain.flatten().argsort(descending=True)[: 4 * count].tolist():
        first, second = divmod(place, count)
        if gain[first, second] <= 0 or len(moved) >= max(2, count // 4):
            break
        if first not in moved and second not in moved:
            partners[first], partners[second] = second, first
            moved += [first, second]
    if moved:
        yield Order("swapped frames", tuple(partners), len(moved), tuple(sorted(moved)))


def _repeats(matrix: torch.Tensor, moved: Sequence[float]) -> Order | None:
    """Frames that are the one before them once more, while the reference moves on."""
    count, total = matrix.shape
    partners, again = list(straight(count, total)), list[int]()
    for at in range(1, min(count, total)):
        held = partners[at - 1]
        plain = float(matrix[at, at])
        if plain > 0 and max(float(matrix[at, held]), moved[at]) * _STILL <= plain:
            partners[at] = held
            again.append(at)
    if not again:
        return None
    return Order("repeated frames", tuple(partners), len(again), tuple(again))


def _assignment(matrix: torch.Tensor) -> Iterator[Order]:
    """Any other order: the cheapest of all."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(matrix.numpy())
    partners = tuple(int(column) for column in columns)
    moved = tuple(at for at, partner in enumerate(partners) if at != partner)
    if moved:
        yield Order("other order", partners, len(moved), moved)


def uniform(frames: torch.Tensor) -> list[float]:
    """Standard deviation of each frame around its own mean, in levels, the largest channel's.

    Args:
        frames: `f h w c` uint8.
    """
    return [float(f.float().flatten(0, 1).std(0, correction=0).max()) for f in frames]


def emptied(actual: Sequence[float], reference: Sequence[float]) -> tuple[int, ...]:
    """Frames that are uniform on the actual side and have content on the other.

    Args:
        actual, reference: As `uniform` gives them, of partners.
    """
    pairs = enumerate(zip(actual, reference, strict=False))
    return tuple(at for at, (a, r) in pairs if a <= _DARK and r >= _CONTENT)
