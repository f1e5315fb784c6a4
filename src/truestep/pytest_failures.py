"""What pytest prints of a check that failed: the lines of the test, and the answer. No torch.

None of it is source of truestep's, and it is `MOST` lines at most; the report has the rest. With
`--tb` of another style than `auto` the lines are those of that style, and with `--full-trace` all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from truestep.errors import TruestepError
    from truestep.verdict import Comparison

MOST = 20
"""Lines that a failing check has, its place in the test among them."""

_ENTRIES = 3
"""Places that are shown: in the test, and the last two on the way to the check."""

_OWN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


def told(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Set what a report prints of a failure."""
    from truestep.errors import TruestepError

    config, excinfo = item.config, call.excinfo
    if excinfo is None or not report.failed or config.getoption("fulltrace", False):
        return
    hide_own_frames(excinfo.value)
    error = excinfo.value
    assert error.__traceback__ is not None  # it was raised
    excinfo = pytest.ExceptionInfo.from_exc_info((type(error), error, error.__traceback__))
    if isinstance(error, TruestepError) and config.getoption("tbstyle", "auto") == "auto":
        report.longrepr = _in_brief(excinfo, config.getoption("truestep_report"))
    else:
        report.longrepr = item.repr_failure(excinfo)


def hide_own_frames(error: BaseException | None) -> None:
    """Take the frames of truestep out of an exception, and of those that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = _without_own(error.__traceback__)
        before = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or before


def _without_own(traceback: TracebackType | None) -> TracebackType | None:
    kept: list[TracebackType] = []
    inside = False
    for entry in _entries(traceback):
        file = entry.tb_frame.f_code.co_filename
        # What is between two frames of ours: a decorator's.
        inside = file.startswith(_OWN) or (inside and file == contextlib.__file__)
        if not inside:
            kept.append(entry)
    left: TracebackType | None = None
    for entry in reversed(kept):
        left = TracebackType(left, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return left or traceback


def _entries(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _in_brief(excinfo: pytest.ExceptionInfo[BaseException], report: str | None) -> Any:
    """Where the test was, and the answer; the answer alone where no test is on the way."""
    from truestep.errors import TruestepError, is_foreign_file

    error = excinfo.value
    assert isinstance(error, TruestepError)
    foreign = [e for e in excinfo.traceback if is_foreign_file(str(e.path))]
    chosen = {id(e) for e in (foreign[:1] + foreign[1:][-(_ENTRIES - 1) :])}
    if chosen:
        excinfo.traceback = excinfo.traceback.filter(lambda e: id(e) in chosen)
    style: Any = "short" if chosen else "value"
    shown: Any = excinfo.getrepr(style=style, chain=False, tbfilter=False)
    entries = shown.reprtraceback.reprentries
    *_, last = entries
    last.lines = [line for line in last.lines if not line.startswith("E")] if chosen else []
    place = sum(len(entry.lines) + 1 for entry in entries)  # and where it is
    answer = answer_of(error, report=report, most=MOST - place)
    last.lines += [f"E   {line}".rstrip() for line in answer]
    if shown.reprcrash is not None:
        shown.reprcrash.message = f"{type(error).__name__}: {error.what}"
    return shown


def answer_of(error: TruestepError, *, report: str | None, most: int) -> list[str]:
    """What an error says, in so many lines: the first of them, and the command that comes next."""
    from truestep.errors import EquivalenceError

    if isinstance(error, EquivalenceError):
        lines = _of_comparison(error.comparison, report)
    else:
        lines = f"{type(error).__name__}: {error}".splitlines()
    notes = [line for note in getattr(error, "__notes__", ()) for line in str(note).splitlines()]
    over = len(lines) + len(notes) - most
    if over > 0:
        lines = [*lines[: len(lines) - over - 2], f"  ... {over + 1} more lines", lines[-1]]
    return [*lines, *notes]


def _of_comparison(comparison: Comparison, report: str | None) -> list[str]:
    """The terminal's answer, its first sentence and its commands each on one line."""
    from truestep.report.answer import answer, headline, next_line
    from truestep.text import command_lines, visible, wrapped

    text, found = headline(comparison), answer(comparison)
    command = next_line(comparison)
    first = len(wrapped("", text, most=4))
    last = len(found) - (len(command_lines(command)) if command else 0)
    more = "(in the report)" if report else "(--truestep-report PATH)"
    body = [f"{row[:-4]}{more}" if row.endswith("(-v)") else row for row in found[first:last]]
    ending = [command, f"report: {report}" if report else ""]
    return [visible(text), *body, *(visible(line) for line in ending if line)]
