"""Read the header of a safetensors file as if it were hostile. No torch, no numpy.

Every number in the file is checked before it is used: sizes, offsets, shapes, names, JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from truestep.errors import FileFormatError
from truestep.magic import SAFETENSORS, what_is
from truestep.reading import reason
from truestep.recording.manifest import (
    METADATA_KEY,
)
from truestep.records import SKETCH_SIZE, STATS
from truestep.text import quoted

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
        hint=f"truestep show {quoted(str(path))}  # says what it holds",
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
                hint=f"truestep show {quoted(str(path))}  # says what it holds",
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


def is_whole(value: object) -> bool:
    """Whether a value out of JSON is a size: a whole number that is not absurd."""
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
    if not isinstance(shape, list) or len(shape) > 64 or not all(is_whole(n) for n in shape):
        refuse(path, f"tensor {shown} has an impossible shape", measured=str(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_whole(n) for n in offsets):
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


def _sha256(data: bytes | memoryview) -> str:
    return SHA256 + hashlib.sha256(data).hexdigest()


def length_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; the dtype as safetensors has it."""
    return ITEM_SIZES[dtype] * math.prod(shape)


def stored_names(name: str, level: str) -> tuple[str, ...]:
    """Names under which a tensor's data is stored at a level."""
    if level == "full":
        return (name,)
    return (f"stats/{name}", f"sketch/{name}") if level == "sketch" else (f"stats/{name}",)
