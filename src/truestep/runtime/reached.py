"""Code that torch's function modes do not reach: other threads, and functions of TorchScript.

While a lender is on (see `truestep.runtime.lent`), what a thread of its own, or one of a pool, is
given to do is done under the lender of who gave it; and a function of TorchScript is given weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from threading import Lock, Thread
from typing import Any, Protocol
from unittest.mock import patch

import torch


class Mode(Protocol):
    """A function mode that can be on in several threads."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function as the mode wants it."""

    def joined(self) -> AbstractContextManager[None]:
        """Have it on in this thread, too."""


Active = Callable[[], Mode | None]
"""The mode that is on in this thread."""

_lock = Lock()
_patches = ExitStack()
_users = 0


@contextmanager
def reached(active: Active) -> Iterator[None]:
    """Let a mode reach more than its thread. Several may, in several threads."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            for owner, name, replacement in _replacements(active):
                _patches.enter_context(patch.object(owner, name, replacement))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _patches.close()


def _replacements(active: Active) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    start: Any = Thread.start
    submit: Any = ThreadPoolExecutor.submit

    def started(thread: Thread) -> None:
        mode = active()
        if mode is not None:
            thread.run = _joining(mode, thread.run)  # type: ignore[method-assign]
        start(thread)

    def submitted(
        pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        mode = active()
        function = function if mode is None else _joining(mode, function)
        return submit(pool, function, *args, **kwargs)

    yield Thread, "start", wraps(start)(started)
    yield ThreadPoolExecutor, "submit", wraps(submit)(submitted)
    for owner in (torch._C.ScriptFunction, torch._C.ScriptMethod):
        yield owner, "__call__", _scripted(active, owner.__call__)


def _joining(mode: Mode, function: Callable[..., Any]) -> Callable[..., Any]:
    def joining(*args: Any, **kwargs: Any) -> Any:
        with mode.joined():
            return function(*args, **kwargs)

    return joining


def _scripted(active: Active, call: Callable[..., Any]) -> Callable[..., Any]:
    def scripted(*args: Any, **kwargs: Any) -> Any:
        mode = active()
        if mode is None:
            return call(*args, **kwargs)
        return mode.__torch_function__(partial(call), (), args, kwargs)  # it cannot be hashed

    return scripted
