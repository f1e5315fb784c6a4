"""Read GGUF files (llama.cpp, ComfyUI-GGUF) as if they were hostile: nothing is believed unchecked.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from truestep.errors import FileFormatError
from truestep.measure.blocks import FORMATS, Packed
from truestep.reading import reason
from truestep.recording.header import MAX_ELEMENTS, MAX_NAME

PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
"""Types whose numbers lie one by one."""

OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Types that have a name, and are not read."""

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value's type; 8 is a string, 9 a list."""

_STRING, _LIST = 8, 9
_SHAPE = "comfy.gguf.orig_shape."
"""What ComfyUI-GGUF writes before a tensor's name, for the shape that it had before."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its shape, outermost axis first, and where it lies."""

    kind: int
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def called(self) -> str:
        """Name of the type: `float16`, `Q4_K`."""
        if self.kind in PLAIN:
            return str(PLAIN[self.kind]).removeprefix("torch.")
        return FORMATS[self.kind].name if self.kind in FORMATS else OTHERS[self.kind]


class GgufTensors(Mapping[str, torch.Tensor]):
    """Tensors of a GGUF file, mapped; what is in blocks comes as the float32 numbers it stands for.

    Attributes:
        entries: Name to place.
        architecture: What the file says that it is of.
    """

    def __init__(
        self, path: Path, data: memoryview, entries: Mapping[str, Entry], architecture: str
    ) -> None:
        self.path, self.entries, self.architecture = path, entries, architecture
        self._data = data

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.packed(name)
        if found is not None:
            return found.rows(slice(None))
        entry = self.entries[name]
        dtype = PLAIN[entry.kind]
        if not entry.size:
            return torch.empty(entry.shape, dtype=dtype)
        return self._raw(entry).view(dtype).reshape(entry.shape)

    def packed(self, name: str) -> Packed | None:
        """A tensor in blocks as it lies there; None of one whose numbers lie one by one.

        Raises:
            FileFormatError: Its blocks are of a kind that is not read.
        """
        entry = self.entries[name]
        if entry.kind in PLAIN:
            return None
        if entry.kind not in FORMATS:
            _refuse(
                self.path,
                f"tensor {name!r} is in blocks that are not read",
                f"they are {entry.called}; read are {', '.join(f.name for f in FORMATS.values())}",
            )
        form = FORMATS[entry.kind]
        return Packed(form, self._raw(entry).reshape(-1, form.size), entry.shape)

    def _raw(self, entry: Entry) -> torch.Tensor:
        raw = torch.frombuffer(self._data, dtype=torch.uint8, count=entry.size, offset=entry.begin)
        aligned = entry.kind in FORMATS or not entry.begin % PLAIN[entry.kind].itemsize
        return raw if aligned else raw.clone()

    def release(self, name: str) -> None:
        """Let the pages of a tensor go; whoever holds it reads the file again."""
        memory = self._data.obj
        if name in self.entries and hasattr(mmap, "MADV_DONTNEED"):
            assert isinstance(memory, mmap.mmap)
            entry = self.entries[name]
            begin = entry.begin - entry.begin % mmap.PAGESIZE
            if entry.size:
                memory.madvise(mmap.MADV_DONTNEED, begin, entry.begin + entry.size - begin)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_gguf(path: Path) -> GgufTensors:
    """All tensors of a GGUF file, mapped.

    Raises:
        FileFormatError: It cannot be read, is damaged, or of another version.
    """
    try:
        with path.open("rb") as file:
            # Copy on write: torch wants writable memory, and the file must not change.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        _refuse(path, "the file cannot be read", reason(error))
    data = memoryview(memory)
    try:
        return _parsed(path, data)
    except _DamagedError as error:
        _refuse(path, "the GGUF file is damaged", str(error))


class _DamagedError(Exception):
    """What is wrong, in words."""


class _Reader:
    """Numbers and texts one after another, none beyond the file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> int:
        size = struct.calcsize(f"<{kind}")
        if self.at + size > len(self.data):
            raise _DamagedError(f"it ends within its head, after {len(self.data):,} bytes")
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += size
        return int(value)

    def skip(self, size: int) -> None:
        if size < 0 or self.at + size > len(self.data):
            raise _DamagedError(f"a value of {size:,} bytes goes beyond its end")
        self.at += size

    def text(self, most: int) -> str:
        size = self.number("Q")
        if size > most:
            raise _DamagedError(f"a name of {size:,} bytes")
        begin = self.at
        self.skip(size)
        try:
            return bytes(self.data[begin : self.at]).decode("utf-8")
        except UnicodeDecodeError:
            raise _DamagedError("a name that is not UTF-8") from None

    def value(self, kind: int) -> object:
        """A value: what is neither a whole number, a short text nor a short list is passed over."""
        if kind == _LIST:
            return self.many()
        if kind == _STRING:
            size = self.number("Q")
            begin = self.at
            self.skip(size)
            return (
                bytes(self.data[begin : self.at]).decode("utf-8", "replace") if size < 256 else ""
            )
        if kind not in _SIZES:
            raise _DamagedError(f"a value of type {kind}")
        if kind in (4, 5, 10, 11):
            return self.number({4: "I", 5: "i", 10: "Q", 11: "q"}[kind])
        self.skip(_SIZES[kind])
        return None

    def many(self) -> list[object]:
        """A list of numbers or texts; lists of lists are of no file that is written."""
        kind, count = self.number("I"), self.number("Q")
        if kind in _SIZES and (kind not in (4, 5, 10, 11) or count > 16):
            self.skip(_SIZES[kind] * count)
            return []
        if kind == _LIST or count > len(self.data) // 4:
            raise _DamagedError(f"a list of {count:,} values of type {kind}")
        return [self.value(kind) for _ in range(count)]


def _parsed(path: Path, data: memoryview) -> GgufTensors:
    reader = _Reader(data)
    if bytes(data[:4]) != b"GGUF":
        raise _DamagedError("it does not begin as one")
    reader.at = 4
    version = reader.number("I")
    if version not in (2, 3):
        _refuse(path, f"GGUF files of version {version} are not read", "known are 2 and 3")
    count, values = reader.number("Q"), reader.number("Q")
    if max(count, values) > len(data) // 12:
        raise _DamagedError(f"{count:,} tensors and {values:,} values cannot be in it")
    said: dict[str, object] = {}
    for _ in range(values):
        key = reader.text(1 << 16)
        said[key] = reader.value(reader.number("I"))
    found = [_entry(reader, said) for _ in range(count)]
    alignment = said.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise _DamagedError(f"an alignment of {alignment}")
    start = -(-reader.at // alignment) * alignment
    entries: dict[str, Entry] = {}
    for name, entry in found:
        if name in entries:
            raise _DamagedError(f"two tensors are called {name[:80]!r}")
        begin = start + entry.begin
        if begin + entry.size > len(data):
            raise _DamagedError(f"tensor {name[:80]!r} goes beyond its end")
        entries[name] = Entry(entry.kind, entry.shape, begin, entry.size)
    architecture = said.get("general.architecture")
    return GgufTensors(path, data, entries, architecture if isinstance(architecture, str) else "")


def _entry(reader: _Reader, said: Mapping[str, object]) -> tuple[str, Entry]:
    name, axes = reader.text(MAX_NAME), reader.number("I")
    if not 0 < axes <= 8:
        raise _DamagedError(f"tensor {name[:80]!r} has {axes:,} axes")
    shape = tuple(reader.number("Q") for _ in range(axes))[::-1]
    kind, begin = reader.number("I"), reader.number("Q")
    if math.prod(shape) > MAX_ELEMENTS:
        raise _DamagedError(f"tensor {name[:80]!r} has too many elements")
    if kind in PLAIN:
        size = math.prod(shape) * PLAIN[kind].itemsize
    elif kind in FORMATS:
        form = FORMATS[kind]
        if shape[-1] % form.elements:
            raise _DamagedError(f"rows of {name[:80]!r} are no whole blocks of {form.name}")
        size = math.prod(shape) // form.elements * form.size
    elif kind in OTHERS:
        size = 0
    else:
        raise _DamagedError(f"tensor {name[:80]!r} is of type {kind}")
    before = said.get(f"{_SHAPE}{name}")
    if isinstance(before, list) and before:
        whole = [n for n in before if isinstance(n, int)]
        if len(whole) == len(before) and math.prod(whole) == math.prod(shape):
            shape = tuple(whole)
    return name, Entry(kind, shape, begin, size)


def _refuse(path: Path, what: str, measured: str) -> NoReturn:
    raise FileFormatError(what, where=str(path), measured=measured)
