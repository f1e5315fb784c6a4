"""The lock file of a reference folder: content hashes, journalled so that a kill breaks nothing.

An entry holds the hash of the settled file and, while a replacement is under way, that of the
pending one. A writer notes the pending hash, renames the file into place, then settles the entry.
Killed at any moment it leaves a file that matches one of the two.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, ValidationError

from truestep.errors import FileFormatError
from truestep.files import replacing
from truestep.verdict import Record

LOCK_FILE = "truestep.lock"
LOCK_VERSION = 1


class Entry(Record):
    """Hashes (SHA-256) of one reference file. `pending` is set only while it is replaced."""

    sha256: str | None = None
    pending: str | None = None


class Lock(Record):
    """Relative path (POSIX) to entry."""

    lock_version: int = LOCK_VERSION
    references: dict[str, Entry] = Field(default_factory=dict)


def read_lock(root: Path) -> Lock:
    """Read a folder's lock; an absent one is empty.

    Raises:
        FileFormatError: It is damaged or of a newer version.
    """
    path = root / LOCK_FILE
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return Lock()
    except OSError as error:
        raise FileFormatError(
            "the lock file cannot be read", where=str(path), measured=str(error.strerror)
        ) from None
    try:
        lock = Lock.model_validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        raise FileFormatError(
            "the lock file is damaged",
            where=str(path),
            measured=str(error).splitlines()[0],
            likely="a merge conflict or an edit by hand",
            hint=f"git checkout {path}",
        ) from None
    if lock.lock_version > LOCK_VERSION:
        raise FileFormatError(
            "the lock file was written by a newer truestep",
            where=str(path),
            measured=f"version {lock.lock_version}; this truestep reads up to {LOCK_VERSION}",
            hint="pip install --upgrade truestep",
        )
    return lock


def set_entry(root: Path, name: str, entry: Entry) -> None:
    """Replace one entry; safe beside other processes that do the same."""
    with _exclusive(root):
        lock = read_lock(root)
        merged = dict(sorted({**lock.references, name: entry}.items()))
        _write(root, lock.model_copy(update={"references": merged}))


@contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Hold an advisory lock on the folder; the kernel frees it when the process dies."""
    root.mkdir(parents=True, exist_ok=True)
    folder = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(root: Path, lock: Lock) -> None:
    with (
        replacing(root / LOCK_FILE, "the lock file") as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        file.write(json.dumps(lock.model_dump(mode="json"), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
