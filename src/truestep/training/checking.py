"""Check a training step against a recorded one: forward, loss, backward, optimiser, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from truestep.environment import Environment
from truestep.errors import FOREIGN, TruestepError, UsageError, one_line, surviving
from truestep.judge.divergence import ROOT
from truestep.judge.floor import Limits
from truestep.judge.rows import build_comparison, compare_tensors, row_fields, tensor_info
from truestep.progress import Progress
from truestep.randomness import own_randomness
from truestep.recording.format import Recording
from truestep.replay.check import build_side
from truestep.training.anchors import anchored
from truestep.training.comparable import called_otherwise, names_apart, of_total, with_losses
from truestep.training.forced import Stepped, script_of
from truestep.training.incoming import silent
from truestep.training.locating import Evidence, located
from truestep.training.names import ORDER, call_name, describe, recorded_calls
from truestep.training.pulling import BACKWARD, Pulled, Recorded
from truestep.training.recording import KIND, LOST
from truestep.training.running import Whole, run_forced, run_modules, run_whole
from truestep.training.step import Build, hyperparameters, parameters
from truestep.training.stepping import Optimizers, groups_of, noted
from truestep.turns import taking_turns
from truestep.verdict import Comparison, Row, Side, Verdict

Key = tuple[str, int]
_GIVEN = frozenset({"given", "returned", "pulled", "random"})
"""First parts of names of what is given to a candidate, and not judged."""

_OWN_CODE = frozenset({"input", "loss", "optimizer", "merge"})
_NO_GRADIENT = "no gradient: frozen, or cut off from the loss (detached)"
_NAMED = 3
_AGAIN = "recorded again, they get a drawn one, but for the outermost"
_CHANGED = "the step changes it, and the reference's does not"
_OLD_END = "the weights at the end of the step: the recording holds none; record it again"
_EXTRA = "{}: the recording has no parameter of this name"
_UNPROBED = "{}: steps after the first; what the optimiser holds in its place cannot be told"
_A_GRADIENT = "it has a gradient, and the reference's has none: it is frozen there"


@dataclass
class Made:
    """What a candidate made.

    Attributes:
        whole: How it ran by itself.
        tensors: By the names of rows.
        pulled: Of each module's call.
        failed: Calls that raised, and what.
        raised: What the trainer's own code raised when it was forced.
        apart: Name of a row and what it says, where the parts cannot be set against each other.
        unprobed: Parameters whose later steps cannot be made; see `Stepped`.
        notes: What went otherwise. unread: what is not looked at.
    """

    whole: Whole
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    pulled: Mapping[Key, Pulled] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)
    raised: str = ""
    apart: tuple[str, str] = ("", "")
    unprobed: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


@taking_turns()
@surviving("the training step")
@own_randomness()
def check_training(
    build: Build,
    reference: Recording | str | Path,
    *,
    tolerance: float | None = None,
    pair: str | None = None,
    label: str = "candidate",
    progress: Progress | None = None,
) -> Comparison:
    """Run a candidate's training step on what was recorded, and judge every part by itself.

    Args:
        build: Called without arguments; returns the candidate's `TrainingStep`, on the weights and
            the batch of the reference.
        reference: What `record_training` made, or its path.
        tolerance: Judge rel_l2 by this limit instead of the noise floor.
        pair: Declared working precisions, `candidate/reference`; default the reference's own.
        label: What the candidate is called in the result.
        progress: Told (what, done, total).

    Returns:
        The comparison. Its first divergence is the innermost module whose forward or gradient is
        wrong on right inputs, or the part of the trainer's own code that is.

    Raises:
        FileFormatError: The reference cannot be read.
        UsageError: It is not a recording of a training step, or the candidate is no training step.
    """
    recording = reference if isinstance(reference, Recording) else Recording.open(reference)
    settings = settings_of(recording)
    calls = recorded_calls(recording, settings["wants"])
    side = Side(label=label, environment=dict(Environment.current("cpu", attention=None)))
    told = progress or (lambda what, done, total: None)
    try:
        made = _made(build, recording, settings, calls, told)
    except TruestepError:
        raise
    except FOREIGN as error:  # whatever a candidate raises is its outcome
        return _raised(error, recording, side)
    limits = Limits(floor=recording.manifest.noise_floor, pair=pair, tolerance=tolerance)
    judged = _rows_apart if made.apart[1] else _rows
    rows, unread = judged(made, recording, settings, limits)
    optimizers = _optimizers(made.whole, settings)
    comparison = build_comparison(
        rows,
        actual=side,
        reference=build_side(recording),
        looked_at=_looked_at(made, calls),
        not_looked_at=(*unread, *made.unread, *_silent(calls), *_lost(recording)),
        notes=tuple(dict.fromkeys([*made.notes, *noted(optimizers)])),
    )
    evidence = Evidence(
        actual=made.tensors,
        reference=recording,
        nodes={key: own.nodes for key, own in made.pulled.items()},
        custom={key: own.custom for key, own in made.pulled.items()},
        recorded_nodes={_key(k): v for k, v in settings["nodes"].items()},
        optimizers=optimizers,
        whole=made.whole,
        calls=calls,
        build=build,
    )
    return located(comparison, evidence)


def _optimizers(whole: Whole, settings: Mapping[str, Any]) -> Optimizers:
    step = whole.step
    return Optimizers(
        own=hyperparameters(step.optimizer),
        recorded=settings["optimizer"],
        own_groups=groups_of(step.optimizer, step.model),
        recorded_groups=settings.get("groups", {}),
        size=settings["size"],
        model=step.model,
    )


def settings_of(recording: Recording) -> dict[str, Any]:
    """What a recording of a training step says of itself beside tensors.

    Raises:
        UsageError: It is none.
    """
    found = recording.manifest.settings.get(KIND)
    names = ("wants", "outermost", "nodes", "size", "optimizer", "anchors", "parameters")
    if not isinstance(found, dict) or not all(name in found for name in names):
        raise UsageError(
            "the reference is not a recording of a training step",
            where=str(recording.path or "reference"),
            hint="make one: truestep training record FILE.py:FUNCTION, or record_training()",
        )
    return found


def _key(text: str) -> Key:
    fqn, _, number = text.rpartition("/")
    return fqn, int(number)


def _made(
    build: Build,
    recording: Recording,
    settings: Mapping[str, Any],
    calls: Mapping[Key, Recorded],
    told: Progress,
) -> Made:
    """The candidate by itself, module by module, and forced; by itself alone where its calls have
    no partners."""
    told("training step", 0, 3)
    whole = run_whole(build)
    told("modules", 1, 3)
    made = Made(whole, {f"weight/{n}": p for n, p in _weights(whole).items()})
    outermost = [(fqn, number) for fqn, number in settings["outermost"]]
    made.apart = ("", names_apart(_weights(whole), settings["parameters"]))
    if not made.apart[1]:
        made.apart = called_otherwise(whole, calls, outermost)
    if made.apart[1]:
        made.tensors |= whole.tensors
        return made
    made.pulled = run_modules(whole, calls, failed=made.failed)
    told("trainer", 2, 3)
    backward: dict[Key, dict[str, torch.Tensor]] = {}
    for name in recording:
        place = describe(name)
        if place.stage == BACKWARD:
            slot = name.rpartition("/")[2]
            backward.setdefault((place.fqn or "", place.step or 0), {})[slot] = recording[name]
    script = script_of(recording, whole.calls, backward, outermost=outermost, size=settings["size"])
    stepped = Stepped()
    try:
        run_forced(build, script, done=stepped)
    except TruestepError:
        raise
    except FOREIGN as error:
        made.raised = f"the trainer's own code raised {one_line(error)} on recorded predictions"
        stepped.notes.append(made.raised)
    made.notes += stepped.notes
    made.unprobed = stepped.unprobed
    made.tensors |= {k: v for k, v in whole.tensors.items() if k not in stepped.tensors}
    for key, own in made.pulled.items():
        made.tensors |= own.named(key)
    made.tensors |= {k: v for k, v in stepped.tensors.items() if not k.startswith("unmerged/")}
    made.tensors, made.unread = with_losses(made.tensors, recording)
    return made


def _weights(whole: Whole) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in parameters(whole.step.model)}


def _raised(error: BaseException, recording: Recording, side: Side) -> Comparison:
    text = f"the training step raised {one_line(error)}"
    row = _alone(_any_gradient(recording), recording, Verdict.INVALID, text)
    return build_comparison([row], actual=side, reference=build_side(recording), notes=(text,))


def _any_gradient(recording: Recording) -> str:
    return next(name for name in recording if name.startswith("gradient/"))


def _alone(name: str, recording: Recording, verdict: Verdict, note: str) -> Row:
    """A row that stands for what was recorded, and that the candidate has no partner of."""
    fields = row_fields(name, None, recording.get(name), describe(name))
    return Row(**{**fields, "verdict": verdict, "note": note})


def _rows_apart(
    made: Made, recording: Recording, settings: Mapping[str, Any], limits: Limits
) -> tuple[list[Row], tuple[str, ...]]:
    """Weights, and why nothing else is judged."""
    name, text = made.apart
    if not name:
        return [_alone(_any_gradient(recording), recording, Verdict.INCOMPARABLE, text)], ()
    sides = []
    for head in ("weight/", "gradient/"):
        expected = {n: recording[n] for n in recording if n.startswith(head)}
        own = {n: tensor for n, tensor in made.tensors.items() if n in expected}
        mine, theirs = (anchored(side, expected, settings["anchors"]) for side in (own, expected))
        sides.append(compare_tensors(mine, theirs, limits=limits, describe=describe))
    weights, gradients = sides
    text = f"{text}: the parts have no partners; {of_total(gradients)}"
    return [*weights, _alone(name, recording, Verdict.INCOMPARABLE, text)], ()


def _rows(
    made: Made, recording: Recording, settings: Mapping[str, Any], limits: Limits
) -> tuple[list[Row], tuple[str, ...]]:
    """Rows in the order in which one fault makes the next, and modules that have no partner."""
    partners = {*made.pulled, *made.failed}
    expected: dict[str, torch.Tensor] = {}
    unread: dict[str, None] = {}
    for name in recording:
        place = describe(name)
        if name.partition("/")[0] in _GIVEN:
            continue
        if name.startswith("module/") and (place.fqn, place.step) not in partners:
            unread[f"{place.fqn}: the candidate does not call it"] = None
            continue
        expected[name] = recording[name]
    if not any(name.startswith("after/") for name in expected):
        unread[_OLD_END] = None
    extra = [name for name in made.tensors if name.startswith("weight/") and name not in expected]
    unread |= dict.fromkeys(_EXTRA.format(name.removeprefix("weight/")) for name in extra)
    unread |= dict.fromkeys(_UNPROBED.format(name) for name in sorted(made.unprobed))
    actual = {name: tensor for name, tensor in made.tensors.items() if _is_asked(name, expected)}
    anchors: Mapping[str, float] = settings["anchors"]
    mine, theirs = (anchored(side, expected, anchors) for side in (actual, expected))
    rows = compare_tensors(mine, theirs, limits=limits, describe=describe)
    judged = [_whole_row(row, made, expected, actual) for row in rows]
    kept = [row for row in judged if row is not None]
    return _ordered(kept), tuple(unread)


def _is_asked(name: str, expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor of the candidate is judged: of what it alone has, gradients are, and what
    the step adds to a weight."""
    if name.startswith("after/"):
        return any(other.startswith("after/") for other in expected)
    return name in expected or describe(name).stage in ("gradient", "loss") or "/w." in name


def _whole_row(
    row: Row,
    made: Made,
    expected: Mapping[str, torch.Tensor],
    actual: Mapping[str, torch.Tensor],
) -> Row | None:
    """A row of one side alone: a gradient that does not come is a fault, not only missing."""
    place = describe(row.name)
    missing = row.verdict is Verdict.MISSING
    failed = made.failed.get((place.fqn or "", place.step or 0))
    if failed and row.name.startswith("module/"):
        return row.model_copy(
            update={"verdict": Verdict.INVALID, "note": f"the module raised {failed}"}
        )
    if made.raised and missing and place.stage in _OWN_CODE:
        return row.model_copy(update={"verdict": Verdict.INVALID, "note": made.raised})
    if missing and row.name.startswith("probe/") and place.fqn in made.unprobed:
        return None  # what the step makes of it is judged, and its later steps are not
    if missing and row.name.startswith("loss/") and made.unread:
        return None  # run() returns none: its gradient is judged
    if missing and _nameless(row, made):
        return row.model_copy(update={"note": "the candidate has no parameter of this name"})
    if missing and place.stage in (BACKWARD, "gradient", "optimizer"):
        if not bool(expected[row.name].any()):
            return None  # zero, and none: nothing is trained either way
        note = _NO_GRADIENT if place.stage != "optimizer" else "it is not trained"
        return row.model_copy(update={"verdict": Verdict.INVALID, "note": note})
    alone = row.reference is None and row.actual is not None
    if alone and place.stage in (BACKWARD, "gradient", "optimizer"):
        if not bool(actual[row.name].any()) or _inner_only(row, expected):
            return None
        note = _CHANGED if row.name.startswith("after/") else _A_GRADIENT
        return row.model_copy(update={"verdict": Verdict.INVALID, "note": note})
    own, theirs = actual.get(row.name), expected.get(row.name)
    told: dict[str, Any] = {"actual": tensor_info(own), "reference": tensor_info(theirs)}
    if own is not None and theirs is not None and not row.verdict.passed:
        zeros = own.numel() > 0 and not bool(own.any()) and bool(theirs.any())
        told |= {"note": "zero everywhere"} if zeros and place.stage != "loss" else {}
    return row.model_copy(update=told)


def _nameless(row: Row, made: Made) -> bool:
    """Whether a row is of a parameter that the candidate does not have by this name."""
    place = describe(row.name)
    head, _, name = row.name.rpartition("/")[2].partition(".")
    if place.stage == BACKWARD:
        if head != "w" or (place.fqn, place.step) not in made.pulled:
            return False
        own = made.whole.modules[place.fqn or ""]
        return name not in dict(parameters(own))
    if row.name.partition("/")[0] not in ("gradient", "clipped", "update", "after", "probe"):
        return False
    return f"weight/{place.fqn}" not in made.tensors


def _inner_only(row: Row, expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether a gradient is of a module or parameter that the reference does not have."""
    place = describe(row.name)
    if place.stage != BACKWARD:
        return f"weight/{place.fqn}" not in expected
    head, _, name = row.name.rpartition("/")[2].partition(".")
    whole = name if place.fqn == ROOT else f"{place.fqn}.{name}"
    if head == "w" and f"weight/{whole}" not in expected:
        return True
    call = call_name("module", (place.fqn or "", place.step or 0))
    return not any(other.startswith(f"{call}/") for other in expected)


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """Stage by stage; modules as they return, in the backward the last first, and a part before
    what holds it."""
    by_stage: dict[str, list[Row]] = {stage: [] for stage in ORDER}
    for row in rows:
        by_stage.setdefault(row.stage, []).append(row)
    by_stage[BACKWARD] = _last_first(by_stage[BACKWARD])
    return [row for stage in by_stage for row in by_stage[stage]]


def _last_first(rows: Sequence[Row]) -> list[Row]:
    groups: dict[tuple[str | None, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.fqn, row.step), []).append(row)
    return [row for group in reversed(list(groups.values())) for row in group]


def _lost(recording: Recording) -> list[str]:
    """Harmless changes that the floor does not hold."""
    return [note for note in recording.manifest.notes if note.startswith(LOST)]


def _silent(calls: Mapping[Key, Recorded]) -> tuple[str, ...]:
    """Calls whose recorded gradient is 0: whatever a backward makes of that is 0."""
    found = [f"{fqn} (call {number})" for (fqn, number), own in calls.items() if silent(own)]
    if not found:
        return ()
    named = ", ".join(found[:_NAMED]) + (" and more" if len(found) > _NAMED else "")
    return (f"backward of {len(found)} calls that a gradient of 0 came to: {named}; {_AGAIN}",)


def _looked_at(made: Made, calls: Mapping[Key, Recorded]) -> tuple[str, ...]:
    modules = {fqn for fqn, _ in made.pulled}
    backward = sum(bool(own.pulled) for key, own in calls.items() if key in made.pulled)
    parts = [f"{len(modules)} modules on recorded inputs", f"{backward} pulled back"]
    stages = {describe(name).stage for name in made.tensors}
    parts += [what for what in ("loss", "gradient", "optimizer", "merge") if what in stages]
    return tuple(parts)
