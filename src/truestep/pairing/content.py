"""Whether two tensors hold the same numbers: in another layout, precision or scale.

Candidates are looked up by statistics that no layout and no scale changes; every candidate is then
confirmed on all of its numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import cKDTree

from truestep.pairing.records import Evidence

Tensor = torch.Tensor

CLOSE = 0.1
"""Largest distance, relative to the reference's deviation, of one tensor in two precisions. Normal
weights: float16 2e-4, bfloat16 1.7e-3, int8 a tensor 1e-2, float8 e4m3 2.7e-2 and e5m2 5.3e-2, Q4_0
of GGUF 8.6e-2."""

CHANCE = math.log(1e12)
"""An unrelated tensor of n normal numbers comes as close as d with a chance of about d^(n - 1). It
must be below 1e-12: a thousand tensors a side are a million chances."""

SHARE = 0.25
"""A factor explains a distance where less than this share of it is left after the best factor."""

NEIGHBOURS = 8
"""Candidates confirmed a tensor. The nearest is the right one; the others show duplicates."""

_CHUNK = 1 << 16
_PROBES = 64


@dataclass(frozen=True)
class Fit:
    """How one tensor is another.

    Attributes:
        distance: What is left, relative to the reference's deviation: rounding, or nothing.
        layout: How the reference is laid out anew.
    """

    evidence: Evidence
    rel_l2: float
    scale: float
    distance: float
    layout: str = ""


@dataclass(frozen=True)
class Sums:
    """Moments of two tensors in one layout."""

    count: int
    actual: float
    reference: float
    cross: float
    difference: float
    deviation: float

    @property
    def rel_l2(self) -> float:
        """Distance relative to the reference's norm."""
        if not self.difference:
            return 0.0
        return math.sqrt(self.difference / self.reference) if self.reference else math.inf


def measure(actual: Tensor, reference: Tensor) -> Sums:
    """Sum up two tensors element by element; same count, each in its own C order."""
    a, r = actual.detach().reshape(-1), reference.detach().reshape(-1)
    totals = torch.zeros(5, dtype=torch.float64)
    for start in range(0, a.numel(), _CHUNK):
        x = a[start : start + _CHUNK].to("cpu", torch.float64)
        y = r[start : start + _CHUNK].to("cpu", torch.float64)
        d = x - y
        totals += torch.stack((x @ x, y @ y, x @ y, d @ d, y.sum()))
    aa, rr, ar, dd, s = totals.tolist()
    return Sums(a.numel(), aa, rr, ar, dd, max(rr - s * s / max(a.numel(), 1), 0.0))


def fit(actual: Tensor, reference: Tensor) -> Fit | None:
    """How the actual tensor is the reference, in the layouts they have; None if it is another."""
    if actual.dtype == reference.dtype and torch.equal(actual.reshape(-1), reference.reshape(-1)):
        return Fit(Evidence.EQUAL, 0.0, 1.0, 0.0) if actual.numel() else None
    sums = measure(actual, reference)
    if not math.isfinite(sums.actual + sums.reference) or not sums.count:
        return None
    if sums.difference == 0.0:
        return Fit(Evidence.EQUAL, 0.0, 1.0, 0.0)
    if not sums.deviation or not sums.cross:
        return None
    plain = math.sqrt(sums.difference / sums.deviation)
    gain = sums.cross / sums.reference
    left = max(sums.actual - gain * sums.cross, 0.0)
    scaled = math.sqrt(left / sums.deviation) / abs(gain)
    if scaled < SHARE * plain and _sure(scaled, sums.count - 2):
        return Fit(Evidence.SCALED, sums.rel_l2, gain, scaled)
    if _sure(plain, sums.count - 1):
        return Fit(Evidence.PRECISION, sums.rel_l2, 1.0, plain)
    return None


def _sure(distance: float, freedom: int) -> bool:
    """Whether chance cannot explain so small a distance."""
    # Sums of squares carry 1e-16: a distance below 1e-8 is not resolved.
    return distance <= CLOSE and -freedom * math.log(max(distance, 1e-8)) > CHANCE


def fit_any(actual: Tensor, reference: Tensor) -> Fit | None:
    """`fit` in every layout: as it is, reshaped, or with axes in another order.

    Args:
        actual, reference: As many elements each.
    """
    best: Fit | None = None
    if not actual.numel():
        return None
    for a, r, evidence, layout in _layouts(actual, reference):
        if not _alike(a, r):
            continue
        found = fit(a, r)
        if found is None or (best is not None and best.distance <= found.distance):
            continue
        kind = evidence if found.evidence is Evidence.EQUAL else found.evidence
        best = Fit(kind, found.rel_l2, found.scale, found.distance, layout)
        if found.evidence is Evidence.EQUAL:
            break
    return best


def _layouts(actual: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor, Evidence, str]]:
    """Both tensors in every layout in which they may agree, the plainest first."""
    same = actual.shape == reference.shape
    text = "" if same else f"reshape {list(reference.shape)} to {list(actual.shape)}"
    yield actual, reference, Evidence.EQUAL if same else Evidence.RESHAPED, text
    a, r = actual.squeeze(), reference.squeeze()
    turned, fixed = (a, r) if a.ndim > r.ndim else (r, a)
    if not 2 <= turned.ndim <= 5 or not fixed.ndim:
        return
    whole = set(np.cumprod(fixed.shape).tolist())
    original = actual if turned is a and a.ndim > r.ndim else reference
    numbers = [axis for axis, size in enumerate(original.shape) if size != 1]
    for axes in itertools.permutations(range(turned.ndim)):
        view = turned.permute(axes)
        if list(axes) == sorted(axes) or not whole <= set(np.cumprod(view.shape).tolist()):
            continue
        side = "actual" if turned is a and a.ndim > r.ndim else "reference"
        text = f"axes {' '.join(str(numbers[axis]) for axis in axes)} of the {side}"
        pair = (view, fixed) if side == "actual" else (fixed, view)
        yield (*pair, Evidence.TRANSPOSED, text)


def arranged(actual: Tensor, reference: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Both in the layout in which they agree, as a `Fit` says it.

    Args:
        layout: Empty, `reshape ...`, `axes 1 0 of the actual`, `axes 1 and 0 exchanged`.
    """
    words = layout.split()
    if words[:1] == ["axes"]:
        if words[-1] == "exchanged":  # slices along an axis of a part are those along another's
            return tuple(
                _slices(t, int(axis)) for t, axis in ((actual, words[3]), (reference, words[1]))
            )  # type: ignore[return-value]
        tensor = actual if words[-1] == "actual" else reference
        kept = [axis for axis, size in enumerate(tensor.shape) if size != 1]
        turned = tensor.squeeze().permute([kept.index(int(axis)) for axis in words[1:-3]])
        if tensor is actual:
            return turned.reshape(reference.shape), reference
        return actual, turned.reshape(actual.shape)
    return actual, reference.reshape(actual.shape) if words else reference


def _slices(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def _alike(actual: Tensor, reference: Tensor) -> bool:
    """A quick look at a few elements, which no other layout of the same numbers survives."""
    count = actual.numel()
    places = np.unique(np.linspace(0, count - 1, _PROBES).astype(np.int64) if count else [])
    x, y = (_unit(_at(tensor, places)) for tensor in (actual, reference))
    x, y = x - x.mean(), y - y.mean()
    product = np.linalg.norm(x) * np.linalg.norm(y)
    return bool(len(places) < 8 or not product or abs(x @ y) > 0.9 * product)


def _unit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values over the largest of them, so that their squares stay inside float64."""
    peak = float(np.abs(values).max(initial=0.0))
    return values / peak if 0.0 < peak < math.inf else values


def _at(tensor: Tensor, places: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    index = np.unravel_index(places, tuple(tensor.shape) or (1,))
    flat = tensor.detach().reshape(1) if not tensor.ndim else tensor.detach()
    picked = flat[tuple(torch.from_numpy(axis).to(tensor.device) for axis in index)]
    return picked.to("cpu", torch.float64).numpy()


def is_constant(tensor: Tensor) -> bool:
    """One value everywhere, or nothing: its content says nothing about where it belongs."""
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return True
    return bool((flat[:_PROBES] == flat[0]).all()) and bool((flat == flat[0]).all())


def signature(tensor: Tensor) -> npt.NDArray[np.float64]:
    """Five statistics that depend on neither layout nor positive scale; nan where undefined."""
    flat = tensor.detach().reshape(-1)
    sums = torch.zeros(6, dtype=torch.float64)
    for start in range(0, flat.numel(), _CHUNK):
        x = flat[start : start + _CHUNK].to("cpu", torch.float64)
        size, square = x.abs(), x * x
        parts = (x, square, square * x, square * square, size, size.sqrt())
        sums += torch.stack([part.sum() for part in parts])
    mean, square, third, fourth, size, root = (sums / max(flat.numel(), 1)).tolist()
    if not (math.isfinite(fourth) and square > 0):
        return np.full(5, np.nan)
    rms = math.sqrt(square)
    return np.array([mean / rms, third / rms**3, size / rms, fourth / rms**4, root / rms**0.5])


def candidates(
    actual: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> Iterator[tuple[str, Sequence[str]]]:
    """For every actual tensor the few reference tensors that may hold the same numbers."""
    sizes: dict[int, tuple[list[str], list[str]]] = {}
    for side, tensors in enumerate((actual, reference)):
        for name, tensor in tensors.items():
            sizes.setdefault(tensor.numel(), ([], []))[side].append(name)
    for own, theirs in sizes.values():
        if not own or not theirs:
            continue
        if len(theirs) <= NEIGHBOURS:
            yield from ((name, theirs) for name in own)
            continue
        points = [
            np.array([signature(t[n]) for n in names])
            for t, names in ((actual, own), (reference, theirs))
        ]
        seen = [
            name for name, fine in zip(theirs, np.isfinite(points[1][:, 0]), strict=True) if fine
        ]
        kept = points[1][np.isfinite(points[1][:, 0])]
        if not seen:
            continue
        spread = kept.std(axis=0) + 1e-12
        tree = cKDTree(kept / spread)
        flip = np.array([-1.0, -1.0, 1.0, 1.0, 1.0])
        for name, point in zip(own, points[0], strict=True):
            if not np.isfinite(point[0]):
                continue
            found: dict[str, None] = {}
            for query in (point, point * flip):  # the second for a negative scale
                _, places = tree.query(query / spread, k=min(NEIGHBOURS, len(seen)))
                found.update(dict.fromkeys(seen[int(i)] for i in np.atleast_1d(places)))
            yield name, list(found)
