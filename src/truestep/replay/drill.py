"""Drill down to the module that makes an error: from the model to a block to a leaf.

On each level the parts of one module are run on the reference's inputs (`isolation`), with a floor
measured on the trusted model under the same replacement; the first part that is wrong is opened
next. Parts may be built in another way inside, as long as what they return is right. A part that
nothing of the candidate answers to is replaced by what is in it, and what it computes itself is
judged with the module around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch

from truestep.floors import NoiseFloor
from truestep.judge.divergence import failed, locate, parent, with_kind, with_origins
from truestep.judge.floor import Limits, pair_of
from truestep.judge.rows import compare_tensors
from truestep.keys import address, key_of
from truestep.measure.distance import same_bits
from truestep.pairing.naming import ROOT, callable_module, named_modules
from truestep.pairing.partners import Part, Partners, namesake
from truestep.replay.forms import holds_the_same
from truestep.replay.isolation import Flow, Forward, benign_flows, flow, rounding, set_against
from truestep.replay.recorded import Recorded
from truestep.replay.statements import (
    differing_in_step,
    differing_parameters,
    first_operator,
    maker,
    operators,
)
from truestep.runtime.precision import working_dtype
from truestep.verdict import GIVEN, Divergence, Row

Tensor = torch.Tensor
MAX_LEVELS = 12
_FINAL = ("not called", "called once more", "called in another order")
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
class Drilled:
    """Where an error is made.

    Attributes:
        divergence: Module, step, branch and likely kind; None where no part is wrong.
        rows: Every module that was looked at, level by level, in order of execution.
        path: Modules that were opened, from the root on.
        left_out: What could not be compared in modules built in another way: `blocks.0 in.3`.
        tried: Hypotheses about its cause.
    """

    divergence: Divergence | None
    rows: tuple[Row, ...]
    path: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    tried: int = 0


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


def drill(
    candidate: Subject | Recorded,
    trusted: Subject,
    *,
    place: tuple[int, str],
    partners: Partners | None = None,
    known: Known | None = None,
    explain: bool = False,
) -> Drilled:
    """Find the module in which a candidate departs from a trusted model.

    Args:
        candidate, trusted: The two sides, in one precision. Of a recorded candidate, the trusted
            modules are run on what its own were given.
        place: Step and branch of the forwards.
        partners: Which trusted module a candidate's module answers to; None by name.
        known: What earlier drills of the same trusted subject and partners measured; added to.
        explain: Try hypotheses until one explains what is wrong; not of a recorded candidate.

    Returns:
        The deepest module that is wrong on right inputs.
    """
    tree = _Tree.of(trusted.model, partners)
    here, path, levels, tried = ROOT, [ROOT], list[_Level](), 0
    found: Divergence | None = None
    for _ in range(MAX_LEVELS):
        parts = tree.parts(here)
        if not parts and found is not None:
            break  # a leaf
        select = frozenset(parts | {here})
        given = candidate.flow if isinstance(candidate, Recorded) else None
        kept = {} if known is None or given is not None else known
        expected = _expected(trusted, select, tree, place, kept, given)
        level = _level(here, candidate, trusted, expected, select, tree, place)
        levels.append(level)
        if level.divergence is None:
            break
        if found is not None and not level.called & parts:
            if not isinstance(candidate, Recorded):  # of which they may not have been recorded
                found = found.model_copy(update={"kind": "none of its parts is called"})
            break
        found = level.divergence
        at = found.fqn or ROOT
        if at == here or at not in parts or (found.kind or "").startswith(_FINAL):
            break
        here = at
        path.append(at)
    if found is not None:
        found = _shared_input(found, levels) or found
        found = _with_operator(found, candidate, trusted, partners)
        if explain and not isinstance(candidate, Recorded):
            from truestep.replay.causes.finding import cause_of

            cause, tried = cause_of(found, candidate, trusted, partners)
            found = found.model_copy(update={"cause": cause})
    rows = [
        row for level in levels for row in level.rows if row.fqn != level.here or row.fqn == ROOT
    ]
    left_out = dict.fromkeys(name for level in levels for name in level.left_out)
    return Drilled(found, tuple(with_origins(rows, found)), tuple(path), tuple(left_out), tried)


@dataclass(frozen=True)
class _Tree:
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
    def of(cls, model: torch.nn.Module, partners: Partners | None) -> _Tree:
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
class _Level:
    here: str
    divergence: Divergence | None
    rows: Sequence[Row]
    called: frozenset[str]
    actual: Flow
    expected: Expected
    left_out: tuple[str, ...]


def _with_operator(
    found: Divergence, candidate: Subject | Recorded, trusted: Subject, partners: Partners | None
) -> Divergence:
    """Say which operator of the module, on which line, is the first to differ."""
    fqn, kind = found.fqn or ROOT, found.kind or ""
    theirs = named_modules(trusted.model).modules.get(fqn)
    if isinstance(candidate, Recorded):
        told = [candidate.told(fqn, theirs, partners)]
        told.insert(0, _recorded_operator(found, candidate, trusted, partners))
        text = "; ".join(part for part in told if part)
        return found.model_copy(update={"operator": text or None})
    ours = named_modules(candidate.model).modules
    names = [fqn] if fqn in ours and (partners is None or fqn == ROOT) else []
    if partners is not None and fqn != ROOT:
        names = [n for n in ours if any(part.fqn == fqn for part in partners.candidate(n))]
    if theirs is None or len(names) != 1 or kind.startswith((*_FINAL, GIVEN)):
        return found
    own = ours[names[0]]
    place = found.step or 0, found.branch or "main"
    given = flow(trusted.model, trusted.forward, place=place, select={fqn})
    parts = partners.candidate if partners is not None else namesake
    if candidate.before is not None:
        candidate.before()
    made = operators(
        candidate.model, candidate.forward, names[0], given=given, parts=parts, place=place
    )
    reference, benign = (
        operators(trusted.model, trusted.forward, fqn, given=given, change=change, place=place)
        for change in (None, rounding(torch.Generator("cpu").manual_seed(0)))
    )
    same_class = type(own) is type(theirs)
    parting = first_operator(made, reference, benign, same_class=same_class)
    told = [parting.text if parting else None]
    if same_class:
        told.append(differing_parameters(own, theirs))
    text = "; ".join(part for part in told if part)
    file, line = (parting and parting.place) or (None, None)
    return found.model_copy(update={"operator": text or None, "file": file, "line": line})


def _recorded_operator(
    found: Divergence, candidate: Recorded, trusted: Subject, partners: Partners | None
) -> str | None:
    """The first operator to differ of a candidate whose operators were recorded."""
    fqn = found.fqn or ROOT
    own = candidate.own(fqn, partners)
    made = candidate.operators(own) if own is not None else []
    if not made or fqn not in named_modules(trusted.model).modules:
        return None
    place = found.step or 0, found.branch or "main"
    parts = partners.trusted if partners is not None else namesake
    reference, benign = (
        operators(
            trusted.model,
            trusted.forward,
            fqn,
            given=candidate.flow,
            parts=parts,
            change=change,
            place=place,
        )
        for change in (None, rounding(torch.Generator("cpu").manual_seed(0)))
    )
    told = differing_in_step(made, reference, benign)
    wrong = candidate.flow.tensors.get(found.name)
    return told or (None if wrong is None else maker(wrong, made))


def _expected(
    trusted: Subject,
    select: frozenset[str],
    tree: _Tree,
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
        working = _precision(trusted.model)
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


def _precision(model: torch.nn.Module) -> str:
    dtype = working_dtype(model) or torch.float32
    return str(dtype).removeprefix("torch.")


def _level(
    here: str,
    candidate: Subject | Recorded,
    trusted: Subject,
    expected: Expected,
    select: frozenset[str],
    tree: _Tree,
    place: tuple[int, str],
) -> _Level:
    reference = expected.flow
    if isinstance(candidate, Recorded):
        actual = candidate.within(select, reference)
        left_out = {*reference.left_out, *candidate.unseen(reference)}
    else:
        actual = _forced(candidate, reference, select, tree, place)
        left_out = {*actual.left_out, *_not_called(actual, reference, tree)}
    working = _precision(trusted.model)
    theirs = {n: tensor for n, tensor in reference.tensors.items() if n not in left_out}
    both = {n: set_against(n, t, theirs[n]) for n, t in actual.tensors.items() if n in theirs}
    rows = compare_tensors(
        {**actual.tensors, **{name: sides[0] for name, sides in both.items()}},
        {**theirs, **{name: sides[1] for name, sides in both.items()}},
        limits=Limits(expected.floor, pair_of(working, working)),
    )
    rows = [row for row in rows if row.reference is not None or not _other(row, actual, tree)]
    divergence, called = _in_order(locate(rows), actual, reference), frozenset(actual.calls)
    notes = tuple(" ".join(_label_and_slot(name)) for name in sorted(left_out))
    if divergence is not None:
        name = divergence.name
        divergence = with_kind(divergence, actual.tensors.get(name), reference.tensors.get(name))
    return _Level(here, divergence, rows, called, actual, expected, notes)


def _forced(
    candidate: Subject,
    reference: Flow,
    select: frozenset[str],
    tree: _Tree,
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


def _not_called(actual: Flow, reference: Flow, tree: _Tree) -> list[str]:
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


def _other(row: Row, actual: Flow, tree: _Tree) -> bool:
    """Whether a row that only the candidate has is of other code's own ways."""
    if tree.partners is None:
        return False
    around = tree.around(row.fqn or ROOT)
    label = around if around in actual.classes else ROOT
    return actual.classes.get(label) != tree.classes.get(label)


def _same_class(fqn: str, actual: Flow, reference: Flow) -> bool:
    return actual.classes.get(fqn) == reference.classes.get(fqn)


def _label_and_slot(name: str) -> tuple[str, str]:
    key = key_of(name)
    return key.label, key.name


def _shared_input(found: Divergence, levels: Sequence[_Level]) -> Divergence | None:
    """What several wrong modules have in common: an input that could not be compared.

    Where other code hands its modules a tensor in a form of its own (rotary angles for tables of
    cosines), nothing can be put in its place. If it is wrong, all modules that are given it are,
    and no others; unless it can be seen to say the same.

    Returns:
        The trusted module that computes what is handed there in its place, or, where none does,
        the module around those that are given it; None where that is not what is seen.
    """
    last = levels[-1].actual.apart
    for part in last:
        inner = [
            o.label for o in last if o.label != part.label and same_bits(o.tensor, part.tensor)
        ]
        if part.label != found.fqn or inner:  # what only hands it on does not use it
            continue
        groups = []
        above = [level for level in levels if level.here != found.fqn]
        for level in above:
            given = {o.label for o in level.actual.apart if same_bits(o.tensor, part.tensor)}
            wrong = {row.fqn for row in level.rows if failed(row) and "/out." in row.name}
            groups.append(given if wrong - {ROOT} <= given <= wrong else set[str]())
        if not groups or not all(groups) or len(groups[0]) < 2:
            continue
        handed = _handed(above[0], groups[0])
        if holds_the_same(part.tensor, handed):
            return None  # right in another form: the code of all of these is wrong
        kind = (
            f"computed in another way: {part.slot} of {part.label} cannot be compared, and every "
            "module that is given it is wrong, and no other; or all of these use it wrongly"
        )
        at = _maker(above[0], handed) or parent(min(groups[0]))
        return found.model_copy(update={"fqn": at, "kind": kind})
    return None


def _handed(level: _Level, given: Iterable[str]) -> list[Tensor]:
    """What the trusted model hands to modules where nothing of the candidate's matches."""
    return [
        tensor
        for name, tensor in level.expected.flow.tensors.items()
        if " ".join(_label_and_slot(name)) in level.left_out and _label_and_slot(name)[0] in given
    ]


def _maker(level: _Level, handed: Sequence[Tensor]) -> str | None:
    """The module without a partner whose output that is."""
    for name, tensor in level.expected.alone.items():
        key = key_of(name)
        if key.outward and any(same_bits(tensor, other) for other in handed):
            return key.fqn
    return None
