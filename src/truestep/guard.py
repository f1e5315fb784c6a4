"""Code that is not ours runs in a child process, so that it cannot end the run as passed.

Models, changes, ports and tests may call `os._exit(0)`, crash in compiled code or be killed, and no
handler of the process sees that. So a run forks before anything heavy is loaded: the child works,
and says with a token what it judged; the parent does nothing but wait, pass signals on, and believe
no exit code without the token. No torch; nothing but the standard library.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from mmap import PAGESIZE, mmap
from types import FrameType

UNJUDGED = 1
"""Exit code of a run that ended before it had judged, as of the verdict `invalid`."""

_STOPS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""What asks a run to stop: its child is told, and ends by itself."""

_AGAIN_S = 0.5
"""One Ctrl-C may reach parent and child: what follows within this time is the same one."""

_PATIENCE_S = 2.0
"""Who asks again after this time waits no longer: what is written is whole at any moment."""

_TOKEN = 16
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_SIGNALLED = 128  # what a shell adds to the number of the signal that ended a process


@dataclass(frozen=True)
class Watched:
    """The child's side: a page that both processes see holds token, exit code, and the place."""

    _page: mmap
    _token: bytes
    _pid: int

    def at(self, place: str) -> None:
        """Say what runs now, for the message should it end the process."""
        if os.getpid() == self._pid:
            text = place.encode("utf-8", "replace")[: PAGESIZE - _TOKEN - 2]
            self._page[_TOKEN + 1 : _TOKEN + 2 + len(text)] = text + b"\0"

    def judged(self, exit_code: int) -> None:
        """Say that the work is complete: from now on its exit code is the run's."""
        if os.getpid() == self._pid:  # a process that it forked has judged nothing
            self._page[_TOKEN] = exit_code if 0 <= exit_code < 256 else 255
            self._page[:_TOKEN] = self._token


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        exit_code: Of the process; minus the number of a signal that ended it.
        judged: The exit code that it had judged, if it had.
        asked: The signal by which somebody had asked it to stop.
        began: When it did, in seconds since the epoch.
        peak_bytes: Largest resident memory that it had.
        place: What it said that it was at; else where it crashed, as `file:line, in function`.
    """

    exit_code: int
    judged: int | None
    asked: int | None
    began: float
    peak_bytes: int
    place: str

    @property
    def ended_by(self) -> str:
        """Name of the signal that ended it; nothing where it ended itself."""
        if self.exit_code >= 0:
            return ""
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"

    @property
    def measured(self) -> str:
        """Its memory, beside the machine's."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"peak memory {self.peak_bytes / 2**30:.2f} GiB of {memory / 2**30:.1f}"

    @property
    def likely(self) -> str:
        """What usually ends a process so."""
        causes = {
            "": "something called os._exit or sys.exit, or replaced the process",
            "SIGKILL": "the out-of-memory killer (dmesg says so), or kill -9",
            "SIGSEGV": "a fault in compiled code: an extension, a kernel or a driver",
            "SIGABRT": "compiled code gave up: a failed assertion, or an uncaught C++ exception",
        }
        return causes.get(self.ended_by, "")


def run(function: Callable[[], int], tell: Callable[[Ended], int]) -> int:
    """Exit code of a function that ran to its end, in a child where there can be one.

    The parent does not return. What ends the child after the function has returned changes nothing.

    Args:
        function: Everything that is to be done.
        tell: Says how a child ended that had not judged; gives the run's exit code.
    """
    crash, writing = os.pipe()
    watched = _forked(partial(_ran, tell, crash), stops=_STOPS, patience_s=_PATIENCE_S)
    if watched is None:
        os.close(crash)
        os.close(writing)
        return function()
    import faulthandler

    os.close(crash)
    faulthandler.enable(writing, all_threads=False)  # of a crash: where it was
    code = function()
    faulthandler.disable()
    watched.judged(code)
    return code


def fork(what: str) -> Watched | None:
    """Go on in a child. Call it before torch, or any thread, is there.

    The parent does not return: it ends with the exit code that the child judged, or that it ended
    with after it had judged 0; with 1 and a message where the child ended before it had judged.

    Args:
        what: Names the run in that message.

    Returns:
        The child's side. None, and no child, where this process has threads already, which a fork
        would lose, or where the platform cannot.
    """
    return _forked(partial(_told, what), stops=_STOPS[:1], patience_s=math.inf)


def _forked(
    tell: Callable[[Ended], int], *, stops: Iterable[int], patience_s: float
) -> Watched | None:
    """Fork. The child returns, with handlers for what asks it to stop; the parent waits and ends.

    Args:
        tell: Gives the exit code of an ended child, and says what there is to say.
        stops: Signals that raise an interrupt in the child.
        patience_s: After this time the child is killed where it is asked again.
    """
    if not hasattr(os, "fork") or not _alone():
        return None
    page, token = mmap(-1, PAGESIZE), os.urandom(_TOKEN)
    forwarded = {*_STOPS, signal.SIGQUIT}
    waited = {n for n in forwarded if signal.getsignal(n) is not signal.SIG_IGN}  # nohup
    waited.add(signal.SIGCHLD)
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    parent, began = os.getpid(), time.time()
    child = os.fork()
    if child == 0:
        _die_with(parent)
        _interrupted_once(stops)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return Watched(page, token, os.getpid())
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        exit_code = tell(_wait(child, page, token, waited, began, patience_s))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # nothing may unwind in the parent: the work is the child's
        os._exit(UNJUDGED)
    os._exit(exit_code)


def _alone() -> bool:
    """Whether this process has one thread, those of libraries counted."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        import threading

        return threading.active_count() == 1 and "torch" not in sys.modules


def _die_with(parent: int) -> None:
    """Where the system can (Linux): a parent that is killed takes this process with it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed in between
            os._exit(UNJUDGED)


class Stopped(KeyboardInterrupt):
    """The process was asked to stop by another signal than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _interrupted_once(stops: Iterable[int]) -> None:
    """Let what asks us to stop raise an interrupt, but for what is ignored (nohup)."""
    last = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > _AGAIN_S:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    for number in stops:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)


def _wait(
    child: int,
    page: mmap,
    token: bytes,
    waited: set[signal.Signals],
    began: float,
    patience_s: float,
) -> Ended:
    """Hand signals on until the child has ended."""
    asked: list[tuple[int, float]] = []
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        number, reached_both = _next_signal(waited)
        if number == signal.SIGCHLD:
            continue
        asked.append((number, time.monotonic()))
        if asked[-1][1] - asked[0][1] > patience_s:
            os.kill(child, signal.SIGKILL)
        elif not reached_both:
            os.kill(child, number)
    place = page[_TOKEN + 1 :].partition(b"\0")[0].decode("utf-8", "replace")
    return Ended(
        exit_code=os.waitstatus_to_exitcode(status),
        judged=page[_TOKEN] if page[:_TOKEN] == token else None,
        asked=asked[0][0] if asked else None,
        began=began,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        place=place,
    )


def _next_signal(waited: set[signal.Signals]) -> tuple[int, bool]:
    """Wait for a signal; also whether the terminal sent it, which sends it to the child too."""
    if hasattr(signal, "sigwaitinfo"):
        found = signal.sigwaitinfo(waited)
        return found.si_signo, found.si_code > 0
    return signal.sigwait(waited), False


def _ran(tell: Callable[[Ended], int], crash: int, ended: Ended) -> int:
    """Of `run`: what was judged, or what `tell` makes of the end and of where it crashed."""
    if ended.judged is not None:
        return ended.judged
    os.set_blocking(crash, False)
    text = b""
    with suppress(BlockingIOError):  # something that the child started still holds the other end
        text = os.read(crash, 1 << 16)
    return tell(replace(ended, place=ended.place or _place(text.decode(errors="replace"))))


def _place(crash: str) -> str:
    """The innermost frame of a crash that is in code neither ours nor a library's, if there is."""
    import re

    from truestep.errors import is_foreign_file

    places = re.findall(r'File "(.+)", line (\d+) in (\S+)', crash)
    place = next((p for p in places if is_foreign_file(p[0])), places[0] if places else None)
    return "{}:{}, in {}".format(*place) if place else ""


def _told(what: str, ended: Ended) -> int:
    """Of `fork`: what was judged, unless the end was worse; and what is not as it should be."""
    if ended.judged is not None and ended.exit_code >= 0:
        return ended.judged or ended.exit_code
    from truestep.errors import TruestepError

    killed = ended.exit_code < 0
    how = f"was ended by {ended.ended_by}" if killed else f"ended with exit code {ended.exit_code}"
    error = TruestepError(
        f"{what} {how} {'before' if ended.judged is None else 'after'} it had judged",
        where=ended.place,
        measured=ended.measured,
        likely=ended.likely,
    )
    os.write(2, f"\n{error}\n".encode(errors="replace"))
    return UNJUDGED if ended.judged is None else ended.judged or _SIGNALLED - ended.exit_code
