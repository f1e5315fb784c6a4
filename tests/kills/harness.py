"""Kill writers at every point where the disk changes, at random moments, and while they race.

Each try is a forked child of a process that has imported everything: a kill costs milliseconds. A
child is killed by SIGKILL at its k-th *point* (before and after every change of the disk that
Python makes, and in the middle of a write), at a random moment (which falls inside libraries, too),
or interrupted at its k-th line. Then what is there must be what was there before, or what the child
wrote; another writer must succeed, and sweep what was left.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

OLD, NEW, NEXT = 1, 2, 3
"""What is written before, by the child, and by the writer after it."""

SOURCE = str(Path(__file__).parents[2] / "src" / "truestep")

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link"}
_CALLS = ("fsync", "replace", "rename", "write", "pwrite", "ftruncate", "copy_file_range", "close")


@dataclass(frozen=True)
class Writer:
    """Something that writes below a folder.

    Attributes:
        name: As it is counted.
        write: Writes a value.
        read: All values that can be read, each whole; raises where something cannot be read.
        keeps: Whether earlier values stay beside later ones.
        mend: What a person does after a kill, where there is something to do; raises where it
            cannot be done.
        lines: Whether it is interrupted line by line (none that runs a program of its own).
    """

    name: str
    write: Callable[[Path, int], None]
    read: Callable[[Path], set[int]]
    keeps: bool = False
    mend: Callable[[Path], None] = lambda folder: None
    lines: bool = True


@dataclass
class Count:
    """What was tried of a writer, and what went wrong."""

    kills: int = 0
    interrupts: int = 0
    races: int = 0
    old: int = 0
    new: int = 0
    faults: list[str] = field(default_factory=list)


def point_by_point(
    writer: Writer, folder: Path, count: Count, *, every: int = 1, interrupt: bool = False
) -> None:
    """Kill a writer at each of its points in turn, or interrupt it at each of its lines.

    Args:
        every: Take each so many points.
        interrupt: Raise KeyboardInterrupt at lines of truestep in place of a kill.
    """
    at = 1
    while True:
        where = f"{'line' if interrupt else 'point'} {at}"
        _begin(writer, folder)
        arm = _interrupting(at) if interrupt else _killing(folder, at)
        ended = _child(lambda: writer.write(folder, NEW), arm)
        if os.WIFEXITED(ended) and os.WEXITSTATUS(ended) == 0:
            return  # it has no more points
        if interrupt:
            count.interrupts += 1
        else:
            count.kills += 1
        _judge(writer, folder, count, {OLD, NEW}, where)
        at += every


def at_random(writer: Writer, folder: Path, count: Count, *, times: int, seed: int) -> None:
    """Kill a writer that writes on and on, at random moments."""
    dice = random.Random(seed)

    def work() -> None:
        value = NEW
        while True:
            writer.write(folder, value)
            value += 1 + (value + 1 == NEXT)

    _begin(writer, folder)
    began = time.perf_counter()
    writer.write(folder, NEW)
    lasts = max(time.perf_counter() - began, 1e-3)
    for number in range(times):
        _begin(writer, folder)
        pid = _fork(work, lambda: None)
        time.sleep(dice.uniform(0.0, 3 * lasts))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        count.kills += 1
        _judge(writer, folder, count, range(10**6), f"random kill {number}, seed {seed}")


def race(writer: Writer, folder: Path, count: Count, *, writers: int, seed: int) -> None:
    """Let several write at once, each slowed at random, and kill some of them."""
    dice = random.Random(seed)
    _begin(writer, folder)
    values = [10 + number for number in range(writers)]
    gate, opener = os.pipe()

    def ready(number: int) -> Callable[[], None]:
        def arm() -> None:
            os.close(opener)
            os.read(gate, 1)  # until the parent closes its end
            _slowed(seed * 1000 + number)

        return arm

    pids = {
        _fork(lambda value=value: writer.write(folder, value), ready(value)): value  # type: ignore[misc]
        for value in values
    }
    os.close(gate)
    os.close(opener)
    doomed = {pid for pid in pids if dice.random() < 0.2}
    for pid in doomed:
        time.sleep(dice.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
    survivors = set()
    for pid, value in pids.items():
        _, ended = os.waitpid(pid, 0)
        if ended == 0:
            survivors.add(value)
        elif pid not in doomed:
            count.faults.append(f"{writer.name}: a writer failed in a race of {writers}, {seed}")
    count.races += 1
    where = f"race of {writers}, seed {seed}"
    _judge(writer, folder, count, {OLD, *values}, where, needs=survivors)


def _begin(writer: Writer, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    writer.write(folder, OLD)


def _judge(
    writer: Writer,
    folder: Path,
    count: Count,
    allowed: Collection[int],
    where: str,
    *,
    needs: Collection[int] = (),
) -> None:
    """Read what is there; write once more; see that nothing was left."""
    try:
        found = writer.read(folder)
        if not found or not all(value in allowed for value in found):
            raise ValueError(f"it holds {sorted(found)}")
        if writer.keeps and not {OLD, *needs} <= found:
            raise ValueError(f"lost: {sorted({OLD, *needs} - found)}")
        if not writer.keeps and needs and not found & set(needs) and OLD in found:
            raise ValueError("nothing that a survivor wrote is there")
        count.old += found == {OLD}
        count.new += found != {OLD}
        writer.mend(folder)
        writer.write(folder, NEXT)
        after = writer.read(folder)
        if NEXT not in after or (writer.keeps and not found <= after):
            raise ValueError(f"the next writer left {sorted(after)} of {sorted(found)}")
        left = [
            p
            for p in folder.rglob("*")
            if p.name.endswith((".tmp", ".spool", ".candidate", ".partial"))
        ]
        if left:
            raise ValueError(f"left over: {', '.join(p.name for p in left)}")
    except Exception as error:  # whatever it is, it is what this looks for
        count.faults.append(f"{writer.name}, {where}: {type(error).__name__}: {error}"[:500])


# --- children --------------------------------------------------------------------------------


def _child(work: Callable[[], None], arm: Callable[[], None]) -> int:
    pid = _fork(work, arm)
    return os.waitpid(pid, 0)[1]


def _fork(work: Callable[[], None], arm: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        arm()
        work()
        status = 0
    except KeyboardInterrupt:
        status = 130
    finally:
        sys.settrace(None)
        os._exit(status)


def _killing(folder: Path, at: int) -> Callable[[], None]:
    """Arm a child so that it is killed at its point of a number."""

    def arm() -> None:
        seen = 0

        def point() -> bool:
            """Whether the next point is the one."""
            nonlocal seen
            seen += 1
            return seen == at

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            opened = event == "open" and str(folder) in str(arguments[0])
            if (opened or event in _CHANGES) and point():
                die()

        def wrapped(original: Callable[..., Any], name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if name == "write" and len(arguments[1]) > 1 and point():
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    die()
                result = original(*arguments, **keywords)
                if point():
                    die()
                return result

            return call

        for name in _CALLS:
            if hasattr(os, name):
                setattr(os, name, wrapped(getattr(os, name), name))
        fcntl.flock = wrapped(fcntl.flock, "flock")
        sys.addaudithook(watch)

    return arm


def _interrupting(at: int) -> Callable[[], None]:
    """Arm a child so that Ctrl-C comes at its line of a number, of those of truestep."""

    def arm() -> None:
        seen = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal seen
            if not frame.f_code.co_filename.startswith(SOURCE):
                return None
            if event == "line":
                seen += 1
                if seen == at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)

    return arm


def _slowed(seed: int) -> None:
    """Give the others time at every change that matters."""
    dice = random.Random(seed)

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            time.sleep(dice.uniform(0.0, 0.003))
            result = original(*arguments, **keywords)
            time.sleep(dice.uniform(0.0, 0.003))
            return result

        return call

    for name in ("replace", "fsync"):
        setattr(os, name, wrapped(getattr(os, name)))
    with suppress(AttributeError):
        fcntl.flock = wrapped(fcntl.flock)
