"""Find tensors that the other side holds inside a larger one: fused along any axis, in any order.

A tensor is cut into rows along one axis. Rows are looked up by the direction of a projection to
eight numbers, which neither precision nor scale turns; where a tensor's rows are found is confirmed
on all of its numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import cKDTree

from truestep.pairing.content import CLOSE, Fit, fit
from truestep.pairing.records import Evidence

Tensor = torch.Tensor
Rows = npt.NDArray[np.int64]

PROJECTED = 8
"""Numbers a row. Unrelated rows come within `NEAR` of each other with a chance of 1e-5 or less."""

NEAR = 3 * CLOSE
"""Largest distance of two directions: three times what the coarsest precision turns them by."""

SHORTEST = 4
"""Rows of fewer elements have no direction worth looking up."""

MARGIN = 10.0
"""A place counts if the second best is this many times further from the content."""


@dataclass(frozen=True)
class Place:
    """Rows of one axis of a larger tensor."""

    axis: int
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return describe(self.rows)

    def of(self, tensor: Tensor) -> Tensor:
        """The rows, in the place's order."""
        index = torch.tensor(self.rows, dtype=torch.int64, device=tensor.device)
        return tensor.detach().index_select(self.axis, index)


@dataclass(frozen=True)
class Part:
    """A tensor found inside a larger one of the other side, `axis` along the place's axis."""

    whole: str
    part: str
    place: Place
    axis: int
    fit: Fit


def describe(rows: Sequence[int]) -> str:
    """`0:16`, `16 of every 48 from 0` (heads interleaved), or `4 rows in another order`."""
    start, count = rows[0], len(rows)
    block = next((i for i in range(1, count) if rows[i] != start + i), count)
    if block == count:
        return f"{start}:{start + count}"
    period = rows[block] - start
    if period > 0 and all(
        row == start + i // block * period + i % block for i, row in enumerate(rows)
    ):
        return f"{block} of every {period} from {start}"
    return f"{count} rows in another order"


def rows_of(tensor: Tensor, axis: int) -> Tensor:
    """A tensor as a matrix whose rows are its slices along an axis."""
    return tensor.detach().movedim(axis, 0).reshape(tensor.shape[axis], -1)


def find_parts(parts: Mapping[str, Tensor], wholes: Mapping[str, Tensor]) -> list[Part]:
    """Find every part that lies at one place of one larger tensor.

    Args:
        parts, wholes: Tensors of the two sides; those of less than two axes are left out.

    Returns:
        The parts found; of two that claim the same rows, neither.
    """
    lengths: dict[int, list[tuple[str, int]]] = {}
    for name, axis, length in _axes(wholes):
        lengths.setdefault(length, []).append((name, axis))
    found: list[Part] = []
    for length, places in lengths.items():
        wanted = [(name, axis) for name, axis, own in _axes(parts) if own == length]
        smallest = max(wholes[name].numel() for name, _ in places)
        wanted = [(name, axis) for name, axis in wanted if parts[name].numel() < smallest]
        if wanted:
            found += _Index(length, wholes, places).search(parts, wanted)
    return undisputed(found)


def _axes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int, int]]:
    """Every way to cut tensors into rows: name, axis, length of a row."""
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        for axis, size in enumerate(tensor.shape):
            length = tensor.numel() // size if size else 0
            if length >= SHORTEST:
                yield name, axis, length


class _Index:
    """Directions of all rows of one length, to look rows up in."""

    def __init__(
        self, length: int, wholes: Mapping[str, Tensor], places: Sequence[tuple[str, int]]
    ) -> None:
        self.length, self.wholes, self.places = length, wholes, places
        self.rows = [_directions(rows_of(wholes[name], axis)) for name, axis in places]
        self.owner = np.repeat(np.arange(len(places)), [len(rows) for rows in self.rows])
        self.tree = cKDTree(np.concatenate(self.rows))

    def search(self, parts: Mapping[str, Tensor], wanted: Sequence[tuple[str, int]]) -> list[Part]:
        """The one place of each part that has one."""
        found = []
        for name, axis in wanted:
            directions = _directions(rows_of(parts[name], axis))
            places = [p for p in self._owners(directions) if self._larger(p, parts[name])]
            hits = [
                hit for p in places if (hit := self._at(p, name, axis, parts[name], directions))
            ]
            hits.sort(key=lambda hit: hit.fit.distance)
            if hits and (len(hits) == 1 or hits[1].fit.distance > MARGIN * hits[0].fit.distance):
                found.append(hits[0])
        return found

    def _larger(self, place: int, part: Tensor) -> bool:
        return self.wholes[self.places[place][0]].numel() > part.numel()

    def _owners(self, directions: npt.NDArray[np.float32]) -> list[int]:
        """Tensors that hold one of a few rows of a part."""
        usable = np.flatnonzero(np.abs(directions[:, 0]) < _NOWHERE)
        picked = (
            usable[np.unique(np.linspace(0, len(usable) - 1, 5).astype(int))] if len(usable) else []
        )
        owners: set[int] = set()
        for row in picked:
            near = self.tree.query(directions[row], k=4, distance_upper_bound=NEAR)[1]
            owners |= {int(self.owner[i]) for i in near if i < len(self.owner)}
        return sorted(owners)

    def _at(
        self, place: int, name: str, axis: int, part: Tensor, directions: npt.NDArray[np.float32]
    ) -> Part | None:
        whole, along = self.places[place]
        targets = self.rows[place]
        apart, rows = cKDTree(targets).query(directions, k=1, distance_upper_bound=NEAR)
        for guess in patterns(rows, apart <= NEAR, len(targets)):
            if len(set(guess)) < len(guess):
                continue
            own = rows_of(part, axis)
            theirs = rows_of(self.wholes[whole], along)[torch.from_numpy(guess)]
            hit = fit(theirs, own)
            if hit is None:
                continue
            layout = "" if axis == along else f"axes {axis} and {along} exchanged"
            hit = replace(
                hit,
                evidence=Evidence.FUSED if hit.evidence is Evidence.EQUAL else hit.evidence,
                layout=layout,
            )
            return Part(whole, name, Place(along, tuple(guess.tolist())), axis, hit)
        return None


def patterns(rows: Rows, near: npt.NDArray[np.bool_], size: int) -> Iterator[Rows]:
    """Where a part's rows may lie, the plainest first: one run, runs at a period, any order."""
    count = np.arange(len(rows))
    good = np.flatnonzero(near)
    if len(good) < 0.75 * len(rows):
        return
    offsets, votes = np.unique(rows[good] - good, return_counts=True)
    run = count + offsets[votes.argmax()]
    if run[0] >= 0 and run[-1] < size:
        yield run
    starts = np.flatnonzero(np.diff(rows) != 1) + 1
    if len(starts) and len(rows) % starts[0] == 0:
        block = int(starts[0])
        period = int(rows[block] - rows[0])
        periodic = rows[0] + count // block * period + count % block
        if periodic.min() >= 0 and periodic.max() < size:
            yield periodic
    if near.all():
        yield rows.astype(np.int64)


_NOWHERE = 1e3


def _directions(rows: Tensor) -> npt.NDArray[np.float32]:
    """Unit vectors `n 8`; rows without a direction (zero, not finite) are far from everything."""
    projected = rows.to("cpu", torch.float32) @ _projection(rows.shape[1])
    norm = projected.norm(dim=1, keepdim=True)
    fine = torch.isfinite(norm[:, 0]) & (norm[:, 0] > 0)
    unit = torch.where(fine[:, None], projected / norm, torch.full_like(projected, 2 * _NOWHERE))
    return unit.numpy()


@functools.cache
def _projection(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(length, PROJECTED, generator=generator)


def undisputed(found: Sequence[Part]) -> list[Part]:
    """Parts at one place only, whose rows no other part claims."""
    best: dict[str, Part] = {}
    for part in found:  # a symmetric layout may be found twice: the closer, then the plainer
        kept = best.get(part.part)
        if kept is None or (part.fit.distance, part.fit.layout) < (
            kept.fit.distance,
            kept.fit.layout,
        ):
            best[part.part] = part
    claims: dict[tuple[str, int, int], set[str]] = {}
    for part in best.values():
        for row in part.place.rows:
            claims.setdefault((part.whole, part.place.axis, row), set()).add(part.part)
    disputed = {name for names in claims.values() if len(names) > 1 for name in names}
    axes: dict[str, set[int]] = {}
    for part in best.values():
        axes.setdefault(part.whole, set()).add(part.place.axis)
    return [
        part for part in best.values() if part.part not in disputed and len(axes[part.whole]) == 1
    ]


def find_run(part: Tensor, whole: Tensor) -> tuple[Place, Fit] | None:
    """The one run of a longer vector that a vector's numbers are.

    Args:
        part, whole: One axis each.
    """
    size, length = part.numel(), whole.numel()
    if part.ndim != 1 or whole.ndim != 1 or not 0 < size < length:
        return None
    own, theirs = (t.detach().to("cpu", torch.float64) for t in (part, whole))
    scale = float((own - own.mean()).norm()) / size**0.5
    if not scale > 0:
        return None
    starts = torch.arange(length - size + 1)
    for probe in range(min(size, 16)):
        # Rounding moves an element by half a unit in its last place, or a step of all of them.
        allowed = CLOSE * (4 * scale + abs(float(own[probe])))
        starts = starts[(theirs[starts + probe] - own[probe]).abs() <= allowed]
    hits = []
    for start in starts.tolist()[:64]:
        found = fit(theirs[start : start + size], own)
        if found is not None:
            hits.append((found.distance, start, found))
    hits.sort(key=lambda hit: hit[0])
    if not hits or (len(hits) > 1 and hits[1][0] <= MARGIN * hits[0][0]):
        return None
    _, start, found = hits[0]
    kind = Evidence.FUSED if found.evidence is Evidence.EQUAL else found.evidence
    return Place(0, tuple(range(start, start + size))), replace(found, evidence=kind)
