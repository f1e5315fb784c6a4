"""Keep a run: every outermost call's arguments and outputs, copied as they come by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from truestep.calls import blocks
from truestep.calls.arguments import Arguments, arguments_of
from truestep.calls.boundaries import Arrival, watching
from truestep.calls.classes import SET_TIMESTEPS, STEP, Kind, positional
from truestep.calls.recording import (
    CallRecording,
    assembled,
    content_name,
    holds_tensors,
    host_copy,
)
from truestep.calls.roles import Happened, roles
from truestep.calls.subject import Subject
from truestep.calls.values import Path, Tree, encode, holds_state, opaque, qualified, tensors
from truestep.errors import UsageError
from truestep.progress import Progress
from truestep.randomness import own_randomness, own_states
from truestep.recording.manifest import CallEntry
from truestep.runtime.identity import device_of
from truestep.runtime.precision import working_dtype

RUN = "run"
"""Component name of what the whole run returns."""


@own_randomness()
def recorded(subject: Subject, progress: Progress | None = None) -> CallRecording:
    """Run a subject once and keep its calls.

    Args:
        subject: What runs.
        progress: Told (what, done, total) at every step of a scheduler.

    Raises:
        UsageError: It makes no call that gives a tensor, or is being watched already.
    """
    recorder = Recorder(progress)
    with watching(subject, recorder) as watch:
        output = subject.run()
    recorder.keep_run(output)
    calls, _ = placed(recorder)
    if not calls:
        raise UsageError(
            "nothing was recorded: no call of a component gave a tensor",
            where=subject.label,
            measured=f"components: {', '.join(subject.components) or 'none'}",
            hint="name the components that run: subject_of(function, components={...})",
        )
    settings = {"label": subject.label, "elsewhere": dict(watch.elsewhere)}
    return assembled(calls, recorder.contents, settings, device=device_of(subject.components))


def placed(recorder: Recorder) -> tuple[list[CallEntry], list[int]]:
    """What is kept of the calls of a run that is over, with their stages, steps and numbers.

    Returns:
        The calls of methods that gave a tensor, and the place that each had among all.
    """
    judgeable = {(c.component, c.method) for c in recorder.calls if holds_tensors(c)}
    places = roles(
        [
            Happened(call.component, call.method, Kind(call.kind), inside, begins)
            for call, inside, begins in zip(
                recorder.calls, recorder.inside, recorder.begins, strict=True
            )
        ]
    )
    kept = [
        (replace(call, stage=role.stage, step=role.step, call=role.call), at)
        for at, (call, role) in enumerate(zip(recorder.calls, places, strict=True))
        if (call.component, call.method) in judgeable  # others only set things
    ]
    return [call for call, _ in kept], [at for _, at in kept]


@dataclass
class Recorder:
    """An observer that makes every call and keeps what it took and gave.

    Attributes:
        progress: Told at every step of a scheduler.
        calls: In the order in which they began; trees name tensors by content.
        inside: Place of the call that each is part of, if it is.
        begins: Number of calls before each began: a block is kept when it ends.
        contents: Content to tensor.
    """

    progress: Progress | None = None
    calls: list[CallEntry] = field(default_factory=list)
    inside: list[int | None] = field(default_factory=list)
    contents: dict[str, torch.Tensor] = field(default_factory=dict)
    begins: list[int] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)
    _steps: dict[str, int] = field(default_factory=lambda: {"done": 0, "total": 0})

    def __call__(self, arrival: Arrival) -> Any:
        """Make a call and keep it."""
        if arrival.component == blocks.BLOCK:
            return self._block(arrival)
        place = len(self.calls)
        drawn = arrival.kind is Kind.RANDOM
        arguments = Arguments({}, 0, {}) if drawn else arguments_of(arrival)
        entry = replace(
            begun(arrival),
            dtype=weight_dtype(arrival.owner),
            parameters=positional(arrival.signature),
            arguments={name: encode(v, self.keep) for name, v in arguments.values.items()},
            context=arrival.context,
        )
        self._add(entry, place, inside=self._open[-1] if self._open else None)  # before draws in it
        before, states = marks(arguments), [] if drawn else [*generator_states(arguments)]
        self._open.append(place)
        try:
            output = arrival.proceed(*arrival.args, **arrival.kwargs)
        finally:
            self._open.pop()
        tree = encode(output, self.keep)
        written = {
            name: encode(arguments.values[name], self.keep)
            for name, mark in marks(arguments).items()
            if mark != before[name]
        }
        state = scheduler_state(arrival)
        self._tell(arrival, state)
        self.calls[place] = replace(
            entry,
            output=tree,
            written=written,
            state={name: encode(value, self.keep) for name, value in state.items()},
            random=tuple(self._moved(states, arguments)),
            live=any(opaque(tree)) or any(map(holds_state, entry.arguments.values())),
        )
        return output

    def _tell(self, arrival: Arrival, state: Mapping[str, Any]) -> None:
        if arrival.kind is not Kind.SCHEDULER or self.progress is None:
            return
        if arrival.method == STEP:
            self._steps["done"] += 1
            done = self._steps["done"]
            self.progress("record", done, max(done, self._steps["total"]))
        elif arrival.method == SET_TIMESTEPS:
            self._steps["total"] += int(state.get("num_inference_steps", 0))

    def _block(self, arrival: Arrival) -> Any:
        """Run a block, and keep what it wrote into the state once what is inside of it is kept."""
        begins = len(self.calls)
        before = blocks.marks(blocks.state_in(arrival.args) or {})
        output = arrival.proceed(*arrival.args, **arrival.kwargs)
        held = blocks.state_in(output)
        if held is not None:
            wrote = blocks.written(before, held, self.keep)
            self._add(replace(begun(arrival), output=wrote), begins)
        return output

    def _add(self, entry: CallEntry, begins: int, *, inside: int | None = None) -> None:
        self.calls.append(entry)
        self.inside.append(inside)
        self.begins.append(begins)

    def keep(self, path: Path, tensor: torch.Tensor) -> str:
        """Keep a copy of a tensor, once by content."""
        copy = host_copy(tensor)
        name = content_name(copy)
        self.contents.setdefault(name, copy)
        return name

    def keep_run(self, output: Any) -> None:
        """Keep what the run returned, unless that is what its only call gave."""
        given = {name for call in self.calls for _, name in tensors(call.output)}
        tree = encode(output, self.keep)
        if len(self.calls) == 1 and all(name in given for _, name in tensors(tree)):
            return
        entry = CallEntry(
            component=RUN,
            method=RUN,
            kind=str(Kind.RUN),
            stage="",
            call=0,
            owner="",
            parameters=(),
            arguments={},
            output=tree,
        )
        self._add(entry, len(self.calls))

    def _moved(
        self, before: list[tuple[str, torch.Tensor]], arguments: Arguments
    ) -> Iterator[tuple[str, str]]:
        after = dict(generator_states(arguments)) if before else {}
        for name, old in before:
            if name in after and not torch.equal(old, after[name]):
                yield name, self.keep((), after[name])


def begun(arrival: Arrival) -> CallEntry:
    """Whose call it is; what it takes and gives, and its place in the run, are not known yet."""
    return CallEntry(
        component=arrival.component,
        method=arrival.method,
        kind=str(arrival.kind),
        stage="",
        call=0,
        owner=qualified(type(arrival.owner)),
        parameters=(),
        arguments={},
        output=None,
    )


def weight_dtype(owner: Any) -> str:
    """Working dtype of a module; nothing of what has no weights."""
    return str(working_dtype(owner) or "").removeprefix("torch.")


def generator_states(arguments: Arguments) -> Iterator[tuple[str, torch.Tensor]]:
    """States of torch's own generators, see `own_states`, and of those among a call's arguments."""
    yield from own_states().items()
    for name, value in arguments.values.items():
        if isinstance(value, torch.Generator):
            yield name, value.get_state()


def held_tensors(value: Any) -> dict[Path, torch.Tensor]:
    """The tensors in a value, by their places."""
    held: dict[Path, torch.Tensor] = {}

    def keep(path: Path, tensor: torch.Tensor) -> str:
        held[path] = tensor
        return ""

    encode(value, keep)
    return held


def marks(arguments: Arguments) -> dict[str, Tree]:
    """What tells whether a call wrote into its arguments: which tensors, at which version."""

    def mark(path: Path, tensor: torch.Tensor) -> str:
        if tensor.is_inference():
            return content_name(host_copy(tensor))
        return f"{tensor.data_ptr()} {tensor.storage_offset()} {tensor._version}"

    return {name: encode(value, mark) for name, value in arguments.values.items()}


def scheduler_state(arrival: Arrival) -> dict[str, Any]:
    """What a scheduler holds once its steps are set: its tensors, and how many steps there are."""
    if arrival.kind is not Kind.SCHEDULER or arrival.method != SET_TIMESTEPS:
        return {}
    held = {**getattr(arrival.owner, "__dict__", {})}
    for name in ("timesteps", "sigmas"):
        if name not in held and hasattr(arrival.owner, name):
            held[name] = getattr(arrival.owner, name)
    state = {
        name: value
        for name, value in held.items()
        if isinstance(value, torch.Tensor) and not name.startswith("_")
    }
    steps = held.get("num_inference_steps")
    return {**state, "num_inference_steps": steps} if type(steps) is int else state
