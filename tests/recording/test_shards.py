"""Checkpoints in several files are one side of a comparison, whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from truestep import compare
from truestep.errors import FileFormatError
from truestep.recording.readers import load
from truestep.recording.shards import Shards
from truestep.verdict import Verdict

WEIGHTS = {
    f"blocks.{number}.{name}.weight": torch.randn(
        6, 4, generator=torch.Generator().manual_seed(10 * number + at)
    )
    for number in range(3)
    for at, name in enumerate(("q", "k"))
}
NAME = "diffusion_pytorch_model"


def sharded(folder: Path, weights: dict[str, torch.Tensor], count: int, **index: Any) -> Path:
    """Write weights in so many files, with an index, as diffusers does."""
    folder.mkdir(parents=True)
    table: dict[str, str] = {}
    for number in range(count):
        file = f"{NAME}-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(weights.items())[number::count])
        save_file(part, folder / file)
        table |= dict.fromkeys(part, file)
    content = {"metadata": {}, "weight_map": table, **index}
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(content))
    return folder


def test_another_sharding_is_the_same_checkpoint(tmp_path: Path) -> None:
    two, three = sharded(tmp_path / "two", WEIGHTS, 2), sharded(tmp_path / "three", WEIGHTS, 3)
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file(WEIGHTS, whole / f"{NAME}.safetensors")
    for actual in (three, whole, three / f"{NAME}.safetensors.index.json"):
        result = compare(actual, two)
        assert result.verdict is Verdict.IDENTICAL
        assert len(result.rows) == 6
    assert isinstance(load(two, label="").tensors, Shards)


def test_a_fault_in_one_shard_is_named(tmp_path: Path) -> None:
    changed = {**WEIGHTS, "blocks.1.k.weight": WEIGHTS["blocks.1.k.weight"] * 1.001}
    result = compare(sharded(tmp_path / "a", changed, 3), sharded(tmp_path / "b", WEIGHTS, 2))
    assert result.verdict is Verdict.DRIFTED
    assert [row.name for row in result.failing] == ["blocks.1.k.weight"]
    rounded = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    result = compare(sharded(tmp_path / "c", rounded, 2), tmp_path / "b")
    assert result.verdict is Verdict.EQUIVALENT
    lacking = dict(list(WEIGHTS.items())[1:])
    result = compare(sharded(tmp_path / "d", lacking, 2), tmp_path / "b")
    assert result.verdict is Verdict.MISSING


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "a", WEIGHTS, 2)
    index = folder / f"{NAME}.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(table.values()))

    def refused(weight_map: Any) -> FileFormatError:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FileFormatError) as caught:
            load(folder, label="")
        return caught.value

    error = refused({**table, "more.weight": first})
    assert error.what == "the index names tensors that its files do not hold"
    assert error.measured == f"{first} lacks 'more.weight' and 0 more"
    error = refused({name: file for name, file in table.items() if file == first})
    assert error.what == "the index leaves out a file of the checkpoint"
    assert error.measured == f"{second} is there"
    error = refused(dict(list(table.items())[1:]))
    assert error.what == "the files hold tensors that the index does not name there"
    error = refused(dict.fromkeys(table, first))
    assert error.what == "the index names tensors that its files do not hold"
    error = refused({**table, "x": f"../a/{first}"})
    assert error.what == "the index names a file outside its folder"
    error = refused({**table, "x": "absent.safetensors"})
    assert (error.what, error.measured) == (
        "a file of the checkpoint is missing",
        "absent.safetensors is not there",
    )
    for odd in ([], {}, None, {"x": 3}):
        assert refused(odd).what == "the index of the checkpoint cannot be read"
    index.write_text("{")
    with pytest.raises(FileFormatError, match="the index of the checkpoint cannot be read"):
        load(folder, label="")
    index.unlink()
    with pytest.raises(FileFormatError, match="the folder has no index") as caught:
        load(folder, label="")
    assert caught.value.hint == f"name one of them: {folder / first}"
    (folder / second).unlink()
    assert len(load(folder, label="").tensors) == 3


def test_a_folder_without_weights_says_where_they_are(tmp_path: Path) -> None:
    sharded(tmp_path / "model" / "transformer", WEIGHTS, 2)
    with pytest.raises(FileFormatError, match="the folder holds no safetensors files") as caught:
        load(tmp_path / "model", label="")
    assert caught.value.measured == "its parts do: transformer"
    assert caught.value.hint == f"name one of its parts: {tmp_path / 'model' / 'transformer'}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileFormatError, match="the folder holds no safetensors files"):
        load(tmp_path / "empty", label="")
    folder = tmp_path / "model" / "transformer"
    (folder / f"{NAME}.fp16.safetensors.index.json").write_text("{}")
    with pytest.raises(FileFormatError, match="the folder holds more than one checkpoint"):
        load(folder, label="")
