"""Write files whole or not at all, whoever else writes them and whenever the process is killed."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from truestep.errors import WriteError
from truestep.text import quoted

_BLOCK = 1 << 20
STALE_S = 24 * 3600.0
"""After so long without a change a temporary file of another machine is taken for abandoned."""


_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})\.(\d+)\.[0-9a-f]{8}\.tmp")
"""Name of a temporary folder: what is written, machine, process, and a random number."""


@contextmanager
def beside(path: Path, what: str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, in a folder of its own; `settle` moves it into place.

    What is left of it goes with the block, however that ends; what killed writers left beside
    `path` goes first. The folder is there because libraries have temporary files, too.

    Args:
        path: The file that is to be written; its folder is made if need be.
        what: What is written, for the error: "the report".

    Raises:
        WriteError: The block raised OSError.
    """
    if "\0" in str(path):
        raise unwritten(path, what, ValueError("a path cannot hold a NUL"))
    short = path.name.encode()[:180].decode("utf-8", "ignore")
    own = f".{short}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    folder = path.with_name(own)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        folder.mkdir()
        yield folder / path.name
    except OSError as error:
        raise unwritten(path, what, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settle(temporary: Path, path: Path) -> None:
    """Move a finished file into place; it is on the disk before it is there, and so is its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
            raise
    finally:
        os.close(handle)


@contextmanager
def replacing(path: str | Path, what: str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it into place when the block succeeds.

    Args:
        path: The file; its folder is made if need be.
        what: What is written, for the error: "the report".

    Raises:
        WriteError: The block or the move raised OSError; what was there before is untouched.
    """
    path = Path(path)
    with beside(path, what) as temporary:
        yield temporary
        settle(temporary, path)


def write_text(path: str | Path, text: str, what: str) -> None:
    """Write UTF-8 text with a final newline; see `replacing`."""
    with replacing(path, what) as temporary:
        temporary.write_text(text if text.endswith("\n") else text + "\n", "utf-8")


ROOM = 64 * 2**20
"""Free bytes without which nothing is begun: a small recording with what is written beside it."""


def nearest_folder(path: Path) -> Path:
    """A path, or the nearest of those above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def require_room(path: Path, what: str, size: int = 0) -> None:
    """Refuse, before anything is computed for it, a file that could not be written.

    Args:
        path: The file that will be written; its folder need not be there yet.
        what: What will be written, for the error.
        size: Bytes that it will have, where that is known.

    Raises:
        WriteError: Its folder is not writable, something else is in its place, or the disk is full.
    """
    if path.is_dir():
        raise unwritten(path, what, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    folder = nearest_folder(path.parent)
    if not folder.is_dir():
        raise unwritten(path, what, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise unwritten(path, what, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    if shutil.disk_usage(folder).free < max(ROOM, size):
        raise unwritten(path, what, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder against other processes and threads that do the same.

    The lock is on the folder itself: it leaves no file, and the kernel frees it when its process
    dies.

    Raises:
        WriteError: The folder cannot be made or opened.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise unwritten(folder, what, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def unwritten(path: Path, what: str, error: Exception) -> WriteError:
    """The error for a file that could not be written."""
    number, there = getattr(error, "errno", None), path.parent
    with suppress(OSError, ValueError):  # a name that the system does not take
        there = nearest_folder(there)
    folder = quoted(str(there))
    return WriteError(
        f"{what} could not be written",
        where=str(path),
        measured=(getattr(error, "strerror", None) or str(error))[:200],
        likely={
            errno.ENOSPC: "the disk is full",
            errno.EISDIR: "a folder is in its place",
            errno.ENOTDIR: "a file is in the place of its folder",
        }.get(number or 0, ""),
        hint=f"df -h {folder}; ls -ld {folder}",
    )


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _machine() -> str:
    """A mark of this machine, or container: elsewhere a process's number means another process."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{platform.node()} {space}'.encode()):08x}"


def sweep(folder: Path) -> None:
    """Remove the temporary folders of killed writers."""
    for entry in folder.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        machine, pid = match.groups()
        dead = machine == _machine() and not alive(int(pid))
        if dead or _untouched_s(entry) > STALE_S:
            shutil.rmtree(entry, ignore_errors=True)


def _untouched_s(folder: Path) -> float:
    """Seconds since a folder, or a file in it, was changed; none where it is gone."""
    with suppress(OSError):
        changed = max(place.stat().st_mtime for place in (folder, *folder.iterdir()))
        return time.time() - changed
    return 0.0


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    value = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value.update(block)
    return value.hexdigest()
