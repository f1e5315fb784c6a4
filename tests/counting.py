"""Work that is counted, not timed: guards that mean the same on every machine."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType


def calls(run: Callable[[], object]) -> int:
    """Number of functions, Python's and C's, that a piece of work calls in this thread."""
    return _counted(run, lambda frame, event: event in ("call", "c_call"))


def calls_of(run: Callable[[], object], *names: str) -> int:
    """Number of calls of Python functions of these names, e.g. `get_close_matches`."""
    return _counted(run, lambda frame, event: event == "call" and frame.f_code.co_name in names)


def calls_inside(run: Callable[[], object], part: str) -> int:
    """Number of calls of Python functions in files whose path has a part, e.g. `truestep`."""
    return _counted(run, lambda frame, event: event == "call" and part in frame.f_code.co_filename)


def _counted(run: Callable[[], object], counts: Callable[[FrameType, str], bool]) -> int:
    count = 0

    def seen(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += counts(frame, event)

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest number of bytes that Python's allocator held at once; tensors' memory not counted."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
