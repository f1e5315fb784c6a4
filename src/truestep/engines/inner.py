"""The module in which a red prediction of an engine goes wrong.

The trusted model is run on the prediction's inputs while each of its modules is given what the
engine's module was, and what it then gives is set against what the engine's gave: nothing is
inherited. Which module answers to which is told by the weights, never by the name alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from truestep.engines.conventions import as_shape
from truestep.engines.expected import Predicted
from truestep.engines.inside import Inside
from truestep.engines.masked import unread
from truestep.engines.run import Pass, Run
from truestep.engines.watch.request import FIRST_CALLS
from truestep.keys import module_name
from truestep.measure.distance import distance
from truestep.pairing.naming import ROOT, named_modules
from truestep.pairing.partners import ROUNDED, Part, Partners, partners_by_weights, partners_of
from truestep.pairing.rename import numbered
from truestep.replay.drill import Drilled, Subject, drill
from truestep.replay.isolation import Flow
from truestep.replay.locating import Into, noted, opened
from truestep.replay.recorded import Recorded
from truestep.replay.statements import Operator
from truestep.text import pasteable
from truestep.verdict import Comparison, Row, Verdict

FAILED = (Verdict.DRIFTED, Verdict.INVALID)
Depth = Literal["steps", "modules"]
LYING = 0.2
"""Share of the modules with weights that have to hold more by another pairing than by their names,
for names that are all there not to be believed. Wrong weights of some modules are a fault."""

_CONTAINERS = ("ModuleList", "ModuleDict", "ParameterList", "ParameterDict")


def at_depth(
    comparison: Comparison,
    run: Run,
    predictions: Mapping[str, Predicted],
    depth: Depth,
    known: Run | None,
) -> Comparison:
    """Add in which module the first red prediction that was looked into goes wrong.

    Args:
        comparison: Of the run's seams.
        run: The engine's.
        predictions: By the names of their rows.
        depth: At `steps`, only say how it is done.
        known: The reference.

    Returns:
        The comparison with rows of modules and a first divergence down to the module, where it is
        the prediction that comes first; else with a note. Where no red prediction was looked into,
        with the command that records one.
    """
    red = [row for row in comparison.rows if row.name in predictions and row.verdict in FAILED]
    if not red:
        return comparison
    seen = [row for row in red if _inside(run, predictions[row.name]) is not None]
    if not seen:
        return _unrecorded(comparison, run, red[0], predictions)
    if depth == "steps":
        return comparison.model_copy(update={"hint": _deeper(comparison, run, known)})
    row = seen[0]
    predicted = predictions[row.name]
    inside = _inside(run, predicted)
    assert inside is not None
    first = comparison.first_divergence
    leads = first is not None and first.name in {each.name for each in red}
    found = _opened(comparison, row, predicted, inside)
    if inside.left:
        note = f"{inside.left} tensors of modules were left out, for which there was no room"
        found = noted(found, note)
    if leads or found.first_divergence == first or found.first_divergence is None:
        return found
    place = found.first_divergence
    told = f"`{row.name}` is wrong by itself, in {place}"
    told += f" ({place.operator})" if place.operator else ""
    update = {"rows": found.rows, "looked_at": found.looked_at, "notes": found.notes}
    return noted(comparison.model_copy(update=update), told)


def _deeper(comparison: Comparison, run: Run, known: Run | None) -> str:
    model = comparison.reference.label if comparison.reference else "MODEL_FOLDER"
    words = ["truestep", "engine", "check", run.label, "--model", model]
    words += ["--reference", known.label] if known is not None else []
    return pasteable([*words, "--depth", "modules"])


def _inside(run: Run, predicted: Predicted) -> Inside | None:
    place = predicted.one.place
    return None if place is None else run.insides.get((place.model, place.number))


def _opened(comparison: Comparison, row: Row, predicted: Predicted, inside: Inside) -> Comparison:
    engine = skeleton(inside)
    place = (row.step or 0, row.branch or "main")
    idle = unread(predicted, place)
    into = Into(
        model=f"trusted {type(predicted.model).__name__}",
        around="the engine's code around its model",
        stage="prediction",
        named=lambda fqn: fqn,
        changes={"step": row.step, "branch": row.branch},
    )

    def drilled(partners: Partners | None) -> Drilled:
        candidate = Recorded(
            _flow(inside, partners, predicted, place),
            engine,
            _written(inside),
            lambda name: _operators(inside, predicted.one, name),
            idle,
        )
        trusted = Subject(predicted.model, predicted.forward)
        return drill(candidate, trusted, place=place, partners=partners)

    models = (engine, predicted.model)
    return opened(comparison, models, drilled, into, rename=None, pair=paired)


class _Recorded(torch.nn.Module):
    """A module of which the name, the class and some weights are known."""

    def forward(self) -> None:
        """It cannot be called: it is a name."""


class _Container(torch.nn.Module):
    """A module that only holds others."""


def skeleton(inside: Inside) -> torch.nn.Module:
    """Modules with an engine's names and classes, and its weights as far as they were kept."""
    made: dict[str, torch.nn.Module] = {}
    for fqn, kind in inside.classes.items():
        name = kind.rpartition(".")[2]
        base = _Container if name in _CONTAINERS else _Recorded
        module = made[fqn] = type(name, (base,), {})()
        head, _, last = fqn.rpartition(".")
        if fqn != ROOT and made.get(head or ROOT) is not None:
            made[head or ROOT].add_module(last, module)
    for name, tensor in inside.weights.items():
        head, _, last = name.rpartition(".")
        if (head or ROOT) in made:
            made[head or ROOT].register_parameter(
                last, torch.nn.Parameter(tensor.detach(), requires_grad=False)
            )
    return made[ROOT]


def paired(
    engine: torch.nn.Module, trusted: torch.nn.Module, *, rename: Mapping[str, str] | None = None
) -> Partners | None:
    """Pair an engine's modules with trusted ones by their weights, layers without these as others.

    Args:
        engine: See `skeleton`.
        trusted: The model.
        rename: Not taken.

    Returns:
        None where every trusted module has a namesake that it means.

    Raises:
        UsageError: No weights were kept.
    """
    partners = partners_of(engine, trusted, rename=rename)
    sides = tuple(dict(named_modules(side).modules) for side in (engine, trusted))
    if {*sides[1]} <= {*sides[0]} and _weighed(sides[0]):  # all names are there
        weighed = partners_by_weights(engine, trusted)
        gain = _agreeing(weighed, *sides) - _agreeing(partners, *sides)
        if gain >= LYING * len(_weighed(sides[0])):
            partners = weighed
    if partners is None:
        return None
    theirs = [*sides[1]]
    own = _layered(partners.own, [*sides[0]])
    cut = _layered(partners.cut, theirs)
    known = {*theirs, *(part.fqn for parts in cut.values() for part in parts)}
    own = {
        n: kept for n, parts in own.items() if (kept := tuple(p for p in parts if p.fqn in known))
    }
    met = {part.fqn.partition("[")[0] for parts in own.values() for part in parts}
    unmatched = tuple(name for name in partners.unmatched if name not in met)
    count = partners.paired + len(partners.unmatched) - len(unmatched)
    return Partners(own, cut, unmatched, count)


def _weighed(modules: Mapping[str, torch.nn.Module]) -> list[str]:
    """Modules that have weights of their own."""
    return [name for name, module in modules.items() if module._parameters]


def _agreeing(
    partners: Partners | None,
    ours: Mapping[str, torch.nn.Module],
    theirs: Mapping[str, torch.nn.Module],
) -> int:
    """How many modules hold the weights of their partner."""
    count = 0
    for name in _weighed(ours):
        answers = partners.candidate(name) if partners is not None else (Part(name),)
        other = theirs.get(answers[0].fqn) if len(answers) == 1 else None
        if other is None:
            continue
        own, held = (dict(side.named_parameters(recurse=False)) for side in (ours[name], other))
        same = own.keys() == held.keys() and all(own[k].shape == t.shape for k, t in held.items())
        count += same and all(distance(own[k], t).rel_l2 < ROUNDED for k, t in held.items())
    return count


def _layered(
    parts: Mapping[str, tuple[Part, ...]], names: Sequence[str]
) -> dict[str, tuple[Part, ...]]:
    """Parts of modules, and for a layer that has none what other layers of its list have."""
    rules: dict[str, tuple[str, tuple[Part, ...]]] = {}
    for name, answers in parts.items():
        place = numbered(name)
        if place is not None:
            rules.setdefault(place[0], (place[1], answers))
    made = dict(parts)
    for name in names:
        place = numbered(name)
        if name in made or place is None or place[0] not in rules:
            continue
        number, answers = rules[place[0]]
        moved = [_moved(part, number, place[1]) for part in answers]
        if all(moved):
            made[name] = tuple(part for part in moved if part is not None)
    return made


def _moved(part: Part, number: str, other: str) -> Part | None:
    """A part in another layer; None where its name has not the number of its own."""
    place = numbered(part.fqn)
    if place is None or place[1] != number:
        return None
    return Part(place[0].replace("*", other, 1), part.rows)


def _flow(
    inside: Inside, partners: Partners | None, predicted: Predicted, place: tuple[int, str]
) -> Flow:
    """What an engine's modules were given and gave, under the trusted modules' names."""
    found = Flow()
    step, branch = place
    found.calls.append(ROOT)
    for event in inside.events:
        parts = partners.candidate(event.fqn) if partners is not None else (Part(event.fqn),)
        for part in parts:
            label = f"{part.fqn}#{event.call}" if event.call else part.fqn
            if event.inward:
                found.calls.append(label)
                found.classes[label] = inside.classes.get(event.fqn, "")
            for slot, tensor in event.tensors.items():
                name = module_name(part.fqn, step=step, branch=branch, slot=slot, call=event.call)
                own = _of_branch(tensor, predicted.one)
                found.tensors[name] = own if event.inward else part.of(own)
    if predicted.actual is not None:
        actual, _ = as_shape(predicted.actual, predicted.expected)
        found.tensors[module_name(ROOT, step=step, branch=branch, slot="out.0")] = actual
    return found


def _operators(inside: Inside, one: Pass, name: str) -> list[Operator]:
    """Operators that ran inside of an engine's module; none where one of them has no results."""
    found = []
    for each in inside.operators:
        if name != ROOT and each.fqn != name and not each.fqn.startswith(f"{name}."):
            continue
        if each.outputs is None:
            return []
        outputs = tuple(_of_branch(tensor, one) for tensor in each.outputs)
        found.append(Operator(each.name, each.arguments, outputs, each.line, each.code))
    return found


def _of_branch(tensor: torch.Tensor, one: Pass) -> torch.Tensor:
    """The rows of a prediction where a tensor has as many as the call had samples."""
    place = one.place
    if place is None or place.rows == 1 or not tensor.ndim:
        return tensor
    lists = any(isinstance(value, tuple) for value in one.arguments.values())
    each = 1 if lists or not one.output.ndim else len(one.output)
    if len(tensor) != place.rows * each:
        return tensor
    return tensor[place.row * each : (place.row + 1) * each]


def _written(inside: Inside) -> dict[str, str]:
    """Where the code of each module is, in words."""
    found = {}
    for fqn, kind in inside.classes.items():
        source = inside.sources.get(kind, "")
        file, _, line = source.rpartition(":")
        at = f" at {Path(file).name}:{line}" if file and not kind.startswith("torch.") else ""
        found[fqn] = f"the engine's `{fqn}`, {kind.rpartition('.')[2]}{at}"
    return found


def _unrecorded(
    comparison: Comparison, run: Run, row: Row, predictions: Mapping[str, Predicted]
) -> Comparison:
    """Say how the modules of a red prediction are recorded."""
    place = predictions[row.name].one.place
    if place is None:
        note = "no module named: what the model was called with was not seen"
        return noted(comparison, note)
    comparison = noted(comparison, f"no module named: those of `{row.name}` were not recorded")
    return comparison.model_copy(update={"hint": recording_command(run, place.number)})


def recording_command(run: Run, number: int) -> str:
    """The command that records a run again with the modules of a call of its model."""
    words = ["truestep", "engine", "run", "--depth", "modules"]
    words += ["--calls", str(number)] if number not in FIRST_CALLS else []
    return pasteable([*words, "--output", run.label, "--", *(run.command or ("PROGRAM",))])
