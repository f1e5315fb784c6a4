"""From what processes of an engine left to recordings: one a generation and rank."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from truestep.calls.classes import STEP, Kind
from truestep.calls.recording import CallRecording, assembled
from truestep.calls.roles import Happened, roles
from truestep.calls.trees import check_tree
from truestep.calls.values import Leaf, leaves, tensors
from truestep.engines.engine import GENERIC, LATENTS, TIMES, engine
from truestep.engines.inside import check_inside, with_inside
from truestep.engines.watch.exchanges import COLLECTIVE, PART
from truestep.engines.watch.spool import CALL, ENDED, HEAD, NOTED, SUFFIX, TENSORS
from truestep.errors import FileFormatError, UsageError
from truestep.reading import reason
from truestep.recording.format import Plain
from truestep.recording.header import Header, read_header
from truestep.recording.manifest import CallEntry

ENGINE = "engine"
"""Setting of a recording of an engine: what ran, how, and what its schedulers were set to."""

PARTIAL = "partial: the process ended before the generation was over"
LEFT_OUT = "tensors above the limit were left out: their shape alone is kept"
SEVERAL = "several threads generated at once: only what the first of them did is here"
INSIDE = (PART, COLLECTIVE)
"""Kinds of what happens inside of models' calls, or between them: no seam."""

COPIED = 1 << 22
"""Bytes of a call up to which its tensors are copied: of small ones there may be more than one
process may hold files open."""

_SPANS = ("generation", "run")
_STAGE_OF_ROLE = {"noise": "latent", "text": "text", "decode": "decoding"}


@dataclass(frozen=True)
class Left:
    """The folder of one generation, as it was left.

    Attributes:
        folder: Where it is.
        head: Who wrote it, and with what.
        ended: What was said when it was over; None of a process that was killed before.
    """

    folder: Path
    head: Mapping[str, Any]
    ended: Mapping[str, Any] | None

    @property
    def rank(self) -> int | None:
        """Of the process, as it was known last."""
        told = (self.ended or {}).get("rank")
        return told if told is not None else self.head.get("rank")

    @property
    def ranks(self) -> int:
        """How many processes its group has, as it was known last."""
        return int((self.ended or {}).get("ranks") or self.head.get("ranks") or 1)


def left_by(output: Path) -> list[Left]:
    """Folders that a program left for a recording, in the order in which they were begun."""
    found = []
    for folder in output.parent.glob(f"{output.name}.*{SUFFIX}"):
        head = _json(folder / HEAD)
        if head is not None:
            found.append(Left(folder, head, _json(folder / ENDED)))
    return sorted(found, key=lambda left: float(left.head.get("started", 0.0)))


def _json(path: Path) -> Mapping[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            _require_head(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise FileFormatError(
            "what a process left cannot be read", where=str(path), measured=reason(error)
        ) from None
    if not isinstance(content, dict):
        raise FileFormatError("what a process left cannot be read", where=str(path))
    return content


def assemble(left: Left) -> CallRecording:
    """Make a recording of what a process left of one generation.

    Raises:
        FileFormatError: A call cannot be read.
        UsageError: No call is there.
    """
    contents: dict[str, torch.Tensor] = {}
    told = sorted(_every(left, contents), key=lambda call: int(call["begun"]))
    if not told:
        raise UsageError("no call was recorded", where=str(left.folder))
    told, several = _of_one_thread(told)
    entries = [_entry(call) for call in told]
    placed = _placed(entries, told, contents)
    settings = {
        "label": str(left.head.get("engine", GENERIC.name)),
        "elsewhere": {},
        ENGINE: {
            "name": left.head.get("engine", GENERIC.name),
            "program": left.head.get("program", []),
            "command": left.head.get("command", []),
            "rank": left.rank,
            "ranks": left.ranks,
            "injected": (left.ended or {}).get("injected", {}),
            "schedulers": {c["component"]: c["config"] for c in told if c.get("config")},
            "roles": {f"{c['component']}.{c['method']}": c["role"] for c in told if c.get("role")},
            "branches": {
                f"{c['component']}.{c['method']}": c["branches"] for c in told if c.get("branches")
            },
        },
    }
    recording = with_inside(assembled(placed, contents, settings, device="cpu"), told, contents)
    notes = [] if left.ended is not None else [PARTIAL]
    notes += [SEVERAL] if several else []
    notes += [LEFT_OUT] if any(_dropped(entry) for entry in entries) else []
    manifest = recording.recording.manifest.model_copy(
        update={"environment": dict(left.head.get("environment", {})), "notes": tuple(notes)}
    )
    return recording.with_manifest(manifest)


def _every(left: Left, contents: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """All calls, those that were written with another too."""
    late = list((left.ended or {}).get(NOTED, []))
    for call in _calls(left.folder, contents):
        late += call.pop(NOTED, [])
        yield call
    for call in late:
        try:
            _require_trees(call, {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                "a call that a process left cannot be read",
                where=str(left.folder),
                measured=reason(error),
            ) from None
        yield call


def _require_trees(call: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """Raise where a call is none, or names tensors that are not there."""
    _require_call(call)
    for tree in (*call["arguments"].values(), call["output"], *call.get("state", {}).values()):
        check_tree(tree, ranks)
    int(call["begun"])
    check_inside(call.get("inside"), ranks)


def _calls(folder: Path, contents: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(f"*{TENSORS}")):
        contents.update(_tensors(path)[1])
    for path in sorted(folder.glob("*.safetensors")):
        try:
            header, tensors = _tensors(path)
            call = json.loads(header.metadata[CALL])
            contents.update(tensors)
            ranks = {name: tensor.ndim for name, tensor in contents.items()}
            _require_trees(call, ranks)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                "a call that a process left cannot be read",
                where=str(path),
                measured=reason(error),
            ) from None
        yield call


def _tensors(path: Path) -> tuple[Header, dict[str, torch.Tensor]]:
    header = read_header(path)
    tensors = Plain(header)
    small = path.stat().st_size < COPIED  # what is mapped holds its file open
    return header, {n: tensors[n].clone() if small else tensors[n] for n in tensors}


def _of_one_thread(told: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Without the calls of threads that step beside the first that does."""
    steps = [c.get("thread") for c in told if c["method"] == STEP and c["kind"] == Kind.SCHEDULER]
    others = {*steps} - {*steps[:1]}
    return [call for call in told if call.get("thread") not in others], bool(others)


def _require_call(call: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError where what another process wrote is no call."""
    words = [call[name] for name in ("component", "method", "kind", "owner")]
    words += [call.get("dtype", ""), call.get("context") or "", call.get("role") or ""]
    tables = [call["arguments"], call.get("state", {}), call.get("config") or {}]
    lists = [call["parameters"], call.get("branches", [])]
    words += [word for words in lists if isinstance(words, list) for word in words]
    for values, kind in ((words, str), (tables, dict), (lists, list)):
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(f"no {kind.__name__} where one is kept")
    if call["kind"] not in INSIDE:
        Kind(call["kind"])
    elif type(call["arguments"].get("inside")) is not int:
        raise ValueError("no number of the call that it is inside of")


def _require_head(content: Mapping[str, Any]) -> None:
    """Likewise of what is said of a generation."""
    rank, environment = content.get("rank"), content.get("environment", {})
    told = isinstance(environment, dict) and isinstance(content.get("injected", {}), dict | str)
    if not told or not all(isinstance(value, str) for value in environment.values()):
        raise ValueError("no table of words where one is kept")
    if rank is not None and type(rank) is not int:
        raise ValueError(f"rank {rank!r}")
    if type(content.get("ranks", 1)) is not int or not isinstance(content.get(NOTED, []), list):
        raise ValueError("no number of ranks where one is kept")
    float(content.get("started", 0.0))


def _entry(call: Mapping[str, Any]) -> CallEntry:
    kind = Kind.RUN if call.get("role") in _SPANS else call["kind"]
    return CallEntry(
        component=call["component"],
        method=call["method"],
        kind=kind,
        stage="output",
        call=0,
        owner=call["owner"],
        parameters=tuple(call["parameters"]),
        arguments=call["arguments"],
        output=call["output"],
        dtype=call.get("dtype", ""),
        context=call.get("context"),
        state=call.get("state", {}),
    )


def _dropped(entry: CallEntry) -> bool:
    if entry.kind in INSIDE:  # of these the shape alone is asked for
        return False
    trees = (*entry.arguments.values(), entry.output)
    return any(leaf.kind == "dropped" for tree in trees for _, leaf in leaves(tree))


def _placed(
    entries: Sequence[CallEntry],
    told: Sequence[Mapping[str, Any]],
    contents: Mapping[str, torch.Tensor],
) -> list[CallEntry]:
    """Calls with their stage and step; what spans others has neither."""
    passed = (Kind.RUN, *INSIDE)
    inner = [entry for entry in entries if entry.kind not in passed]
    if any(entry.method == STEP and entry.kind == Kind.SCHEDULER for entry in inner):
        happened = [Happened(e.component, e.method, Kind(e.kind)) for e in inner]
        places = _closed(inner, [(role.stage, role.step) for role in roles(happened)])
    else:
        places = _by_timestep(inner, told, contents)
    known = iter(places)
    steps = _steps_inside(entries, told, places)
    found: list[CallEntry] = []
    numbers: Counter[tuple[Any, ...]] = Counter()
    for entry, call in zip(entries, told, strict=True):
        if entry.kind in INSIDE:
            stage, step = "output", steps[int(call["begun"])]
        else:
            stage, step = ("output", None) if entry.kind == Kind.RUN else next(known)
        stage = _STAGE_OF_ROLE.get(call.get("role") or "", stage)
        step = None if stage in ("text", "decoding") else step
        place = (stage, step, entry.component, entry.method)
        found.append(replace(entry, stage=stage, step=step, call=numbers[place]))
        numbers[place] += 1
    return sorted(found, key=lambda entry: entry.kind == Kind.RUN)  # what spans a run ends last


def _closed(
    entries: Sequence[CallEntry], places: list[tuple[str, int | None]]
) -> list[tuple[str, int | None]]:
    """Predictions after the last update, as many as a step has, are a step without one."""
    last = max((step for _, step in places if step is not None), default=None)
    if last is None:
        return places
    named = [(e.component, e.method) for e in entries]
    within = [i for i, place in enumerate(places) if place == ("prediction", last)]
    usual = Counter(named[i] for i in within if entries[i].kind == Kind.MODEL)
    late = [
        i
        for i, (_, step) in enumerate(places)
        if step is None and within and i > within[-1] and named[i] in usual
    ]
    if Counter(named[i] for i in late) != usual:
        return places
    return [("prediction", last + 1) if i in late else place for i, place in enumerate(places)]


def _steps_inside(
    entries: Sequence[CallEntry],
    told: Sequence[Mapping[str, Any]],
    places: Sequence[tuple[str, int | None]],
) -> dict[int, int | None]:
    """Steps of what happens inside of calls: theirs; between them, of the next that has one."""
    known = iter(places)
    own = {
        int(call["begun"]): next(known)[1]
        for entry, call in zip(entries, told, strict=True)
        if entry.kind not in (Kind.RUN, *INSIDE)
    }
    found: dict[int, int | None] = {}
    following: int | None = None
    for entry, call in zip(reversed(entries), reversed(told), strict=True):
        begun = int(call["begun"])
        if entry.kind in INSIDE:
            found[begun] = own.get(entry.arguments["inside"], following)
        elif own.get(begun) is not None:
            following = own[begun]
    return found


def _by_timestep(
    entries: Sequence[CallEntry],
    told: Sequence[Mapping[str, Any]],
    contents: Mapping[str, torch.Tensor],
) -> list[tuple[str, int | None]]:
    """Places in a run without schedulers: a step is as long as the timestep and the latent stay.

    The denoiser is what an adapter says, else the model that is called most often and is given a
    timestep.
    """
    inside_steps = ("prediction", "passes", "guided")
    named = {(c["component"], c["method"]) for c in told if c.get("role") in inside_steps}
    times = [_time(entry, contents) for entry in entries]
    often = Counter(
        (e.component, e.method)
        for e, time in zip(entries, times, strict=True)
        if time is not None and e.kind == Kind.MODEL
    )
    wanted = named or {name for name, _ in often.most_common(1)}
    inside = [
        index for index, entry in enumerate(entries) if (entry.component, entry.method) in wanted
    ]
    if not inside:
        return [("output", None)] * len(entries)
    places: list[tuple[str, int | None]] = []
    step = -1
    last: tuple[str, float | None] = ("", None)
    for index, time in enumerate(times):
        here = (_latent(entries[index]) or last[0], time)
        if index in inside and time is not None and here != last:
            step, last = step + 1, here
        if index < inside[0]:
            places.append(("text", None))
        elif entries[index].kind == Kind.MODEL and time is not None and index <= inside[-1] + 1:
            places.append(("prediction", step))
        else:
            places.append(("decoding", None))
    return places


def _latent(entry: CallEntry) -> str:
    """Content of the latent that a call was given, by the names that are usual for it."""
    trees = (entry.arguments[name] for name in LATENTS if name in entry.arguments)
    return next((name for tree in trees for _, name in tensors(tree)), "")


def _time(entry: CallEntry, contents: Mapping[str, torch.Tensor]) -> float | None:
    """The timestep that a call was given, by the names that are usual for it."""
    names = [name for name in TIMES if name in entry.arguments]
    for name in names:
        for _, leaf in leaves(entry.arguments[name]):
            value = _number(leaf, contents)
            if value is not None:
                return value
    return None


def _number(leaf: Leaf, contents: Mapping[str, torch.Tensor]) -> float | None:
    if leaf.kind == "number":
        return float(leaf.value)
    if leaf.kind == "tensor":
        tensor = contents[leaf.value]
        if tensor.numel() and not bool((tensor != tensor.reshape(-1)[0]).any()):
            return float(tensor.reshape(-1)[0])
    return None


def targets(
    output: Path, found: Iterable[Left], *, keep: bool = False
) -> Iterator[tuple[Left, Path]]:
    """Where each generation goes: OUTPUT, then OUTPUT with `.2`; with `.rank1` of a group.

    Args:
        output: The first.
        found: The generations, in order.
        keep: Pass over files that are there.
    """
    numbers: Counter[int | None] = Counter()
    for left in found:
        while True:
            numbers[left.rank] += 1
            parts = [output.stem]
            parts += [f"rank{left.rank}"] if left.rank is not None else []
            parts += [str(numbers[left.rank])] if numbers[left.rank] > 1 else []
            target = output.with_name(".".join(parts) + output.suffix)
            if not (keep and target.exists()):
                break
        yield left, target


def write(left: Left, target: Path) -> CallRecording:
    """Write the recording of one generation; its folder is gone then.

    Raises:
        FileFormatError, WriteError: It could not be read, or written; the folder stays.
        UsageError: No call was recorded.
    """
    try:
        recording = assemble(left)
    except UsageError:  # nothing is in it
        shutil.rmtree(left.folder)
        raise
    recording.write(target)
    shutil.rmtree(left.folder)
    return recording


def adapter_of(settings: Mapping[str, Any]) -> Any:
    """The adapter of the engine that a recording is of; the generic one of several or none."""
    name = str(settings.get(ENGINE, {}).get("name", ""))
    try:
        return engine(name)
    except UsageError:
        return GENERIC
