"""Objects kept on this machine: `~/.cache/truestep`, or TRUESTEP_CACHE.

What is in the cache can always be had again: it is not synced to the disk, and what is damaged in
it is removed.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from truestep.files import beside, sha256_of, sweep
from truestep.progress import Progress, silent
from truestep.recording.remote.objects import Remote, get, name_of

VARIABLE = "TRUESTEP_CACHE"
WHAT = "the cached object"

INCOMING = "incoming"
"""Where what comes stands until it is whole."""


def cache_root() -> Path:
    """The folder of the cache."""
    said = os.environ.get(VARIABLE)
    if said:
        return Path(said).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "truestep"


def cached(sha256: str) -> Path | None:
    """An object of the cache, read through; one that is damaged is removed."""
    path = cache_root() / name_of(sha256)
    try:
        if sha256_of(path) == sha256:
            return path
    except FileNotFoundError:
        return None
    path.unlink(missing_ok=True)
    return None


def fetched(remote: Remote, sha256: str, progress: Progress = silent) -> Path:
    """An object, from the cache or the store; verified while it comes.

    Raises:
        FileFormatError: The store does not have it, or it is not what it is called.
        EndpointError: The store does not answer.
        WriteError: The disk is full.
    """
    known = cached(sha256)
    if known is not None:
        with suppress(OSError):
            sweep(cache_root() / INCOMING)  # what a writer left that was killed once it had it
        return known
    path = cache_root() / name_of(sha256)
    with beside(cache_root() / INCOMING / sha256, WHAT) as temporary:
        get(remote, sha256, temporary, progress)
        temporary.chmod(temporary.parent.stat().st_mode & 0o444)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
    return path


def lay(source: Path, path: Path, what: str) -> None:
    """Put a file in another place, too: linked where that can be, else copied; whole or not at all.

    Raises:
        WriteError: It could not be written.
    """
    with beside(path, what) as temporary:
        link(source, temporary)
        os.replace(temporary, path)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be.

    Raises:
        OSError: It could not be done.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        with suppress(FileNotFoundError):
            target.unlink()
        shutil.copyfile(source, target)
