"""One screen of a verb: the answer, what fits of what is listed, and what comes next.

What judges a candidate has its own choice of lines (`report.answer`); every other verb says what it
has to say as entries, and those for which there is no room are counted: `... 30 more (-v)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from truestep.text import columns, command_lines, say, visible, wrapped

LINES = 12
"""Lines of an answer, its commands among them."""

COLOURS = {0: "green", 1: "red", 2: "red", 3: "yellow", 4: "yellow"}
"""Of the first word of an answer, by the exit code; it only ever repeats what the word says."""

_HEAD = 4
"""Lines of the answer itself."""

_SMALLEST = 8
"""Letters of a cell that is cut."""


@dataclass(frozen=True)
class Entries:
    """What is listed on a screen.

    Attributes:
        lines: Of each entry, its lines; an entry is shown whole or not at all.
        noun: What the entries are, in the line that counts those that are left out.
    """

    lines: Sequence[Sequence[str]]
    noun: str = ""


def rows(lines: Iterable[str], noun: str = "") -> Entries:
    """Entries of one line each."""
    return Entries([[line] for line in lines], noun)


def facts(pairs: Iterable[tuple[str, str]], *, most: int | None = 1) -> Entries:
    """Labelled entries, each of `most` lines; all of its lines where that is None."""
    return Entries([wrapped(label, text, most=most) for label, text in pairs if text], "facts")


def screen(
    head: str,
    *listed: Entries,
    ending: Iterable[str] = (),
    verbose: bool = False,
) -> list[str]:
    """At most `LINES` lines no wider than the terminal; all of them where it is to be verbose.

    Args:
        head: The answer in a sentence.
        listed: What stands under it, in order; what comes first has the room.
        ending: What comes after: commands, and where files are. Empty ones are left out.
    """
    closing = [row for line in ending if line for row in command_lines(visible(line))]
    if verbose:
        every = [line for group in listed for entry in group.lines for line in entry]
        return [*wrapped("", head, split=False), *every, *closing]
    lines = wrapped("", head, most=_HEAD, split=False)
    room = LINES - len(lines) - len(closing)
    groups = [group for group in listed if group.lines]
    for at, group in enumerate(groups):
        told = _fitting(group, room - (len(groups) - at - 1))
        lines += told
        room -= len(told)
    return [*lines, *closing]


def _fitting(group: Entries, room: int) -> list[str]:
    """As many entries as there is room for, and how many more there are."""
    lines: list[str] = []
    for at, entry in enumerate(group.lines):
        last = at == len(group.lines) - 1
        if len(lines) + len(entry) > room - (not last):
            noun = f" {group.noun}" if group.noun else ""
            more = f"  ... {len(group.lines) - at} more{noun} (-v)"
            return [*lines, more][: max(room, 0)]
        lines += (cut(line) for line in entry)
    return lines


def cut(line: str) -> str:
    """A line no wider than the terminal, with dots at its end where it was longer."""
    shown = visible(line)
    return shown if len(shown) <= columns() else f"{shown[: columns() - 4].rstrip()} ..."


def aligned(
    cells: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), indent: int = 2
) -> list[str]:
    """Cells as columns no wider than the terminal: those of numbers end under each other.

    Args:
        cells: Rows of equal length, a head among them.
        left: Columns of words; the widest of them gives way where there is no room.
        indent: Spaces before each row.
    """
    shown = [[visible(text) for text in row] for row in cells]
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))] if shown else []
    over = sum(width + 2 for width in widths) - 2 + indent - columns()
    for at in sorted(left, key=lambda i: -widths[i] if widths else 0):
        spared = min(max(over, 0), max(widths[at] - _SMALLEST, 0)) if widths else 0
        if spared:
            widths[at] -= spared
            over -= spared
    return [" " * indent + _row(row, widths, left).rstrip() for row in shown]


def _row(row: Sequence[str], widths: Sequence[int], left: Sequence[int]) -> str:
    return "  ".join(
        shortened(text, width).ljust(width) if i in left else text.rjust(width)
        for i, (text, width) in enumerate(zip(row, widths, strict=True))
    )


def shortened(name: str, width: int) -> str:
    """A name without its middle where it is too long: both ends tell."""
    if len(name) <= width or width < _SMALLEST:
        return name[: max(width, _SMALLEST)]
    front = (width - 3) // 2
    return f"{name[:front]}...{name[len(name) - (width - 3 - front) :]}"


def print_lines(lines: Iterable[str], *, exit_code: int | None = None) -> None:
    """Print an answer; its first word in the colour of the exit code, if it has one."""
    for at, line in enumerate(lines):
        coloured = at == 0 and exit_code is not None
        say(line, colour=COLOURS.get(exit_code or 0) if coloured else None, first_word=coloured)
