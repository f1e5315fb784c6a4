"""Requests of a service that run now, and the moments between them in which none does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Requests:
    """Requests may run at once with each other; what is done between them runs alone.

    Attributes:
        counting: Held while requests are counted.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._alone = False
        self._mine = threading.local()
        self.counting = threading.Lock()

    @property
    def inside(self) -> bool:
        """Whether this thread is in a request, or in what is done between them."""
        return getattr(self._mine, "inside", False)

    @contextmanager
    def one(self) -> Iterator[None]:
        """While a request runs; it begins once nothing is done between requests."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._running += 1
        self._mine.inside = True
        try:
            yield
        finally:
            self._mine.inside = False
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def between(self, *, wait: bool = False) -> Iterator[bool]:
        """While no request runs, and none begins.

        Args:
            wait: For that moment, which may be long in coming; else there is none while one runs.

        Yields:
            Whether it is such a moment.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(self._is_free)
            free = self._is_free()
            self._alone = self._alone or free
        if not free:
            yield False
            return
        self._mine.inside = True
        try:
            yield True
        finally:
            self._mine.inside = False
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    def _is_free(self) -> bool:
        return not self._running and not self._alone
