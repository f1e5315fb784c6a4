"""Read the header of a safetensors file as if it were hostile. No torch, no numpy.

Every number in the file is checked before it is used: sizes, offsets, shapes, names, JSON.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shlex
import struct
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import xxhash
from pydantic import ValidationError

from truestep.errors import FileFormatError
from truestep.magic import SAFETENSORS, what_is
from truestep.measure.reduced import SKETCH_SIZE, STATS
from truestep.reading import check_plain, parse_json, reason
from truestep.recording import columns
from truestep.recording.manifest import (
    DIGEST_KEY,
    FORMAT_VERSION,
    METADATA_KEY,
    Manifest,
    TensorEntry,
)

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself."""

SHA256 = "sha256:"
"""What a digest begins with that was made by the standard library alone
(`truestep.standalone.recorder`). truestep itself writes xxh3, without a prefix."""

MAX_NAME = 1024
MAX_ELEMENTS = 2**60

ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}

SAFETENSORS_NAMES = {name: short for short, name in TORCH_NAMES.items()}

MOMENTS_KINDS = (("F64", (len(STATS),)), ("F32", (SKETCH_SIZE,)))
"""What stands for a tensor below level `full`: its moments, then its sketch."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no name has: control characters and halves of characters."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies: safetensors dtype, shape, and bytes counted from the data's start.

    `digest` is that of its bytes where the table, not the manifest's row, says it.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    digest: str = ""


@dataclass(frozen=True)
class Header:
    """A checked header. `data_start` is the file offset of the first tensor byte."""

    path: Path
    tensors: Mapping[str, Slot]
    metadata: dict[str, str]
    data_start: int


RECORD_AGAIN = "restore the file, or record it again: truestep record CASE --update"

_HEAD = 1 << 16
"""Bytes from the start of a file in which the library writes its metadata."""


def refuse(path: Path, what: str, *, measured: str = "", likely: str = "") -> NoReturn:
    """Raise the error for a safetensors file that cannot be used; only recordings are recorded."""
    measured = measured.encode("utf-8", "backslashreplace").decode()  # halves of characters
    again = "copy or download the file again"
    hint = RECORD_AGAIN if _says_truestep(path) else again
    raise FileFormatError(what, where=str(path), measured=measured, likely=likely, hint=hint)


def _says_truestep(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return f'"{METADATA_KEY}"'.encode() in file.read(_HEAD)
    except (OSError, ValueError):
        return False


def _refuse_kind(path: Path, size: int) -> None:
    """Refuse a file that is something else than safetensors, and say what."""
    kind = what_is(path)
    if kind in ("", SAFETENSORS):
        return
    raise FileFormatError(
        "this is not a safetensors file",
        where=str(path),
        measured=f"it is {kind}, {size:,} bytes",
        hint=f"truestep show {shlex.quote(str(path))}  # says what it holds",
    )


def read_header(path: str | Path) -> Header:
    """Read and check a safetensors header.

    Raises:
        FileFormatError: The file is absent, truncated, damaged or not safetensors.
    """
    path = Path(path)
    text, data_start, size = _header_text(path)
    entries = _parse(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        refuse(path, "the header's metadata is not a table of strings")
    tensors = {name: _slot(path, name, entry) for name, entry in entries.items()}
    _check_layout(path, tensors, size - data_start)
    return Header(path, tensors, metadata, data_start)


def _header_text(path: Path) -> tuple[bytes, int, int]:
    try:
        if path.is_dir():
            raise FileFormatError(
                "a folder was given where a file is needed",
                where=str(path),
                measured=f"it is {what_is(path)}",
                hint=f"truestep show {shlex.quote(str(path))}  # says what it holds",
            )
        size = path.stat().st_size
        if size < 8:
            empty = "the file is empty" if size == 0 else "the file is too short"
            refuse(
                path,
                f"{empty}: it is not a safetensors file",
                measured=f"{size} bytes; the smallest has 10",
            )
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER or length > size - 8:
                _refuse_kind(path, size)
                refuse(
                    path,
                    "the safetensors header does not fit",
                    measured=f"it claims {length:,} bytes; the file has {size:,}, "
                    f"the format allows {MAX_HEADER:,}",
                    likely="truncated, or not a safetensors file",
                )
            text = file.read(length)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise FileFormatError(
            "the file cannot be read", where=str(path), measured=reason(error)
        ) from None
    if len(text) != length:
        refuse(path, "the file was cut while it was read")
    return text, 8 + length, size


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name appears twice")
        return table

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant
        )
    except (ValueError, RecursionError) as error:
        refuse(
            path, "the header is not valid JSON", measured=reason(error), likely="a damaged file"
        )
    if not isinstance(entries, dict):
        refuse(path, "the header is not a table", measured=type(entries).__name__)
    return entries


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ELEMENTS


def bad_name(name: str) -> bool:
    """Whether no tensor may be called so."""
    return name in ("", "__metadata__") or len(name) > MAX_NAME or _CONTROL.search(name) is not None


def _slot(path: Path, name: str, entry: object) -> Slot:
    shown = repr(name[:80])
    if bad_name(name):
        refuse(path, f"tensor name {shown} is empty, too long or has control characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse(path, f"the entry of tensor {shown} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        refuse(
            path,
            f"tensor {shown} has an unknown dtype",
            measured=f"{str(dtype)[:40]!r}; known: {', '.join(ITEM_SIZES)}",
        )
    if not isinstance(shape, list) or len(shape) > 64 or not all(_whole(n) for n in shape):
        refuse(path, f"tensor {shown} has an impossible shape", measured=str(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(n) for n in offsets):
        refuse(path, f"tensor {shown} has impossible offsets", measured=str(offsets)[:80])
    count = 1
    for dimension in shape:
        count *= dimension
        if count > MAX_ELEMENTS:
            refuse(path, f"tensor {shown} has an impossible shape", measured=str(shape)[:80])
    begin, end = offsets
    if end - begin != count * ITEM_SIZES[dtype]:
        refuse(
            path,
            f"the bytes of tensor {shown} do not match its shape",
            measured=f"{end - begin:,} bytes for {dtype} {shape}, "
            f"which needs {count * ITEM_SIZES[dtype]:,}",
        )
    return Slot(dtype, tuple(shape), begin, end)


def _check_layout(path: Path, tensors: dict[str, Slot], size: int) -> None:
    """Tensors must lie end to end and fill the data exactly."""
    position = 0
    for name, slot in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if slot.begin != position:
            kind = "overlaps another" if slot.begin < position else "leaves a hole before it"
            refuse(
                path,
                f"tensor {name[:80]!r} {kind}",
                measured=f"it begins at byte {slot.begin:,}, the one before ends at {position:,}",
            )
        position = slot.end
    if position != size:
        kind = "truncated" if size < position else "followed by bytes that belong to no tensor"
        refuse(
            path,
            f"the file is {kind}",
            measured=f"{size:,} bytes of data; its tensors need {position:,}",
            likely="an interrupted copy or download",
        )


def digest(data: bytes | memoryview) -> str:
    """xxh3_64 of bytes, hexadecimal."""
    return xxhash.xxh3_64_hexdigest(data)


def manifest_digest(text: str) -> str:
    """xxh3_128 of a manifest's JSON, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def has_digest(data: bytes | memoryview, expected: str) -> bool:
    """Whether a tensor's bytes have a digest: xxh3_64, or SHA-256 after `sha256:`."""
    return expected == (_sha256(data) if expected.startswith(SHA256) else digest(data))


def _manifest_has_digest(text: str, expected: str) -> bool:
    own = _sha256(text.encode()) if expected.startswith(SHA256) else manifest_digest(text)
    return expected == own


def _sha256(data: bytes | memoryview) -> str:
    return SHA256 + hashlib.sha256(data).hexdigest()


def read_manifest(path: str | Path) -> Manifest | None:
    """The manifest of a recording; None for a safetensors file that truestep did not write.

    Raises:
        FileFormatError: The manifest is damaged, of a newer format, or disagrees with the header.
    """
    return read_recording(path)[1]


def manifest_of(header: Header) -> Manifest | None:
    """The manifest in a checked header; see `read_manifest`."""
    return _resolved(header)[1]


def read_recording(path: str | Path) -> tuple[Header, Manifest | None]:
    """Header and manifest of a recording; the header of a packed one has the tensors in its data.

    Raises:
        FileFormatError: See `read_header` and `read_manifest`.
    """
    return _resolved(read_header(path))


def _resolved(header: Header) -> tuple[Header, Manifest | None]:
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return header, None
    path = header.path
    try:
        intact = _manifest_has_digest(text, header.metadata.get(DIGEST_KEY, ""))
    except UnicodeEncodeError:  # half a character
        intact = False
    if not intact:
        refuse(
            path,
            "the recording's manifest is damaged",
            measured="its digest does not match",
            likely="a flipped bit, or an edit by hand",
        )
    try:
        raw = json.loads(text)
        version = raw["format_version"]
        halves = "\\ud" in text or "\\uD" in text  # of characters; the table is large, and typed
        check_plain({k: v for k, v in raw.items() if halves or k != "tensors"})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        refuse(path, "the recording's manifest is not valid", measured=reason(error))
    if not _whole(version) or version < 1:
        refuse(path, "the recording's format version is not a number", measured=str(version)[:40])
    if version > FORMAT_VERSION:
        raise FileFormatError(
            "the recording was written by a newer truestep",
            where=str(path),
            measured=f"format {version}; this truestep reads up to {FORMAT_VERSION}",
            hint="pip install --upgrade truestep",
        )
    try:
        manifest = Manifest.model_validate(raw)
    except (ValidationError, RecursionError) as error:
        refuse(path, "the recording's manifest is not valid", measured=reason(error))
    if manifest.columns:
        return _unpacked(header, manifest)
    _check_table(header, manifest)
    return header, manifest


class Packed(Mapping[str, Slot]):
    """The tensors of a packed recording, by stored name; see `recording.columns`."""

    def __init__(self, rows: columns.Table, level: str, begins: dict[int, int]) -> None:
        """Find where each row's data lie.

        Args:
            rows: The table, in the order of the data.
            level: Of the recording.
            begins: Where the data with items of a size begin.
        """
        self._rows, self._level = rows, level
        self._names = rows.names
        self._prefixes = [name.removesuffix("/") for name in stored_names("", level)]
        self._begins: list[array[int]] = []
        self.ends = dict(begins)
        for part in range(len(self._prefixes)):
            column = array("q")
            for own, sizes in rows.each("dtype", "shape"):
                dtype, shape = self._kind(own, sizes, part)
                column.append(self.ends[ITEM_SIZES[dtype]])
                self.ends[ITEM_SIZES[dtype]] += length_of(dtype, shape)
            self._begins.append(column)

    def _kind(self, dtype: str, shape: tuple[int, ...], part: int) -> tuple[str, tuple[int, ...]]:
        if self._level == "full":
            return SAFETENSORS_NAMES[dtype], shape
        return MOMENTS_KINDS[part]

    def _place(self, name: str) -> tuple[int, int] | None:
        """Number of the row and of the part that a stored name means."""
        for part, prefix in enumerate(self._prefixes):
            if prefix and not name.startswith(f"{prefix}/"):
                continue
            number = self._names.find(name.removeprefix(f"{prefix}/") if prefix else name)
            if number is not None:
                return number, part
        return None

    def __getitem__(self, name: str) -> Slot:
        place = self._place(name)
        if place is None:
            raise KeyError(name)
        number, part = place
        row = self._rows[number]
        dtype, shape = self._kind(row.dtype, row.shape, part)
        begin = self._begins[part][number]
        known = row.sketch_digest if part else row.digest
        return Slot(dtype, shape, begin, begin + length_of(dtype, shape), known)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._place(name) is not None

    def __iter__(self) -> Iterator[str]:
        for name in self._names:
            yield from stored_names(name, self._level)

    def __len__(self) -> int:
        return self._names.distinct * len(self._prefixes)


def _unpacked(header: Header, manifest: Manifest) -> tuple[Header, Manifest]:
    """A packed recording with its table, and with the tensors in its data for those in its header.

    Raises:
        FileFormatError: A column is damaged, or does not fit the others or the data.
    """
    path, kinds = header.path, columns.KINDS
    data = {f"data.{size}": size for size in (8, 4, 2, 1)}
    expected = {columns.PREFIX + name for name in kinds}
    if manifest.tensors or set(manifest.columns) != set(kinds):
        refuse(path, "the recording's table is neither in its manifest nor in its columns")
    if expected - set(header.tensors) or set(header.tensors) - expected - set(data):
        refuse(path, "the recording's columns and its header disagree")
    for name, slot in header.tensors.items():
        kind = kinds.get(name.removeprefix(columns.PREFIX), "U8")
        if slot.dtype != kind or len(slot.shape) != 1:
            refuse(path, f"tensor {name!r} has another kind than a packed recording's")
    content = {name: _column(header, name, manifest.columns[name]) for name in kinds}
    try:
        words = parse_json(content["words"])
        rows = columns.rows_of(content, sketched=manifest.level == "sketch", words=words)
    except (ValueError, RecursionError) as error:
        refuse(path, "the recording's table is damaged", measured=reason(error))
    content.clear()
    begins = {s: header.tensors[n].begin for n, s in data.items() if n in header.tensors}
    packed = _packed(path, rows, manifest.level, begins)
    ends = {s: header.tensors[n].end for n, s in data.items() if n in header.tensors}
    if packed.ends != ends:
        refuse(path, "the recording's table does not fit its data")
    orders = list(rows.each("order"))
    if any(after < before for before, after in pairwise(orders)):
        rows = rows.take(sorted(range(len(rows)), key=orders.__getitem__)).replaced()
    whole = manifest.model_copy(update={"tensors": rows})
    return dataclasses.replace(header, tensors=packed), whole


def _packed(path: Path, rows: columns.Table, level: str, begins: dict[int, int]) -> Packed:
    known: set[tuple[str, tuple[int, ...]]] = set()
    for at, (name, *kind) in enumerate(rows.each("name", "dtype", "shape")):
        if bad_name(name):
            refuse(path, f"tensor name {name[:80]!r} is empty, too long or has control characters")
        if tuple(kind) not in known:
            _check_entry(path, rows[at])
            known.add((kind[0], kind[1]))
    try:
        packed = Packed(rows, level, begins)
    except (KeyError, OverflowError):
        refuse(path, "the recording's table does not fit its data")
    if len(packed) < len(rows) * len(stored_names("", level)):
        refuse(path, "the manifest lists a tensor twice")
    return packed


def _column(header: Header, name: str, expected: str) -> bytes:
    """The content of one column of a packed recording's table."""
    slot = header.tensors[columns.PREFIX + name]
    try:
        with header.path.open("rb") as file:
            file.seek(header.data_start + slot.begin)
            content = file.read(slot.end - slot.begin)
    except OSError as error:
        refuse(header.path, "the recording's table cannot be read", measured=reason(error))
    if digest(content) != expected:
        refuse(
            header.path,
            f"column {name} of the recording's table is damaged",
            measured="its digest does not match",
            likely="a flipped bit, or an edit by hand",
        )
    return content


def length_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; the dtype as safetensors has it."""
    return ITEM_SIZES[dtype] * math.prod(shape)


def stored_names(name: str, level: str) -> tuple[str, ...]:
    """Names under which a tensor's data is stored at a level."""
    if level == "full":
        return (name,)
    return (f"stats/{name}", f"sketch/{name}") if level == "sketch" else (f"stats/{name}",)


def stored_digests(entry: TensorEntry, level: str) -> dict[str, str]:
    """Stored name to digest, of one row of the tensor table."""
    digests = (entry.digest, entry.sketch_digest)
    return dict(zip(stored_names(entry.name, level), digests, strict=False))


def _check_table(header: Header, manifest: Manifest) -> None:
    path = header.path
    expected = {
        stored: entry
        for entry in manifest.tensors
        for stored in stored_names(entry.name, manifest.level)
    }
    for name in [*(set(expected) ^ set(header.tensors))][:1]:
        refuse(path, f"manifest and header disagree on tensor {name[:80]!r}")
    if len(expected) != len(manifest.tensors) * len(stored_names("", manifest.level)):
        refuse(path, "the manifest lists a tensor twice")
    for name, entry in expected.items():
        slot = header.tensors[name]
        dtype, shape = entry.dtype, entry.shape
        if manifest.level != "full":
            _check_entry(path, entry)
            sketched = name.startswith("sketch/")
            dtype = "float32" if sketched else "float64"
            shape = (SKETCH_SIZE if sketched else len(STATS),)
        if TORCH_NAMES[slot.dtype] != dtype or slot.shape != shape:
            refuse(
                path,
                f"manifest and header disagree on tensor {name[:80]!r}",
                measured=f"{dtype} {list(shape)} against {slot.dtype} {list(slot.shape)}",
            )


def _check_entry(path: Path, entry: TensorEntry) -> None:
    """Refuse a dtype or shape that no tensor can have, where no slot vouches for them."""
    shown = repr(entry.name[:80])
    if entry.dtype not in TORCH_NAMES.values():
        refuse(path, f"tensor {shown} has an unknown dtype", measured=repr(entry.dtype[:40]))
    sizes = entry.shape[:64]
    need = 8 * math.prod(max(size, 1) for size in sizes)  # bytes at most; strides must fit, too
    if len(entry.shape) > 64 or min(sizes, default=0) < 0 or need > MAX_ELEMENTS:
        refuse(path, f"tensor {shown} has an impossible shape", measured=str(sizes)[:80])
