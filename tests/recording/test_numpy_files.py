"""Hostile .npy and .npz files: errors of ours, and no memory that the file does not hold."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from truestep.errors import FileFormatError
from truestep.recording.numpy_files import read_npy, read_npz


def npy(text: bytes, *, version: int = 1, length: int | None = None) -> bytes:
    size = len(text) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", size)
        + text
    )


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }\n"

BAD = {
    "cut in the magic": b"\x93NUM",
    "cut in the header": npy(HEADER % b"3")[:30],
    "a header of 4 GB": npy(HEADER % b"3", version=2, length=2**32 - 1),
    "open brackets": npy(b"(" * 5000),
    "a nest": npy(b"[" * 2000 + b"]" * 2000),
    "more than there is": npy(HEADER % b"1000000000000") + bytes(12),
    "less than nothing": npy(HEADER % b"-3") + bytes(12),
    "no elements of absurd shape": npy(HEADER % b"0, 100000000000000000000000"),
    "no dtype": npy((HEADER % b"3").replace(b"<f4", b"<q9")),
    "an unknown version": npy(HEADER % b"3", version=9),
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(40),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(name: str, tmp_path: Path) -> None:
    path = tmp_path / "f.npy"
    path.write_bytes(BAD[name])
    tracemalloc.start()
    with pytest.raises(FileFormatError) as caught:
        read_npy(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6
    assert str(path) in str(caught.value)
    assert ("it is a PNG picture" in caught.value.measured) is (name == "a PNG")


def archive(method: int = 0, content: bytes | None = None) -> bytes:
    buffer, array = io.BytesIO(), io.BytesIO()
    np.save(array, np.arange(500.0))
    with zipfile.ZipFile(buffer, "w", method) as target:
        target.writestr("x.npy", array.getvalue() if content is None else content)
    return buffer.getvalue()


def changed(offset: int, form: str, value: int) -> bytes:
    """An archive with a field of both of its entry's headers changed; `offset` of the central's."""
    data = bytearray(archive(8))
    central = data.find(b"PK\1\2")
    struct.pack_into(form, data, central + offset, value)
    struct.pack_into(form, data, offset - 2, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: archive(14), "compressed in a way that the .npz format does not have"),
        (lambda: archive(12), "method 12; stored and deflated are read"),
        (lambda: changed(8, "<H", 1), "entry 'x.npy' is encrypted"),
        (lambda: changed(24, "<I", 2**31), "compressed implausibly well"),
        (lambda: changed(20, "<I", 2**31), "compressed implausibly well"),
        (lambda: archive(8)[:-30], "cannot be read"),
        (lambda: archive(content=b"hello"), "cannot be read"),
        (lambda: archive(content=npy(HEADER % b"1000000000")), "is truncated"),
    ],
)
def test_bad_archives(data: Callable[[], bytes], said: str, tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    path.write_bytes(data())
    tracemalloc.start()
    with pytest.raises(FileFormatError) as caught:
        read_npz(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert said in str(caught.value)
    assert peak < 5e6


def test_good_ones(tmp_path: Path) -> None:
    arrays = {"a": np.arange(3, dtype=">i2"), "b": np.zeros((2, 0)), "c": np.eye(3, order="F")}
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "f.npz", **arrays)
        found = read_npz(tmp_path / "f.npz")
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    np.save(tmp_path / "f.npy", np.zeros(10**6))  # shrinks well, and is no bomb
    np.savez_compressed(tmp_path / "z.npz", z=np.zeros(10**6))
    assert read_npy(tmp_path / "f.npy").shape == read_npz(tmp_path / "z.npz")["z"].shape == (10**6,)
