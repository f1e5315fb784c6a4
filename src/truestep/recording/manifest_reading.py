"""Read the manifest in a checked header, and its table of tensors, as if they were hostile too."""

from __future__ import annotations

import dataclasses
import json
import math
from array import array
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from truestep.errors import FileFormatError
from truestep.reading import check_plain, parse_json, reason
from truestep.recording.header import (
    ITEM_SIZES,
    MAX_ELEMENTS,
    MOMENTS_KINDS,
    SAFETENSORS_NAMES,
    SHA256,
    TORCH_NAMES,
    Header,
    Slot,
    bad_name,
    digest,
    has_digest,
    is_whole,
    length_of,
    manifest_digest,
    read_header,
    refuse,
    stored_names,
)
from truestep.recording.manifest import (
    DIGEST_KEY,
    FORMAT_VERSION,
    METADATA_KEY,
    Manifest,
    TensorEntry,
)
from truestep.records import SKETCH_SIZE, STATS

if TYPE_CHECKING:
    from truestep.recording import columns


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
        expected = header.metadata.get(DIGEST_KEY, "")
        intact = expected == manifest_digest(text) or (
            expected.startswith(SHA256) and has_digest(text.encode(), expected)
        )
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
    if not is_whole(version) or version < 1:
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
        columns = self._rows.columns
        dtype, shape = self._kind(columns["dtype"][number], columns["shape"][number], part)
        begin = self._begins[part][number]
        known = columns["sketch_digest" if part else "digest"][number]
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
    from truestep.recording import columns

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
    from truestep.recording import columns

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
