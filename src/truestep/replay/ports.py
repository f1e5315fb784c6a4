"""Replay a trace on a port: every module on the inputs that the official one was given.

For an official implementation that lives in another environment: record a full trace with inputs
there (`truestep.capture`, or the single-file recorder), replay it here. No module sees the error of
another, so each is judged by itself, against the port's own rounding on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from truestep.errors import FOREIGN, UsageError, surviving
from truestep.floors import NoiseFloor
from truestep.judge.divergence import ROOT, locate, with_kind, with_origins
from truestep.judge.floor import Limits, pair_of
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.judge.sentence import with_divergence
from truestep.keys import address, key_of
from truestep.pairing.naming import named_modules
from truestep.pairing.partners import Names, Part, namesake
from truestep.pairing.rename import renamed
from truestep.recording.format import Recording
from truestep.replay.isolation import Flow, Forward, benign_flows, flow
from truestep.runtime.precision import working_dtype
from truestep.text import listed
from truestep.turns import taking_turns
from truestep.verdict import Comparison, Divergence, Row, Side

Tensor = torch.Tensor
Call = Callable[..., Any]


@taking_turns()
@surviving("the port")
def replay_trace(
    model: torch.nn.Module,
    trace: str | Path | Recording,
    *,
    call: Call | None = None,
    rename: Mapping[str, str] | None = None,
    steps: Collection[int] | None = None,
    tolerance: float | None = None,
) -> Comparison:
    """Run every module of a port on the inputs in a trace, and judge what each returns.

    Args:
        model: The port, in the precision and on the device it is to be judged in.
        trace: A trace at level `full` with inputs, of the official model.
        call: Runs the model on the recorded arguments of the root (tensors in their places, and by
            name); by default `model(...)` with just these.
        rename: The port's module names to the official ones, `*` for one part of a name. What it
            leaves out keeps its name; modules without a partner are left out, which is noted.
        steps: Steps to replay; default the first, the middle and the last that were recorded.
        tolerance: Judge rel_l2 by this limit instead of the port's own rounding.

    Returns:
        One row a tensor; `first_divergence` is the first module that is wrong on right inputs, or
        the one around code that gave another input.

    Raises:
        FileFormatError: The trace is damaged.
        UsageError: It holds no full tensors or no inputs, or the model cannot be run on them.
    """
    recording = trace if isinstance(trace, Recording) else Recording.open(trace)
    places = _places(recording, steps)
    outer = _outer(recording, model)
    names, left_out = _names(model, recording, rename, outer)
    rows: list[Row] = []
    first: Divergence | None = None
    for place in places:
        expected = _expected(recording, model, place, outer=outer, same_names=not rename)
        forward = _forward(model, expected, call, place)
        try:
            actual = flow(model, forward, given=expected, place=place, parts=names)
        except FOREIGN as error:  # whatever a port's code raises on these arguments
            raise UsageError(
                f"the port raised {type(error).__name__} on the recorded inputs: {error}",
                where="step {}, {}".format(*place),
                hint="call=lambda **recorded: port(...) passes what the trace does not hold",
            ) from error
        limits = Limits(tolerance=tolerance)
        if tolerance is None:
            limits = _own_rounding(model, forward, actual, place=place, parts=names)
        unseen = {*actual.left_out, *_unmatched(expected, actual)}
        wanted = {name: t for name, t in expected.tensors.items() if name not in unseen}
        found = compare_tensors(actual.tensors, wanted, limits=limits)
        departs = locate(found)
        rows += with_origins(found, departs)
        if first is None and departs is not None:
            name = departs.name
            first = with_kind(departs, actual.tensors.get(name), wanted.get(name))
    result = build_comparison(
        rows,
        actual=Side(label=type(model).__name__),
        reference=Side(
            label=str(recording.path or "trace"),
            path=str(recording.path) if recording.path else None,
            environment=dict(recording.manifest.environment),
        ),
        looked_at=(
            f"{len({row.fqn for row in rows})} modules on recorded inputs",
            f"steps {', '.join(f'{step} {branch}' for step, branch in places)}",
        ),
        not_looked_at=left_out,
    )
    return with_divergence(result, first, ()) if first is not None else result


def _own_rounding(
    model: torch.nn.Module, forward: Forward, reference: Flow, **options: Any
) -> Limits:
    """Limits by the port's own rounding, module by module; see `benign_flows`."""
    dtype = working_dtype(model) or torch.float32
    working = str(dtype).removeprefix("torch.")
    pair = pair_of(working, working)
    runs = benign_flows(model, forward, reference, working=working, **options)
    return Limits(NoiseFloor(runs=tuple(runs)), pair)


def _places(recording: Recording, steps: Collection[int] | None) -> list[tuple[int, str]]:
    """Steps and branches to replay, in order."""
    manifest = recording.manifest
    entries = [entry for entry in manifest.tensors if entry.name.startswith("module/")]
    inputs = any("/in." in entry.name for entry in entries)
    if manifest.level != "full" or not inputs:
        raise UsageError(
            "the trace cannot be replayed",
            where=str(recording.path or "trace"),
            measured=f"level {manifest.level}, {'with' if inputs else 'without'} inputs",
            hint="record it with --level full --inputs",
        )
    found = list(dict.fromkeys((e.step or 0, e.branch or "main") for e in entries))
    every = sorted({step for step, _ in found})
    chosen = {every[0], every[len(every) // 2], every[-1]} if steps is None else set(steps)
    missing = sorted(chosen - set(every))
    if missing:
        raise UsageError(
            f"no step {missing[0]} in the trace",
            measured=f"its steps are {every[0]} to {every[-1]}",
        )
    return [place for place in found if place[0] in chosen]


def _outer(recording: Recording, model: torch.nn.Module) -> str:
    """The class that begins the names of this model in a program's trace; empty without one.

    Of several models of the program, that of the port's class.
    """
    names = {entry.fqn for entry in recording.manifest.tensors if entry.fqn}
    classes = {name.partition(".")[0] for name in names}
    if ROOT in names or not classes <= names or classes & {*named_modules(model).modules}:
        return ""
    own = type(model).__name__
    return own if own in classes else classes.pop() if len(classes) == 1 else ""


def _inner(fqn: str, outer: str) -> str | None:
    """A name of a trace as the model has it; None where it is of another model."""
    if not outer:
        return fqn
    if fqn == outer:
        return ROOT
    return fqn.removeprefix(f"{outer}.") if fqn.startswith(f"{outer}.") else None


def _names(
    model: torch.nn.Module, recording: Recording, rename: Mapping[str, str] | None, outer: str
) -> tuple[Names, tuple[str, ...]]:
    """Which official module each of the port's answers to, and what has no partner, in words."""
    every = (_inner(entry.fqn or ROOT, outer) for entry in recording.manifest.tensors)
    theirs = dict.fromkeys(name for name in every if name is not None and name != ROOT)
    mapped = {
        own: _inner(target, outer) or target if (target := renamed(own, rename or {})) else own
        for own in named_modules(model).modules
        if own != ROOT
    }
    met = [name for name in mapped.values() if name in theirs]
    if theirs and not met:
        raise UsageError(
            "no module of the port has the name of one in the trace",
            measured=f"port: {listed([*mapped])}; trace: {listed([*theirs])}",
            hint="give --rename MAP.toml (in Python rename={'layers.*': 'blocks.*'}): the port's "
            "names, then the trace's",
        )
    alone = [name for name in theirs if name not in met]
    words = (f"without a partner in the port: {listed(alone)}",) if alone else ()
    if not rename:
        return namesake, words
    return (lambda fqn: (Part(mapped[fqn]),) if mapped.get(fqn) in theirs else ()), words


def _expected(
    recording: Recording,
    model: torch.nn.Module,
    place: tuple[int, str],
    *,
    outer: str,
    same_names: bool,
) -> Flow:
    """One recorded forward. Modules of one name count as one class: their calls must match."""
    found = Flow()
    classes = {n: type(m).__name__ for n, m in named_modules(model).modules.items()}
    for entry in recording.manifest.tensors:
        if (entry.step, entry.branch) != place or not entry.name.startswith("module/"):
            continue
        fqn = _inner(entry.fqn or ROOT, outer)
        if fqn is None:
            continue
        key = key_of(entry.name).but(fqn=fqn)
        found.tensors[str(key)] = recording[entry.name]
        if key.label not in found.calls:
            found.calls.append(key.label)
        if same_names and fqn in classes:
            found.classes[key.label] = classes[fqn]
    return found


def _forward(
    model: torch.nn.Module, expected: Flow, call: Call | None, place: tuple[int, str]
) -> Callable[[], Any]:
    """The model on the root's recorded arguments."""
    placed: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    where = next(iter(p.device for p in model.parameters()), torch.device("cpu"))
    dtype = working_dtype(model) or torch.float32
    for name, tensor in expected.tensors.items():
        given = key_of(name)
        slot = given.name
        if given.label != ROOT or not given.inward:
            continue
        key = slot.removeprefix("in.")
        if "." in key:
            raise UsageError(
                f"the model is given a nest of tensors ({slot}), which a trace cannot rebuild",
                hint="call=lambda *recorded, **named: model(...) puts the arguments together",
            )
        value = tensor.to(where, dtype if tensor.is_floating_point() else None)
        if key.isdecimal():
            placed[int(key)] = value
        else:
            named[key] = value
    if not placed and not named:
        raise UsageError(
            "the trace does not hold what the model itself was given",
            where="step {}, {}".format(*place),
            hint=f"record it with --select '*' --inputs: {ROOT} must be among the modules",
        )
    run = call or model
    return lambda: run(*(placed[key].clone() for key in sorted(placed)), **named)


def _unmatched(expected: Flow, actual: Flow) -> list[str]:
    """Tensors of modules that the port does not have: noted, not missing."""
    called = {label.partition("#")[0] for label in actual.calls}
    return [n for n in expected.tensors if (address(n).fqn or "") not in called]
