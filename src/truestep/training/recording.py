"""Record a training step: what its modules, its loss and its optimiser make, and how far harmless
changes move that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from truestep.environment import Environment
from truestep.errors import FOREIGN, TruestepError, UsageError, one_line, surviving
from truestep.floors import NoiseFloor, NoiseRun
from truestep.judge.floor import pair_of
from truestep.judge.refusals import refuse_empty_content, refuse_unsteady
from truestep.judge.rows import measured_run
from truestep.measure.plain import plain
from truestep.progress import Progress
from truestep.randomness import own_randomness
from truestep.recording.format import Recording
from truestep.recording.table import manifest_of
from truestep.runtime.precision import working_dtype
from truestep.training.anchors import anchored, anchors_of
from truestep.training.benign import AS_IT_IS, Change, changes
from truestep.training.forced import Stepped, script_of
from truestep.training.incoming import with_drawn
from truestep.training.names import call_name, recorded_calls
from truestep.training.pulling import Pulled, Recorded
from truestep.training.running import Whole, run_forced, run_modules, run_whole
from truestep.training.step import Build, hyperparameters
from truestep.training.stepping import groups_of
from truestep.turns import taking_turns

KIND = "training"
"""Setting of a recording that is one of a training step: what was found of it beside tensors."""

LOST = "noise floor without"
"""Begins the note of a harmless change that the step could not be run under."""

Key = tuple[str, int]


@dataclass(frozen=True)
class Trained:
    """One pass over everything.

    Attributes:
        tensors: By the names of rows.
        pulled: Of every module's call.
        stepped: Of the trainer's own code.
    """

    tensors: dict[str, torch.Tensor]
    pulled: Mapping[Key, Pulled]
    stepped: Stepped


@taking_turns()
@surviving("the training step")
@own_randomness()
def record_training(
    build: Build,
    *,
    path: str | Path | None = None,
    select: str = "*",
    floor: bool = True,
    progress: Progress | None = None,
) -> Recording:
    """Record a training step of the trusted side, with its measured noise floor.

    The trusted side may be the model that inference runs: autograd's derivative of that is what a
    trainer's backward has to be.

    Args:
        build: Called without arguments; returns a `TrainingStep`, the same every time.
        path: Where to write the recording; None keeps it in memory.
        select: Modules to look into by name, as `blocks.*,!*.norm*`.
        floor: Measure the noise floor (about eight steps more).
        progress: Told (what, done, total).

    Returns:
        The recording; its names are those of `truestep.training.names`.

    Raises:
        UsageError: It is no training step, gives nothing to judge by, or something else the second
            time.
        WriteError: The recording cannot be written.
    """
    whole = run_whole(build, select=select, copies=True)
    calls = _recorded(whole)
    if not any(own.pulled for own in calls.values()):
        raise UsageError(
            "no gradient came back to the model",
            where=type(whole.step.model).__name__,
            likely="run() calls no backward, or the model runs without gradients",
        )
    calls, drawn = with_drawn(calls, whole.outermost)
    tensors = _inputs(whole, calls)
    wants = {f"{fqn}/{number}": sorted(own.wants) for (fqn, number), own in calls.items()}
    trained = trained_step(build, whole, calls, tensors)
    refuse_empty_content(_gradients(trained.tensors), where="gradients of the training step")
    notes = [*trained.stepped.notes]
    measured, anchors = None, dict[str, float]()
    settings: dict[str, Any] = {
        "wants": wants,
        "outermost": [list(key) for key in whole.outermost],
        "drawn": [list(key) for key in drawn],
        "nodes": {f"{f}/{n}": dict(p.nodes) for (f, n), p in trained.pulled.items()},
        "size": trained.stepped.size,
        "optimizer": hyperparameters(whole.step.optimizer),
        "groups": groups_of(whole.step.optimizer, whole.step.model),
        "parameters": sorted(whole.weights),
    }
    if floor:
        known = {**tensors, **trained.tensors}
        runs, anchors, more = _measure(build, whole, known, trained, settings, progress)
        measured = NoiseFloor(runs=tuple(runs))
        notes += more
    settings["anchors"] = anchors
    tensors |= trained.tensors
    return _written(tensors, settings, measured, notes, path, forwards=len(whole.outermost))


def trained_step(
    build: Build,
    whole: Whole,
    calls: Mapping[Key, Recorded],
    recorded: Mapping[str, torch.Tensor],
    *,
    change: Change = AS_IT_IS,
    size: float = 0.0,
    backward: Mapping[Key, Mapping[str, torch.Tensor]] | None = None,
) -> Trained:
    """Run the modules of a step by themselves, then its own code on what they are to give.

    Args:
        build: Makes the step. whole: how it ran by itself.
        calls: What is given to each module. recorded: what was recorded.
        change: A harmless change.
        size: Of drawn gradients; 0: that of those that come.
        backward: Recorded gradients of the outermost calls; None: those that come of it.
    """
    pulled = run_modules(whole, calls, change=change)
    named = {name: value for key, own in pulled.items() for name, value in own.named(key).items()}
    backward = backward or {key: own.backward for key, own in pulled.items()}
    script = script_of(recorded, whole.calls, backward, outermost=whole.outermost, size=size)
    stepped = run_forced(build, script, change=change)
    tensors = {**whole.tensors, **named, **stepped.tensors}
    return Trained(merged_as_trained(tensors), pulled, stepped)


def merged_as_trained(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a recording, what the merged model is to give is what the trainer's own model gives."""
    found = dict(tensors)
    for name in tensors:
        head, _, rest = name.partition("/")
        if head == "unmerged":
            found[f"merged/{rest}"] = found.pop(name)
    return found


def _recorded(whole: Whole) -> dict[Key, Recorded]:
    return {
        key: Recorded(call.given, call.wants, call.pulled, call.random)
        for key, call in whole.calls.items()
    }


def _inputs(whole: Whole, calls: Mapping[Key, Recorded]) -> dict[str, torch.Tensor]:
    """What a candidate is given: inputs, gradients, random numbers; and the weights."""
    tensors = {f"weight/{name}": value for name, value in whole.weights.items()}
    for key, own in calls.items():
        tensors |= {call_name("given", key, path): value for path, value in own.given.items()}
        tensors |= {call_name("pulled", key, path): value for path, value in own.pulled.items()}
        if own.random is not None:
            tensors[call_name("random", key)] = own.random
    for key in whole.outermost:
        made = whole.calls[key].made
        tensors |= {call_name("returned", key, path): value for path, value in made.items()}
    return tensors


def _gradients(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("gradient/")}


def _measure(
    build: Build,
    whole: Whole,
    known: Mapping[str, torch.Tensor],
    trained: Trained,
    settings: Mapping[str, Any],
    progress: Progress | None,
) -> tuple[list[NoiseRun], dict[str, float], list[str]]:
    """Benign runs, what is judged beside an anchor, and what was left out."""
    dtype = working_precision(whole)
    todo = changes(dtype)
    calls = recorded_calls(known, settings["wants"])
    backward = {key: own.backward for key, own in trained.pulled.items()}
    made: list[tuple[Change, dict[str, torch.Tensor]]] = []
    runs: list[NoiseRun] = []
    notes: list[str] = []
    anchors: dict[str, float] | None = None

    def measured(change: Change, values: Mapping[str, torch.Tensor]) -> NoiseRun:
        assert anchors is not None
        recorded = {name: trained.tensors[name] for name in values}
        mine, theirs = (anchored(side, recorded, anchors) for side in (values, recorded))
        both = {name: (value, theirs[name]) for name, value in mine.items()}
        return measured_run(change.kind, change.detail, pair_of(dtype, dtype), both)

    for done, change in enumerate(todo):
        try:
            own = run_whole(build, select="(root)", change=change)
            own.calls, own.modules, own.step = whole.calls, whole.modules, whole.step
            again = trained_step(
                build, own, calls, known, change=change, size=settings["size"], backward=backward
            )
        except TruestepError:
            raise
        except FOREIGN as error:
            notes.append(f"{LOST} {change.kind} ({change.detail}): {one_line(error)}")
            continue
        values = _as_recorded(again, trained)
        made.append((change, values))
        if change.kind == "repeat" or (anchors is None and done >= 1):
            anchors = anchors or anchors_of(trained.tensors, [v for c, v in made])
        if anchors is not None:
            runs += [measured(*one) for one in made]
            refuse_unsteady(runs[-1:], model=whole.step.model)
            made.clear()
        if progress:
            progress(f"noise floor: {change.kind}", done + 1, len(todo))
    return runs, anchors or {}, [note[:200] for note in notes]


def _as_recorded(again: Trained, trained: Trained) -> dict[str, torch.Tensor]:
    """What a benign run made, of the same names and shapes; the merged model's own answers."""
    found = {**again.tensors}
    for name, value in again.stepped.tensors.items():
        if name.startswith("merged/"):
            found[name] = value
    return {
        name: value
        for name, value in found.items()
        if name in trained.tensors and trained.tensors[name].shape == value.shape
    }


def working_precision(whole: Whole) -> str:
    """Dtype that the model's products are computed in: autocast's where that is on."""
    for key in whole.outermost:
        for enabled, dtype in whole.calls[key].autocast.values():
            if enabled:
                return str(dtype).removeprefix("torch.")
    return str(working_dtype(whole.step.model) or torch.float32).removeprefix("torch.")


def _written(
    tensors: Mapping[str, torch.Tensor],
    settings: dict[str, Any],
    floor: NoiseFloor | None,
    notes: list[str],
    path: str | Path | None,
    *,
    forwards: int,
) -> Recording:
    kept = {name: plain(t).to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    manifest = manifest_of(
        kept,
        Environment.current("cpu", attention=None),
        settings={KIND: settings},
        forwards=forwards,
        noise_floor=floor,
        notes=tuple(notes),
    )
    return Recording.in_memory(kept, manifest).kept(path)
