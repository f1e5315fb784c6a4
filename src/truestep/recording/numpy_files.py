"""Read .npy and .npz files as if they were hostile: nothing is allocated that is not there."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from truestep.errors import FileFormatError
from truestep.magic import ARCHIVE, NUMPY, what_is
from truestep.reading import reason

Array = np.ndarray[Any, Any]

DEFLATE_RATIO, SMALL = 1000, 1_000_000
"""A constant array shrinks nearly as much as deflate can, 1,032; what is small may be anything."""

_ENCRYPTED = 0x1 | 0x40 | 0x2000


class Clamped(io.BufferedReader):
    """A file whose reads take no more memory than the rest of it."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file."""
        left = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def clamped(path: Path) -> Clamped:
    """Open a file for reading."""
    return Clamped(io.FileIO(path))


def read_npy(path: Path) -> Array:
    """The array of a .npy file.

    Raises:
        FileFormatError: It cannot be read, claims more than it holds, or holds Python objects.
    """
    try:
        with clamped(path) as file:
            return _array(path, file, path.stat().st_size)
    except FileFormatError:
        raise
    except Exception as error:  # numpy's header parser raises almost anything
        refuse_as(path, "the .npy file cannot be read", error, own=(NUMPY,))


def read_npz(path: Path) -> dict[str, Array]:
    """The arrays of a .npz file by name.

    Raises:
        FileFormatError: It cannot be read, claims more than it holds, or holds Python objects.
    """
    try:
        with clamped(path) as whole, zipfile.ZipFile(whole) as archive:
            entries = archive.infolist()
            check_archive(path, entries, kind=".npz")
            arrays = {}
            for info in entries:
                with archive.open(info) as file:
                    name = info.filename.removesuffix(".npy")
                    arrays[name] = _array(path, file, info.file_size)
            return arrays
    except FileFormatError:
        raise
    except Exception as error:  # a damaged archive raises almost anything
        refuse_as(path, "the .npz file cannot be read", error, own=(ARCHIVE,))


def check_archive(path: Path, entries: list[zipfile.ZipInfo], *, kind: str) -> None:
    """Refuse an archive of a kind that nobody writes, or whose sizes cannot be true.

    Raises:
        FileFormatError: Two entries of one name, an unusual method, encryption, or sizes that the
            archive has no room for.
    """
    twice = next((n for n, count in Counter(i.filename for i in entries).items() if count > 1), "")
    if twice:
        _refuse(path, f"the {kind} file holds entry {twice!r} twice")
    room = path.stat().st_size
    for info in entries:
        shown = repr(info.filename[:80])
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            _refuse(
                path,
                f"entry {shown} is compressed in a way that the {kind} format does not have",
                measured=f"method {info.compress_type}; stored and deflated are read",
            )
        if info.flag_bits & _ENCRYPTED:
            _refuse(path, f"entry {shown} is encrypted")
        room -= info.compress_size
        if room < 0 or info.file_size > DEFLATE_RATIO * info.compress_size + SMALL:
            _refuse(
                path,
                f"entry {shown} is compressed implausibly well",
                measured=f"{info.compress_size:,} bytes claim to be {info.file_size:,}",
            )


def _array(path: Path, file: BinaryIO | Any, size: int) -> Array:
    """One array, whose header must not claim more than `size` bytes hold."""
    start = file.tell()
    version = np.lib.format.read_magic(file)
    header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = header(file)
    if dtype.hasobject:
        _refuse(
            path,
            "the array holds Python objects",
            measured="loading them could run code",
            hint="save plain numbers: numpy.save(path, array, allow_pickle=False)",
        )
    if min(shape, default=0) < 0 or math.prod(max(n, 1) for n in shape) >= 2**62:
        _refuse(path, "the array has an impossible shape", measured=str(shape)[:80])
    need = math.prod(shape) * dtype.itemsize
    if need > size:
        _refuse(path, "the .npy file is truncated", measured=f"{size:,} bytes, it needs {need:,}")
    file.seek(start)
    array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array


def refuse_as(path: Path, what: str, error: Exception, *, own: tuple[str, ...]) -> NoReturn:
    """Refuse a file for what its parser raised, and say what it is where that is not `own`."""
    kind = what_is(path)
    measured = f"{type(error).__name__}: {reason(error)}"[:200]
    _refuse(
        path, what, measured=f"it is {kind}; {measured}" if kind not in ("", *own) else measured
    )


def _refuse(path: Path, what: str, *, measured: str = "", hint: str = "") -> NoReturn:
    raise FileFormatError(what, where=str(path), measured=measured, hint=hint)
