"""Which passes a pipeline makes and how it weighs them, found by moving them.

While a recording is played back, one row of one model output is moved by a constant. What the
scheduler is given then moves by that constant times the row's weight, whatever packing, slicing and
batching lie between. No model runs. The weights are for names; what is combined is judged by what
the scheduler is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from truestep.calls.arguments import Arguments
from truestep.calls.boundaries import Arrival
from truestep.calls.forcing import Forcing
from truestep.calls.keys import Path
from truestep.calls.recorder import held_tensors
from truestep.calls.recording import CallRecording
from truestep.calls.seen import EnoughError, Plan
from truestep.calls.subject import Subject
from truestep.calls.values import in_lists, tensors
from truestep.recording.manifest import CallEntry

ALIKE = 1e-2
"""Weights closer than this are one: scales have two or three digits, and float32 rounding is seen
through a shift as large as the output itself."""

LEVELS = 3
"""A row may reach parts of what the scheduler is given with different weights, or not at all: of a
learned variance, of other samples of the batch. More than so many are no weights."""


@dataclass(frozen=True)
class Row:
    """One sample of one output of one call of a model.

    Attributes:
        component, method, call: Whose output, and of which of its calls in the step.
        path: Place in the output.
        row: Place in the batch; None of an output that is one sample's alone.
    """

    component: str
    method: str
    call: int
    path: Path
    row: int | None


@dataclass(frozen=True)
class Pass:
    """A guidance pass.

    Attributes:
        source: Where it comes from.
        into: Component and argument that it reaches: `scheduler.step model_output`.
        weight: By which it is weighed there; the weights of all passes are one together.
        gain: What their sum was: -1 where a scheduler takes the negative, another number where the
            result is rescaled or expressed otherwise.
        name: `cond`, `uncond`, `perturbed` or, of what has no weight, nothing.
    """

    source: Row
    into: str
    weight: float
    gain: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Guidance:
    """How passes are combined at one step.

    Attributes:
        step: Which.
        passes: Every row that reaches a scheduler.
        affine: Whether all of them reach it by constant weights.
    """

    step: int
    passes: tuple[Pass, ...]
    affine: bool

    def scale(self, into: str = "") -> float | None:
        """The guidance scale: one less the weight of `uncond`; None where nothing is guided."""
        weights = [p.weight for p in self.passes if p.name == "uncond" and into in p.into]
        return 1.0 - weights[0] if weights and self.affine else None

    def __str__(self) -> str:
        """One line for people."""
        if not self.affine:
            return f"step {self.step}: passes are combined, but not by weights"
        named = [f"{p.name or 'unused'} {p.weight:g}" for p in self.passes]
        return f"step {self.step}: {', '.join(named) or 'no guidance'}"


def guidance(subject: Subject, reference: CallRecording, step: int | None = None) -> Guidance:
    """Find the passes of a subject and their weights.

    Args:
        subject: What was recorded, or a candidate for it.
        reference: The recording.
        step: Where; default halfway.

    Returns:
        The passes; `affine` is False where a shift arrives as something other than a shift, as
        where the result is rescaled by its own deviation.
    """
    step = reference.steps // 2 if step is None else step
    still = _arriving(subject, reference, step, None, 0.0)
    passes: list[Pass] = []
    affine = True
    for row in _rows(reference, step):
        size = _size(reference, step, row)
        moved = _arriving(subject, reference, step, row, size)
        for into, value in moved.items():
            if into not in still or value.shape != still[into].shape:
                continue
            weights = _levels((value.double() - still[into].double()) / size)
            if weights is None:
                affine = False
            elif weights:
                passes.append(Pass(row, into, max(weights, key=abs)))
    return Guidance(step, tuple(_named(reference, step, passes)), affine)


def _levels(moved: torch.Tensor) -> list[float] | None:
    """The constant weights by which a shift arrives, none of them nothing; None if there are none.

    Args:
        moved: What arrived over what was shifted, any shape.
    """
    values = moved.reshape(-1)
    levels: list[float] = []
    while values.numel():
        level = float(values[0])
        limit = ALIKE * max(1.0, abs(level))
        near = (values - level).abs() < limit
        levels.append(float(values[near].mean()))
        values = values[~near]
        if len(levels) > LEVELS:
            return None
    return [round(level, 4) for level in levels if abs(level) >= ALIKE]


def _rows(reference: CallRecording, step: int) -> Iterator[Row]:
    """Every row of every floating-point output of the models at a step."""
    for call in _predictions(reference, step):
        listed = set(in_lists(call.output))
        for path, name in tensors(call.output):
            tensor = reference.recording[name]
            if not tensor.is_floating_point() or tensor.ndim < 2:
                continue
            rows = [None] if path in listed else range(tensor.shape[0])
            for row in rows:
                yield Row(call.component, call.method, call.call, path, row)


def _predictions(reference: CallRecording, step: int) -> list[CallEntry]:
    return [c for c in reference.calls if c.step == step and c.stage == "prediction"]


def _call_of(reference: CallRecording, step: int, row: Row) -> CallEntry:
    return next(
        call
        for call in _predictions(reference, step)
        if (call.component, call.method, call.call) == (row.component, row.method, row.call)
    )


def _size(reference: CallRecording, step: int, row: Row) -> float:
    """A shift as large as the output: a power of two, which rounds nothing by itself."""
    name = dict(tensors(_call_of(reference, step, row).output))[row.path]
    rms = float(reference.recording[name].double().square().mean().sqrt())
    return 2.0 ** round(torch.tensor(rms).log2().item()) if rms > 0 else 1.0


def _arriving(
    subject: Subject, reference: CallRecording, step: int, row: Row | None, size: float
) -> dict[str, torch.Tensor]:
    """What the schedulers are given at a step, where a row was moved."""
    probe = _Probe(reference, step, row, size)
    with suppress(EnoughError):
        probe.run(subject)
    return {
        f"{seen.key.component}.{seen.key.method} {'.'.join(seen.key.path)}": seen.actual
        for seen in probe.result.seen
        if seen.key.step == step
        and seen.key.stage == "update"
        and seen.key.side == "in"
        and seen.actual is not None
        and seen.actual.is_floating_point()
    }


class _Probe(Forcing):
    """Plays a recording back with one row of one output moved, as far as the step's end."""

    def __init__(self, reference: CallRecording, step: int, row: Row | None, size: float) -> None:
        super().__init__(reference, Plan(made=lambda call: False, precision=torch.float32))
        self._step, self._row, self._size = step, row, size
        self._target = _call_of(reference, step, row) if row else None

    def __call__(self, arrival: Arrival) -> object:
        calls = self.reference.by_method.get((arrival.component, arrival.method), [])
        number = self._came[arrival.component, arrival.method]
        call = calls[number] if number < len(calls) else None
        if call is not None and (call.stage == "decoding" or (call.step or 0) > self._step):
            raise EnoughError
        return super().__call__(arrival)

    def _answer(self, arrival: Arrival, call: CallEntry, arguments: Arguments) -> object:
        output = super()._answer(arrival, call, arguments)
        if call is self._target and self._row is not None:
            tensor = held_tensors(output)[self._row.path]
            tensor[slice(None) if self._row.row is None else self._row.row] += self._size
        return output


def _named(reference: CallRecording, step: int, passes: Sequence[Pass]) -> Iterator[Pass]:
    """Name passes by their weights: the largest is `cond`, whatever the scheduler's sign.

    Of the others one on the same inputs is `perturbed`, one on others `uncond`.
    """
    for into in dict.fromkeys(p.into for p in passes):
        group = [p for p in passes if p.into == into]
        gain = sum(p.weight for p in group)
        gain = gain if abs(gain) >= ALIKE else 1.0
        upright = [replace(p, weight=round(p.weight / gain, 3), gain=gain) for p in group]
        first = max(upright, key=lambda p: p.weight)
        given = _inputs(reference, step, first.source)
        for p in upright:
            if p is first or p.weight > 0:
                yield replace(p, name="cond")
            else:
                same = _inputs(reference, step, p.source) == given
                yield replace(p, name="perturbed" if same else "uncond")


def _inputs(reference: CallRecording, step: int, row: Row) -> list[bytes]:
    """What a row was made of: its part of every input of its call."""
    call = _call_of(reference, step, row)
    name = dict(tensors(call.output))[row.path]
    batch = reference.recording[name].shape[0]
    given = []
    for tree in call.arguments.values():
        for _, stored in tensors(tree):
            tensor = reference.recording[stored]
            split = row.row is not None and tensor.ndim and tensor.shape[0] == batch
            part = tensor[row.row] if split else tensor
            given.append(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return given
