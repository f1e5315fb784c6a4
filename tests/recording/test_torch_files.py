"""Hostile .pt files: nothing runs, nothing is allocated that is not there."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from truestep.errors import FileFormatError
from truestep.recording.torch_files import read_pt, tensors_in

X = torch.arange(12.0)


def with_pickle(path: Path, data: bytes) -> None:
    """A .pt file whose pickle is this."""
    torch.save({"x": X}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


def call(module: str, name: str, *arguments: int) -> bytes:
    """A pickle that calls something with numbers."""
    numbers = b"".join(b"J" + struct.pack("<i", number) for number in arguments)
    return b"\x80\x02" + f"c{module}\n{name}\n(".encode() + numbers + b"tR."


HUGE = 2**30


@pytest.mark.parametrize(
    "data",
    [
        call("torch", "FloatTensor", HUGE),
        call("torch", "Tensor", HUGE),
        call("__builtin__", "bytearray", HUGE),
        call("torch.nn.parameter", "Parameter", HUGE),
        call("torch.storage", "UntypedStorage", HUGE),
        # The class is put away by one that only names it, and taken out again.
        b"\x80\x02ctorch.storage\nUntypedStorage\nq\x01X\x01\0\0\0ah\x01(J\0\0\0\x40tR.",
        call("os", "system", 1),
        call("builtins", "eval", 1),
    ],
)
def test_what_a_file_may_call_allocates_nothing(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    with_pickle(path, data)
    with pytest.raises(FileFormatError, match="needs code to be unpickled"):
        read_pt(path)


def old(path: Path, change: Callable[[bytes], bytes]) -> None:
    """A file of before torch 1.6, changed."""
    buffer = io.BytesIO()
    torch.save({"x": X}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(change(buffer.getvalue()))


def test_old_files_are_read(tmp_path: Path) -> None:
    old(tmp_path / "f.pt", bytes)
    assert torch.equal(read_pt(tmp_path / "f.pt")["x"], X)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (b"K\x0cNt", b"J\0\0\0\x40Nt", "is larger than the file"),  # the storage
        (b"K\x00K\x0c\x85", b"K\x00J\0\0\0\x40\x85", "wrong byte size"),  # the shape
        (b"K\x0cNt", b"NNt", "is larger than the file"),  # a storage of no size
    ],
)
def test_old_files_that_claim_more_than_they_hold(
    before: bytes, after: bytes, said: str, tmp_path: Path
) -> None:
    def change(data: bytes) -> bytes:
        assert before in data
        return data.replace(before, after)

    old(tmp_path / "f.pt", change)
    with pytest.raises(FileFormatError, match=said):
        read_pt(tmp_path / "f.pt")


def test_an_expanded_tensor_is_read_while_it_is_small(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"x": torch.ones(1).expand(1000)}, path)
    assert read_pt(path)["x"].shape == (1000,)
    torch.save({"x": torch.ones(1).expand(10**12)}, path)
    with pytest.raises(FileFormatError, match="claims far more elements than the file") as caught:
        read_pt(path)
    assert caught.value.likely == "an expanded tensor"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "a quantized ten"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    ],
)
def test_tensors_that_are_none(
    tensor: Callable[[], torch.Tensor], said: str, tmp_path: Path
) -> None:
    torch.save({"x": tensor()}, tmp_path / "f.pt")
    with pytest.raises(FileFormatError, match=said):
        read_pt(tmp_path / "f.pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.uint16])
def test_plain_tensors_of_any_dtype_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    content = {"a": torch.ones(3).to(dtype), "p": torch.nn.Parameter(torch.ones(2)), "n": 1}
    torch.save(content, tmp_path / "f.pt")
    named = dict(tensors_in(read_pt(tmp_path / "f.pt")))
    assert named["a"].dtype is dtype
    assert named.keys() == {"a", "p"}


def test_a_bare_pickle_is_named(tmp_path: Path) -> None:
    (tmp_path / "f.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FileFormatError, match=r"the \.pt file cannot be read"):
        read_pt(tmp_path / "f.pt")
