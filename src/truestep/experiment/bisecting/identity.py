"""What a verdict depends on beside its point: the interpreter, its packages, files, variables."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from truestep.experiment.bisecting.isolation import FRESH, GIT
from truestep.experiment.bisecting.store import key_of

_PYTHON = re.compile(r"(?:python|pypy)[\d.]*t?")

_PACKAGES = """
import importlib.metadata as m, sys
names = sorted({f"{d.metadata['Name']}=={d.version}" for d in m.distributions()})
print(sys.version, sys.prefix, *names, sep="\\n")
"""

_OF_THE_SESSION = re.compile(
    r"_|PWD|OLDPWD|SHLVL|COLUMNS|LINES|LS_COLORS|PS1|WINDOWID|DISPLAY|WAYLAND_DISPLAY|XAUTHORITY"
    r"|INVOCATION_ID|JOURNAL_STREAM|SYSTEMD_EXEC_PID|DBUS_SESSION_BUS_ADDRESS|STY|(?:"
    r"TERM\w*|SSH|XDG_SESSION|TMUX|VTE|ITERM|KITTY|WEZTERM|KONSOLE|GNOME_TERMINAL|VSCODE|SLURM|PBS"
    r"|PYTEST)(?:_.*)?"
)
"""Variables of the shell, terminal, login or job that a bisect is started from: the same bisect has
others each time. A verdict depends on all others."""

_LARGEST = 64 * 2**20
"""Bytes of a file above which its size and time stand for its content: weights are renamed, not
rewritten, and reading them for each probe would take longer than the probe."""

_MOST_FILES = 10_000

_PATIENCE_S = 120.0


def interpreter_of(command: Sequence[str], folder: Path) -> str:
    """The Python that a command runs: itself, that of its first line, or the first of PATH."""
    path = shutil.which(command[0], path=os.environ.get("PATH")) or str(folder / command[0])
    if _PYTHON.fullmatch(Path(path).name):
        return path
    try:
        with open(path, "rb") as file:
            line = file.readline(512)
    except OSError:
        line = b""
    words = line[2:].decode("utf-8", "replace").split() if line.startswith(b"#!") else []
    for word in reversed(words):
        if _PYTHON.fullmatch(Path(word).name):
            return shutil.which(word) or sys.executable
    return shutil.which("python") or shutil.which("python3") or sys.executable


def fingerprint(command: Sequence[str], folder: Path) -> str:
    """A digest of what a command's verdict depends on, whatever the point.

    Args:
        command: With `{weights}` and the like still in it.
        folder: Where a relative path in it begins.
    """
    interpreter = interpreter_of(command, folder)
    program = shutil.which(command[0]) or command[0]
    parts = [*command, str(folder), os.path.realpath(program), _packages(interpreter)]
    parts += [f"{path}={content(path)}" for path in _files(command, folder)]
    parts += [f"{key}={value}" for key, value in sorted(os.environ.items()) if _told(key)]
    return key_of(parts)


def _told(name: str) -> bool:
    return not (name in FRESH or name in GIT or _OF_THE_SESSION.fullmatch(name))


def _packages(interpreter: str) -> str:
    """Version and packages of an interpreter; its path where it cannot be asked."""
    try:
        done = subprocess.run(
            [interpreter, "-c", _PACKAGES],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=True,
            cwd=os.sep,
        )
    except (OSError, subprocess.SubprocessError):
        return os.path.realpath(interpreter)
    return done.stdout


def _files(command: Sequence[str], folder: Path) -> Iterator[Path]:
    """Files and folders that a command names, also behind `--option=`."""
    for word in command:
        for text in dict.fromkeys((word, word.partition("=")[2], word.partition(":")[0])):
            path = folder / text if text else folder
            if text and path != folder and path.exists():
                yield path


def content(path: Path) -> str:
    """A digest of a file, or of the files of a folder."""
    if path.is_dir():
        files = sorted(each for each in islice(path.rglob("*"), _MOST_FILES) if each.is_file())
        return key_of(f"{each.relative_to(path)} {_stamp(each)}" for each in files)
    if path.is_file() and path.stat().st_size <= _LARGEST:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return _stamp(path)


def _stamp(path: Path) -> str:
    state = path.stat()
    return f"{state.st_size} {state.st_mtime_ns}"


def imported_from(
    names: Iterable[str], command: Sequence[str], folder: Path, variables: dict[str, str]
) -> dict[str, str]:
    """Where a command would import packages from; empty where it would not find them.

    They are looked up, not imported.
    """
    names = list(names)
    code = (
        "import importlib.util as u, sys\n"
        "for name in sys.argv[1:]:\n"
        "    spec = u.find_spec(name)\n"
        "    places = list(spec.submodule_search_locations or []) if spec else []\n"
        "    print(spec and (spec.has_location and spec.origin or (places or [''])[0]) or '')\n"
    )
    try:
        done = subprocess.run(
            [interpreter_of(command, folder), "-c", code, *names],
            cwd=os.sep,
            env=variables,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(names, "")
    lines = done.stdout.split("\n")[: len(names)]
    return dict(zip(names, [*lines, *[""] * len(names)], strict=False))
