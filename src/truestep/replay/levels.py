"""One level of a drill: the parts of modules on the reference's inputs, with their measured floor.

On each level the parts of one or several modules are run on the reference's inputs (`isolation`),
with a floor measured on the trusted model under the same replacement. Parts may be built in another
way inside, as long as what they return is right. A part that nothing of the candidate answers to is
replaced by what is in it, and what it computes itself is judged with the module around it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch

from truestep.floors import NoiseFloor
from truestep.judge.divergence import locate, parent, with_kind
from truestep.judge.floor import Limits, pair_of
from truestep.judge.rows import compare_tensors
from truestep.keys import address, key_of
from truestep.pairing.naming import ROOT, callable_module, named_modules
from truestep.pairing.partners import Part, Partners, namesake
from truestep.replay.isolation import Flow, Forward, benign_flows, flow, set_against
from truestep.replay.recorded import Recorded
from truestep.runtime.precision import working_dtype
from truestep.verdict import Divergence, Row

Tensor = torch.Tensor

MAX_LEVELS = 12

FINAL = ("not called", "called once more", "called in another order")
"""Kinds that say enough: what is inside need not be opened."""


@dataclass(frozen=True)
class Subject:
    """A model and a forward of it on recorded inputs.

    Attributes:
        model: Its modules are hooked.
        forward: Runs it once.
        before: What a run does before this forward (another branch), for models that keep
            something from one call to the next.
    """

    model: torch.nn.Module
    forward: Forward
    before: Forward | None = None


@dataclass(frozen=True)
class Expected:
    """What the parts of one module do in the trusted model.

    Attributes:
        flow: What each receives and returns.
        floor: The noise floor of each.
        alone: What modules return that nothing of the candidate answers to, by name.
    """

    flow: Flow
    floor: NoiseFloor
    alone: Mapping[str, Tensor]


Known = MutableMapping[frozenset[str], Expected]
"""Levels measured before, of one trusted model and forward, by the modules looked at."""


@dataclass(frozen=True)
class Tree:
    """The trusted model's modules, as far as the candidate answers to them.

    Attributes:
        names: Modules (and parts of fused ones) with a partner.
        classes: Their classes and those of the modules without a partner.
        partners: None where both sides have the same names.
    """

    names: frozenset[str]
    classes: dict[str, str]
    partners: Partners | None

    @classmethod
    def of(cls, model: torch.nn.Module, partners: Partners | None) -> Tree:
        modules = {n: m for n, m in named_modules(model).modules.items() if n != ROOT}
        classes = {n: type(m).__name__ for n, m in modules.items() if callable_module(m)}
        if partners is None:
            return cls(frozenset(classes), classes, None)
        met = {part.fqn for parts in partners.own.values() for part in parts}
        cut = {part.fqn for parts in partners.cut.values() for part in parts}
        return cls(frozenset(met & (set(classes) | cut)), classes, partners)

    def parts(self, fqn: str) -> set[str]:
        """The modules directly inside one, those inside of it where a module has no partner."""
        return {name for name in self.names if self.around(name) == fqn}

    def around(self, fqn: str) -> str:
        """The nearest module around one that has a partner."""
        found = parent(fqn)
        while found != ROOT and found not in self.names:
            found = parent(found)
        return found

    def without(self, names: Collection[str]) -> Tree:
        """The same, where some modules are not looked at as a whole."""
        return replace(self, names=self.names - {*names})

    @property
    def alone(self) -> frozenset[str]:
        """Modules that nothing of the candidate answers to."""
        fused = set(self.partners.cut) if self.partners is not None else set()
        return frozenset(set(self.classes) - self.names - fused)

    def candidate(self, fqn: str) -> tuple[Part, ...]:
        return namesake(fqn) if self.partners is None else self.partners.candidate(fqn)

    def trusted(self, fqn: str) -> tuple[Part, ...]:
        return namesake(fqn) if self.partners is None else self.partners.trusted(fqn)


@dataclass(frozen=True)
class Level:
    """What one level showed.

    Attributes:
        here: The module whose parts were looked at.
        divergence: The first of them that is wrong, or None.
        rows: All of them, in order of execution.
        called: Those that the candidate calls.
        actual, expected: The two sides.
        left_out: What could not be compared.
    """

    here: str
    divergence: Divergence | None
    rows: Sequence[Row]
    called: frozenset[str]
    actual: Flow
    expected: Expected
    left_out: tuple[str, ...]


def expected_of(
    trusted: Subject,
    select: frozenset[str],
    tree: Tree,
    place: tuple[int, str],
    known: Known,
    given: Flow | None,
) -> Expected:
    """The trusted side of a level, measured once; on what a candidate was given, where it is."""
    if select not in known:
        reference = flow(
            trusted.model,
            trusted.forward,
            place=place,
            given=given,
            select=select | tree.alone,
            parts=tree.trusted,
        )
        alone = {
            name: reference.tensors.pop(name)
            for name in [*reference.tensors]
            if key_of(name).fqn in tree.alone
        }
        working = working_precision(trusted.model)
        runs = benign_flows(
            trusted.model,
            trusted.forward,
            reference,
            place=place,
            given=given,
            select=select,
            parts=tree.trusted,
            working=working,
        )
        known[select] = Expected(reference, NoiseFloor(runs=tuple(runs)), alone)
    return known[select]


def working_precision(model: torch.nn.Module) -> str:
    """Name of the dtype that a model works in; float32 where its weights do not say."""
    dtype = working_dtype(model) or torch.float32
    return str(dtype).removeprefix("torch.")


def level_of(
    here: str,
    candidate: Subject | Recorded,
    trusted: Subject,
    expected: Expected,
    select: frozenset[str],
    tree: Tree,
    place: tuple[int, str],
) -> Level:
    reference = expected.flow
    if isinstance(candidate, Recorded):
        actual = candidate.within(select, reference)
        left_out = {*reference.left_out, *candidate.unseen(reference)}
    else:
        actual = _forced(candidate, reference, select, tree, place)
        left_out = {*actual.left_out, *_not_called(actual, reference, tree)}
    working = working_precision(trusted.model)
    theirs = {n: tensor for n, tensor in reference.tensors.items() if n not in left_out}
    both = {n: set_against(n, t, theirs[n]) for n, t in actual.tensors.items() if n in theirs}
    if isinstance(candidate, Recorded):
        both = {name: candidate.read(name, *sides) for name, sides in both.items()}
    rows = compare_tensors(
        {**actual.tensors, **{name: sides[0] for name, sides in both.items()}},
        {**theirs, **{name: sides[1] for name, sides in both.items()}},
        limits=Limits(expected.floor, pair_of(working, working)),
    )
    rows = [row for row in rows if row.reference is not None or not _other(row, actual, tree)]
    divergence, called = _in_order(locate(rows), actual, reference), frozenset(actual.calls)
    notes = tuple(" ".join(label_and_slot(name)) for name in sorted(left_out))
    if divergence is not None:
        name = divergence.name
        divergence = with_kind(divergence, actual.tensors.get(name), reference.tensors.get(name))
    return Level(here, divergence, rows, called, actual, expected, notes)


def _forced(
    candidate: Subject,
    reference: Flow,
    select: frozenset[str],
    tree: Tree,
    place: tuple[int, str],
) -> Flow:
    """What a candidate's modules give on the reference's inputs."""
    if candidate.before is not None:
        candidate.before()
    return flow(
        candidate.model,
        candidate.forward,
        place=place,
        given=reference,
        select=select,
        parts=tree.candidate,
    )


def _in_order(found: Divergence | None, actual: Flow, reference: Flow) -> Divergence | None:
    """The first member of a list that runs at another place in it, where that is what is wrong."""
    if found is None or not (found.kind or "").startswith("before "):
        return found
    first = address(found.name).fqn or ""
    ran, runs = (
        [c for c in side.calls if _list(c) and _list(c) == _list(first)]
        for side in (actual, reference)
    )
    if set(ran) != set(runs) or ran == runs:
        return found
    at, instead = next((b, a) for a, b in zip(ran, runs, strict=True) if a != b)
    kind = f"called in another order: `{instead}` in its place"
    return found.model_copy(update={"fqn": at, "kind": kind})


def _list(fqn: str) -> str | None:
    """The list that a module is a member of: `blocks` of `blocks.3`."""
    head, _, last = fqn.rpartition(".")
    return head if last.isdecimal() else None


def _not_called(actual: Flow, reference: Flow, tree: Tree) -> list[str]:
    """Tensors of calls that a candidate does not make where its code is another's.

    That a module is not called is evidence only where the module around it is of the same class:
    other code may use its weights in another way.
    """
    called = set(actual.calls)
    return [
        name
        for name in reference.tensors
        if (key := key_of(name)).label not in called
        and not _same_class(tree.around(key.fqn or ROOT), actual, reference)
    ]


def _other(row: Row, actual: Flow, tree: Tree) -> bool:
    """Whether a row that only the candidate has is of other code's own ways."""
    if tree.partners is None:
        return False
    around = tree.around(row.fqn or ROOT)
    label = around if around in actual.classes else ROOT
    return actual.classes.get(label) != tree.classes.get(label)


def _same_class(fqn: str, actual: Flow, reference: Flow) -> bool:
    return actual.classes.get(fqn) == reference.classes.get(fqn)


def label_and_slot(name: str) -> tuple[str, str]:
    key = key_of(name)
    return key.label, key.name
