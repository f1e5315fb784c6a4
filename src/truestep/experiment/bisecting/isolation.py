"""Run a command as a probe: with caches of its own, from its start to its end or a time limit.

Fresh for every probe: HOME, the caches of compilers, and the folder of temporary files; no bytecode
is written. Left as they are: the caches of weights (HF_HOME, TORCH_HOME), which are large and named
by content, the user's own packages, the settings of git and of programs, GPUs and their state.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path

FRESH = {
    "HOME": "home",
    "XDG_CACHE_HOME": "cache",
    "XDG_DATA_HOME": "data",
    "XDG_STATE_HOME": "state",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "TRITON_CACHE_DIR": "triton",
    "TRITON_HOME": "triton-home",
    "CUDA_CACHE_PATH": "cuda",
    "NUMBA_CACHE_DIR": "numba",
    "TMPDIR": "tmp",
    "TEMP": "tmp",
    "TMP": "tmp",
}
"""Variables that name a folder of this probe alone."""

ROOT = "TRUESTEP_BISECT_ROOT"
"""Variable with the folder that the bisect was started in; of commits the repository's."""

GIT = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR")
"""Of a git that started us (a hook): they would lead a probe to the repository's own files."""

MOST_KEPT = 1 << 16
"""Bytes of what a probe printed that are read: its end."""

_SIGNALLED = 128
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_PATIENCE_S = 5.0
_MOST_ROUNDS = 20
_PAUSE_S = 0.01
_LIBRARY = ctypes.CDLL(None)
"""Loaded here: after a fork it might wait for a lock that another thread holds."""


@dataclass(frozen=True)
class Place:
    """Where a command runs, made ready.

    Attributes:
        folder: Its working directory.
        variables: Of its environment, beside the fresh ones; None takes one away.
        words: What stands for `{repo}`, `{weights}` in its arguments.
        problem: Why nothing there can be judged; empty where it can.
    """

    folder: Path
    variables: Mapping[str, str | None] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Setting:
    """A point that can be probed.

    Attributes:
        key: Its content: two points with one key are the same.
        label: In words.
        place: Makes it ready in an empty folder, and clears it away.
    """

    key: str
    label: str
    place: Callable[[Path], AbstractContextManager[Place]]


@dataclass(frozen=True)
class Ran:
    """How a command ended, and the end of what it printed."""

    exit_code: int
    seconds: float
    stdout: str = ""
    stderr: str = ""
    timed_out: bool = False


def environment(
    scratch: Path, kept: Iterable[str], more: Mapping[str, str | None]
) -> dict[str, str]:
    """The environment of a probe.

    Args:
        scratch: Its folder; the fresh ones are made in it.
        kept: Names of `FRESH` that are left as they are.
        more: What the probe sets or, by None, takes away; it wins.
    """
    kept = set(kept)
    variables = {key: value for key, value in os.environ.items() if key not in GIT}
    home = Path(os.path.expanduser("~"))
    settings = home / ".config"
    cache = Path(variables.get("XDG_CACHE_HOME") or home / ".cache")
    stay = {
        "PYTHONDONTWRITEBYTECODE": "1",  # that of libraries is read: to compile torch takes 10 s
        "HF_HOME": str(cache / "huggingface"),
        "TORCH_HOME": str(cache / "torch"),
        "PYTHONUSERBASE": str(home / ".local"),
        "XDG_CONFIG_HOME": str(settings),
    }
    if (home / ".gitconfig").is_file():
        stay["GIT_CONFIG_GLOBAL"] = str(home / ".gitconfig")
    variables = {**stay, **variables}
    for name, folder in FRESH.items():
        if name not in kept:
            path = scratch / folder
            path.mkdir(parents=True, exist_ok=True)
            variables[name] = str(path)
    for name, value in more.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    return variables


def filled(command: Sequence[str], words: Mapping[str, str]) -> list[str]:
    """A command with its places in braces filled in; other braces are left alone."""
    told = []
    for word in command:
        for name, value in words.items():
            word = word.replace(f"{{{name}}}", value)
        told.append(word)
    return told


def run(
    command: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    *,
    scratch: Path,
    timeout_s: float | None,
) -> Ran:
    """Run a command to its end; whatever ends this process ends it, too.

    Args:
        scratch: Where what it prints is kept until it is read.
    """
    began = time.monotonic()
    out, err = scratch / "stdout", scratch / "stderr"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except FileNotFoundError as error:
            return Ran(127, 0.0, stderr=f"{error.strerror}: {error.filename}")
        except OSError as error:
            return Ran(126, 0.0, stderr=f"{error.strerror}: {error.filename}")
        timed_out = False
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            code = _end(process)
        except BaseException:
            _end(process)
            kill_of(scratch)
            raise
    _kill_group(process.pid)  # what it left behind would run beside the next probe
    kill_of(scratch)
    code = code if code >= 0 else _SIGNALLED - code
    return Ran(code, time.monotonic() - began, _tail(out), _tail(err), timed_out)


def _die_with_parent() -> None:
    """In the child: a truestep that is killed takes the command with it (Linux)."""
    _LIBRARY.prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Ask a command and what it started to end, and make it end."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE_S)
    _kill_group(process.pid)
    return process.wait()


def _kill_group(number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(number, signal.SIGKILL)


def kill_of(scratch: Path) -> None:
    """Kill whatever was started with a variable in a probe's folder, as its TMPDIR is: what left
    the command's session, too (Linux; elsewhere nothing is known of other processes)."""
    mark = b"=" + os.fsencode(scratch) + b"/"
    for _ in range(_MOST_ROUNDS):  # one that is found may have started another meanwhile
        found = [number for number in _processes() if mark in _variables_of(number)]
        for number in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        if not found:
            return
        time.sleep(_PAUSE_S)


def _processes() -> list[int]:
    with suppress(OSError):
        numbers = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [number for number in numbers if number != os.getpid()]
    return []


def _variables_of(number: int) -> bytes:
    """Of a process; empty where it has ended, or is another user's."""
    with suppress(OSError):
        return Path(f"/proc/{number}/environ").read_bytes()
    return b""


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - MOST_KEPT, 0))
        return file.read().decode("utf-8", "replace")


def path_of(root: Path) -> str:
    """PYTHONPATH with a project's own packages first."""
    source = root / "src" if (root / "src").is_dir() else root
    before = os.environ.get("PYTHONPATH")
    return f"{source}{os.pathsep}{before}" if before else str(source)
