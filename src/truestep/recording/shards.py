"""A checkpoint in several safetensors files: one mapping of tensors, each read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from truestep.errors import FileFormatError
from truestep.reading import parse_json, read
from truestep.recording.format import Plain, read_plain
from truestep.text import quoted

INDEX = ".safetensors.index.json"
"""How the name of a table ends that says which file holds which tensor."""


class Shards(Mapping[str, torch.Tensor]):
    """Tensors of all files, in the order of the index."""

    def __init__(self, files: Mapping[str, Plain]) -> None:
        """Args:
        files: Name of a tensor to the file that holds it.
        """
        self._files = files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name][name]

    def release(self, name: str) -> None:
        """Let the pages of a tensor go; whoever holds it reads the file again."""
        if name in self._files:
            self._files[name].release(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def is_checkpoint(path: Path) -> bool:
    """Whether it is a folder, or the index of one."""
    return path.is_dir() or path.name.endswith(INDEX)


def read_checkpoint(path: Path) -> Mapping[str, torch.Tensor]:
    """All tensors of a checkpoint, by its index or, where there is none, of the one file there is.

    Args:
        path: A folder of a model's weights, as diffusers and transformers write it, or the
            `*.safetensors.index.json` in it.

    Raises:
        FileFormatError: There is no such checkpoint or more than one, a file is missing or damaged,
            the index names what its files do not hold, or they hold more than it names.
    """
    if not path.is_dir():
        return _by_index(path)
    indices, files = (sorted(path.glob(f"*{end}")) for end in (INDEX, ".safetensors"))
    if len(indices) == 1:
        return _by_index(indices[0])
    if indices or len(files) > 1:
        names = [each.name for each in indices or files]
        _refuse(
            path,
            "the folder holds more than one checkpoint" if indices else "the folder has no index",
            f"it holds {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}",
            hint=f"name one of them: {quoted(str(path / names[0]))}",
        )
    if not files:
        parts = sorted({each.parent for each in path.glob("*/*.safetensors")})
        _refuse(
            path,
            "the folder holds no safetensors files",
            f"its parts do: {', '.join(part.name for part in parts)}" if parts else "",
            hint=f"name one of its parts: {quoted(str(parts[0]))}" if parts else "",
        )
    return read_plain(files[0])


def _by_index(path: Path) -> Shards:
    table = read(path, "the index of the checkpoint cannot be read", _weight_map)
    opened: dict[str, Plain] = {}
    for file in dict.fromkeys(table.values()):
        if Path(file).name != file or file in (".", ".."):
            _refuse(path, "the index names a file outside its folder", f"it names {file[:80]!r}")
        if not (path.parent / file).is_file():
            _refuse(path, "a file of the checkpoint is missing", f"{file} is not there")
        opened[file] = read_plain(path.parent / file)
    absent = [name for name, file in table.items() if name not in opened[file]]
    if absent:
        measured = f"{table[absent[0]]} lacks {absent[0]!r} and {len(absent) - 1} more"
        _refuse(path, "the index names tensors that its files do not hold", measured)
    stem = path.name.removesuffix(INDEX)
    others = [each.name for each in sorted(path.parent.glob(f"{stem}-*-of-*.safetensors"))]
    strange = [name for name in others if name not in opened]
    if strange:
        _refuse(path, "the index leaves out a file of the checkpoint", f"{strange[0]} is there")
    extra = [(f, n) for f, part in opened.items() for n in part if table.get(n) != f]
    if extra:
        measured = f"{extra[0][0]} holds {extra[0][1]!r} and {len(extra) - 1} more"
        _refuse(path, "the files hold tensors that the index does not name there", measured)
    return Shards({name: opened[file] for name, file in table.items()})


def _weight_map(data: bytes) -> dict[str, str]:
    found = parse_json(data, unique=True)
    table: Any = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError("it has no weight_map")
    odd = next((file for file in table.values() if not isinstance(file, str)), None)
    if odd is not None:
        raise ValueError(f"its weight_map names {odd!r}, which is no file")
    return table


def _refuse(path: Path, what: str, measured: str, *, hint: str = "") -> NoReturn:
    raise FileFormatError(what, where=str(path), measured=measured, hint=hint)
