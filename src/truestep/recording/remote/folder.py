"""A store in a folder: of this machine, of a file server, or of a repository with Git LFS."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from truestep.errors import EndpointError
from truestep.files import alone, beside, settle
from truestep.progress import Progress
from truestep.recording.remote.address import Address
from truestep.recording.remote.objects import (
    WHAT,
    Remote,
    Stored,
    blocks,
    require_content,
    sha256_in,
    write_all,
    write_hashed,
)

INCOMING = "incoming"
"""Where what is being written stands; whoever writes next sweeps what was left of killed ones."""


def folder_store(place: Address) -> Remote:
    """The store of a folder, which is made when something is first sent to it."""
    root = place.folder
    if root is None:
        raise ValueError(f"{place.shown} is no folder")
    return Remote(
        address=place,
        size=lambda name: _size(root, name),
        send=lambda path, name, good, note: _send(root, path, name, good, note),
        receive=lambda name, path, note: _receive(root, name, path, note),
        listed=lambda: _listed(root),
        remove=lambda name, age_s: _remove(root, name, age_s),
        renew=lambda name: _renew(root, name),
    )


def _size(root: Path, name: str) -> int | None:
    _there(root)
    try:
        path = root / name
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(root / name, error) from error
    require_content(path)
    return size


def _there(root: Path) -> None:
    """Refuse a folder whose disk is not there: an object would seem to be missing.

    A folder that is not there yet is made by the first push; one above it must be there.
    """
    if not root.exists() and not root.parent.exists():
        raise EndpointError(
            "the store's folder is not there",
            where=str(root),
            likely="its disk is not mounted, or the address is wrong",
            hint=_FOLDER,
        )


_FOLDER = "give --store, TRUESTEP_STORE or [references] store a folder that is there"


def _send(root: Path, path: Path, name: str, good: Callable[[], None], progress: Progress) -> None:
    target = root / name
    with beside(root / INCOMING / target.name, WHAT) as temporary:
        with path.open("rb") as source, temporary.open("wb", buffering=0) as file:
            total = os.fstat(source.fileno()).st_size
            for block in blocks(source, total, progress, "sent"):
                write_all(file, block)
        good()
        temporary.chmod(temporary.parent.stat().st_mode & 0o444)
        target.parent.mkdir(parents=True, exist_ok=True)
        settle(temporary, target)


def _receive(root: Path, name: str, path: Path, progress: Progress) -> str:
    try:
        with (root / name).open("rb", buffering=0) as source:
            total = os.fstat(source.fileno()).st_size
            return write_hashed(blocks(source, total, progress, "received"), path)
    except OSError as error:
        raise _unreadable(root / name, error) from error


def _listed(root: Path) -> Iterator[Stored]:
    for path in sorted(root.glob("objects/*/*")):
        sha256 = sha256_in(path.relative_to(root).as_posix())
        if sha256 is None:
            continue
        with suppress(FileNotFoundError):  # another process has taken it away
            status = path.stat()
            yield Stored(sha256, status.st_size, status.st_mtime)


def _renew(root: Path, name: str) -> None:
    with alone(root, WHAT), suppress(FileNotFoundError):
        try:
            os.utime(root / name)
        except PermissionError:  # of another user: it is as old as it is
            return


def _remove(root: Path, name: str, age_s: float) -> bool:
    path = root / name
    with alone(root, WHAT):  # against those who renew it at this moment
        try:
            if time.time() - path.stat().st_mtime < age_s:
                return False
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _unreadable(path, error) from error
    return True


def _unreadable(path: Path, error: OSError) -> EndpointError:
    return EndpointError(
        "the store's folder does not answer",
        where=str(path),
        measured=(error.strerror or str(error))[:200],
        likely="its disk is gone, or may not be read",
        hint=_FOLDER,
    )
