"""Work that is counted, not timed: guards that mean the same on every machine."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType


def calls(run: Callable[[], object]) -> int:
    """Number of functions, Python's and C's, that a piece of work calls in this thread."""
    count = 0

    def seen(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def calls_of(run: Callable[[], object], *names: str) -> int:
    """Number of calls of Python functions of these names, e.g. `get_close_matches`."""
    count = 0

    def seen(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        if event == "call":
            count += frame.f_code.co_name in names

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
