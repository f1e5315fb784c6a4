"""The header reader against hostile files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truestep.errors import FileFormatError
from truestep.recording.format import read_plain
from truestep.recording.header import read_header

GOOD: dict[str, Any] = {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def write(path: Path, header: Any, data: bytes = b"\0" * 16, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {**GOOD["x"], **changes}}


def test_a_good_file_reads(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "f", GOOD))
    assert header.tensors["x"].shape == (2, 2)


HOSTILE: list[tuple[Any, bytes, int | None, str]] = [
    (GOOD, b"\0" * 16, 2**63, "header does not fit"),
    (GOOD, b"\0" * 16, 10**6, "header does not fit"),
    (GOOD, b"\0" * 15, None, "the file is truncated"),
    (GOOD, b"\0" * 17, None, "followed by bytes that belong to no tensor"),
    ([], b"", None, "the header is not a table"),
    (b"{", b"", None, "not valid JSON"),
    (b"\xff\xfe{}", b"", None, "not valid JSON"),
    (b"[" * 200_000, b"", None, "not valid JSON"),
    (b'{"x": NaN}', b"", None, "not valid JSON"),
    (
        b'{"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b"\0" * 4,
        None,
        "a name appears twice",
    ),
    (entry(dtype="F33"), b"\0" * 16, None, "unknown dtype"),
    (entry(dtype=["F32"]), b"\0" * 16, None, "unknown dtype"),
    (entry(shape=[-2, -2]), b"\0" * 16, None, "impossible shape"),
    (entry(shape=[True, 4]), b"\0" * 16, None, "impossible shape"),
    (entry(shape=[2.0, 2]), b"\0" * 16, None, "impossible shape"),
    (entry(shape=[2**40, 2**40]), b"\0" * 16, None, "impossible shape"),
    (entry(shape=[0, 2**62]), b"\0" * 16, None, "impossible shape"),
    (entry(shape=[1] * 100), b"\0" * 16, None, "impossible shape"),
    (entry(shape="22"), b"\0" * 16, None, "impossible shape"),
    (entry(shape=[3, 2]), b"\0" * 16, None, "do not match its shape"),
    (entry(data_offsets=[16, 0]), b"\0" * 16, None, "do not match its shape"),
    (entry(data_offsets=[-16, 0]), b"\0" * 16, None, "impossible offsets"),
    (entry(data_offsets=[4, 20]), b"\0" * 20, None, "leaves a hole before it"),
    (entry(extra=1), b"\0" * 16, None, "is not dtype, shape and data_offsets"),
    ({"x": 3}, b"", None, "is not dtype, shape and data_offsets"),
    ({"": GOOD["x"]}, b"\0" * 16, None, "empty, too long or has control"),
    ({"a\nb": GOOD["x"]}, b"\0" * 16, None, "empty, too long or has control"),
    ({"a" * 2000: GOOD["x"]}, b"\0" * 16, None, "empty, too long or has control"),
    ({**GOOD, "y": GOOD["x"]}, b"\0" * 16, None, "overlaps another"),
    ({**GOOD, "__metadata__": {"a": 1}}, b"\0" * 16, None, "not a table of strings"),
    ({**GOOD, "__metadata__": []}, b"\0" * 16, None, "not a table of strings"),
]


@pytest.mark.parametrize(("header", "data", "length", "message"), HOSTILE)
def test_hostile_headers(
    header: Any, data: bytes, length: int | None, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "f.safetensors", header, data, length=length)
    with pytest.raises(FileFormatError) as caught:
        read_header(path)
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert "hint:" in text
    assert len(text.splitlines()) <= 25


@pytest.mark.parametrize("honest", [True, False])
def test_only_a_recording_is_to_be_recorded_again(honest: bool, tmp_path: Path) -> None:
    metadata = {"__metadata__": {"truestep": "{}"}} if honest else {}
    path = write(tmp_path / "f.safetensors", {**metadata, **GOOD}, b"")
    with pytest.raises(FileFormatError, match="the file is truncated") as caught:
        read_header(path)
    assert ("truestep record CASE --update" in caught.value.hint) is honest
    assert ("copy or download the file again" in caught.value.hint) is not honest


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"PK\3\4" + bytes(40), "a zip archive"),
        (b"\x93NUMPY\1\0" + bytes(40), "a numpy array (.npy)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG picture"),
        (b"\x08\x07\x12\x07pytorch" + bytes(40), "an ONNX model"),
        (b"GGUF" + bytes(40), "a GGUF model (llama.cpp)"),
    ],
)
def test_what_is_something_else_is_not_called_truncated(
    data: bytes, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="this is not a safetensors file") as caught:
        read_header(path)
    assert f"it is {kind}, " in caught.value.measured
    assert "truncated" not in str(caught.value)
    assert caught.value.hint == f"truestep show {path}  # says what it holds"


def test_absent_empty_short_and_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"abc")
    for name, message in (
        ("none", "cannot be read"),
        ("empty", "the file is empty"),
        ("short", "the file is too short"),
        (".", "a folder was given"),
    ):
        with pytest.raises(FileFormatError, match=message):
            read_header(tmp_path / name)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_random_bytes_never_surprise(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(data)
    with pytest.raises(FileFormatError):
        read_header(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=5), x),
        max_leaves=8,
    )
)
def test_random_json_never_surprises(tmp_path: Path, header: Any) -> None:
    path = write(tmp_path / "f", header, b"")
    try:
        read_header(path)
    except FileFormatError:
        return
    assert header == {} or header == {"__metadata__": {}} or set(header) <= {"__metadata__"}


def test_unaligned_tensors_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path = write(tmp_path / "f", header, b"\7" + struct.pack("<2f", 1.5, -2.0))
    assert read_plain(path)["b"].tolist() == [1.5, -2.0]
