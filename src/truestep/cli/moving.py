"""How bytes that are sent and received are told."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from truestep.text import say

LEAST_S = 1.0
"""Where no bar is shown, what was moved faster is not told."""


def size_text(size: float) -> str:
    """A size as it is read."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size:.0f} B"


@contextmanager
def byte_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr while bytes are moved; where that is no terminal, a line for each object."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TransferSpeedColumn

    bar = Progress(
        "{task.description:<10}",
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    with bar:
        yield show


class _Lines:
    def __init__(self) -> None:
        self._last, self._begun = 0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if done <= self._last or not self._begun:
            self._begun = time.monotonic()
        self._last = done
        lasted = time.monotonic() - self._begun
        if done == total and lasted >= LEAST_S:
            rate = size_text(total / lasted)
            say(f"{what}: {size_text(total)} in {lasted:.1f} s, {rate}/s", err=True)
            self._begun = 0.0
