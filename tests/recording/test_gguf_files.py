"""GGUF files as their own library writes them, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from truestep.cli.contents import contents_of
from truestep.errors import FileFormatError
from truestep.recording.gguf_files import read_gguf
from truestep.recording.readers import load

KINDS = gguf.GGMLQuantizationType


def write(path: Path, tensors: dict[str, tuple[np.ndarray, KINDS | None]], **said: object) -> Path:
    """A file of tensors, each with the type of its blocks or none."""
    writer = gguf.GGUFWriter(path, "flux")
    for key, value in said.items():
        writer.add_array(key.replace("__", "."), value)
    for name, (values, kind) in tensors.items():
        packed = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6, 64)).astype("f4")


def test_what_the_library_wrote_is_read(values: np.ndarray, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.gguf",
        {
            "plain": (values, None),
            "half": (values.astype("f2"), None),
            "brain": (values, KINDS.BF16),
            "eight": (values, KINDS.Q8_0),
            "long": (values[:, :1].astype("i8"), None),
        },
        tokens=["a", "b", "\u732b"],
    )
    found = read_gguf(path)
    assert list(found) == ["plain", "half", "brain", "eight", "long"]
    assert found.architecture == "flux"
    numbers = torch.from_numpy(values)
    assert torch.equal(found["plain"], numbers)
    assert torch.equal(found["half"], numbers.half())
    assert torch.equal(found["brain"], numbers.bfloat16())
    assert torch.equal(found["long"], numbers[:, :1].long())
    packed = gguf.quants.quantize(values, KINDS.Q8_0)
    assert np.array_equal(found["eight"].numpy(), gguf.quants.dequantize(packed, KINDS.Q8_0))
    assert found["eight"].shape == (6, 64)
    found.release("plain")
    assert torch.equal(found["plain"], numbers)
    assert set(load(path, label="a").tensors) == set(found)


def test_a_shape_that_was_changed_for_the_format_is_the_one_before(
    values: np.ndarray, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "a.gguf", {"x": (values, None)}, comfy__gguf__orig_shape__x=[2, 3, 8, 8]
    )
    assert read_gguf(path)["x"].shape == (2, 3, 8, 8)


def test_show_lists_the_types(values: np.ndarray, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"x": (values, None), "y": (values, KINDS.Q5_1)})
    found = contents_of(path)
    assert found.kind == "a GGUF model (llama.cpp)"
    assert found.rows == (("x", "float32", (6, 64)), ("y", "Q5_1", (6, 64)))
    assert found.lines == ("architecture: flux",)


def head(tensors: int, values: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def entry(name: bytes, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + axes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file cannot be read"),
        (b"GGUF", "it ends within its head, after 4 bytes"),
        (head(0, 0, version=1), "GGUF files of version 1 are not read"),
        (head(2**40, 0), "1,099,511,627,776 tensors and 0 values cannot be in it"),
        (head(1, 0, struct.pack("<Q", 2**40) + b"x" * 40), "a name of 1,099,511,627,776 bytes"),
        (head(1, 0, entry(b"\xff\xfe", (4,), 0)), "a name that is not UTF-8"),
        (head(1, 0, entry(b"x", (2**40, 2**40), 0)), "tensor 'x' has too many elements"),
        (head(1, 0, entry(b"x", (4,), 99)), "tensor 'x' is of type 99"),
        (head(1, 0, entry(b"x", (33,), 8)), "rows of 'x' are no whole blocks of Q8_0"),
        (head(1, 0, entry(b"x", (4,), 0)), "tensor 'x' goes beyond its end"),
        (head(2, 0, entry(b"x", (0,), 0) * 2 + b"\0" * 32), "two tensors are called 'x'"),
        (head(1, 0, entry(b"x", (), 0)), "tensor 'x' has 0 axes"),
        (head(0, 1, struct.pack("<Q", 1) + b"k" + struct.pack("<I", 77)), "a value of type 77"),
        (
            head(0, 1, struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**60)),
            "goes beyond its end",
        ),
        (
            head(0, 1, struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 9),
            "a list of 1 values of type 9",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_named(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(FileFormatError) as caught:
        read_gguf(path)
    assert words in str(caught.value)


def test_blocks_of_other_kinds_are_named_when_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(head(1, 0, entry(b"x", (256,), 20)) + b"\0" * 200)
    found = read_gguf(path)
    assert contents_of(path).rows == (("x", "IQ4_NL", (256,)),)
    with pytest.raises(FileFormatError, match="tensor 'x' is in blocks that are not read"):
        found["x"]
