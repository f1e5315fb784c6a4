"""Code that is not ours runs in a child process, so that it cannot end the run as passed.

`os._exit(0)`, a segmentation fault or the out-of-memory killer end a process at once, and no
handler of it sees them. So a run forks before anything heavy is loaded: the child works, and says
when it has judged; the parent does nothing but wait, and passes on no 0 that was not judged.
No torch; nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from dataclasses import dataclass

from truestep.errors import TruestepError

UNJUDGED = 1
"""Exit code of a run that ended before it had judged, as of the verdict `invalid`."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PAGE = mmap.PAGESIZE
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_SIGNALLED = 128  # what a shell adds to the number of the signal that ended a process


@dataclass(frozen=True)
class Watched:
    """The child's side: a page that both processes see. Byte 0: judged, 1: exit code, 2-: place."""

    _page: mmap.mmap
    _pid: int

    def at(self, place: str) -> None:
        """Say what runs now, for the message should it end the process."""
        if os.getpid() == self._pid:
            text = place.encode("utf-8", "replace")[: _PAGE - 3]
            self._page[2 : 3 + len(text)] = text + b"\0"

    def judged(self, exit_code: int) -> None:
        """Say that the work is complete: from now on its exit code is the run's."""
        if os.getpid() == self._pid:  # a process that it forked has judged nothing
            self._page[:2] = bytes((1, exit_code & 0xFF))


def fork(what: str) -> Watched | None:
    """Go on in a child. Call it before torch, or any thread, is there.

    The parent does not return: it ends with the exit code that the child judged, or with 1 and a
    message where the child ended before it had.

    Args:
        what: Names the run in that message.

    Returns:
        The child's side. None, and no child, where this process has threads already, which a fork
        would lose, or where the platform cannot.
    """
    if _threads() != 1 or not hasattr(signal, "sigwaitinfo"):
        return None
    page = mmap.mmap(-1, _PAGE)
    waited = {*_FORWARDED, signal.SIGCHLD}
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed in between
            os._exit(UNJUDGED)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return Watched(page, os.getpid())
    try:
        exit_code = _wait(child, page, waited, what)
    except BaseException:  # nothing may unwind in the parent: the work is the child's
        os._exit(UNJUDGED)
    os._exit(exit_code)


def _threads() -> int:
    """Threads of this process, those of libraries too; 0 where that cannot be told."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 0


def _wait(child: int, page: mmap.mmap, waited: set[signal.Signals], what: str) -> int:
    """Hand signals on until the child has ended; the run's exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        found = signal.sigwaitinfo(waited)
        if found.si_signo != signal.SIGCHLD and found.si_code <= 0:
            os.kill(child, found.si_signo)  # a terminal's own reaches the child by itself
    exit_code = os.waitstatus_to_exitcode(status)
    judged, said = page[0] == 1, page[1]
    if judged and exit_code >= 0:
        return said or exit_code
    place = page[2:].partition(b"\0")[0].decode("utf-8", "replace")
    text = _message(what, exit_code, judged=judged, place=place, peak_mib=usage.ru_maxrss / 1024)
    os.write(2, f"\n{text}\n".encode(errors="replace"))
    return (said or _SIGNALLED - exit_code) if judged else UNJUDGED


def _message(what: str, exit_code: int, *, judged: bool, place: str, peak_mib: float) -> str:
    if exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = f"signal {-exit_code}"
        how = f"was ended by {name}"
    else:
        name, how = "", f"ended with exit code {exit_code}"
    likely = {
        "": "something called os._exit or sys.exit",
        "SIGKILL": "the out-of-memory killer, or kill -9",
        "SIGSEGV": "a fault in compiled code: an extension, a kernel or a driver",
        "SIGABRT": "compiled code gave up: a failed assertion, or an uncaught C++ exception",
    }
    return str(
        TruestepError(
            f"{what} {how} {'after' if judged else 'before'} it had judged",
            where=place,
            measured=f"peak memory {peak_mib:,.0f} MiB",
            likely=likely.get(name, ""),
        )
    )
