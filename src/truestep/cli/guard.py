"""Run a verb in a child process, and pass on only what it completed.

Verbs run code that is not ours: models, changes, ports. It may call `os._exit(0)`, crash or be
killed, and a process that ends so must not look like one that judged. The parent is small: it forks
before anything heavy is imported, waits, and believes an exit code only with the token that the
child sends once the verb has returned.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

STOPS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""What asks the command to stop. The child is told, and ends by itself."""

_AGAIN_S = 0.5
"""One Ctrl-C reaches parent and child: what follows within this time is the same one."""

_PATIENCE_S = 2.0
"""Who asks again after this time waits no longer: what is written is whole at any moment."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(KeyboardInterrupt):
    """The process was asked to stop by another signal than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def guarded(verb: Callable[[], int]) -> int:
    """Exit code of a verb that ran to its end, in a child process where there can be one.

    A process that has threads, or torch, cannot be forked safely: there the verb runs here.
    """
    if not hasattr(os, "fork") or threading.active_count() > 1 or "torch" in sys.modules:
        return verb()
    token = os.urandom(16)
    reading, writing = os.pipe()
    began = time.time()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    child = os.fork()
    if not child:
        os.close(reading)
        _die_with(parent)
        return _child(verb, token, writing)
    os.close(writing)
    return _parent(child, token, reading, began)


def _child(verb: Callable[[], int], token: bytes, writing: int) -> int:
    """Run the verb, then say so."""
    own = os.getpid()
    last = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > _AGAIN_S:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    _handle(stop)
    import faulthandler

    faulthandler.enable(writing, all_threads=False)  # of a crash: where it was
    code = verb()
    faulthandler.disable()
    if os.getpid() == own:  # a process that was forked meanwhile says nothing
        with suppress(OSError):  # closed by code that is not ours: the parent says so
            os.write(writing, token + bytes([code if 0 <= code < 256 else 255]))
    return code


def _parent(child: int, token: bytes, reading: int, began: float) -> int:
    """Wait; pass on the exit code of a verb that has ended, or say what ended it."""
    asked: list[tuple[int, float]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append((number, time.monotonic()))
        patience = asked[-1][1] - asked[0][1] < _PATIENCE_S
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(child, number if patience else signal.SIGKILL)

    _handle(forward)
    _, status, usage = os.wait4(child, 0)
    os.set_blocking(reading, False)
    try:
        said = os.read(reading, 1 << 16)
    except BlockingIOError:  # something that the child started still holds the other end
        said = b""
    text, complete, code = said.partition(token)
    if complete and code:
        return code[0]
    from truestep.cli.ended import Ended, interrupted, report

    if asked and os.WIFSIGNALED(status):  # it was stopped before it could say so
        return interrupted(asked[0][0], since=began)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return report(Ended(status=status, peak_bytes=peak, crash=text.decode(errors="replace")), began)


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    """Install a handler of what stops us, but for what is ignored (nohup, a job in background)."""
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _die_with(parent: int) -> None:
    """Where the system can (Linux): a parent that is killed takes this process with it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
