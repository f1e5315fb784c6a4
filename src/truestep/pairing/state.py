"""What the solver knows so far: pairs of parameters, and what of either side is still free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from truestep.pairing.content import Fit, fit_any, is_constant, measure
from truestep.pairing.fused import Place
from truestep.pairing.records import Evidence
from truestep.pairing.scales import Named, Numbers, shape_of

Tensor = torch.Tensor

SAMPLE = 1 << 20
"""Elements that tell whether large tensors of two checkpoints are a pair."""

AGREEMENT = 2 / 3
"""A module of one side is where at least this share of the other's paired parameters lies: one
misplaced parameter of three may not move it."""


class Chosen(Named):
    """Some tensors of a side, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self.tensors, self._names = tensors, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self.tensors[name]


def stored(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor as a checkpoint holds it: of codes with a scale (`scales.Numbers`), the codes."""
    while isinstance(tensors, Chosen):
        tensors = tensors.tensors
    return tensors.stored(name) if isinstance(tensors, Numbers) else tensors[name]


class Unit(NamedTuple):
    """A tensor, or the rows of it that no pair has taken."""

    name: str
    place: Place | None = None


@dataclass
class Match:
    """Two units that belong together.

    Attributes:
        odd: It disagrees with its content, or with others of its kind; `note` says how.
        misplaced: It lies, or is laid out, otherwise than others of its kind.
    """

    actual: Unit
    reference: Unit
    evidence: Evidence
    rel_l2: float = 0.0
    scale: float = 1.0
    distance: float = 0.0
    layout: str = ""
    odd: bool = False
    misplaced: bool = False
    note: str = ""


@dataclass
class State:
    """Both sides and the pairs found so far.

    Attributes:
        fits: Content of pairs of units that were looked at.
    """

    actual: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]
    matches: list[Match] = field(default_factory=list)
    fits: dict[tuple[Unit, Unit], Fit | None] = field(default_factory=dict)
    constants: dict[tuple[str, Unit], bool] = field(default_factory=dict)
    values: dict[tuple[str, Unit], float] = field(default_factory=dict)
    shapes: dict[str, dict[str, torch.Size]] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = {
            side: {name: shape_of(tensors, name) for name in tensors}
            for side, tensors in (("actual", self.actual), ("reference", self.reference))
        }

    def add(
        self, actual: Unit, reference: Unit, found: Fit, evidence: Evidence | None = None
    ) -> None:
        """Pair two units on their content."""
        self.matches.append(
            Match(
                actual,
                reference,
                evidence or found.evidence,
                rel_l2=found.rel_l2,
                scale=found.scale,
                distance=found.distance,
                layout=found.layout,
            )
        )

    def add_by(self, actual: Unit, reference: Unit, evidence: Evidence, note: str = "") -> None:
        """Pair two units on something else: odd where their content differs."""
        found = self.fit(actual, reference)
        if found is not None:
            self.add(actual, reference, found, evidence)
            self.matches[-1].note = note
            return
        differing = Evidence.EXCLUSION if evidence is Evidence.STRUCTURE else evidence
        self.matches.append(
            Match(
                actual,
                reference,
                differing,
                rel_l2=self.apart(actual, reference),
                distance=float("inf"),
                odd=True,
                note=note
                if differing is Evidence.EXCLUSION
                else f"content differs; {note}".rstrip("; "),
            )
        )

    def tensor(self, unit: Unit, *, side: str) -> Tensor:
        """The numbers of a unit."""
        whole = (self.actual if side == "actual" else self.reference)[unit.name]
        return whole if unit.place is None else unit.place.of(whole)

    def fit(self, actual: Unit, reference: Unit) -> Fit | None:
        """How one unit is the other; None if their contents differ."""
        key = (actual, reference)
        if key not in self.fits:
            self.fits[key] = self._fit(actual, reference)
        return self.fits[key]

    def _fit(self, actual: Unit, reference: Unit) -> Fit | None:
        if self.count(actual, side="actual") != self.count(reference, side="reference"):
            return None
        one, other = (
            self._value(unit, side=side)
            for unit, side in ((actual, "actual"), (reference, "reference"))
        )
        if one is not None and other is not None:
            return self._constants(actual, reference) if one == other else None
        own, theirs = self.actual, self.reference
        shape = self.shapes["actual"][actual.name]
        large = shape.numel() > SAMPLE and not (actual.place or reference.place)
        alike = large and shape == self.shapes["reference"][reference.name]
        if alike and isinstance(own, Numbers) and isinstance(theirs, Numbers):
            return fit_any(_sample(own, actual.name), _sample(theirs, reference.name))
        return fit_any(self.tensor(actual, side="actual"), self.tensor(reference, side="reference"))

    def _constants(self, actual: Unit, reference: Unit) -> Fit:
        """Two units of one value."""
        shapes = [
            list(self.shapes[side][unit.name])
            for side, unit in (("reference", reference), ("actual", actual))
        ]
        if actual.place or reference.place or shapes[0] == shapes[1]:
            return Fit(Evidence.EQUAL, 0.0, 1.0, 0.0)
        return Fit(Evidence.RESHAPED, 0.0, 1.0, 0.0, f"reshape {shapes[0]} to {shapes[1]}")

    def _value(self, unit: Unit, *, side: str) -> float | None:
        """The one value of a unit that has no other."""
        if not self.constant(unit, side=side) or not self.count(unit, side=side):
            return None
        key = (side, unit)
        if key not in self.values:
            self.values[key] = float(self.tensor(unit, side=side).reshape(-1)[0])
        return self.values[key]

    def count(self, unit: Unit, *, side: str) -> int:
        """Elements of a unit."""
        shape = self.shapes[side][unit.name]
        if unit.place is None or not shape:
            return shape.numel()
        return shape.numel() // max(shape[unit.place.axis], 1) * len(unit.place.rows)

    def apart(self, actual: Unit, reference: Unit) -> float:
        """Relative distance of two units in the layouts they have."""
        a, r = self.tensor(actual, side="actual"), self.tensor(reference, side="reference")
        return measure(a, r).rel_l2 if a.numel() == r.numel() else float("inf")

    def constant(self, unit: Unit, *, side: str) -> bool:
        """Whether a unit's content says nothing."""
        key = (side, unit)
        if key not in self.constants:
            tensors = self.actual if side == "actual" else self.reference
            whole = stored(tensors, unit.name)
            self.constants[key] = is_constant(unit.place.of(whole) if unit.place else whole)
        return self.constants[key]

    def free(self, side: str) -> list[Unit]:
        """What no pair has taken: whole tensors, and the rows left of those that were cut."""
        taken: dict[str, set[int] | None] = {}
        axes: dict[str, int] = {}
        for match in self.matches:
            unit = match.actual if side == "actual" else match.reference
            if unit.place is None:
                taken[unit.name] = None
                continue
            rows = taken.setdefault(unit.name, set())
            axes[unit.name] = unit.place.axis
            if rows is not None:
                rows.update(unit.place.rows)
        left = []
        for name, shape in self.shapes[side].items():
            if name not in taken:
                left.append(Unit(name))
                continue
            rows = taken[name]
            if rows is not None and len(rows) < shape[axes[name]]:
                rest = tuple(i for i in range(shape[axes[name]]) if i not in rows)
                left.append(Unit(name, Place(axes[name], rest)))
        return left

    def is_free(self, unit: Unit, *, side: str) -> bool:
        """Whether no pair has taken any of a unit."""
        for match in self.matches:
            other = match.actual if side == "actual" else match.reference
            if other.name != unit.name:
                continue
            if other.place is None or unit.place is None:
                return False
            if set(other.place.rows) & set(unit.place.rows):
                return False
        return True


def _sample(numbers: Numbers, name: str) -> Tensor:
    """About `SAMPLE` elements: runs of rows from all over a tensor; what is judged later is all."""
    shape = shape_of(numbers, name)
    count = shape[0]
    wanted = max(SAMPLE * count // shape.numel() // _RUNS, 1)
    starts = [at * count // _RUNS for at in range(_RUNS)] if count > wanted * _RUNS else [0]
    size = wanted if len(starts) > 1 else count
    return torch.cat([numbers.rows(name, slice(at, at + size)) for at in starts])


_RUNS = 16


def parent(name: str) -> str:
    """Module of a name; empty for the model."""
    return name.rpartition(".")[0]


def ancestors(name: str) -> Iterator[str]:
    """Modules around a name, innermost first, the model (empty) last."""
    while name:
        name = parent(name)
        yield name


def inside(name: str, scope: str) -> bool:
    """Whether a name is in a module."""
    return not scope or name.startswith(f"{scope}.")


def relative(name: str, scope: str) -> str:
    """A name as its module sees it."""
    return name.removeprefix(f"{scope}.") if scope else name


def scopes(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Where each module of the first side is on the second.

    Of the modules that hold enough of its pairs, the one that holds the fewest others beside them
    (a layer is not its attention, though that has most of its parameters), the innermost of equals.
    The model is always the model.
    """
    votes: dict[str, Counter[str]] = {}
    held: Counter[str] = Counter()
    for first, second in pairs:
        around = list(ancestors(second))
        held.update(around)
        for scope in ancestors(first):
            votes.setdefault(scope, Counter()).update(around)
    found = {}
    for scope, counter in votes.items():
        needed = AGREEMENT * counter[""]
        found[scope] = max(
            (name for name, count in counter.items() if count >= needed),
            key=lambda name: (
                counter[name] / (counter[""] + held[name] - counter[name]),
                name.count(".") + 1 if name else 0,
            ),
        )
    if found:
        found[""] = ""
    return found
