"""What a place between calls can be made of: the failing tensors, and all that was recorded before.

Code between the calls of a plain pipeline is given what was recorded, so that what the candidate
hands to a call is a function of that alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from truestep.calls.judging import place_of
from truestep.calls.keys import Key, key_of
from truestep.calls.recording import CallRecording, key, placed_trees
from truestep.calls.values import tensors
from truestep.recording.manifest import CallEntry
from truestep.replay.causes.guesses import Failing

MOST = 1 << 25
"""Tensors with more values are no material: to read them takes longer than to look."""


@dataclass(frozen=True)
class Piece:
    """A tensor that was recorded before a place.

    Attributes:
        key: Where it was first kept.
        context: The guidance pass of its call, where it was said.
        kind: Of its call: `model` and others.
        stored: Its name in the recording.
    """

    key: Key
    context: str | None
    kind: str
    stored: str

    @property
    def said(self) -> str:
        """It, for people."""
        return place_of(self.key, self.context).removeprefix("code before ")


class Shelf(Protocol):
    """What a place may be made of: see `Material`."""

    @property
    def components(self) -> Mapping[str, Any]:
        """The trusted side's parts."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What the pipeline was called with."""

    def before(self, call: Any) -> Iterator[Piece]:
        """Tensors before a call."""

    def read(self, piece: Piece) -> torch.Tensor | None:
        """One of them."""

    def shape(self, piece: Piece) -> tuple[int, ...]:
        """Its shape."""

    def config(self, component: str) -> Mapping[str, Any]:
        """What a part is configured as."""

    def of_step(self, key: Key, offset: int) -> torch.Tensor | None:
        """The same argument of the same call at another step."""


@dataclass(frozen=True)
class Material:
    """Recorded tensors, and the settings of the trusted side.

    Attributes:
        reference: The recording.
        components: The trusted side's, by name.
        arguments: What the pipeline was called with.
        unkept: What the trusted side gave that the recording does not keep, by key.
    """

    reference: CallRecording
    components: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unkept: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def before(self, call: CallEntry) -> Iterator[Piece]:
        """Tensors that were given or made before a call, the latest first, each once."""
        calls = self.reference.calls
        at = next(i for i, each in enumerate(calls) if each is call)
        known: set[str] = set()
        for each in reversed(calls[:at]):
            for where, stored in self._of(each):
                if stored not in known:
                    known.add(stored)
                    yield Piece(where, each.context, each.kind, stored)

    def _of(self, call: CallEntry) -> Iterator[tuple[Key, str]]:
        """Tensors of a call, the last first: what it gave, then what it was given."""
        for side, path, tree in reversed(list(placed_trees(call))):
            for inner, stored in tensors(tree):
                yield key(call, side, (*path, *inner)), stored
        for text in self.unkept:
            where = key_of(text)
            same = (where.component, where.method, where.stage, where.step, where.call)
            if same == (call.component, call.method, call.stage, call.step, call.call):
                yield where, text

    def read(self, piece: Piece) -> torch.Tensor | None:
        """A tensor in float64; None of one that is too large, or no longer kept."""
        if piece.stored in self.unkept:
            return self.unkept[piece.stored].double()
        shape = self.reference.shapes.get(piece.stored)
        if shape is None or torch.Size(shape).numel() > MOST:
            return None
        return self.reference.recording[piece.stored].double()

    def shape(self, piece: Piece) -> tuple[int, ...]:
        """Its shape, without reading it."""
        if piece.stored in self.unkept:
            return tuple(self.unkept[piece.stored].shape)
        return self.reference.shapes.get(piece.stored, ())

    def config(self, component: str) -> Mapping[str, Any]:
        """What a component of the trusted side is configured as."""
        return config_of(self.components.get(component))

    def of_step(self, key: Key, offset: int) -> torch.Tensor | None:
        """The same argument of the same call at another step, in float64."""
        for call in self.reference.by_method.get((key.component, key.method), ()):
            if key.step is None or call.step != key.step + offset or call.call != key.call:
                continue
            tree = call.arguments.get(key.path[0])
            for path, name in tensors(tree):
                if (key.path[0], *path) == key.path:
                    return self.reference.recording[name].double()
            if isinstance(tree, int | float) and len(key.path) == 1:
                return torch.tensor(float(tree), dtype=torch.float64)
        return None


@dataclass(frozen=True)
class Handed:
    """A place between calls where the candidate differs, at every step where it does.

    Attributes:
        failing: Its tensors, in order of the run.
        keys, calls: Where each is, and of which call.
        material: What it may be made of.
        label: The place in words, where its keys do not say it.
    """

    failing: Sequence[Failing]
    keys: Sequence[Key]
    calls: Sequence[Any]
    material: Shelf
    label: str = ""

    @property
    def what(self) -> str:
        """The argument or output that differs, by its name."""
        return self.keys[0].path[0] if self.keys[0].path else ""

    @property
    def argument(self) -> str:
        """The same for people: `scheduler.step's model_output`."""
        first = self.keys[0]
        return (
            self.label
            or f"`{'.'.join(first.path) or 'what is given'}` of {first.component}.{first.method}"
        )

    @cached_property
    def same_sizes(self) -> bool:
        """Whether both sides have the same sizes everywhere."""
        return all(one.actual.shape == one.reference.shape for one in self.failing)

    def pieces(self, at: int) -> list[Piece]:
        """What was recorded before the call of one failing tensor."""
        return list(self.material.before(self.calls[at]))


def config_of(component: Any) -> Mapping[str, Any]:
    """A component's configuration; empty where it has none."""
    config = getattr(component, "config", None)
    return config if isinstance(config, Mapping) else {}
