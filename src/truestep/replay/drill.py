"""Drill down to the module that makes an error: from the model to a block to a leaf.

The first part of a level (`levels`) that is wrong is opened next. Where a cause is asked for, the
other parts that are wrong by themselves are opened, too (`further`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from truestep.judge.divergence import failed, parent, with_origins
from truestep.keys import key_of
from truestep.measure.distance import same_bits
from truestep.pairing.naming import ROOT, named_modules
from truestep.pairing.partners import Partners, namesake
from truestep.replay.forms import holds_the_same
from truestep.replay.isolation import flow, rounding
from truestep.replay.levels import (
    FINAL,
    MAX_LEVELS,
    Known,
    Level,
    Tree,
    expected_of,
    label_and_slot,
    level_of,
)
from truestep.replay.levels import Subject as Subject
from truestep.replay.recorded import Recorded
from truestep.replay.statements import (
    differing_in_step,
    differing_parameters,
    first_operator,
    maker,
    operators,
)
from truestep.verdict import GIVEN, Divergence, Row

Tensor = torch.Tensor


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


def drill(
    candidate: Subject | Recorded,
    trusted: Subject,
    *,
    place: tuple[int, str],
    partners: Partners | None = None,
    known: Known | None = None,
    explain: bool = False,
    again: Callable[[], tuple[Subject, Subject, tuple[int, str]] | None] | None = None,
) -> Drilled:
    """Find the module in which a candidate departs from a trusted model.

    Args:
        candidate, trusted: The two sides, in one precision. Of a recorded candidate, the trusted
            modules are run on what its own were given.
        place: Step and branch of the forwards.
        partners: Which trusted module a candidate's module answers to; None by name.
        known: What earlier drills of the same trusted subject and partners measured; added to.
        explain: Try hypotheses until one explains what is wrong; not of a recorded candidate.
        again: Gives the two sides and their place at another step, where a cause has to hold too.

    Returns:
        The deepest module that is wrong on right inputs.
    """
    tree = Tree.of(trusted.model, partners)
    here, path, levels, tried = ROOT, [ROOT], list[Level](), 0
    found: Divergence | None = None
    for _ in range(MAX_LEVELS):
        parts = tree.parts(here)
        if not parts and found is not None:
            break  # a leaf
        select = frozenset(parts | {here})
        given = candidate.flow if isinstance(candidate, Recorded) else None
        kept = {} if known is None or given is not None else known
        expected = expected_of(trusted, select, tree, place, kept, given)
        level = level_of(here, candidate, trusted, expected, select, tree, place)
        hidden = _hidden(level, tree)
        if hidden:
            tree = tree.without(hidden)
            continue
        levels.append(level)
        if level.divergence is None:
            break
        if found is not None and not level.called & parts:
            if not isinstance(candidate, Recorded):  # of which they may not have been recorded
                found = found.model_copy(update={"kind": "none of its parts is called"})
            break
        found = level.divergence
        at = found.fqn or ROOT
        if at == here or at not in parts or (found.kind or "").startswith(FINAL):
            break
        here = at
        path.append(at)
    if found is not None:
        found = _shared_input(found, levels) or found
        found = _with_operator(found, candidate, trusted, partners)
        if explain and not isinstance(candidate, Recorded):
            from truestep.replay.further import Sides, explained

            later = again() if again is not None else None
            sides = Sides(candidate, trusted, partners, place)
            if later is not None:
                sides = replace(sides, again=Sides(later[0], later[1], partners, later[2]))
            found, tried = explained(found, levels, path, sides)
    rows = [
        row for level in levels for row in level.rows if row.fqn != level.here or row.fqn == ROOT
    ]
    left_out = dict.fromkeys(name for level in levels for name in level.left_out)
    return Drilled(found, tuple(with_origins(rows, found)), tuple(path), tuple(left_out), tried)


def _hidden(level: Level, tree: Tree) -> set[str]:
    """Modules in which what goes wrong between the parts of another may be.

    That is so where nothing that they give could be compared, as of a block that is given text and
    picture in one tensor for two: what is in them may be, and is looked at in their place.
    """
    if level.divergence is None or (level.divergence.fqn or ROOT) != level.here:
        return set()
    seen = {row.fqn for row in level.rows if "/out." in row.name and row.reference is not None}
    called = {label.partition("#")[0] for label in level.called} - {level.here, ROOT}
    return {name for name in called - seen if tree.parts(name)}


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
    if theirs is None or len(names) != 1 or kind.startswith((*FINAL, GIVEN)):
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


def _shared_input(found: Divergence, levels: Sequence[Level]) -> Divergence | None:
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


def _handed(level: Level, given: Iterable[str]) -> list[Tensor]:
    """What the trusted model hands to modules where nothing of the candidate's matches."""
    return [
        tensor
        for name, tensor in level.expected.flow.tensors.items()
        if " ".join(label_and_slot(name)) in level.left_out and label_and_slot(name)[0] in given
    ]


def _maker(level: Level, handed: Sequence[Tensor]) -> str | None:
    """The module without a partner whose output that is."""
    for name, tensor in level.expected.alone.items():
        key = key_of(name)
        if key.outward and any(same_bits(tensor, other) for other in handed):
            return key.fqn
    return None
