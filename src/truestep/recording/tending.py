"""What of a store is good, and what of it nothing needs any more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from truestep.errors import FileFormatError
from truestep.files import beside
from truestep.progress import Progress, silent
from truestep.recording import versions
from truestep.recording.placing import WHAT, content_of, entry_of, needed
from truestep.recording.remote.cache import INCOMING, cache_root
from truestep.recording.remote.objects import Remote, get, name_of


@dataclass(frozen=True)
class Fault:
    """What is wrong with a content, and where."""

    name: str
    sha256: str
    what: str


def is_whole(remote: Remote, sha256: str, progress: Progress = silent) -> bool:
    """Whether the store has a content, and it is what it is called."""
    try:
        _read(remote, sha256, progress)
    except FileFormatError:
        return False
    return True


def _read(remote: Remote, sha256: str, progress: Progress) -> None:
    with beside(cache_root() / INCOMING / sha256, WHAT) as temporary:
        get(remote, sha256, temporary, progress)


def verify(
    root: Path, names: Sequence[str], remote: Remote, progress: Progress = silent
) -> tuple[int, list[Fault]]:
    """Read every content that the lock names, here and in the store.

    Returns:
        How many were read, and what is wrong.

    Raises:
        EndpointError: The store does not answer.
    """
    faults, read = [], 0
    for name in names:
        entry, path = entry_of(root, name), root / name
        here = content_of(path)
        if here and here not in entry.named:
            faults.append(Fault(name, here, "the file here is not what the lock file says"))
        for sha256 in sorted(needed(root, name)):
            try:
                _read(remote, sha256, progress)
                read += 1
            except FileFormatError as error:
                faults.append(Fault(name, sha256, error.what))
    return read, faults


@dataclass(frozen=True)
class Needless:
    """An object that nothing needs, and whether it was removed."""

    sha256: str
    size: int
    age_s: float | None
    removed: bool = False


def prune(
    root: Path, remote: Remote, *, older_s: float, remove: bool
) -> tuple[list[Needless], int]:
    """Objects that no lock file of any commit names, and that are older than so many seconds.

    Args:
        root: The folder of references.
        remote: The store.
        older_s: Younger ones stay: they may have been pushed for a commit that is not here yet.
        remove: Remove them; else they are only told.

    Returns:
        They, and how many objects stay.

    Raises:
        UsageError: It is not known what other commits need.
        EndpointError: The store does not answer.
    """
    named = versions.named_in_folders([root])
    if versions.in_git(root):
        named |= versions.named_in_git(root)
    needless, kept = [], 0
    for stored in list(remote.listed()):
        age_s = None if stored.modified is None else time.time() - stored.modified
        if stored.sha256 in named or age_s is None or age_s < older_s:
            kept += 1
            continue
        removed = remove and remote.remove(name_of(stored.sha256), older_s)
        needless.append(Needless(stored.sha256, stored.size, age_s, removed))
    return needless, kept
