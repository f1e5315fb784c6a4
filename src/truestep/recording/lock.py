"""The lock file of a reference folder: content hashes, journalled so that a kill breaks nothing.

An entry holds the hash of the settled file and, while a replacement is under way, that of the
pending one. A writer notes the pending hash, renames the file into place, then settles the entry,
and holds the folder over all three. Killed at any moment it leaves a file that matches one of the
two.

Of a reference that was promoted the lock holds more: which content is the promoted one, which is a
draft, and every event that has made it so. What the lock says is then the truth; a file that is not
here, or an earlier one, is fetched (see `recording/placing.py`).
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from truestep.errors import FileFormatError
from truestep.files import write_text
from truestep.reading import parse_json, read
from truestep.verdict import Record

DEFAULT_ROOT = Path("truestep-references")
"""The folder of references where no other is said."""

LOCK_FILE = "truestep.lock"
LOCK_VERSION = 2
"""1 has neither drafts nor history; a lock that needs neither is written as that still."""


class Event(Record):
    """What has made a content the promoted one: who, when, where and why.

    Attributes:
        action: What was done.
        sha256, size: The content that is promoted by it.
        replaces: The one that was promoted before.
        reason: As it was given.
        who, when, commit: A name, UTC, and the commit of the code; `-dirty` where it was changed.
        environment: Of the recording: device, kernel and libraries that made it.
        revision: Of the model, where the case names one.
        verdict, sentence: Of a comparison with the one that it replaces; empty for the first.
    """

    action: Literal["promote", "rollback"]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int
    replaces: str | None = None
    reason: str
    who: str
    when: str
    commit: str | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    revision: str | None = None
    verdict: str = ""
    sentence: str = ""


class Entry(Record):
    """Hashes (SHA-256) of one reference. `pending` is set only while its file is replaced.

    Attributes:
        sha256: Of the file that is judged by.
        pending: Of the file that is about to take its place.
        draft: Of the content that may be promoted next, where another one is promoted.
        history: Events, the last one last; none where nothing was promoted.
    """

    sha256: str | None = None
    pending: str | None = None
    draft: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    history: tuple[Event, ...] = ()

    @property
    def promoted(self) -> str | None:
        """The content that is promoted."""
        return self.history[-1].sha256 if self.history else None

    @property
    def named(self) -> set[str]:
        """Every content that this names."""
        events = {sha for e in self.history for sha in (e.sha256, e.replaces)}
        return {sha for sha in (self.sha256, self.pending, self.draft, *events) if sha}


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
    return read(
        path,
        "the lock file is damaged",
        lambda data: _lock_of(parse_json(data, unique=True), path),
        likely="a merge conflict or an edit by hand",
        hint=f"git checkout {path}",
    )


def _lock_of(content: Any, path: Path) -> Lock:
    version = content.get("lock_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > LOCK_VERSION:
        raise FileFormatError(
            "the lock file was written by a newer truestep",
            where=str(path),
            measured=f"version {version}; this truestep reads up to {LOCK_VERSION}",
            hint="pip install --upgrade truestep",
        )
    lock = Lock.model_validate(content)
    for name in lock.references:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\0" in name:
            raise ValueError(f"{name[:80]!r} is outside of the folder")
    return lock


def put_entry(root: Path, name: str, entry: Entry) -> None:
    """Replace one entry; the caller holds the folder (`files.alone`)."""
    lock = read_lock(root)
    references = dict(sorted({**lock.references, name: entry}.items()))
    write_text(root / LOCK_FILE, json.dumps(_plain(references), indent=2), "the lock file")


def _plain(references: dict[str, Entry]) -> dict[str, Any]:
    """A lock as JSON, of the oldest version that can say it."""
    told = {}
    for name, entry in references.items():
        told[name] = entry.model_dump(mode="json")
        for key in ("draft", "history"):
            if not told[name][key]:
                del told[name][key]
    later = any("draft" in entry or "history" in entry for entry in told.values())
    return {"lock_version": LOCK_VERSION if later else 1, "references": told}
