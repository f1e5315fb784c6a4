"""Traces of programs that were killed: made whole from the spool they left.

What had been handed to the operating system is there, up to the last root call that ended; a line
or a tensor that was being written is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from truestep.errors import FileFormatError, UsageError, WriteError
from truestep.files import alive
from truestep.recording.format import Recording
from truestep.recording.header import ITEM_SIZES, digest
from truestep.recording.manifest import Level, Manifest
from truestep.tracing.writer import SUFFIX, Row, entry_row, join, length_of, stored_parts

PARTIAL = "partial: the process ended before the trace was closed"


def spools(path: Path) -> list[Path]:
    """Spools that belong to a target, or the one spool that `path` is."""
    if path.is_dir():
        return [path] if path.name.endswith(SUFFIX) else sorted(path.glob(f"*{SUFFIX}"))
    return sorted(path.parent.glob(f"{path.name}.*{SUFFIX}"))


def recover(path: str | Path, *, output: str | Path | None = None) -> Recording:
    """Make a trace of what a killed process left.

    Args:
        path: The target the process would have written, its spool, or a folder with one spool.
        output: Where to write; default the target.

    Returns:
        The trace, with a note that it is partial. The spool is gone.

    Raises:
        UsageError: There is no spool or more than one, its process lives, or `output` exists.
        FileFormatError: The journal is damaged from its first line on.
    """
    found = spools(Path(path))
    if len(found) != 1:
        raise UsageError(
            "there is no spool to recover" if not found else f"{len(found)} spools were left",
            where=str(path),
            measured="\n".join(str(place) for place in found[:10]),
            hint=f"truestep trace recover {found[0]}" if found else "ls -d *.spool",
        )
    folder = found[0]
    name, _, owner = folder.name.removesuffix(SUFFIX).rpartition(".")
    if owner.isdecimal() and int(owner) != os.getpid() and alive(int(owner)):
        raise UsageError(
            "the process that writes this trace is still running",
            where=str(folder),
            measured=f"process {owner}",
        )
    target = Path(output) if output else folder.with_name(name)
    if target.exists():
        raise UsageError(
            "the target exists",
            where=str(target),
            hint=f"truestep trace recover {folder} --output OTHER.safetensors",
        )
    head, rows, sizes = _read(folder)
    notes = (*head.get("notes", ()), PARTIAL)
    manifest = Manifest.model_validate({**head, "notes": notes, "tensors": ()})
    try:
        for size, end in sizes.items():
            os.truncate(folder / f"data.{size}", end)
    except OSError as error:
        raise WriteError(
            "the spool cannot be changed", where=str(folder), measured=str(error)
        ) from error
    return join(folder, target, manifest, rows, sizes)


def _read(folder: Path) -> tuple[dict[str, Any], list[Row], dict[int, int]]:
    """Settings, whole tensors, and how many bytes of each data file they need."""
    try:
        lines = (folder / "journal.jsonl").read_bytes().split(b"\n")
        head = json.loads(lines[0])
        level: Level = Manifest.model_validate({**head, "tensors": ()}).level
    except (OSError, ValueError) as error:
        raise FileFormatError(
            "the spool's journal cannot be read",
            where=str(folder),
            measured=str(error).splitlines()[0][:200],
            likely="the process was killed before its first module ran",
        ) from None
    rows: list[Row] = []
    sizes: dict[int, int] = {}
    files = {int(p.suffix[1:]): p for p in folder.glob("data.*") if p.suffix[1:].isdecimal()}
    with ExitStack() as stack:
        opened = {size: stack.enter_context(file.open("rb")) for size, file in files.items()}
        for line in lines[1:]:
            try:
                row = entry_row(json.loads(line), level)
                ends = _whole(row, level, opened)
            except (ValueError, TypeError, KeyError):
                break  # the line, or its data, was being written
            rows.append(row)
            for size, end in ends.items():
                sizes[size] = max(sizes.get(size, 0), end)
    return head, rows, sizes


def _whole(row: Row, level: Level, files: Mapping[int, BinaryIO]) -> dict[int, int]:
    """Where the data of a row end, by the size of an item.

    Raises:
        ValueError, KeyError: They are not there, or not what they were.
    """
    ends = {}
    expected = (row.entry.digest, row.entry.sketch_digest)
    for (_, dtype, shape, offset), known in zip(stored_parts(row, level), expected, strict=False):
        size, length = ITEM_SIZES[dtype], length_of(dtype, shape)
        if length:
            files[size].seek(offset)
            if digest(files[size].read(length)) != known:
                raise ValueError("damaged")
        ends[size] = offset + length
    return ends
