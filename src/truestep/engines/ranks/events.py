"""What happened on the ranks inside of one prediction: modules and collectives, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from truestep.calls.classes import Kind
from truestep.calls.recording import CallRecording
from truestep.calls.values import Tree, tensors
from truestep.engines.ranks.gathering import Gathered
from truestep.engines.run import Pass
from truestep.engines.watch.exchanges import COLLECTIVE, ORDER, PART
from truestep.recording.manifest import CallEntry


@dataclass
class Event:
    """One module's call, or one collective, on all ranks that made it.

    Attributes:
        kind: `part` or `collective`.
        name: Of the module, or of the collective's function.
        number: How often it had been called in the prediction.
        entries: The call on each rank.
        order: When it was over, on the first rank that has it.
    """

    kind: str
    name: str
    number: int
    entries: dict[int, CallEntry] = field(default_factory=dict)
    order: tuple[int, int] = (0, 0)

    @property
    def is_collective(self) -> bool:
        """Whether ranks exchange something."""
        return self.kind == COLLECTIVE

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of a collective's group."""
        for entry in self.entries.values():
            tree = entry.arguments.get("ranks")
            numbers = tree.get("list", []) if isinstance(tree, dict) else []
            if numbers and all(type(number) is int for number in numbers):
                return tuple(numbers)
        return tuple(sorted(self.entries))

    def said(self, name: str) -> str:
        """A word that is kept of it: its `line`, its `module`, its `op`."""
        values = (entry.arguments.get(name) for entry in self.entries.values())
        return next((value for value in values if isinstance(value, str)), "")

    @property
    def label(self) -> str:
        """As it stands in results."""
        if not self.is_collective:
            return f"`{self.name}`" if self.name else "the model's output"
        line = self.said("line")
        file, _, number = line.rpartition(":")
        at = f" at {Path(file).name}:{number}" if file else ""
        module = f" in `{self.said('module')}`" if self.said("module") else ""
        ranks = self.ranks
        several = len(ranks) > 1 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))
        who = f"{ranks[0]}-{ranks[-1]}" if several else ", ".join(map(str, ranks))
        return f"{self.name}{at}{module} ({'rank' if len(ranks) == 1 else 'ranks'} {who})"


def happened(
    gathered: Gathered, step: int, place: int
) -> tuple[list[Event], dict[int, tuple[int, int]]]:
    """Modules and collectives inside of one prediction, in the order in which they ended.

    Also by rank which of how many branches the prediction is in its call.
    """
    events: dict[tuple[str, str, str, int], Event] = {}
    rows: dict[int, tuple[int, int]] = {}
    for rank, at in gathered.sources[step, place].items():
        recording = gathered.files[rank].recording
        own = next(one for one in gathered.runs[rank].steps if one.number == step)
        entries, rows[rank] = _inside(recording, step, own.passes[at], at)
        _aligned(events, rank, entries)
    return sorted(events.values(), key=lambda event: event.order), rows


def between(gathered: Gathered, step: int | None, *, first: bool) -> list[Event]:
    """Collectives outside of predictions: before the first of a run, or within a step after them.

    Args:
        gathered: The run.
        step: Number of the step; None for what comes after the last.
        first: Only what comes before the first prediction.
    """
    events: dict[tuple[str, str, str, int], Event] = {}
    for rank, one in gathered.files.items():
        found, seen = [], False
        for entry in one.recording.calls:
            seen = seen or (entry.kind == Kind.MODEL and entry.stage == "prediction")
            outside = entry.kind == COLLECTIVE and not entry.arguments.get("inside")
            if outside and (not seen if first else entry.step == step and seen):
                found.append(entry)
        _aligned(events, rank, found)
    return sorted(events.values(), key=lambda event: event.order)


def _inside(
    recording: CallRecording, step: int, one: Pass, at: int
) -> tuple[list[CallEntry], tuple[int, int]]:
    """Calls inside of the call that a pass is of, and which of how many of its rows that is."""
    found: list[tuple[CallEntry, list[CallEntry]]] = []
    for entry in recording.calls:
        if entry.kind == Kind.MODEL:
            found.append((entry, []))
        elif entry.kind in (PART, COLLECTIVE) and entry.arguments.get("inside") and found:
            found[-1][1].append(entry)
    own = [each for each in found if each[0].step == step and each[0].stage == "prediction"]
    for entry, inner in own:
        output = first_of(recording, entry.output)
        held = _held(output, one.output) if output is not None else None
        if held is not None:
            return inner, held
    return own[at][1] if at < len(own) else [], (0, 1)


def _held(output: torch.Tensor, part: torch.Tensor) -> tuple[int, int] | None:
    """Which of how many equal parts of a tensor another is."""
    if output.dtype != part.dtype or not part.numel() or output.numel() % part.numel():
        return None
    flat, own = output.reshape(-1, part.numel()), part.reshape(-1)
    found = next((row for row, value in enumerate(flat) if torch.equal(value, own)), None)
    return None if found is None else (found, len(flat))


def _aligned(
    events: dict[tuple[str, str, str, int], Event], rank: int, entries: Sequence[CallEntry]
) -> None:
    counts: Counter[tuple[str, str, str]] = Counter()
    for entry in entries:
        name = entry.method if entry.kind == COLLECTIVE else str(entry.arguments.get("name", ""))
        group = repr(entry.arguments.get("ranks")) if entry.kind == COLLECTIVE else ""
        if entry.method in ("isend", "irecv", "send", "recv", "permute_tensor"):
            group = ""
        key = (entry.kind, name, group)
        event = events.setdefault((*key, counts[key]), Event(entry.kind, name, counts[key]))
        if not event.entries:
            event.order = _order(entry)
        event.entries[rank] = entry
        counts[key] += 1


def _order(entry: CallEntry) -> tuple[int, int]:
    """When a call was over: what ends at once ends from the inside outwards."""
    tree = entry.arguments.get(ORDER)
    numbers = tree.get("list", []) if isinstance(tree, dict) else []
    if len(numbers) == 2 and all(type(number) is int for number in numbers):
        return numbers[1], -numbers[0]
    return 0, 0


def made(gathered: Gathered, event: Event) -> dict[int, torch.Tensor]:
    """What each rank was left with; a list of tensors as one, along a new first axis."""
    return _values(gathered, ((rank, one.output) for rank, one in event.entries.items()))


def given(gathered: Gathered, event: Event) -> dict[int, torch.Tensor]:
    """What each rank gave to a collective."""
    pairs = ((rank, one.arguments.get("given")) for rank, one in event.entries.items())
    return _values(gathered, pairs)


def _values(gathered: Gathered, trees: Iterator[tuple[int, Tree]]) -> dict[int, torch.Tensor]:
    found = {}
    for rank, tree in trees:
        recording = gathered.files[rank].recording
        parts = [value for value in _every(recording, tree) if value.is_floating_point()]
        if len(parts) == 1:
            found[rank] = parts[0]
        elif parts and len({part.shape for part in parts}) == 1:
            found[rank] = torch.stack(parts)
    return found


def _every(recording: CallRecording, tree: Any) -> Iterator[torch.Tensor]:
    for _, name in tensors(tree):
        if name in recording.recording:
            yield recording.recording[name]


def first_of(recording: CallRecording, tree: Tree) -> torch.Tensor | None:
    """The first tensor of a tree."""
    return next(_every(recording, tree), None)


def without_prefix(names: Sequence[str], known: Mapping[str, Any]) -> str:
    """What stands before the names of a port's modules: of a model that it holds in another."""
    prefixes = {""}
    for name in names:
        parts = name.split(".")
        prefixes |= {".".join(parts[:at]) + "." for at in range(1, min(len(parts), 4))}

    def count(prefix: str) -> int:
        held = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        return sum(name in known for name in held)

    return max(sorted(prefixes, key=len), key=count)
