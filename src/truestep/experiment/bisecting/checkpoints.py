"""Two checkpoints as changes: each tensor, file or component that differs can be exchanged.

Files are read by their headers and copied by their bytes: no tensor is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from truestep.errors import UsageError
from truestep.experiment.bisecting.isolation import Place, Setting
from truestep.experiment.bisecting.store import key_of
from truestep.files import sha256_of, unwritten
from truestep.recording.header import Header, Slot, read_header

VARIABLE = "TRUESTEP_WEIGHTS"
"""Variable with the path of the mixed checkpoint."""

_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Item:
    """What differs between two checkpoints, and can be exchanged alone.

    Attributes:
        name: A tensor with its component in front, a file, or a component.
        kind: `component` where tensors of the two do not pair by their names.
    """

    name: str
    kind: str
    component: str
    key: str


@dataclass(frozen=True)
class _Tensor:
    header: Header
    slot: Slot


@dataclass(frozen=True)
class Side:
    """One checkpoint: its files by their names in it."""

    root: Path
    files: dict[str, Path]

    def components(self) -> dict[str, list[str]]:
        """Folder to its files of tensors."""
        found: dict[str, list[str]] = {}
        for name in self.files:
            if name.endswith(_SUFFIX):
                found.setdefault(str(Path(name).parent), []).append(name)
        return found


@dataclass(frozen=True)
class Pair:
    """Two checkpoints and what differs."""

    good: Side
    bad: Side
    items: tuple[Item, ...]

    @property
    def single(self) -> bool:
        """Whether they are files, not folders."""
        return self.good.root.is_file()


def pair(spec: str) -> Pair:
    """The checkpoints of GOOD..BAD.

    Raises:
        UsageError: It names no two files or folders, or they are the same.
        FileFormatError: A file of tensors cannot be read.
    """
    parts = _split(spec)
    if not parts:
        raise UsageError(
            "--weights needs two files of tensors, or two folders",
            where=f"--weights {spec}",
            hint="write it as GOOD..BAD",
        )
    good, bad = (_side(path, parts[0]) for path in parts)
    items = tuple(sorted(_items(good, bad), key=lambda item: _natural(item.name)))
    if not items:
        raise UsageError("both checkpoints hold the same", where=f"--weights {spec}")
    return Pair(good, bad, items)


def _split(spec: str) -> list[Path]:
    """Both paths; none where there are no such two. Paths may have dots of their own."""
    for at in (found.start() for found in re.finditer(r"(?=\.\.)", spec)):
        parts = [Path(spec[:at]), Path(spec[at + 2 :])]
        kinds = (all(map(Path.is_file, parts)), all(map(Path.is_dir, parts)))
        if spec[:at] and spec[at + 2 :] and any(kinds):
            return parts
    return []


def _side(path: Path, named_as: Path) -> Side:
    path = path.absolute()
    if path.is_file():
        return Side(path, {named_as.name: path})
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return Side(path, {str(each.relative_to(path)): each for each in files})


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _items(good: Side, bad: Side) -> Iterator[Item]:
    ours, theirs = good.components(), bad.components()
    paired: set[str] = set()
    for component in sorted({*ours, *theirs}):
        sides = tensors(good, ours.get(component, [])), tensors(bad, theirs.get(component, []))
        if sides[0] is None or sides[1] is None or sides[0].keys() != sides[1].keys():
            yield Item(component, "component", component, component)
            paired.add(component)
            continue
        paired.add(component)
        for name, tensor in sides[0].items():
            if not _same(tensor, sides[1][name]):
                shown = name if component == "." else f"{component}/{name}"
                yield Item(shown, "tensor", component, name)
    for name in sorted({*good.files, *bad.files}):
        if name.endswith((_SUFFIX, _INDEX)) and str(Path(name).parent) in paired:
            continue
        if not _same_file(good.files.get(name), bad.files.get(name)):
            yield Item(name, "file", "", name)


def tensors(side: Side, names: Iterable[str]) -> dict[str, _Tensor] | None:
    """Tensors of a component; None where a name is in two of its files."""
    found: dict[str, _Tensor] = {}
    for file in names:
        header = read_header(side.files[file])
        for name, slot in header.tensors.items():
            if name in found:
                return None
            found[name] = _Tensor(header, slot)
    return found


def _same(one: _Tensor, other: _Tensor) -> bool:
    if (one.slot.dtype, one.slot.shape) != (other.slot.dtype, other.slot.shape):
        return False
    return all(a == b for a, b in zip(_blocks(one), _blocks(other), strict=True))


def _blocks(tensor: _Tensor) -> Iterator[bytes]:
    """The bytes of a tensor, block by block."""
    left = tensor.slot.end - tensor.slot.begin
    with tensor.header.path.open("rb") as file:
        file.seek(tensor.header.data_start + tensor.slot.begin)
        while left:
            data = file.read(min(left, _BLOCK))
            left -= len(data)
            yield data


def _same_file(one: Path | None, other: Path | None) -> bool:
    if one is None or other is None or one.stat().st_size != other.stat().st_size:
        return False
    return sha256_of(one) == sha256_of(other)


def groups(items: Sequence[Item]) -> list[tuple[str, list[Item]]]:
    """Items by the first part of their names in which they differ: components, then blocks,
    modules, tensors."""
    parts = [re.split(r"[./]", item.name) for item in items]
    depth = 0
    while len({tuple(words[: depth + 1]) for words in parts}) == 1 and len(items) > 1:
        depth += 1
    found: dict[str, list[Item]] = {}
    for item, words in zip(items, parts, strict=True):
        length = sum(map(len, words[: depth + 1])) + len(words[: depth + 1]) - 1
        found.setdefault(item.name[:length], []).append(item)
    return [(name if some[1:] else some[0].name, some) for name, some in found.items()]


def setting(found: Pair, chosen: Sequence[Item], folder: Path, identity: str) -> Setting:
    """A point: the good checkpoint with the chosen items of the bad one.

    Args:
        folder: Where the command runs.
        identity: What stands for the content of the two.
    """
    names = [f"{item.kind} {item.name}" for item in chosen]
    count = f"{len(names)} of {len(found.items)} differences"

    @contextmanager
    def place(scratch: Path) -> Iterator[Place]:
        try:
            path = _mixed(found, chosen, scratch / "weights")
        except OSError as error:
            raise unwritten(scratch / "weights", "the mixed checkpoint", error) from error
        variables: dict[str, str | None] = {
            VARIABLE: str(path),
            "TRUESTEP_BISECT_ROOT": str(folder),
        }
        yield Place(folder, variables, {"weights": str(path), "repo": str(folder)})

    return Setting(key=key_of([identity, *names]), label=count, place=place)


def identity(found: Pair) -> str:
    """What stands for the content of both sides: sizes and times of all of their files."""
    told = []
    for side in (found.good, found.bad):
        for name, path in side.files.items():
            state = path.stat()
            told.append(f"{side.root} {name} {state.st_size} {state.st_mtime_ns}")
    return key_of(told)


def _mixed(found: Pair, chosen: Sequence[Item], path: Path) -> Path:
    """Write the mixed checkpoint: links to what is whole, new files where tensors are exchanged."""
    files = dict(found.good.files)
    changed: dict[str, set[str]] = {}
    for item in chosen:
        if item.kind == "tensor":
            changed.setdefault(item.component, set()).add(item.key)
        elif item.kind == "file":
            _take(files, found.bad.files, {item.key})
        else:
            _take(files, found.bad.files, _weights_of(item.key, {*files, *found.bad.files}))
    path.mkdir()
    written: dict[str, Path] = {}
    ours, theirs = found.good.components(), found.bad.components()
    for component, names in changed.items():
        sources = tensors(found.bad, theirs[component]) or {}
        for file in ours[component]:
            header = read_header(found.good.files[file])
            if names & header.tensors.keys():
                written[file] = path / file
                written[file].parent.mkdir(parents=True, exist_ok=True)
                _write(path / file, header, {n: sources[n] for n in names & header.tensors.keys()})
    for name, source in files.items():
        if name not in written:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).symlink_to(source)
    return path / next(iter(files)) if found.single else path


def _weights_of(component: str, names: Iterable[str]) -> set[str]:
    inside = (name for name in names if str(Path(name).parent) == component)
    return {name for name in inside if name.endswith((_SUFFIX, _INDEX))}


def _take(files: dict[str, Path], others: dict[str, Path], names: set[str]) -> None:
    """Files as the other side has them; one that it lacks goes."""
    for name in names:
        files.pop(name, None)
        if name in others:
            files[name] = others[name]


def _write(path: Path, header: Header, exchanged: dict[str, _Tensor]) -> None:
    """A file of tensors with some of them exchanged; dtypes and shapes are those of their side."""
    order = {n: exchanged.get(n, _Tensor(header, slot)) for n, slot in header.tensors.items()}
    table: dict[str, object] = {"__metadata__": header.metadata} if header.metadata else {}
    begin = 0
    for name, tensor in order.items():
        end = begin + tensor.slot.end - tensor.slot.begin
        table[name] = {
            "dtype": tensor.slot.dtype,
            "shape": list(tensor.slot.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the library has it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in order.values():
            for data in _blocks(tensor):
                file.write(data)
