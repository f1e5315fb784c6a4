"""How long work tells what it has done, and what it takes."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) while something long goes on."""


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody is told."""


def resident_peak(process: str = "self") -> int | None:
    """Largest resident memory of a process so far, in bytes; None where Linux does not say."""
    return told_by_linux(f"/proc/{process}/status", "VmHWM")


def written_bytes() -> int | None:
    """What this process has written to files and pipes so far; None where Linux does not say."""
    return told_by_linux("/proc/self/io", "wchar")


def told_by_linux(path: str, name: str) -> int | None:
    """A number of bytes in a file of /proc, of a line `name: number` or `name: number kB`."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.startswith(f"{name}:"):
                    number, *unit = line.split()[1:]
                    return int(number) * (1024 if unit == ["kB"] else 1)
    except OSError:
        pass
    return None
