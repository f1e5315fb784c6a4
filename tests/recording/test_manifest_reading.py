"""The manifest of a recording against hostile files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.errors import FileFormatError
from truestep.recording.format import Recording
from truestep.recording.header import manifest_digest
from truestep.recording.manifest import Manifest
from truestep.recording.manifest_reading import read_manifest
from truestep.recording.table import tensor_table


def write(path: Path, header: Any, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


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


def test_reading_a_header_imports_no_torch(saved: Path) -> None:
    code = (
        "import sys\nfrom truestep.recording.manifest_reading import read_manifest\n"
        f"read_manifest({str(saved)!r})\nassert 'torch' not in sys.modules\n"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
