"""The tensor table of a large recording, as columns beside its data. No torch, no numpy.

A safetensors header holds 100 MB at most, which 300,000 tensors fill, and rows of JSON take
kilobytes of memory each. A *packed* recording keeps its table in tensors of the file instead, which
any reader of safetensors reads, and its data end to end by the size of an item::

    data.8  data.4  data.2  data.1     U8     what is stored, in the order of the rows
    table.names                        U8     names, UTF-8, a newline after each
    table.words                        U8     JSON: [texts, shapes]
    table.order  .step  .call          I64    of each row; a step that is none is the least number
    table.kind  .dtype  .branch  .fqn  I32    number of a text; -1 is none
    table.shape                        I32    number of a shape
    table.digest  .sketch_digest       U64    xxh3_64 of what is stored

A row's data lie behind those of the row before it with items of the same size: there are no offsets
that could be wrong.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from truestep.many import Column, Many, Shared, Texts
from truestep.recording.manifest import TensorEntry

NO_STEP = -(2**63)

NUMBERS = ("order", "step", "call")
TEXTS = ("kind", "dtype", "branch", "fqn")
DIGESTS = ("digest", "sketch_digest")

KINDS = {
    "names": "U8",
    "words": "U8",
    **dict.fromkeys(NUMBERS, "I64"),
    **dict.fromkeys((*TEXTS, "shape"), "I32"),
    **dict.fromkeys(DIGESTS, "U64"),
}
"""Columns, and their safetensors dtypes."""

PREFIX = "table."
"""What the names of the columns' tensors begin with."""

_CODES = {"I64": "q", "I32": "i", "U64": "Q"}


def columns_of(rows: Iterable[TensorEntry]) -> dict[str, bytes]:
    """A table as columns.

    Raises:
        ValueError: A number has more than 64 bits, or a digest is not one of xxh3_64.
    """
    names = bytearray()
    numbers = {name: array(_CODES[kind]) for name, kind in KINDS.items() if kind in _CODES}
    texts: dict[str, int] = {}
    shapes: dict[tuple[int, ...], int] = {}
    try:
        for row in rows:
            names += row.name.encode() + b"\n"
            numbers["order"].append(row.order)
            numbers["step"].append(NO_STEP if row.step is None else row.step)
            numbers["call"].append(row.call)
            numbers["shape"].append(shapes.setdefault(row.shape, len(shapes)))
            for key in TEXTS:
                text = getattr(row, key)
                number = -1 if text is None else texts.setdefault(text, len(texts))
                numbers[key].append(number)
            numbers["digest"].append(int(row.digest, 16))
            numbers["sketch_digest"].append(int(row.sketch_digest or "0", 16))
    except OverflowError as error:
        raise ValueError(str(error)) from None
    words = json.dumps([list(texts), list(shapes)]).encode()
    return {"names": bytes(names), "words": words, **{n: _out(v) for n, v in numbers.items()}}


class _Digests:
    """Digests of xxh3_64, hexadecimal."""

    def __init__(self, numbers: array[int]) -> None:
        self._numbers = numbers

    def extend(self, values: Iterable[str], /) -> None:
        """Add some at the end."""
        self._numbers.extend([int(value, 16) for value in values])

    def __getitem__(self, at: int, /) -> str:
        return f"{self._numbers[at]:016x}"

    def __iter__(self) -> Iterator[str]:
        return (f"{number:016x}" for number in self._numbers)


class _Steps:
    """Numbers of steps, or None."""

    def __init__(self, numbers: array[int]) -> None:
        self._numbers = numbers

    def extend(self, values: Iterable[int | None], /) -> None:
        """Add some at the end."""
        self._numbers.extend([NO_STEP if value is None else value for value in values])

    def __getitem__(self, at: int, /) -> int | None:
        number = self._numbers[at]
        return None if number == NO_STEP else number

    def __iter__(self) -> Iterator[int | None]:
        return (None if number == NO_STEP else number for number in self._numbers)


class Table(Many[TensorEntry]):
    """The table of a recording as columns: an entry is made when it is asked for."""

    kind = TensorEntry
    fields = tuple(field.name for field in dataclasses.fields(TensorEntry))
    how: ClassVar[Mapping[str, Callable[[], Column]]] = {"name": Texts, "digest": Texts}

    @property
    def names(self) -> Texts:
        """Names of all rows, whichever are taken."""
        column = self.columns["name"]
        if not isinstance(column, Texts):
            raise TypeError("a table without names")
        return column

    def value(self, name: str, field: str) -> Any:
        """A field of the row of a name, of a table that was not taken from another; else None."""
        at = self.names.find(name)
        return None if at is None else self.columns[field][at]


def rows_of(columns: Mapping[str, bytes], *, sketched: bool, words: Any) -> Table:
    """A table from its columns.

    Args:
        columns: The content of each.
        sketched: Whether rows have the digest of a sketch.
        words: The column of that name, parsed.

    Raises:
        ValueError: The columns do not fit each other.
    """
    columns["names"].decode()  # refuses what is no UTF-8
    names = Texts.of_lines(columns["names"])
    if names.starts[-1] != len(columns["names"]):
        raise ValueError("the last name has no end")
    numbers = {
        key: _in(columns[key], _CODES[kind]) for key, kind in KINDS.items() if kind in _CODES
    }
    if any(len(column) != len(names) for column in numbers.values()):
        raise ValueError("its columns have different lengths")
    texts, shapes = _words(words)
    for key, limit in (*((key, len(texts)) for key in TEXTS), ("shape", len(shapes))):
        low = -1 if key in ("branch", "fqn") else 0
        if len(names) and not (low <= min(numbers[key]) and max(numbers[key]) < limit):
            raise ValueError(f"column {key} points to a text that is not there")
    texts.append(None)  # what -1 points to
    sketches: Column = _Digests(numbers["sketch_digest"])
    if not sketched:
        sketches = Shared([""], array("i", bytes(4 * len(names))))
    made: dict[str, Column] = {
        "name": names,
        "order": numbers["order"],
        "call": numbers["call"],
        "step": _Steps(numbers["step"]),
        "shape": Shared(shapes, numbers["shape"]),
        **{key: Shared(texts, numbers[key]) for key in TEXTS},
        "digest": _Digests(numbers["digest"]),
        "sketch_digest": sketches,
    }
    return Table(made, range(len(names)))


def _words(words: Any) -> tuple[list[Any], list[tuple[int, ...]]]:
    fits = isinstance(words, list) and len(words) == 2 and all(isinstance(w, list) for w in words)
    if not fits or not all(isinstance(text, str) for text in words[0]):
        raise ValueError("its words are not texts and shapes")
    for shape in words[1]:
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("its words are not texts and shapes")
    return list(words[0]), [tuple(shape) for shape in words[1]]


def _out(column: array[int]) -> bytes:
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def _in(data: bytes, code: str) -> array[int]:
    column = array(code)
    if len(data) % column.itemsize:
        raise ValueError("a column ends within a number")
    column.frombytes(data)
    if sys.byteorder == "big":
        column.byteswap()
    return column
