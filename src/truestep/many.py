"""Many records in little memory: kept as columns, and made again when one is asked for.

A million rows of a comparison, each a record of records, take 2 kB each; as columns a tenth of it.
No torch, no numpy.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import attrgetter
from typing import Any, ClassVar, Generic, Protocol, TypeVar, overload

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema
from typing_extensions import Self

from truestep.text import short

R = TypeVar("R")


class Column(Protocol):
    """Values of one field, in order."""

    def extend(self, values: Iterable[Any], /) -> None:
        """Add some at the end."""

    def __getitem__(self, at: int, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


class Texts:
    """Texts end to end, each ended by a byte that is not read, and found again by a table of
    hashes."""

    def __init__(self, content: bytes = b"", starts: array[int] | None = None) -> None:
        self.content: bytes | bytearray = content if content else bytearray()
        self.starts = starts or array("q", [0])
        self._slots: array[int] | None = None
        self._distinct = 0

    @classmethod
    def of_lines(cls, content: bytes) -> Self:
        """Lines of UTF-8; the last one is ended, too."""
        starts, end = array("q", [0]), content.find(b"\n")
        while end >= 0:
            starts.append(end + 1)
            end = content.find(b"\n", end + 1)
        return cls(content, starts)

    def extend(self, values: Iterable[str], /) -> None:
        """Add some at the end."""
        for value in values:
            self.append(value)

    def append(self, value: str, /) -> None:
        """Add one at the end."""
        if isinstance(self.content, bytes):
            raise TypeError("these texts are those of a file")
        self.content += value.encode("utf-8", "surrogatepass") + b"\n"
        self.starts.append(len(self.content))
        self._slots = None

    def __getitem__(self, at: int, /) -> str:
        return self._raw(at).decode("utf-8", "surrogatepass")

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def _raw(self, at: int) -> bytes | bytearray:
        return self.content[self.starts[at] : self.starts[at + 1] - 1]

    @property
    def distinct(self) -> int:
        """How many there are that differ."""
        self._table()
        return self._distinct

    def find(self, text: str) -> int | None:
        """Number of the first that is equal."""
        raw, slots = text.encode("utf-8", "surrogatepass"), self._table()
        found = slots[self._slot(raw, slots)]
        return None if found < 0 else found

    def _slot(self, raw: bytes, slots: array[int]) -> int:
        """Where a text's number is, or would be."""
        last = len(slots) - 1
        spot = hash(raw) & last
        while slots[spot] >= 0 and self._raw(slots[spot]) != raw:
            spot = (spot + 1) & last
        return spot

    def _table(self) -> array[int]:
        if self._slots is None:
            slots = array("i", [-1]) * (2 << max(len(self), 1).bit_length())
            self._distinct = 0
            for at in range(len(self)):
                spot = self._slot(bytes(self._raw(at)), slots)
                if slots[spot] < 0:
                    slots[spot] = at
                    self._distinct += 1
            self._slots = slots
        return self._slots


class Shared:
    """Values of which there are few, each kept once."""

    def __init__(self, values: Iterable[Any] = (), numbers: array[int] | None = None) -> None:
        self.values = list(values)
        self._ids = {value: number for number, value in enumerate(self.values)}
        self._numbers = array("i") if numbers is None else numbers

    def extend(self, values: Iterable[Any], /) -> None:
        """Add some at the end."""
        ids = self._ids
        for window in _windows(values):
            try:
                self._numbers.extend([ids[value] for value in window])
            except KeyError:
                for value in window:
                    if value not in ids:
                        ids[value] = len(self.values)
                        self.values.append(value)
                self._numbers.extend([ids[value] for value in window])

    def __getitem__(self, at: int, /) -> Any:
        return self.values[self._numbers[at]]

    def __iter__(self) -> Iterator[Any]:
        return map(self.values.__getitem__, self._numbers)


class Numbers:
    """Floats, or None."""

    def __init__(self) -> None:
        self._values = array("d")
        self._known = bytearray()

    def extend(self, values: Iterable[float | None], /) -> None:
        """Add some at the end."""
        for window in _windows(values):
            self._values.extend([0.0 if value is None else value for value in window])
            self._known.extend([value is not None for value in window])

    def __getitem__(self, at: int, /) -> float | None:
        value = self._values[at] if self._known[at] else None
        return math.nan if value != value else value  # one NaN, as records had it, is equal

    def __iter__(self) -> Iterator[float | None]:
        return map(self.__getitem__, range(len(self._values)))


class Split(Generic[R]):
    """Records, or None, as columns of their own."""

    def __init__(self, many: Many[R]) -> None:
        self._many = many
        self._places = array("i")

    def extend(self, values: Iterable[R | None], /) -> None:
        """Add some at the end."""
        for window in _windows(values):
            at = len(self._many)
            for value in window:
                self._places.append(-1 if value is None else at)
                at += value is not None
            self._many.extend([value for value in window if value is not None])

    def __getitem__(self, at: int, /) -> R | None:
        place = self._places[at]
        return None if place < 0 else self._many[place]

    def __iter__(self) -> Iterator[R | None]:
        return map(self.__getitem__, range(len(self._places)))

    def part(self, name: str) -> Column:
        """One field of each, without making the records."""
        return _Part(self._many.columns[name], self._places)


class _Part:
    """A field of records that may be None."""

    def __init__(self, column: Column, places: Sequence[int]) -> None:
        self._column, self._places = column, places

    def extend(self, values: Iterable[Any], /) -> None:
        """A part is of what is there."""
        raise TypeError("a part of records is read only")

    def __getitem__(self, at: int, /) -> Any:
        place = self._places[at]
        return None if place < 0 else self._column[place]

    def __iter__(self) -> Iterator[Any]:
        return (None if place < 0 else self._column[place] for place in self._places)


def _windows(values: Iterable[R]) -> Iterator[list[R]]:
    """Some values after the other, so that not all are held at once."""
    rest = iter(values)
    while window := list(islice(rest, 512)):
        yield window


class Many(Sequence[R]):
    """Records of one kind, none of which is kept as such.

    Attributes:
        kind: What is made of a row.
        fields: Names of its fields.
        how: What keeps a field; those that are not named have few values.
        columns: Values of every field.
    """

    kind: ClassVar[type[Any]]
    fields: ClassVar[tuple[str, ...]]
    how: ClassVar[Mapping[str, Callable[[], Column]]] = {}

    def __init__(
        self, columns: dict[str, Column] | None = None, numbers: Sequence[int] | None = None
    ) -> None:
        self.columns = columns or {name: self.how.get(name, Shared)() for name in self.fields}
        self._numbers: Sequence[int] = range(0) if numbers is None else numbers

    @classmethod
    def of(cls, records: Iterable[R]) -> Self:
        """Records as columns; what is so already is given back."""
        if isinstance(records, cls):
            return records
        many = cls()
        for window in _windows(records):
            many.extend(window)
        return many

    def extend(self, records: Sequence[R]) -> None:
        """Add some at the end, while it is being made."""
        for name, column in self.columns.items():
            column.extend(list(map(attrgetter(name), records)))
        self._numbers = range(len(self._numbers) + len(records))

    def each(self, *names: str) -> Iterator[Any]:
        """Fields of every row, as tuples where they are several; no row is made.

        Args:
            names: `verdict`, or of a record in it `metrics.rel_l2`; None where there is no record.
        """
        columns = map(self._column, names)
        if isinstance(self._numbers, range):
            found = [iter(column) for column in columns]
        else:
            found = [map(column.__getitem__, self._numbers) for column in columns]
        return zip(*found, strict=True) if len(found) > 1 else found[0]

    def _column(self, name: str) -> Column:
        head, _, part = name.partition(".")
        column = self.columns[head]
        return column.part(part) if part and isinstance(column, Split) else column

    def take(self, places: Iterable[int]) -> Self:
        """Some of the rows, in that order; columns are shared."""
        numbers = array("i", [self._numbers[at] for at in places])
        if numbers == array("i", self._numbers):
            return self
        return type(self)(self.columns, numbers)

    def replaced(self, **values: Iterable[Any]) -> Self:
        """The same rows with other values in some fields; the other columns are shared."""
        columns = dict(self.columns)
        if not isinstance(self._numbers, range):
            for name in self.columns.keys() - values.keys():
                columns[name] = self._filled(name, self.each(name))
        for name, new in values.items():
            columns[name] = self._filled(name, new)
        return type(self)(columns, range(len(self)))

    def _filled(self, name: str, values: Iterable[Any]) -> Column:
        column = self.how.get(name, Shared)()
        column.extend(values)
        return column

    @overload
    def __getitem__(self, at: int) -> R: ...
    @overload
    def __getitem__(self, at: slice) -> Self: ...
    def __getitem__(self, at: int | slice) -> R | Self:
        if isinstance(at, slice):
            return self.take(range(len(self))[at])
        number = self._numbers[at]
        fields = {name: column[number] for name, column in self.columns.items()}
        made: R = self.kind(**fields)
        return made

    def __iter__(self) -> Iterator[R]:
        return map(self.__getitem__, range(len(self)))

    def __len__(self) -> int:
        return len(self._numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        shown = ", ".join(short(repr(each), 90) for each in self[:3])
        return f"({shown}{f', ... {len(self)} in all' if len(self) > 3 else ''})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return schema_of(tuple[cls.kind, ...], handler, cls.of)  # type: ignore[name-defined]


def schema_of(
    plain: Any, handler: GetCoreSchemaHandler, keep: Callable[[Iterable[Any]], Any]
) -> CoreSchema:
    """How pydantic reads and writes a field that holds `Many`: as it does a tuple of records.

    Args:
        plain: The tuple's type.
        keep: Makes what is kept of it.
    """
    inner = handler.generate_schema(plain)
    return core_schema.no_info_wrap_validator_function(
        lambda value, read: value if isinstance(value, Many) else keep(read(value)),
        inner,
        serialization=core_schema.wrap_serializer_function_ser_schema(
            lambda value, write: write(tuple(value)), schema=inner
        ),
    )
