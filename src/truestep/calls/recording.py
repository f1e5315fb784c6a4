"""Calls in a recording: their table in the manifest, their tensors once by content."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from truestep.calls.keys import Key, Side
from truestep.calls.keys import Path as Place
from truestep.calls.trees import check_tree
from truestep.calls.values import Tree, in_real_numbers, renamed, tensors
from truestep.environment import Environment, library_version
from truestep.errors import FileFormatError
from truestep.floors import NoiseFloor
from truestep.measure.plain import plain
from truestep.recording.format import Recording, bytes_of
from truestep.recording.header import digest
from truestep.recording.manifest import CALLS, CallEntry, Manifest, TensorEntry
from truestep.recording.table import table_entry

KEPT_STEPS = "steps"
"""Setting of a thinned recording: the steps that can be judged by it."""

STATE, WRITTEN, RANDOM_STATE = "(state)", "(written)", "(random)"
"""First part of a path: what a scheduler holds, what a call wrote into an argument, generators."""


@dataclass(frozen=True)
class CallRecording:
    """Every call of one run.

    Attributes:
        recording: Tensors and manifest.
    """

    recording: Recording

    @property
    def calls(self) -> tuple[CallEntry, ...]:
        """The calls, in the order in which they began."""
        return self.recording.manifest.calls

    @property
    def floor(self) -> NoiseFloor | None:
        """The noise floor of every call, if it was measured."""
        floor = self.recording.manifest.noise_floor
        return floor and floor.of(freely=False)

    @property
    def end_floor(self) -> NoiseFloor | None:
        """The noise floor of what free runs end with, if it was measured."""
        floor = self.recording.manifest.noise_floor
        return floor and floor.of(freely=True)

    @property
    def judged_steps(self) -> frozenset[int] | None:
        """Steps that can be judged; None where all can."""
        kept = self.recording.manifest.settings.get(KEPT_STEPS)
        return None if kept is None else frozenset(kept)

    @property
    def steps(self) -> int:
        """Number of denoise steps."""
        return max((call.step + 1 for call in self.calls if call.step is not None), default=0)

    @cached_property
    def by_method(self) -> Mapping[tuple[str, str], list[CallEntry]]:
        """Calls of each component and method."""
        found: dict[tuple[str, str], list[CallEntry]] = defaultdict(list)
        for call in self.calls:
            found[call.component, call.method].append(call)
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its name."""
        return {entry.name: tuple(entry.shape) for entry in self.recording.manifest.tensors}

    @property
    def methods(self) -> dict[str, set[str]]:
        """Methods of each component that were called."""
        found: dict[str, set[str]] = defaultdict(set)
        for component, method in self.by_method:
            found[component].add(method)
        return found

    def stepped_by(self, scheduler: str) -> bool:
        """Whether a scheduler, or a copy of it, made a step."""
        return any(
            method == "step" and component.partition("~")[0] == scheduler
            for component, method in self.by_method
        )

    def with_floor(self, floor: NoiseFloor | None, notes: Iterable[str] = ()) -> CallRecording:
        """The same calls with a noise floor."""
        manifest = self.recording.manifest
        update = {"noise_floor": floor, "notes": (*manifest.notes, *notes)}
        return self.with_manifest(manifest.model_copy(update=update))

    def with_manifest(
        self, manifest: Manifest, more: Mapping[str, torch.Tensor] = {}
    ) -> CallRecording:
        """The same tensors, and more of them, under another manifest."""
        named = [entry.name for entry in manifest.tensors]
        kept = {name: self.recording[name] for name in named if name in self.recording}
        return CallRecording(Recording.in_memory({**kept, **more}, manifest))

    def write(self, path: str | Path) -> str:
        """Write atomically, and say the SHA-256 of the file.

        Raises:
            WriteError: The file could not be written; an existing one is untouched.
        """
        return self.recording.save(path)


def refuse_unplayable(recording: Recording, *, where: str) -> None:
    """Refuse what cannot be played back.

    Raises:
        FileFormatError: It holds no calls.
        UsageError: It was recorded at a level that keeps no tensors.
    """
    if not recording.manifest.calls:
        raise FileFormatError("the recording holds no calls", where=where)
    recording.require_tensors(where=where)


def read(path: str | Path) -> CallRecording:
    """Open a recording of calls; tensors are read when they are asked for.

    Raises:
        FileFormatError: It is unreadable, damaged or hostile, or holds no calls.
        UsageError: It was recorded at a level that keeps no tensors.
    """
    recording = Recording.open(path)
    refuse_unplayable(recording, where=str(path))
    ranks = {entry.name: len(entry.shape) for entry in recording.manifest.tensors}
    for call in recording.manifest.calls:
        try:
            for _, tree in trees_of(call):
                check_tree(tree, ranks)
            for _, name in call.random:
                check_tree({"tensor": name}, ranks)
        except ValueError as error:
            raise FileFormatError(
                f"a call of {call.component[:80]!r} cannot be read",
                where=str(path),
                measured=str(error),
                likely="an edit by hand, or a file made to do harm",
            ) from error
    return CallRecording(recording)


def trees_of(call: CallEntry) -> Iterator[tuple[Side, Tree]]:
    """All trees of a call, those that it was given first."""
    for tree in call.arguments.values():
        yield "in", tree
    yield "out", call.output
    for tree in (*call.written.values(), *call.state.values()):
        yield "out", tree


def placed_trees(call: CallEntry) -> Iterator[tuple[Side, Place, Tree]]:
    """All trees of a call, and where each is in keys."""
    for name, tree in call.arguments.items():
        yield "in", (name,), tree
    yield "out", (), call.output
    for first, trees in ((WRITTEN, call.written), (STATE, call.state)):
        for name, tree in trees.items():
            yield "out", (first, name), tree


def key(call: CallEntry, side: Side, path: Place, precision: str = "") -> Key:
    """The key of a tensor of a call."""
    return Key(
        stage=call.stage,
        component=call.component,
        method=call.method,
        call=call.call,
        side=side,
        path=path,
        step=call.step,
        precision=precision,
    )


def content_name(tensor: torch.Tensor) -> str:
    """What two tensors have in common that are stored once: dtype, shape and bytes."""
    return f"{tensor.dtype} {tuple(tensor.shape)} {digest(bytes_of(tensor))}"


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that nothing else writes to."""
    return in_real_numbers(plain(tensor)).to("cpu", copy=True).contiguous()


def assembled(
    calls: Sequence[CallEntry],
    contents: Mapping[str, torch.Tensor],
    settings: dict[str, Any],
    *,
    device: str,
) -> CallRecording:
    """A recording of calls whose trees name tensors by content.

    Args:
        calls: In the order in which they began.
        contents: Content to tensor.
        settings: Kept in the manifest.
        device: Where it ran.
    """
    stored: dict[str, str] = {}
    table: list[TensorEntry] = []

    def name_for(call: CallEntry, side: Side, prefix: Place) -> Callable[[Place, str], str]:
        def name(path: Place, content: str) -> str:
            if content not in stored:
                stored[content] = str(key(call, side, (*prefix, *path)))
                table.append(
                    table_entry(
                        stored[content],
                        contents[content],
                        len(table),
                        kind=call.stage,
                        step=call.step,
                        branch=call.context,
                    )
                )
            return stored[content]

        return name

    def every(call: CallEntry, side: Side, trees: dict[str, Tree], *way: str) -> dict[str, Tree]:
        return {k: renamed(tree, name_for(call, side, (*way, k))) for k, tree in trees.items()}

    named = []
    for call in calls:
        named.append(
            replace(
                call,
                arguments=every(call, "in", call.arguments),
                output=renamed(call.output, name_for(call, "out", ())),
                written=every(call, "out", call.written, WRITTEN),
                state=every(call, "out", call.state, STATE),
                random=tuple(
                    (argument, name_for(call, "out", (RANDOM_STATE, argument))((), content))
                    for argument, content in call.random
                ),
            )
        )
    manifest = Manifest(
        format_version=CALLS,
        tool_version=library_version("truestep") or "",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        level="full",
        settings=settings,
        environment=dict(Environment.current(device, attention=None)),
        tensors=tuple(table),
        calls=tuple(named),
        forwards=sum(call.kind == "model" for call in named),
    )
    tensors = {name: contents[content] for content, name in stored.items()}
    return CallRecording(Recording.in_memory(tensors, manifest))


def holds_tensors(call: CallEntry) -> bool:
    """Whether a call gave anything that could be judged."""
    return any(any(tensors(tree)) for side, tree in trees_of(call) if side == "out")
