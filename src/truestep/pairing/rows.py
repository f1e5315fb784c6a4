"""Find tensors of one side on the other bit for bit: whole, or row by row inside others.

Rows are compared by a hash of 64 bits, after both sides are cast to the coarser of the dtypes that
most of their numbers have: a conversion by rounding then gives the same rows as its source. One
pass reads every tensor once; what is found needs no distance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from truestep.floors import EPSILON
from truestep.measure.rounding import nonfinite
from truestep.pairing.content import Fit, measure
from truestep.pairing.fused import Part, Place, patterns, undisputed
from truestep.pairing.records import Evidence
from truestep.pairing.state import SAMPLE, stored

Tensor = torch.Tensor
Hashes = npt.NDArray[np.uint64]

LEAST = 4
"""Elements: two unrelated tensors of so many agree in bfloat16 with a chance of 1e-11."""

_BLOCK = 1 << 25
"""Bytes of rows that are cast and hashed at once."""


@dataclass(frozen=True)
class Hashed:
    """Hashes of a tensor's rows.

    Attributes:
        length: Elements a row; a vector is one row.
    """

    rows: Hashes
    length: int

    @property
    def whole(self) -> int:
        """One hash of all rows."""
        return xxhash.xxh3_64_intdigest(self.rows.tobytes() + self.length.to_bytes(8, "little"))


def common_dtype(*sides: Mapping[str, Tensor]) -> torch.dtype | None:
    """The coarsest of the dtypes that most numbers of each side have; None without floats."""
    most = []
    for tensors in sides:
        sizes: Counter[torch.dtype] = Counter()
        for name in tensors:
            tensor = stored(tensors, name)
            if tensor.is_floating_point():
                sizes[tensor.dtype] += tensor.numel()
        most += [dtype for dtype, _ in sizes.most_common(1)]
    return max(most, key=_step) if most else None


def _step(dtype: torch.dtype) -> float:
    return EPSILON.get(str(dtype).removeprefix("torch."), 0.0)


def hashed(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None) -> Hashed | None:
    """Hash the rows of a tensor in a dtype, if that is coarser than its own.

    Args:
        tensors: The side; one that lies in a file gives its pages back as they are read.

    Returns:
        None where the tensor says nothing: it is short, or not finite.
    """
    tensor = stored(tensors, name).detach()
    if dtype is None or not tensor.is_floating_point() or _step(dtype) <= _step(tensor.dtype):
        dtype = tensor.dtype
    if tensor.numel() < LEAST:
        return None
    rows = tensor.reshape(len(tensor) if tensor.ndim > 1 else 1, -1)
    length, release = rows.shape[1], getattr(tensors, "release", None)
    found = np.empty(len(rows), np.uint64)
    block = max(_BLOCK // max(length * tensor.itemsize, 1), 1)
    for start in range(0, len(rows), block):
        part = rows[start : start + block].to("cpu", dtype).contiguous()
        if any(nonfinite(part)):
            return None
        width = length * part.itemsize
        data = part.view(torch.uint8).reshape(-1).numpy().data
        found[start : start + len(part)] = [
            xxhash.xxh3_64_intdigest(data[at : at + width]) for at in range(0, len(data), width)
        ]
        if release is not None and len(rows) > block:
            release(name)
    return Hashed(found, length)


def same_wholes(
    own: Mapping[str, Hashed], theirs: Mapping[str, Hashed]
) -> Iterator[tuple[str, str]]:
    """Names that hold the same rows in the same order, and no second one of either side does."""
    groups: dict[int, tuple[list[str], list[str]]] = {}
    for side, hashes in enumerate((own, theirs)):
        for name, rows in hashes.items():
            groups.setdefault(rows.whole, ([], []))[side].append(name)
    for names, others in groups.values():
        if len(names) == len(others) == 1:
            yield names[0], others[0]


def parts_by_rows(
    parts: Mapping[str, Hashed], wholes: Mapping[str, Hashed]
) -> list[tuple[str, str, Place]]:
    """Where each part's rows lie in one tensor of the other side: fused, interleaved, permuted.

    Args:
        parts, wholes: Rows of the two sides; vectors and single rows are left out.

    Returns:
        Name of the part, of the whole, and the place, in which every row agrees.
    """
    lengths: dict[int, list[str]] = {}
    for name, rows in wholes.items():
        if len(rows.rows) > 1:
            lengths.setdefault(rows.length, []).append(name)
    found = []
    for length, names in lengths.items():
        wanted = {n: h for n, h in parts.items() if h.length == length and len(h.rows) > 1}
        if wanted:
            index = _Index([wholes[name].rows for name in names])
            for name, rows in wanted.items():
                hit = index.find(rows.rows)
                if hit is not None:
                    found.append((name, names[hit[0]], Place(0, tuple(hit[1].tolist()))))
    return found


class _Index:
    """Rows of many tensors, looked up by hash."""

    def __init__(self, tensors: Sequence[Hashes]) -> None:
        self.tensors = tensors
        rows = np.concatenate(tensors)
        owner = np.repeat(np.arange(len(tensors)), [len(each) for each in tensors])
        place = np.concatenate([np.arange(len(each)) for each in tensors])
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        alone = np.ones(len(rows), bool)  # a row that lies at two places tells neither
        alone[1:] &= rows[1:] != rows[:-1]
        alone[:-1] &= rows[1:] != rows[:-1]
        self.rows, self.owner, self.place = (x[alone] for x in (rows, owner[order], place[order]))

    def find(self, wanted: Hashes) -> tuple[int, npt.NDArray[np.int64]] | None:
        """The tensor that holds all rows, and which of its rows they are."""
        if not len(self.rows):
            return None
        at = np.searchsorted(self.rows, wanted).clip(max=len(self.rows) - 1)
        known = self.rows[at] == wanted
        if not known.any():
            return None
        owner = int(np.bincount(self.owner[at[known]]).argmax())
        held = self.tensors[owner]
        near = known & (self.owner[at] == owner)
        for guess in patterns(self.place[at], near, len(held)):
            plain = len(guess) == len(held) and bool((np.diff(guess) == 1).all())
            if plain or len(set(guess.tolist())) < len(guess):
                continue
            if bool((held[guess] == wanted).all()):
                return owner, guess.astype(np.int64)
        return None


def found_parts(
    parts: Mapping[str, Tensor],
    wholes: Mapping[str, Tensor],
    places: Collection[tuple[str, str, Place]],
) -> list[Part]:
    """Parts at such places, with what a rounding took.

    Of two that claim the same rows, neither; and none of a tensor that they do not fill: what is
    left of it may be the same numbers less exactly, which is seen only beside the others.
    """
    found = undisputed([Part(w, n, at, 0, _fit(parts[n], wholes[w], at)) for n, w, at in places])
    filled = Counter[str]()
    for part in found:
        filled[part.whole] += len(part.place.rows)
    return [part for part in found if filled[part.whole] == len(wholes[part.whole])]


def _fit(part: Tensor, whole: Tensor, place: Place) -> Fit:
    count = max(SAMPLE // max(part[0].numel(), 1), 1)
    rows = whole.detach()[list(place.rows[:count])]
    return exact_fit(rows, part.detach()[:count], Evidence.FUSED)


def exact_fit(actual: Tensor, reference: Tensor, evidence: Evidence = Evidence.EQUAL) -> Fit:
    """How one tensor is another that has the same rows in the coarser of their dtypes."""
    if actual.dtype == reference.dtype:
        same = evidence is not Evidence.EQUAL or actual.shape == reference.shape
        kind = evidence if same else Evidence.RESHAPED
        return Fit(kind, 0.0, 1.0, 0.0, _reshaped(actual, reference))
    sums = measure(*(t.reshape(-1)[:SAMPLE] for t in (actual, reference)))
    distance = math.sqrt(sums.difference / sums.deviation) if sums.deviation else sums.rel_l2
    kind = Evidence.PRECISION if sums.difference else evidence
    return Fit(kind, sums.rel_l2, 1.0, distance, _reshaped(actual, reference))


def _reshaped(actual: Tensor, reference: Tensor) -> str:
    if actual.shape == reference.shape or actual.numel() != reference.numel():
        return ""
    return f"reshape {list(reference.shape)} to {list(actual.shape)}"
