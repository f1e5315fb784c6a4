"""Traces of programs that were killed: made whole from the spool they left.

What had been handed to the operating system is there, up to the last root call that ended; a line
or a tensor that was being written is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, BinaryIO

from truestep.errors import FileFormatError, UsageError, WriteError
from truestep.files import alive
from truestep.reading import parse_json, reason
from truestep.recording.format import Recording
from truestep.recording.header import ITEM_SIZES, bad_name, digest, length_of
from truestep.recording.manifest import Level, Manifest
from truestep.recording.spool import (
    MAX_LINE,
    SUFFIX,
    Row,
    being_written,
    entry_row,
    join,
    journal_lines,
    stored_parts,
)
from truestep.text import quoted

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
            hint=f"truestep trace recover {quoted(str(found[0]))}" if found else "ls -d *.spool",
        )
    folder = found[0]
    name, _, owner = folder.name.removesuffix(SUFFIX).rpartition(".")
    target = Path(output) if output else folder.with_name(name)
    head, count, sizes, closed = _read(folder)
    if not closed and _written(folder, owner.partition("-")[0]):
        raise UsageError(
            "the process that writes this trace is still running",
            where=str(folder),
            measured=f"process {owner}",
        )
    if target.exists():
        raise UsageError(
            "the target exists",
            where=str(target),
            hint=f"truestep trace recover {quoted(str(folder))} --output other.safetensors",
        )
    notes = (*head.get("notes", ()), *(() if closed else (PARTIAL,)))
    manifest = Manifest.model_validate({**head, "notes": notes, "tensors": ()})
    try:
        for size, end in sizes.items():
            os.truncate(folder / f"data.{size}", end)
    except OSError as error:
        raise WriteError(
            "the spool cannot be changed", where=str(folder), measured=str(error)
        ) from error
    return join(folder, target, manifest, count, sizes)


def _written(folder: Path, owner: str) -> bool:
    """Whether a spool is being written: by this process, or by another that lives."""
    if owner == str(os.getpid()):
        return folder.absolute() in being_written()
    return owner.isdecimal() and alive(int(owner))


def _read(folder: Path) -> tuple[dict[str, Any], int, dict[int, int], bool]:
    """Settings, how many rows are whole, the bytes of data they need, and whether the trace ended.

    A trace that was closed, but could not be put in place, ends with all that its manifest says.
    """
    head, level = _head(folder)
    names: set[str] = set()
    sizes: dict[int, int] = {}
    files = {int(p.suffix[1:]): p for p in folder.glob("data.*") if p.suffix[1:].isdecimal()}
    with ExitStack() as stack:
        try:
            opened = {size: stack.enter_context(f.open("rb")) for size, f in files.items()}
            lines = stack.enter_context(closing(journal_lines(folder)))
            for line in lines:
                fields = parse_json(line)
                if isinstance(fields, dict):
                    Manifest.model_validate({**fields, "tensors": ()})
                    return fields, len(names), sizes, True
                row = entry_row(fields, level)
                ends = _whole(row, level, opened, sizes)
                if row.entry.name in names or bad_name(row.entry.name):
                    break
                names.add(row.entry.name)
                sizes.update(ends)
        except OSError as error:
            raise FileFormatError(
                "the spool's data cannot be read", where=str(folder), measured=reason(error)
            ) from None
        except (ValueError, TypeError, KeyError):
            pass  # the line, or its data, was being written
    return head, len(names), sizes, False


def _head(folder: Path) -> tuple[dict[str, Any], Level]:
    """The settings, and the level among them.

    Raises:
        FileFormatError: They cannot be read.
    """
    try:
        with (folder / "journal.jsonl").open("rb") as file:
            head = parse_json(file.readline(MAX_LINE))
        if not isinstance(head, dict):
            raise ValueError(f"its first line is a {type(head).__name__}, not a table")
        return head, Manifest.model_validate({**head, "tensors": ()}).level
    except (OSError, ValueError) as error:
        raise FileFormatError(
            "the spool's journal cannot be read",
            where=str(folder),
            measured=reason(error),
            likely="the process was killed before its first module ran",
        ) from None


def _whole(
    row: Row, level: Level, files: Mapping[int, BinaryIO], sizes: Mapping[int, int]
) -> dict[int, int]:
    """Where the data of a row end, by the size of an item.

    Raises:
        ValueError, KeyError: They are not there, or not what they were.
    """
    ends = {}
    expected = (row.entry.digest, row.entry.sketch_digest)
    for (_, dtype, shape, offset), known in zip(stored_parts(row, level), expected, strict=False):
        size, length = ITEM_SIZES[dtype], length_of(dtype, shape)
        if offset != sizes.get(size, 0) or min(shape, default=0) < 0:
            raise ValueError("not the next bytes")  # they are appended
        if length:
            if offset + length > os.fstat(files[size].fileno()).st_size:
                raise ValueError("the data are not there")
            files[size].seek(offset)
            if digest(files[size].read(length)) != known:
                raise ValueError("damaged")
        ends[size] = sizes.get(size, 0) + length
    return ends
