"""Traces on their way to disk: a spool beside the target while the program runs, one file after.

The spool `TARGET.PID.spool` is a folder. `data.8`, `data.4`, ... hold the bytes of stored tensors
by the size of an item, appended as they come; `journal.jsonl` has a line of settings, then one line
a tensor with its digest. Closing joins the data files, widest items first so that all tensors are
aligned, behind a safetensors header, and moves the result into place. Nothing is held in memory but
names. A program that is killed leaves its spool: `recover` makes a trace of it. A trace whose table
would outgrow the header is packed: see `recording.columns`.

Joining needs the trace's size twice on disk, for a moment.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import struct
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import TypeAdapter

from truestep.errors import UsageError, WriteError
from truestep.files import settle, unwritten
from truestep.recording import columns
from truestep.recording.format import Recording, metadata_of, verify
from truestep.recording.header import (
    ITEM_SIZES,
    MOMENTS_KINDS,
    SAFETENSORS_NAMES,
    digest,
    length_of,
    stored_names,
)
from truestep.recording.manifest import PACKED, Level, Manifest, TensorEntry
from truestep.text import quoted

SUFFIX = ".spool"

PLAIN = 16_000_000
"""Bytes of journal up to which each tensor has its own entry in the header. The header takes up to
four times as much, with names of the longest kind; readers take 100 MB."""

MAX_LINE = 1_000_000
"""Bytes of a line of the journal; a name has 1,024 characters, a shape 64 numbers."""

_BUFFER = 1 << 18
_ENTRY = TypeAdapter(TensorEntry)
_STORABLE = frozenset(SAFETENSORS_NAMES)


@dataclass(frozen=True)
class Blob:
    """Bytes of one stored tensor: dtype as torch names it, shape, and the bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class Row:
    """One recorded tensor: its entry in the manifest's table, and where its bytes are."""

    entry: TensorEntry
    offsets: tuple[int, ...]


def storable(dtype: torch.dtype) -> bool:
    """Whether a recording can hold a dtype."""
    return str(dtype).removeprefix("torch.") in _STORABLE


_OPEN: dict[Path, tuple[int, Path]] = {}
"""Targets that are being traced to: the process, and its spool."""

_BEGINNING = threading.Lock()


def _new_folder(target: Path) -> Path:
    """Make the folder of a new spool; one that a process with our number left is not touched."""
    for number in itertools.count():
        owner = f"{os.getpid()}-{number}" if number else str(os.getpid())
        folder = target.with_name(f"{target.name}.{owner}{SUFFIX}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def being_written() -> list[Path]:
    """Spools that this process writes."""
    return [folder for pid, folder in _OPEN.values() if pid == os.getpid()]


class Spool:
    """Tensors appended to files beside the target, which is written when the trace is closed.

    Nothing is kept in the buffers of the interpreter that another process could inherit and write
    a second time: a fork leaves the spool to the process that opened it.
    """

    def __init__(self, target: str | Path, *, head: dict[str, Any], level: Level) -> None:
        self.target = Path(target)
        self._key = self.target.absolute()
        self._level: Level = level
        self._owner = os.getpid()
        self._count = 0
        self._sizes: dict[int, int] = {}
        self._buffers: dict[int, bytearray] = {}
        self._files: dict[int, int] = {}
        self._lines: list[str] = []
        with _BEGINNING:
            if _OPEN.get(self._key, (0,))[0] == os.getpid():
                raise UsageError(
                    "another trace is being written to this path",
                    where=str(self.target),
                    likely="one capture within another, or in another thread",
                    hint="give each its own path",
                )
            try:
                if self.target.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                self.target.parent.mkdir(parents=True, exist_ok=True)
                self.folder = _new_folder(self.target)
                self._journal = self._open("journal.jsonl")
                self._write(self._journal, json.dumps({**head, "level": level}).encode() + b"\n")
            except OSError as error:
                raise unwritten(self.target, "the trace", error) from error
            _OPEN[self._key] = (os.getpid(), self.folder.absolute())

    def add(self, fields: tuple[Any, ...], blobs: Sequence[Blob]) -> None:
        """Append one recorded tensor.

        Args:
            fields: Name, order, dtype, shape, step, branch, fqn and call: see `TensorEntry`.
            blobs: What is stored of it, in the order of `stored_names`.

        Raises:
            WriteError: The disk is full, or the folder went away.
        """
        digests, offsets = [], []
        try:
            for blob in blobs:
                size = ITEM_SIZES[SAFETENSORS_NAMES[blob.dtype]]
                digests.append(digest(blob.data))
                offsets.append(self._append(size, blob.data))
        except OSError as error:
            raise unwritten(self.target, "the trace", error) from error
        self._count += 1
        self._lines.append(json.dumps((*fields, digests, offsets)))
        if len(self._lines) >= 4096:
            self.flush()

    def _append(self, size: int, data: bytes | memoryview) -> int:
        offset = self._sizes.get(size, 0)
        length = len(data)
        buffer = self._buffers.setdefault(size, bytearray())
        if length >= _BUFFER or len(buffer) + length > _BUFFER:
            self._drain(size)
        if length >= _BUFFER:
            self._write(self._files[size], data)
        else:
            buffer += data
        self._sizes[size] = offset + length
        return offset

    def _drain(self, size: int) -> None:
        if size not in self._files:
            self._files[size] = self._open(f"data.{size}")
        buffer = self._buffers[size]
        if buffer:
            self._write(self._files[size], buffer)
            buffer.clear()

    def _open(self, name: str) -> int:
        return os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    @staticmethod
    def _write(file: int, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]

    def flush(self) -> None:
        """Hand everything to the operating system: it survives the process from here on."""
        try:
            for size in self._buffers:
                self._drain(size)
            if self._lines:
                self._write(self._journal, ("\n".join(self._lines) + "\n").encode())
                self._lines.clear()
        except OSError as error:
            raise unwritten(self.target, "the trace", error) from error

    def close(self, manifest: Manifest, *, replace: bool = True) -> Recording:
        """Join the spool into the target, atomically, and open it.

        Args:
            manifest: Everything but the tensor table.
            replace: Whether an existing target may be replaced; where not, the spool is left.

        Raises:
            WriteError: It could not be written; the spool is left, an existing target untouched.
        """
        try:
            self.flush()
            self._write(self._journal, b"%s\n" % manifest.model_dump_json().encode())
        except (OSError, WriteError) as error:
            raise _kept(self.folder, self.target, error) from error
        finally:
            self.release()
        if not replace and self.target.exists():
            exists = FileExistsError(errno.EEXIST, "the trace that is there is complete")
            raise _kept(self.folder, self.target, exists)
        return join(self.folder, self.target, manifest, self._count, self._sizes)

    def release(self) -> None:
        """Close the files and leave the spool as it is."""
        with _BEGINNING:
            _OPEN.pop(self._key, None)
        for file in (*self._files.values(), self._journal):
            with suppress(OSError):
                os.close(file)
        self._files.clear()

    def owned(self) -> bool:
        """Whether this process, not a parent that was forked, opened the spool."""
        return os.getpid() == self._owner


class Memory:
    """The same in memory, for a trace without a path."""

    def __init__(self, *, level: Level) -> None:
        self._level: Level = level
        self._rows: list[tuple[Any, ...]] = []
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, fields: tuple[Any, ...], blobs: Sequence[Blob]) -> None:
        """Keep a copy of one recorded tensor; see `Spool.add`."""
        names = stored_names(fields[0], self._level)
        for name, blob in zip(names, blobs, strict=True):
            raw = bytearray(blob.data)
            dtype = getattr(torch, blob.dtype)
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            self._tensors[name] = flat.reshape(blob.shape)
        self._rows.append((*fields, tuple(digest(blob.data) for blob in blobs), ()))

    def flush(self) -> None:
        """Nothing to do."""

    def close(self, manifest: Manifest, *, replace: bool = True) -> Recording:
        """The recording, in memory."""
        rows = sorted((entry_row(f, self._level) for f in self._rows), key=lambda r: r.entry.order)
        table = tuple(row.entry for row in rows)
        stored = [name for e in table for name in stored_names(e.name, self._level)]
        tensors = {name: self._tensors[name] for name in stored}
        return Recording(manifest.model_copy(update={"tensors": table}), tensors=tensors)

    def release(self) -> None:
        """Nothing to do."""

    def owned(self) -> bool:
        """Memory belongs to whoever has it."""
        return True


def entry_row(fields: Sequence[Any], level: Level) -> Row:
    """A line of the journal as a row of the table.

    Raises:
        ValueError: It is not one.
    """
    name, order, dtype, shape, step, branch, fqn, call, digests, offsets = fields
    wanted = len(stored_names(name, level))
    if len(digests) != wanted or len(offsets) not in (0, wanted):
        raise ValueError("digests and offsets do not fit the level")
    entry = _ENTRY.validate_python(
        {
            "name": name,
            "kind": "module",
            "order": order,
            "dtype": dtype,
            "shape": shape,
            "digest": digests[0],
            "sketch_digest": digests[1] if wanted > 1 else "",
            "step": step,
            "branch": branch,
            "fqn": fqn,
            "call": call,
        }
    )
    return Row(entry, tuple(offsets))


def stored_parts(row: Row, level: Level) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Stored name, safetensors dtype, shape and offset of what stands for one tensor."""
    entry = row.entry
    kinds = [(SAFETENSORS_NAMES[entry.dtype], entry.shape)] if level == "full" else [*MOMENTS_KINDS]
    names = stored_names(entry.name, level)
    return [
        (name, dtype, shape, offset)
        for name, (dtype, shape), offset in zip(names, kinds, row.offsets, strict=False)
    ]


def journal_lines(folder: Path) -> Generator[bytes, None, None]:
    """Lines of a spool's journal after the first, one at a time.

    Raises:
        OSError: It cannot be read.
    """
    with (folder / "journal.jsonl").open("rb") as file:
        file.readline()
        while line := file.readline(MAX_LINE):
            yield line


def _rows(folder: Path, level: Level, count: int) -> Iterator[Row]:
    """The first rows of a spool's journal, which are whole."""
    for line in islice(journal_lines(folder), count):
        yield entry_row(json.loads(line), level)


@dataclass(frozen=True)
class _Part:
    """One tensor of the file: name, safetensors dtype, shape, and its bytes or where they are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: bytes | Path

    @property
    def alignment(self) -> int:
        """Size of what is read from it."""
        if isinstance(self.content, Path):
            return int(self.content.suffix[1:])
        return ITEM_SIZES[self.dtype]


def _plain(
    folder: Path, manifest: Manifest, rows: Iterable[Row], sizes: dict[int, int]
) -> tuple[dict[str, Any], list[_Part]]:
    """Header and data of a file in which each tensor has its own entry."""
    ordered = sorted(rows, key=lambda row: row.entry.order)
    manifest = manifest.model_copy(update={"tensors": tuple(row.entry for row in ordered)})
    bases, position = {}, 0
    for size in sorted(sizes, reverse=True):
        bases[size] = position
        position += sizes[size]
    table: dict[str, Any] = {"__metadata__": metadata_of(manifest)}
    for row in ordered:
        for name, dtype, shape, offset in stored_parts(row, manifest.level):
            begin = bases.get(ITEM_SIZES[dtype], 0) + offset
            end = begin + length_of(dtype, shape)
            table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return table, _data(folder, sizes)


def _packed(
    folder: Path, manifest: Manifest, rows: Iterable[Row], sizes: dict[int, int]
) -> tuple[dict[str, Any], list[_Part]]:
    """Header and data of a file that keeps its table in columns."""
    content = columns.columns_of(row.entry for row in rows)
    parts = _data(folder, sizes)
    for name, kind in columns.KINDS.items():
        shape = (len(content[name]) // ITEM_SIZES[kind],)
        parts.append(_Part(columns.PREFIX + name, kind, shape, content[name]))
    parts.sort(key=lambda part: -part.alignment)
    digests = {name: digest(data) for name, data in content.items()}
    update = {"columns": digests, "format_version": PACKED}
    table: dict[str, Any] = {"__metadata__": metadata_of(manifest.model_copy(update=update))}
    position = 0
    for part in parts:
        end = position + length_of(part.dtype, part.shape)
        table[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [position, end],
        }
        position = end
    return table, parts


def _data(folder: Path, sizes: dict[int, int]) -> list[_Part]:
    """The spool's data, widest items first, so that all tensors are aligned."""
    return [
        _Part(f"data.{size}", "U8", (sizes[size],), folder / f"data.{size}")
        for size in sorted(sizes, reverse=True)
    ]


def join(
    folder: Path, target: Path, manifest: Manifest, count: int, sizes: dict[int, int]
) -> Recording:
    """Write the target from a spool, read it back, move it into place, remove the spool.

    Args:
        folder: The spool.
        target: The file.
        manifest: Everything but the table.
        count: How many rows of the journal are whole.
        sizes: Bytes of each data file that they need, by the size of an item.

    Raises:
        WriteError: It could not be written, or no reader would take it; the spool is left, and
            what is at the target untouched.
    """
    made = folder / "recording"
    try:
        arrange = _plain if (folder / "journal.jsonl").stat().st_size <= PLAIN else _packed
        table, parts = arrange(folder, manifest, _rows(folder, manifest.level, count), sizes)
        with made.open("wb") as file:
            text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # data begin on a multiple of 8 bytes
            file.write(struct.pack("<Q", len(text)) + text)
            for part in parts:
                _append(part, file)
        del table, parts, text
        recording = verify(made)
        settle(made, target)
    except (OSError, ValueError, WriteError) as error:
        made.unlink(missing_ok=True)
        raise _kept(folder, target, error) from error
    shutil.rmtree(folder)
    return recording.at(target)


def _append(part: _Part, file: BinaryIO) -> None:
    if isinstance(part.content, bytes):
        file.write(part.content)
    elif part.shape[0]:
        file.flush()
        with part.content.open("rb") as data:
            _copy(data, file, part.shape[0])


def _kept(folder: Path, target: Path, error: OSError | ValueError | WriteError) -> WriteError:
    """The error for a trace that could not be written; its spool is left."""
    shown = error if isinstance(error, WriteError) else unwritten(target, "the trace", error)
    shown.where = str(target)
    shown.likely = shown.likely or "what was traced is kept in the spool"
    place = quoted(str(folder))
    shown.hint = f"truestep trace recover {place} --output other.safetensors"
    return shown


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Append `count` bytes; within the kernel where it can."""
    done = 0
    if hasattr(os, "copy_file_range"):
        try:
            while done < count:
                moved = os.copy_file_range(source.fileno(), target.fileno(), count - done)
                if not moved:
                    break
                done += moved
        except OSError:
            if done:
                raise
    if done < count:
        source.seek(done)
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
