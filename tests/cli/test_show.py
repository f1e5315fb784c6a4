"""`truestep show`: files, folders and profiles, and what cannot be shown."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.commands import Run, runner
from truestep.controls import NAMES, differences, profiles


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `truestep show`."""
    return runner(monkeypatch, capsys, "show")


def test_no_name_lists_the_profiles_a_line_each(show: Run) -> None:
    code, out, _ = show("profile")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith(f"{len(profiles())} profiles: ")
    for name, line in zip(profiles(), lines[-len(profiles()) :], strict=True):
        assert line.startswith(f"  {name} ")


def test_one_name_prints_every_control_with_value_and_source(show: Run) -> None:
    code, out, _ = show("profile", "diffusers-0.42.1", "-v")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("diffusers-0.42.1: diffusers 0.42.1, LTX2Pipeline")
    for name in NAMES:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name
    flat = " ".join(out.split())
    for cell in profiles()["diffusers-0.42.1"].cells.values():
        assert " ".join(cell.source.split()) in flat
    assert not [line for line in lines if line != line.rstrip() or len(line) > 120]


def test_two_names_print_the_differences_alone(show: Run) -> None:
    first, second = "official@f4b06fb", "official@822ce3c"
    code, out, _ = show("profile", first, second, "-v")
    assert code == 0
    source = "ltx_core/components/guiders.py, MultiModalGuider.calculate: .float() since f4b06fb"
    assert " ".join(out.split()).startswith(
        "official@f4b06fb and official@822ce3c differ in 2 of 26 controls guidance_dtype "
        f"official@f4b06fb: float32 {source} official@822ce3c: model"
    )
    assert "std_scope" not in out
    same = show("profile", first, first)[1]
    assert same == "official@f4b06fb and official@f4b06fb agree in all 26 controls\n"


def test_json_has_the_same(show: Run) -> None:
    every = json.loads(show("profile", "--json")[1])["profiles"]
    assert list(every) == list(profiles())
    one = json.loads(show("profile", "sglang-0.5.23", "--json")[1])["profiles"]
    assert one == {"sglang-0.5.23": every["sglang-0.5.23"]}
    assert one["sglang-0.5.23"]["controls"]["stg_blocks"]["value"] == [28]
    two = json.loads(show("profile", "sglang-0.5.23", "vllm-omni-0.30", "--json")[1])
    assert list(two["differences"]) == list(differences("sglang-0.5.23", "vllm-omni-0.30"))
    assert two["differences"]["std_scope"]["vllm-omni-0.30"]["value"] == "sample"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["profile", "official"], "there is no profile 'official'"),
        (["profile", "sglang-0.5.23", "difusers-0.42.1"], "did you mean 'diffusers-0.42.1'?"),
        (["profile", "a", "b", "c"], "show profile takes two names at most"),
        (["a.safetensors", "b.safetensors"], "show takes one file"),
    ],
)
def test_what_cannot_be_shown_is_said(show: Run, arguments: list[str], said: str) -> None:
    code, out, err = show(*arguments)
    assert (code, out) == (2, "")
    assert said in err


Write = Callable[[Path], object]


def write_bytes(data: bytes) -> Write:
    return lambda path: path.write_bytes(data)


ONE = {"a": torch.ones(2, 3), "b": [torch.zeros((), dtype=torch.int64)]}
FILES: dict[str, tuple[Write, list[str]]] = {
    "x.pt": (lambda path: torch.save(ONE, path), ["2 tensors", "a .pt file", "float32  2x3"]),
    "old.pt": (
        lambda path: torch.save(ONE, path, _use_new_zipfile_serialization=False),
        ["2 tensors", "a .pt file of before torch 1.6", "b.0  int64    scalar"],
    ),
    "x.npy": (lambda path: np.save(path, np.ones(3)), ["1 tensors", "a numpy array", "float64  3"]),
    "x.npz": (lambda path: np.savez(path, k=np.ones(3)), ["numpy arrays (.npz)", "k  float64  3"]),
    "misnamed.safetensors": (lambda path: torch.save(ONE, path), ["a .pt file"]),
    "x.zip": (
        lambda path: zipfile.ZipFile(path, "w").writestr("note.txt", "hello"),
        ["1 entries", "a zip archive", "note.txt", "5 bytes"],
    ),
    "x.png": (write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(9)), ["x.png: a PNG picture, 0.0 MB"]),
    "x.gguf": (write_bytes(b"GGUF\3\0\0\0" + bytes(20)), ["a GGUF model (llama.cpp)"]),
    "x.mp4": (write_bytes(b"\0\0\0\x18ftypmp42" + bytes(9)), ["an MP4 or MOV video"]),
    "x.pkl": (write_bytes(b"\x80\4\x95" + bytes(9)), ["a pickle", "could run code"]),
    "x.txt": (write_bytes(b"hello\n"), ["a text file"]),
    "lfs.safetensors": (
        write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ["a Git LFS pointer: git lfs pull gets it"],
    ),
    "page.safetensors": (write_bytes(b"<!DOCTYPE html><p>404"), ["an HTML page: a download that"]),
    "model.safetensors.index.json": (
        write_bytes(b'{"weight_map": {"w": "1.safetensors", "v": "2.safetensors"}}'),
        ["2 tensors", "in 2 files: 1.safetensors, 2.safetensors", "not there: 1.safetensors"],
    ),
    "config.json": (write_bytes(b'{"_class_name": "Wan"}'), ["the configuration of a Wan"]),
    "list.json": (write_bytes(b"[1, 2]"), ["a JSON file", "a list of 2"]),
}


@pytest.mark.parametrize("name", FILES)
def test_any_file_is_said_to_be_what_it_is(show: Run, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write, said = FILES[name]
    write(path)
    code, out, err = show(str(path))
    assert (code, err) == (0, "")
    out = out.replace("\n  ", " ")
    for text in said:
        assert text in out
    assert "truncated" not in out
    data = json.loads(show(str(path), "--json")[1])
    assert data["kind"] in out


def test_folders_are_shown(show: Run, tmp_path: Path, tiny_wan: dict[str, Path]) -> None:
    model = " ".join(show(str(tiny_wan["wan21"]))[1].split())
    assert "a diffusers model folder: WanPipeline" in model
    assert "transformer" in model
    assert "1 files of weights" in model
    (tmp_path / "truestep.lock").write_text(
        '{"lock_version": 1, "references": {"a/b/c/d.safetensors": {"sha256": "0"}}}', "utf-8"
    )
    references = " ".join(show(str(tmp_path))[1].split())
    assert "a folder of references, 1 references" in references
    assert "a/b/c/d.safetensors" in references
    spool = tmp_path / "t.safetensors.1.spool"
    spool.mkdir()
    (spool / "journal.jsonl").touch()
    assert f"truestep trace recover {spool} makes a trace of it" in show(str(spool), "-v")[1]
    plain = show(str(tmp_path / ".."))[1]
    assert "entries" in plain


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("none.pt", None, "the file cannot be read"),
        ("cut.pt", b"PK\3\4 cut", "the zip archive is damaged"),
        ("cut.safetensors", b"\xff\0\0\0\0\0\0\0{", "the safetensors header does not fit"),
        ("empty", b"", "the file is empty"),
        ("noise", bytes(range(200, 250)), "the safetensors header does not fit"),
        ("x.json", b"{1", "the JSON file is damaged"),
        ("a" * 300, None, "File name too long"),
    ],
)
def test_what_cannot_be_read_is_exit_2(
    show: Run, name: str, data: bytes | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    code, out, err = show(str(path))
    assert (code, out) == (2, "")
    assert said in err
    assert "record CASE" not in err
