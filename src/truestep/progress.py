"""How long work tells what it has done, and what it takes."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) while something long goes on."""


def resident_peak(process: str = "self") -> int | None:
    """Largest resident memory of a process so far, in bytes; None where Linux does not say."""
    try:
        with open(f"/proc/{process}/status", encoding="utf-8") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def written_bytes() -> int | None:
    """What this process has written to files and pipes so far; None where Linux does not say."""
    try:
        with open("/proc/self/io", encoding="utf-8") as file:
            for line in file:
                if line.startswith("wchar:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None
