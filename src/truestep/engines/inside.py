"""What the modules of an engine's denoiser were given and gave in one call, as it was recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from truestep.calls.recording import CallRecording
from truestep.calls.trees import check_tree
from truestep.calls.values import tensors
from truestep.errors import FileFormatError
from truestep.keys import module_name
from truestep.nests import safe_fqn
from truestep.recording.header import bad_name
from truestep.recording.manifest import TensorEntry
from truestep.recording.table import table_entry

INSIDE = "inside"
"""Setting of a recording: by model, its classes and weights, and modules of some of its calls."""

ROOT = "(root)"


@dataclass(frozen=True)
class Event:
    """A module's call that begins or ends.

    Attributes:
        fqn: Of the module, as the engine names it.
        call: Its number within the call of the model.
        inward: Whether it begins: what it is given; else what it gives.
        tensors: By slot (`in.0`, `in.x`, `out.0`), those that were kept.
    """

    fqn: str
    call: int
    inward: bool
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Called:
    """An operator.

    Attributes:
        fqn: The innermost module that ran.
        name, arguments, line, code: As `replay.lines` tells them.
        outputs: Its results; None where there was no room for one.
    """

    fqn: str
    name: str
    arguments: tuple[str, ...]
    outputs: tuple[torch.Tensor, ...] | None
    line: str
    code: str


@dataclass(frozen=True)
class Inside:
    """One call of a model, looked into.

    Attributes:
        classes: Of all its modules.
        sources: File and line where a class is written.
        weights: Parameters and buffers that were kept.
        events: In the order in which they happened.
        left: Tensors that there was no room for.
        operators: In the order in which they were called; none where they were not recorded.
    """

    classes: Mapping[str, str]
    sources: Mapping[str, str]
    weights: Mapping[str, torch.Tensor]
    events: tuple[Event, ...]
    left: int
    operators: tuple[Called, ...] = ()


def check_inside(table: Any, ranks: Mapping[str, int]) -> None:
    """Refuse what another process wrote of a model's modules, where it is no such thing.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    if table is None:
        return
    words = [*table["classes"].items(), *table.get("sources", {}).items()]
    if not all(isinstance(word, str) for pair in words for word in pair):
        raise ValueError("no word where a class is named")
    int(table["left"])
    for tree in table.get("weights", {}).values():
        check_tree(tree, ranks)
    for fqn, number, side, tree in table["modules"]:
        if not isinstance(fqn, str) or type(number) is not int or side not in ("in", "out"):
            raise ValueError("no call of a module where one is kept")
        check_tree(tree, ranks)
    for fqn, name, arguments, tree, line, code in table.get("operators", ()):
        if not all(isinstance(word, str) for word in (fqn, name, line, code, *arguments)):
            raise ValueError("no words where an operator is described")
        check_tree(tree, ranks)


def with_inside(
    recording: CallRecording,
    told: Sequence[Mapping[str, Any]],
    contents: Mapping[str, torch.Tensor],
) -> CallRecording:
    """A recording with the modules that its processes looked into.

    Args:
        recording: Of the calls.
        told: The calls as the process told them, in order.
        contents: Content to tensor.
    """
    found = _Writer(contents, len(recording.recording.manifest.tensors))
    numbers: Counter[str] = Counter()
    for call in told:
        name = f"{call['component']}.{call['method']}"
        if call.get("inside") is not None:
            found.add(name, numbers[name], call["inside"])
        numbers[name] += 1
    if not found.models:
        return recording
    manifest = recording.recording.manifest
    update = {
        "settings": {**manifest.settings, INSIDE: found.models},
        "tensors": (*manifest.tensors, *found.table),
    }
    return recording.with_manifest(manifest.model_copy(update=update), found.kept)


class _Writer:
    """Tensors of modules under names of their own, each content once."""

    def __init__(self, contents: Mapping[str, torch.Tensor], order: int) -> None:
        self.models: dict[str, Any] = {}
        self.table: list[TensorEntry] = []
        self.kept: dict[str, torch.Tensor] = {}
        self._contents, self._order = contents, order
        self._names: dict[str, str] = {}

    def add(self, model: str, number: int, told: Mapping[str, Any]) -> None:
        """Take one call of a model."""
        entry = self.models.setdefault(model, {"weights": {}, "calls": {}})
        entry["classes"], entry["sources"] = told["classes"], told.get("sources", {})
        for name, tree in told.get("weights", {}).items():
            for _, content in tensors(tree):
                entry["weights"][name] = self._name(f"weight/{model}/{name}", content, "weight")
        events = []
        for fqn, call, side, tree in told["modules"]:
            slots = {}
            for slot, content in _slots(side, tree):
                where = safe_fqn(f"{model}.{fqn}")
                name = module_name(where, step=number, branch="main", slot=slot, call=call)
                slots[slot] = self._name(name, content, "module", fqn=where)
            events.append([fqn, call, side, slots])
        call = entry["calls"][str(number)] = {"modules": events, "left": int(told["left"])}
        called = []
        for at, (fqn, op, arguments, tree, line, code) in enumerate(told.get("operators", ())):
            where = safe_fqn(f"{model}.{fqn}%{at}")
            names = [
                self._name(
                    module_name(where, step=number, branch="main", slot=slot),
                    content,
                    "module",
                    fqn=where,
                )
                for slot, content in _slots("out", tree)
            ]
            whole = len(names) == len(tree["list"]) if isinstance(tree, dict) else False
            called.append([fqn, op, arguments, names if whole else None, line, code])
        if called:
            call["operators"] = called

    def _name(self, name: str, content: str, kind: str, fqn: str | None = None) -> str:
        if content not in self._names:
            name = name if not bad_name(name) else f"{kind}/{content}"
            self._names[content] = name
            self.kept[name] = tensor = self._contents[content]
            order = self._order + len(self.table)
            self.table.append(table_entry(name, tensor, order, kind=kind, fqn=fqn))
        return self._names[content]


def _slots(side: str, tree: Any) -> Iterator[tuple[str, str]]:
    for path, content in tensors(tree):
        yield (
            ".".join([side, *(safe_fqn(part).replace(".", "_") for part in path or ("0",))]),
            (content),
        )


def insides(recording: CallRecording) -> dict[tuple[str, int], Inside]:
    """Calls that were looked into: by model and method, and the number among its calls.

    Raises:
        FileFormatError: What a file says of them is damaged.
    """
    told = recording.recording.manifest.settings.get(INSIDE)
    if told is None:
        return {}
    try:
        return {
            (model, int(number)): _read(recording, entry, call)
            for model, entry in told.items()
            for number, call in entry["calls"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            "what was recorded of an engine's modules cannot be read",
            where=str(recording.recording.path or "recording"),
            measured=f"{type(error).__name__}: {error}",
        ) from None


def _read(recording: CallRecording, entry: Mapping[str, Any], call: Mapping[str, Any]) -> Inside:
    held = recording.recording
    events = tuple(
        Event(
            str(fqn),
            int(number),
            side == "in",
            {str(slot): held[name] for slot, name in slots.items() if name in held},
        )
        for fqn, number, side, slots in call["modules"]
    )
    words = [
        {str(key): str(value) for key, value in entry[name].items()}
        for name in ("classes", "sources")
    ]
    weights = {str(k): held[name] for k, name in entry["weights"].items() if name in held}
    operators = tuple(
        Called(
            str(fqn),
            str(name),
            tuple(map(str, arguments)),
            None if names is None else tuple(held[each] for each in names),
            str(line),
            str(code),
        )
        for fqn, name, arguments, names, line, code in call.get("operators", ())
    )
    return Inside(words[0], words[1], weights, events, int(call["left"]), operators)
