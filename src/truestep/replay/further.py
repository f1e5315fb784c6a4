"""What else is wrong beside the first module, why, and whether that is all.

A level of a drill runs every module on right inputs, so that one that is wrong there is wrong by
itself. Those are opened like the first, and explained by what explained it. Then the candidate's
model runs once more, freely, with every module that is named giving what the trusted one gives:
within its floor, nothing else is wrong.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.floors import NoiseFloor
from truestep.judge.divergence import failed, with_origins
from truestep.judge.floor import Limits, pair_of
from truestep.judge.rows import compare_tensors
from truestep.keys import key_of, module_name
from truestep.measure.distance import distance
from truestep.nests import leaves
from truestep.pairing.naming import ROOT, named_modules
from truestep.pairing.partners import Part, Partners
from truestep.replay.causes.finding import causes_of
from truestep.replay.isolation import Flow, benign_flows, flow, laid_out, replaced
from truestep.replay.levels import (
    FINAL,
    MAX_LEVELS,
    Level,
    Subject,
    Tree,
    expected_of,
    level_of,
    working_precision,
)
from truestep.verdict import GIVEN, Cause, Divergence, Elsewhere, Recheck, Row

Tensor = torch.Tensor

MOST_OPENED = 16
"""Modules beside the first that are opened and explained; others are named as they were seen."""

MOST_AT_ONCE = 64
"""Modules that are looked at in one forward: all that they are given and return is kept."""


@dataclass(frozen=True)
class Sides:
    """The two sides of a drill.

    Attributes:
        candidate, trusted: Their models and forwards.
        partners: Which of their modules answer to which; None by name.
        place: Step and branch of the forwards.
        again: The same at another step, where a cause has to hold too: at the first one t may be
            what it is divided by.
    """

    candidate: Subject
    trusted: Subject
    partners: Partners | None
    place: tuple[int, str]
    again: Sides | None = None


@dataclass
class _Seen:
    """The modules that are wrong inside of one."""

    inside: dict[str, list[str]] = field(default_factory=dict)

    def deepest(self, fqn: str) -> Iterator[str]:
        """The modules that are wrong inside of one: itself where none is."""
        found = [name for each in self.inside.get(fqn, ()) for name in self.deepest(each)]
        yield from found or [fqn]


def explained(
    found: Divergence, levels: Sequence[Level], path: Sequence[str], sides: Sides
) -> tuple[Divergence, int]:
    """A divergence with its cause, everything else that is wrong by itself, and the recheck.

    Args:
        found: The first module that is wrong.
        levels: What the drill saw on its way there.
        path: Modules that it opened, from the root on.
        sides: Both sides.

    Returns:
        It, and how many hypotheses were tried about the first module.
    """
    cause, tried = _cause(found.fqn or ROOT, sides)
    found = found.model_copy(update={"cause": cause})
    final = (found.kind or "").startswith((*FINAL, GIVEN))
    if final or found.fqn in (None, ROOT):
        return found, tried
    tree = Tree.of(sides.trusted.model, sides.partners)
    seen = _Seen()
    rows = [row for level in levels for row in level.rows]
    wrong = _wrong(rows, found, path)
    opened, closed = wrong[:MOST_OPENED], wrong[MOST_OPENED:]
    _open(opened, tree, sides, seen)
    names = list(dict.fromkeys(name for each in opened for name in seen.deepest(each)))
    only = cause.kind if cause is not None else None
    told = causes_of(names[:MOST_OPENED], sides, first=only) if names else []
    causes = dict(zip(names, (each for each, _ in told), strict=False))
    also = tuple(Elsewhere(fqn=name, cause=causes.get(name)) for name in (*names, *closed))
    recheck = _rechecked([found.fqn or ROOT, *(each.fqn for each in also)], tree, sides)
    return found.model_copy(update={"also": also, "recheck": recheck}), tried


def _cause(fqn: str, sides: Sides) -> tuple[Cause | None, int]:
    """Why a module is wrong, at both steps; and how much was tried."""
    [(cause, tried)] = causes_of([fqn], sides)
    if sides.again is None or cause is None:
        return cause, tried
    [(later, more)] = causes_of([fqn], sides.again, first=cause.kind)
    if later is None or _alike(cause, later):
        return cause if later is not None else None, tried + more
    [(cause, most)] = causes_of([fqn], sides, first=later.kind)
    return cause if cause is not None and _alike(cause, later) else None, tried + more + most


def _alike(one: Cause, other: Cause) -> bool:
    """Whether two causes say the same; what was fitted may differ in its last figures."""
    texts = [_NUMBER.sub("#", each.text) for each in (one, other)]
    values = [[float(v) for v in _NUMBER.findall(each.text)] for each in (one, other)]
    return (
        one.kind == other.kind
        and texts[0] == texts[1]
        and all(
            math.isclose(mine, theirs, rel_tol=1e-2) for mine, theirs in zip(*values, strict=True)
        )
    )


_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.])")


def _wrong(rows: Sequence[Row], found: Divergence, path: Sequence[str]) -> list[str]:
    """Modules that are wrong by themselves, in order of execution, without the first."""
    own = {
        row.fqn or ROOT: None
        for row in with_origins(rows, found)
        if row.origin == "introduced" and key_of(row.name).outward
    }
    around = {*path, found.fqn, ROOT}
    return [name for name in own if name not in around]


def _open(wrong: Sequence[str], tree: Tree, sides: Sides, seen: _Seen) -> None:
    """Open modules level by level, several in one forward, down to the deepest that are wrong."""
    frontier = list(wrong)
    for _ in range(MAX_LEVELS):
        parts = {name: tree.parts(name) for name in frontier}
        frontier = []
        for group in _groups({name: own for name, own in parts.items() if own}):
            select = frozenset(group).union(*(parts[name] for name in group))
            expected = expected_of(sides.trusted, select, tree, sides.place, {}, None)
            level = level_of(
                ROOT, sides.candidate, sides.trusted, expected, select, tree, sides.place
            )
            for name in group:
                inner = [row for row in level.rows if row.fqn in parts[name] and failed(row)]
                if inner and not key_of(inner[0].name).outward:
                    continue  # its own code gives them what is wrong
                outward = (row.fqn or ROOT for row in inner if key_of(row.name).outward)
                seen.inside[name] = list(dict.fromkeys(outward))
                frontier += seen.inside[name]
        if not frontier:
            return


def _groups(parts: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Modules that are opened in one forward."""
    group, count = list[str](), 0
    for name, own in parts.items():
        if group and count + len(own) > MOST_AT_ONCE:
            yield group
            group, count = [], 0
        group.append(name)
        count += len(own) + 1
    if group:
        yield group


def _rechecked(names: Sequence[str], tree: Tree, sides: Sides) -> Recheck | None:
    """The recheck at both steps: the worse of the two; None where one of them says nothing."""
    first = _recheck(names, tree, sides)
    if first is None or sides.again is None:
        return first
    later = _recheck(names, tree, sides.again)
    if later is None:  # not wrong there, or nothing to put in: the first says what it says
        return first
    return min((first, later), key=lambda each: (each.passed, -(each.ratio or 0.0)))


def _recheck(names: Sequence[str], tree: Tree, sides: Sides) -> Recheck | None:
    """What is left once the modules give what they should; None where that cannot be put in, or
    where the model is not wrong in this forward: what is wrong then hangs on those before it."""
    place, nothing = sides.place, frozenset[str]()
    whole = flow(
        sides.trusted.model,
        sides.trusted.forward,
        place=place,
        select=set(names),
        parts=tree.trusted,
    )
    root = {n: t for n, t in whole.tensors.items() if key_of(n).fqn == ROOT}
    reference = Flow(tensors=root, classes=whole.classes)
    theirs = {n: t for n, t in root.items() if key_of(n).outward}
    given = Flow(tensors={n: t for n, t in root.items() if n not in theirs}, classes=whole.classes)
    working = working_precision(sides.trusted.model)
    runs = benign_flows(
        sides.trusted.model,
        sides.trusted.forward,
        reference,
        place=place,
        select=nothing,
        working=working,
    )
    limits = Limits(NoiseFloor(runs=tuple(runs)), pair_of(working, working))
    before = _free(sides.candidate, given, place)
    own = {n: t for n, t in before.tensors.items() if key_of(n).outward}
    if all(row.verdict.passed for row in compare_tensors(own, theirs, limits=limits)):
        return None
    answers = _Answers(set(names), tree, _outputs(whole), place)
    with ExitStack() as stack:
        answers.enter(stack, sides.candidate.model)
        after = _free(sides.candidate, given, place)
    if answers.missed or answers.given != set(names):
        return None
    ours = {n: t for n, t in after.tensors.items() if key_of(n).outward}
    rows = compare_tensors(ours, theirs, limits=limits)
    if not rows or not theirs:
        return None
    return Recheck(
        modules=len(names),
        error_before=_apart(own, theirs),
        error_after=_apart(ours, theirs),
        ratio=max((row.ratio for row in rows if row.ratio is not None), default=None),
        passed=all(row.verdict.passed for row in rows),
        whole=tuple(name for name in names if tree.parts(name)),
    )


def _outputs(reference: Flow) -> dict[str, dict[str, Tensor]]:
    """What modules return in a forward, by label and slot."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in reference.tensors.items():
        key = key_of(name)
        if key.outward:
            found.setdefault(key.label, {})[key.name] = tensor
    return found


def _free(candidate: Subject, given: Flow, place: tuple[int, str]) -> Flow:
    """What a candidate's model gives where it alone is given right inputs."""
    if candidate.before is not None:
        candidate.before()
    return flow(candidate.model, candidate.forward, place=place, given=given, select=frozenset())


def _apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest relative distance of what a model gives."""
    errors = (
        distance(ours[name].float(), tensor.float()).rel_l2
        if name in ours and ours[name].shape == tensor.shape
        else float("inf")
        for name, tensor in theirs.items()
    )
    return max(errors, default=float("inf"))


class _Answers:
    """Has the candidate's modules return what the trusted ones do.

    Attributes:
        given: Modules that were answered for.
        missed: Whether one returned something that nothing of the trusted one's could replace.
    """

    def __init__(
        self,
        names: set[str],
        tree: Tree,
        outputs: Mapping[str, Mapping[str, Tensor]],
        place: tuple[int, str],
    ) -> None:
        self.names, self.tree, self.outputs, self.place = names, tree, outputs, place
        self.seen: Counter[str] = Counter()
        self.given: set[str] = set()
        self.missed = False

    def enter(self, stack: ExitStack, model: torch.nn.Module) -> None:
        """Hook the modules for as long as the stack is entered."""
        for own, module in named_modules(model).modules.items():
            parts = tuple(part for part in self.tree.candidate(own) if part.fqn in self.names)
            if parts and own != ROOT:
                hook = self._hook(parts)
                stack.callback(module.register_forward_hook(hook).remove)

    def _hook(self, parts: Sequence[Part]) -> Any:
        def answer(module: Any, args: Any, output: Any) -> Any:
            swaps: dict[int, Tensor] = {}
            for part in parts:
                label = self._label(part)
                theirs = self.outputs.get(label, {})
                for slot, tensor in leaves(output, "out"):
                    made = _put(swaps.get(id(tensor), tensor), theirs.get(slot), part)
                    self.missed |= made is None
                    if made is not None:
                        swaps[id(tensor)] = made
                self.given.add(part.fqn)
            return replaced(output, swaps)

        return answer

    def _label(self, part: Part) -> str:
        call = self.seen[part.fqn]
        self.seen[part.fqn] += 1
        step, branch = self.place
        return key_of(
            module_name(part.fqn, step=step, branch=branch, slot="out.0", call=call)
        ).label


def _put(tensor: Tensor, theirs: Tensor | None, part: Part) -> Tensor | None:
    """A candidate's output with a trusted one in the place of a part of it."""
    own = part.of(tensor)
    if theirs is None or tensor.is_complex():
        return None
    laid = laid_out(theirs, own)
    if laid is None:
        return None
    laid = laid.to(tensor.device, tensor.dtype)
    if own is tensor:
        return laid.clone()
    made = tensor.clone()
    made[..., list(part.rows or ())] = laid
    return made
