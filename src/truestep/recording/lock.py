"""The lock file of a reference folder: content hashes, journalled so that a kill breaks nothing.

An entry holds the hash of the settled file and, while a replacement is under way, that of the
pending one. A writer notes the pending hash, renames the file into place, then settles the entry,
and holds the folder over all three. Killed at any moment it leaves a file that matches one of the
two.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from truestep.errors import FileFormatError
from truestep.files import write_text
from truestep.reading import parse_json, read
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
    if not path.exists():
        return Lock()
    lock = read(
        path,
        "the lock file is damaged",
        lambda data: Lock.model_validate(parse_json(data, unique=True)),
        likely="a merge conflict or an edit by hand",
        hint=f"git checkout {path}",
    )
    if lock.lock_version > LOCK_VERSION:
        raise FileFormatError(
            "the lock file was written by a newer truestep",
            where=str(path),
            measured=f"version {lock.lock_version}; this truestep reads up to {LOCK_VERSION}",
            hint="pip install --upgrade truestep",
        )
    return lock


def put_entry(root: Path, name: str, entry: Entry) -> None:
    """Replace one entry; the caller holds the folder (`files.alone`)."""
    lock = read_lock(root)
    merged = dict(sorted({**lock.references, name: entry}.items()))
    kept = lock.model_copy(update={"references": merged})
    write_text(
        root / LOCK_FILE, json.dumps(kept.model_dump(mode="json"), indent=2), "the lock file"
    )
