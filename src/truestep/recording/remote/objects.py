"""Objects of a store: named by the SHA-256 of their content, sent whole, never read unverified.

A store is a `Remote`: a handful of functions, one module a kind of server. An object is written
once, under its own hash; which objects matter, and what for, is known by the lock file alone, so
that nothing in a store is ever changed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from truestep.errors import EndpointError, FileFormatError, TruestepError
from truestep.files import require_room, sha256_of, unwritten
from truestep.progress import Progress, silent
from truestep.recording.remote.address import Address, failed

WHAT = "the object"
BLOCK = 4 << 20
"""Bytes that are read, sent and hashed at a time."""

_NAME = re.compile(r"(?:.*/)?objects/([0-9a-f]{2})/([0-9a-f]{64})")

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has left in the place of another."""


@dataclass(frozen=True)
class Stored:
    """An object as a store lists it; `modified` is in seconds since 1970, if the store says so."""

    sha256: str
    size: int
    modified: float | None = None


@dataclass(frozen=True)
class Remote:
    """A store as functions. A name is relative: `objects/ab/ab12...`.

    Attributes:
        address: Where it is.
        size: Bytes of an object; None where there is none.
        send: Send a file under a name, whole or not at all; `good` is called before it can be seen
            there, and raises where it is not what it is called. Progress counts bytes.
        receive: Write an object to a path, and give the SHA-256 of what came.
        listed: All objects.
        remove: Take one away, if it is as old as that still: younger than so many seconds it stays.
        renew: Make one as young as one that was sent now, where the store can; whoever tidies up
            leaves it alone then.
    """

    address: Address
    size: Callable[[str], int | None]
    send: Callable[[Path, str, Callable[[], None], Progress], None]
    receive: Callable[[str, Path, Progress], str]
    listed: Callable[[], Iterable[Stored]]
    remove: Callable[[str, float], bool]
    renew: Callable[[str], None]


class OtherContentError(FileFormatError):
    """A file is not what it is called, and was not sent."""


def name_of(sha256: str) -> str:
    """Name of an object in a store."""
    return f"objects/{sha256[:2]}/{sha256}"


def sha256_in(name: str) -> str | None:
    """The hash that a name of an object holds; None of any other name."""
    found = _NAME.fullmatch(name)
    return found[2] if found and found[2].startswith(found[1]) else None


def put(remote: Remote, path: Path, sha256: str, progress: Progress = silent) -> bool:
    """Send a file, unless the store has it.

    Args:
        remote: The store.
        path: A local file.
        sha256: Of the content that it should have.
        progress: Told bytes.

    Returns:
        Whether it was sent. One of another size under its name (a half upload of something else)
        is replaced: it is not what it is called.

    Raises:
        OtherContentError: The file's content is another one; nothing was sent under the name.
        EndpointError: The store does not answer, or has not taken it.
        WriteError: A folder could not be written.
    """
    name, size = name_of(sha256), path.stat().st_size
    if remote.size(name) == size:
        remote.renew(name)
        if remote.size(name) == size:  # nobody has taken it away in between
            return False
    with ThreadPoolExecutor(1) as pool:
        known = pool.submit(sha256_of, path)
        remote.send(path, name, lambda: _require(known, path, sha256), progress)
        _require(known, path, sha256)
    after = remote.size(name)
    if after != size:
        raise EndpointError(
            "the store does not have what was sent to it",
            where=f"{remote.address.shown}: {name}",
            measured=f"{after} bytes, {size} were sent",
            hint="truestep references push  # sends what is missing",
        )
    return True


def _require(known: Future[str], path: Path, sha256: str) -> None:
    """Raise where a file is not what it is called."""
    if known.result() != sha256:
        raise OtherContentError(
            "the file is not what the lock file says, and was not sent",
            where=str(path),
            measured=f"SHA-256 {known.result()[:12]}, the lock file says {sha256[:12]}",
            likely="it was changed after it was recorded",
            hint="truestep references status",
        )


def get(remote: Remote, sha256: str, temporary: Path, progress: Progress = silent) -> None:
    """Write an object to a temporary path; nothing else is there afterwards.

    Raises:
        FileFormatError: The store does not have it, or it is not what it is called.
        EndpointError: The store does not answer.
        WriteError: The disk is full.
    """
    name = name_of(sha256)
    where = f"{remote.address.shown}: {name}"
    size = remote.size(name)
    if size is None:
        raise FileFormatError(
            "the store does not have the object",
            where=where,
            likely="whoever made it has not pushed it",
            hint="truestep references push  # where it was made",
        )
    require_room(temporary, WHAT, size)
    found = remote.receive(name, temporary, progress)
    if found != sha256:
        received = temporary.stat().st_size
        temporary.unlink(missing_ok=True)
        raise FileFormatError(
            "the object in the store is not what it is called, and was not used",
            where=where,
            measured=f"SHA-256 {found[:12]} of {received} bytes, {sha256[:12]} is asked for",
            likely="it was tampered with, or damaged on its way",
            hint="truestep references verify  # reads all of them",
        )


class Hashing:
    """Hash blocks beside the thread that writes them."""

    def __init__(self) -> None:
        self._value = hashlib.sha256()
        self._blocks: queue.Queue[bytes | None] = queue.Queue(4)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (block := self._blocks.get()) is not None:
            self._value.update(block)

    def add(self, block: bytes) -> None:
        """Hash one more."""
        self._blocks.put(block)

    def end(self) -> str:
        """SHA-256 of all."""
        self._blocks.put(None)
        self._thread.join()
        return self._value.hexdigest()


def blocks(file: BinaryIO, total: int, progress: Progress, what: str) -> Iterator[bytes]:
    """A file block by block."""
    done = 0
    while block := file.read(BLOCK):
        done += len(block)
        yield block
        progress(what, done, total)


def write_all(file: BinaryIO, block: bytes) -> None:
    """Write all of a block to an unbuffered file, which may take a part of it where a disk is full.

    Raises:
        OSError: It could not be written.
    """
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]


def write_hashed(source: Iterable[bytes], path: Path) -> str:
    """Write blocks to a path, and give their SHA-256.

    Raises:
        WriteError: The file could not be written; what the source raises passes.
    """
    hashing = Hashing()
    try:
        with _created(path) as file:
            for block in source:
                try:
                    write_all(file, block)
                except OSError as error:
                    raise unwritten(path, WHAT, error) from error
                hashing.add(block)
    finally:
        digest = hashing.end()
    return digest


def _created(path: Path) -> BinaryIO:
    try:
        return path.open("wb", buffering=0)
    except OSError as error:
        raise unwritten(path, WHAT, error) from error


def pointed_at(path: Path) -> str | None:
    """The SHA-256 of the file that Git LFS has left a pointer for; None of any other file."""
    with suppress(OSError):
        if path.stat().st_size > 1024:
            return None
        text = path.read_bytes()
        found = re.search(rb"^oid sha256:([0-9a-f]{64})$", text, re.MULTILINE)
        if text.startswith(POINTER) and found:
            return found[1].decode()
    return None


def require_content(path: Path) -> None:
    """Raise where Git LFS has left a pointer in the place of a file.

    Raises:
        FileFormatError: It has.
    """
    if pointed_at(path) is None:
        return
    from truestep.text import quoted

    folder, name = quoted(os.fspath(path.parent)), quoted(path.name)
    raise FileFormatError(
        "the file is a Git LFS pointer: its content is not here",
        where=str(path),
        likely="the repository was cloned without Git LFS, or with GIT_LFS_SKIP_SMUDGE",
        hint=f"git -C {folder} lfs pull --include {name}",
    )


@contextmanager
def telling(
    place: Address,
    name: str,
    path: Path | None,
    *,
    passed: tuple[type[Exception], ...] = (TruestepError,),
) -> Iterator[None]:
    """Make what a library of theirs raises an error of ours.

    Args:
        path: What is written to.
        passed: What is raised as it is.
    """
    try:
        yield
    except passed:
        raise
    except Exception as error:  # whatever a library of theirs raises
        if path is not None and of_disk(error):
            raise unwritten(path, WHAT, error) from error
        raise failed(place, name, error) from None


def of_disk(error: Exception) -> bool:
    """Whether the local disk is what failed: only it gives these numbers."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return isinstance(error, OSError) and error.errno in full
