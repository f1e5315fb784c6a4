"""The header reader against hostile files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from truestep.errors import FileFormatError
from truestep.recording.format import Recording, read_plain
from truestep.recording.header import manifest_digest, read_header
from truestep.recording.manifest import Manifest
from truestep.recording.manifest_reading import read_manifest
from truestep.recording.table import tensor_table

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


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = {"x": torch.ones(4), "y": torch.zeros(2, dtype=torch.bfloat16)}
    manifest = Manifest(
        tool_version="0", created="now", level="full", tensors=tensor_table(tensors)
    )
    path = tmp_path / "r.safetensors"
    Recording.in_memory(tensors, manifest).save(path)
    return path


def nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def one_run(pair: str) -> dict[str, Any]:
    return {"runs": [{"kind": "repeat", "detail": "", "pair": pair, "tensors": []}]}


def rewritten(path: Path, change: Any, *, honest: bool = True) -> Path:
    """The file with its manifest changed, its digest recomputed if honest."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["truestep"])
    change(manifest)
    text = json.dumps(manifest)
    header["__metadata__"]["truestep"] = text
    if honest:
        header["__metadata__"]["truestep_digest"] = manifest_digest(text)
    return write(path, header, data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=4), "written by a newer truestep"),
        (lambda m: m.update(format_version="1"), "format version is not a number"),
        (lambda m: m.pop("format_version"), "manifest is not valid"),
        (lambda m: m.update(level="half"), "manifest is not valid"),
        (lambda m: m.update(case_id="\ud800"), "manifest is not valid"),
        (lambda m: m.update(settings={"\udfff": 1}), "manifest is not valid"),
        (lambda m: m["tensors"][0].update(branch="\ud800"), "manifest is not valid"),
        (lambda m: m.update(settings={"x": 10**400}), "manifest is not valid"),
        (lambda m: m.update(settings={"x": nest(200)}), "manifest is not valid"),
        (lambda m: m.update(noise_floor=one_run("float32")), "manifest is not valid"),
        (lambda m: m.update(surprise=1), "manifest is not valid"),
        (lambda m: m["tensors"].pop(), "manifest and header disagree"),
        (lambda m: m["tensors"].append(m["tensors"][0]), "lists a tensor twice"),
        (lambda m: m["tensors"][0].update(dtype="float16"), "manifest and header disagree"),
        (lambda m: m["tensors"][0].update(shape=[2, 2]), "manifest and header disagree"),
        (lambda m: m["tensors"][0].update(name="z"), "manifest and header disagree"),
    ],
)
def test_manifests_that_do_not_fit(change: Any, message: str, saved: Path) -> None:
    with pytest.raises(FileFormatError, match=message):
        read_manifest(rewritten(saved, change))


@pytest.fixture
def sketched(tmp_path: Path) -> Path:
    tensors = {"x": torch.ones(4), "y": torch.zeros(2, dtype=torch.bfloat16)}
    manifest = Manifest(
        tool_version="0", created="now", level="sketch", tensors=tensor_table(tensors)
    )
    path = tmp_path / "s.safetensors"
    Recording.in_memory(tensors, manifest).save(path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(level="full"), "manifest and header disagree"),
        (lambda m: m.update(level="stats"), "manifest and header disagree"),
        (lambda m: m["tensors"].pop(), "manifest and header disagree"),
        (lambda m: m["tensors"].append(m["tensors"][0]), "lists a tensor twice"),
        (lambda m: m["tensors"][0].update(name="z"), "manifest and header disagree"),
        (lambda m: m["tensors"][0].update(dtype="complex64"), "unknown dtype"),
        (lambda m: m["tensors"][0].update(dtype="nn"), "unknown dtype"),
        (lambda m: m["tensors"][0].update(shape=[-4]), "impossible shape"),
        (lambda m: m["tensors"][0].update(shape=[2**58]), "impossible shape"),
        (lambda m: m["tensors"][0].update(shape=[0, 2**40, 2**40]), "impossible shape"),
        (lambda m: m["tensors"][0].update(shape=[1] * 65), "impossible shape"),
        (lambda m: m["tensors"][0].update(shape=[10**400]), "impossible shape"),
    ],
)
def test_manifests_that_do_not_fit_sketches(change: Any, message: str, sketched: Path) -> None:
    assert read_manifest(sketched) is not None
    with pytest.raises(FileFormatError, match=message):
        read_manifest(rewritten(sketched, change))


def test_a_sketch_without_a_digest_is_damaged(sketched: Path) -> None:
    opened = Recording.open(rewritten(sketched, lambda m: m["tensors"][0].pop("sketch_digest")))
    opened["stats/x"]
    with pytest.raises(FileFormatError, match="tensor 'sketch/x' is damaged"):
        opened["sketch/x"]


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [("sketch/x", "F32", [512, 2]), ("sketch/x", "I32", [1024]), ("stats/x", "F64", [2, 4])],
)
def test_sketches_and_moments_have_one_shape(
    name: str, dtype: str, shape: list[int], sketched: Path
) -> None:
    data = sketched.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[name].update(dtype=dtype, shape=shape)
    with pytest.raises(FileFormatError, match=f"manifest and header disagree on tensor '{name}'"):
        read_manifest(write(sketched, header, data[8 + length :]))


def test_an_edited_manifest_is_damaged(saved: Path) -> None:
    path = rewritten(saved, lambda m: m.update(tool_version="9"), honest=False)
    with pytest.raises(FileFormatError, match="manifest is damaged"):
        read_manifest(path)


def test_a_newer_format_says_upgrade(saved: Path) -> None:
    with pytest.raises(FileFormatError) as caught:
        read_manifest(rewritten(saved, lambda m: m.update(format_version=7)))
    assert "format 7; this truestep reads up to 3" in str(caught.value)
    assert "pip install --upgrade truestep" in str(caught.value)


def test_truncation_anywhere_is_seen(saved: Path) -> None:
    data = saved.read_bytes()
    for size in [*range(40), *range(40, len(data), 17), len(data) - 1]:
        saved.write_bytes(data[:size])
        with pytest.raises(FileFormatError):
            read_manifest(saved)


def test_unaligned_tensors_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path = write(tmp_path / "f", header, b"\7" + struct.pack("<2f", 1.5, -2.0))
    assert read_plain(path)["b"].tolist() == [1.5, -2.0]


def test_reading_a_header_imports_no_torch(saved: Path) -> None:
    code = (
        "import sys\nfrom truestep.recording.manifest_reading import read_manifest\n"
        f"read_manifest({str(saved)!r})\nassert 'torch' not in sys.modules\n"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
