"""How the calls of a model at one step hold the rows of the recorded ones.

Guidance passes may be made one call each, all in one batch, or in another order. Which row of a
candidate's call stands for which recorded one is told by what it is given: the texts differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from truestep.calls.arguments import Arguments
from truestep.calls.keys import Path
from truestep.calls.recorder import held_tensors
from truestep.calls.recording import CallRecording
from truestep.calls.values import Tree, in_lists, in_real_numbers, leaves, tensors
from truestep.measure.plain import plain
from truestep.recording.manifest import CallEntry

Method = tuple[str, str]
"""Component and method."""

Slot = tuple[int, int]
"""Which recorded call of a step, and which row of it."""

_NAMED_OTHERWISE = 1e3
"""Cost of a row whose call says that it is another pass: more than any inputs cost."""

_OUT_OF_ORDER = 1e-6
"""Cost of each place by which a row is out of order: decides only between equal inputs."""


@dataclass(frozen=True)
class Layout:
    """How calls of one method at one step are grouped.

    Attributes:
        recorded: Rows of each recorded call.
        arrivals: Of each call of the candidate, which recorded row each of its rows stands for;
            nothing of a call that came beside all that were recorded.
    """

    recorded: tuple[int, ...]
    arrivals: tuple[tuple[Slot, ...], ...]

    @property
    def same_sizes(self) -> bool:
        """Whether there are as many calls as recorded, of as many rows."""
        return tuple(map(len, self.arrivals)) == self.recorded

    @property
    def usual(self) -> bool:
        """Whether nothing is grouped otherwise than it was recorded."""
        ordered = [(call, row) for call, size in enumerate(self.recorded) for row in range(size)]
        return self.same_sizes and [slot for slots in self.arrivals for slot in slots] == ordered

    def __str__(self) -> str:
        """How, for people."""
        calls, recorded = len(self.arrivals), len(self.recorded)
        came, rows = sum(map(len, self.arrivals)), sum(self.recorded)
        if self.same_sizes:
            return "passes in another order"
        if came < rows:
            return f"{came} of {rows} rows in {_count(calls)}, recorded in {_count(recorded)}"
        if calls == 1:
            every = "both passes" if recorded == 2 else f"all {recorded} passes"
            return f"{every} in one batch, recorded in {recorded} calls"
        one = "one batch" if recorded == 1 else _count(recorded)
        return f"passes in {_count(calls)}, recorded in {one}"


def _count(calls: int) -> str:
    return f"{calls} call{'s' if calls > 1 else ''}"


Layouts = Mapping[tuple[Method, tuple[int, ...]], Layout]
"""By method, and rows of its recorded calls at a step."""


def grouped(reference: CallRecording) -> dict[Method, dict[int, list[CallEntry]]]:
    """Calls of models at each step, of every method whose samples lie along the first axis."""
    found: dict[Method, dict[int, list[CallEntry]]] = defaultdict(lambda: defaultdict(list))
    for call in reference.calls:
        if call.step is not None and call.stage == "prediction":
            found[call.component, call.method][call.step].append(call)
    shape = reference.shapes.__getitem__
    return {
        method: dict(steps)
        for method, steps in found.items()
        if all(rows_of(call, shape) for calls in steps.values() for call in calls)
    }


def rows_of(call: CallEntry, shape: Callable[[str], tuple[int, ...]]) -> int:
    """Number of rows in a recorded call's batch; 0 where its samples cannot be told apart."""
    listed = set(in_lists(call.output))
    outputs = _shapes(call.output, shape)
    sizes = {size[:1] for size in outputs.values()}
    if call.kind != "model" or call.written or call.random or not set(outputs) - listed:
        return 0
    return int(next(iter(sizes))[0]) if len(sizes) == 1 and sizes != {()} else 0


def _shapes(tree: Tree, shape: Callable[[str], tuple[int, ...]]) -> dict[Path, tuple[int, ...]]:
    """Shapes of a tree's tensors by their places, of those that were not kept too."""
    return {
        path: shape(leaf.value) if leaf.kind == "tensor" else tuple(leaf.value)
        for path, leaf in leaves(tree)
        if leaf.kind in ("tensor", "dropped")
    }


def sizes_of(
    calls: Sequence[CallEntry], shape: Callable[[str], tuple[int, ...]]
) -> tuple[int, ...]:
    """Rows of each of some recorded calls."""
    return tuple(rows_of(call, shape) for call in calls)


def given_to(call: CallEntry) -> dict[Path, str]:
    """Names of the recorded tensors that a call was given, by their places."""
    return {
        (argument, *path): name
        for argument, tree in call.arguments.items()
        for path, name in tensors(tree)
    }


def rows_arrived(
    arguments: Arguments, call: CallEntry, shape: Callable[[str], tuple[int, ...]]
) -> int:
    """Number of rows in the batch of a call that arrives; 0 where it cannot be told.

    Args:
        arguments: Its.
        call: A recorded call of the same method.
        shape: Of recorded tensors.
    """
    size = rows_of(call, shape)
    recorded = {
        (name, *path): known
        for name, tree in call.arguments.items()
        for path, known in _shapes(tree, shape).items()
    }
    sizes = [
        tuple(in_real_numbers(tensor).shape)
        for path, tensor in held_tensors(arguments.values).items()
        if recorded.get(path, ())[:1] == (size,)
    ]
    wide = [s for s in sizes if len(s) > 1] or [s for s in sizes if s]
    return max((s[0] for s in wide), default=0)


@dataclass(frozen=True)
class Arrived:
    """What one call of a candidate was given at a step.

    Attributes:
        rows: In its batch.
        context: The guidance pass that it says it is, if it does.
        given: Host copies of its tensors, by their places.
    """

    rows: int
    context: str | None
    given: Mapping[Path, torch.Tensor]


def layout_of(
    reference: CallRecording,
    calls: Sequence[CallEntry],
    arrivals: Sequence[Arrived],
    *,
    backwards: bool = False,
) -> Layout | None:
    """Pair the rows of a candidate's calls with those of the recorded calls of the same step.

    Each goes where what it is given is nearest to what was recorded, all of them together.

    Args:
        reference: The recording.
        calls: The recorded ones.
        arrivals: The candidate's.
        backwards: Rows that are given the same are taken in the other order.

    Returns:
        The layout; None where some rows of a call have no recorded one, and others have.
    """
    from scipy.optimize import linear_sum_assignment

    sizes = sizes_of(calls, reference.shapes.__getitem__)
    slots = [(number, row) for number, size in enumerate(sizes) for row in range(size)]
    rows = [(number, row) for number, came in enumerate(arrivals) for row in range(came.rows)]
    if not rows:
        return None
    named = {c: sum(s for s, call in zip(sizes, calls, strict=True) if call.context == c)
             for c in {call.context for call in calls} if c is not None}  # fmt: skip
    costs = torch.zeros(len(rows), len(slots), dtype=torch.float64)
    for place, (number, _) in enumerate(rows):
        came = arrivals[number]
        for other, (call, _) in enumerate(slots):
            says = came.context is not None and named.get(came.context) == came.rows
            turn = len(slots) - 1 - other if backwards else other
            costs[place, other] += _OUT_OF_ORDER * abs(place - turn)
            costs[place, other] += _NAMED_OTHERWISE * (says and calls[call].context != came.context)
    for theirs, mine in _compared(reference, calls, sizes, arrivals):
        scale = float(theirs.norm(dim=1).max()) or 1.0
        costs += (mine[:, None] / scale - theirs[None] / scale).norm(dim=2)
    paired: list[list[Slot]] = [[] for _ in arrivals]
    for place, slot in zip(*linear_sum_assignment(costs.numpy()), strict=True):
        paired[rows[place][0]].append(slots[slot])
    if any(part and len(part) != came.rows for part, came in zip(paired, arrivals, strict=True)):
        return None
    return Layout(sizes, tuple(map(tuple, paired)))


def _compared(
    reference: CallRecording,
    calls: Sequence[CallEntry],
    sizes: Sequence[int],
    arrivals: Sequence[Arrived],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of every tensor that has a row for each sample on both sides: all rows, as vectors."""
    given = [given_to(call) for call in calls]
    for path in given[0]:
        if not all(path in names for names in given):
            continue
        recorded = [reference.recording[names[path]] for names in given]
        actual = [came.given.get(path) for came in arrivals]
        split = [t for t in actual if t is not None]
        tails = {tuple(t.shape[1:]) for t in (*recorded, *split)}
        rows = [*sizes, *(came.rows for came in arrivals)]
        lengths = [t.shape[0] if t.ndim else 0 for t in (*recorded, *split)]
        if len(tails) == 1 and lengths == rows:
            yield _vectors(recorded), _vectors(split)


def _vectors(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = [part.reshape(part.shape[0], -1).double() for part in parts]
    return torch.cat(rows).nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0)


def host_copies(arguments: Arguments) -> dict[Path, torch.Tensor]:
    """Host copies of a call's tensors, by their places."""
    held = held_tensors(arguments.values)
    return {
        path: in_real_numbers(plain(t)).detach().to("cpu", copy=True) for path, t in held.items()
    }
