"""Checkpoints in GGUF against what they were made of."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from truestep.judge.compare import compare
from truestep.judge.weights import compare_weights
from truestep.verdict import Verdict

KINDS = gguf.GGMLQuantizationType
LAYERS, WIDTH = 3, 64
KEY = "blocks.1.qkv.weight"


def build() -> dict[str, torch.Tensor]:
    """Matrices, biases and norms, float32."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in range(LAYERS):
        for name, rows in (("qkv", 3 * WIDTH), ("out", WIDTH), ("mlp", 4 * WIDTH)):
            found[f"blocks.{layer}.{name}.weight"] = (
                torch.randn(rows, WIDTH, generator=generator) * 0.02
            )
            found[f"blocks.{layer}.{name}.bias"] = torch.randn(rows, generator=generator) * 0.02
        found[f"blocks.{layer}.norm.weight"] = 1 + torch.randn(WIDTH, generator=generator) * 0.02
    return found


SOURCE = build()


def write(
    path: Path, kind: KINDS, source: dict[str, torch.Tensor] = SOURCE, prefix: str = ""
) -> Path:
    """A GGUF file: matrices in blocks, vectors as they are."""
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in source.items():
        values = tensor.numpy()
        if tensor.ndim < 2:
            writer.add_tensor(prefix + name, values)
        else:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(prefix + name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_0, KINDS.Q5_1, KINDS.BF16])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_right_conversion_passes(kind: KINDS, prefix: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", kind, prefix=prefix)
    found = compare_weights(path, SOURCE)
    assert found.verdict is Verdict.EQUIVALENT, found.sentence
    name = "bfloat16" if kind is KINDS.BF16 else kind.name
    assert found.sentence == (
        f"equivalent: {3 * LAYERS} of {7 * LAYERS} parameters rounded to {name}, the others agree "
        "bit for bit"
    )
    assert {row.actual.dtype for row in found.rows if row.actual} == {name, "float32"}


@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_0])
def test_split_projections_are_found_in_blocks(kind: KINDS, tmp_path: Path) -> None:
    split = {}
    for name, tensor in SOURCE.items():
        if ".qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace("qkv", f"to_{part}")] = piece.clone()
        else:
            split[name] = tensor
    found = compare_weights(write(tmp_path / "a.gguf", kind), split)
    assert found.verdict is Verdict.EQUIVALENT, found.sentence
    row = next(row for row in found.rows if row.name == "blocks.1.to_k.weight")
    assert row.note == f"rounded to {kind.name}; in actual: {KEY} [{WIDTH}:{2 * WIDTH}]"


def test_faults_are_named(tmp_path: Path) -> None:
    for change in (
        lambda t: t * 1.05,
        lambda t: torch.cat([t[WIDTH : 2 * WIDTH], t[:WIDTH], t[2 * WIDTH :]]),
        lambda t: t.flip(1),
    ):
        wrong = SOURCE | {KEY: change(SOURCE[KEY]).contiguous()}
        for prefix in ("", "model."):
            path = write(tmp_path / "a.gguf", KINDS.Q8_0, wrong, prefix)
            found = compare_weights(path, SOURCE)
            assert found.verdict is Verdict.DRIFTED
            assert [row.name for row in found.failing] == [KEY]
            assert "codes are not the nearest Q8_0; rel_l2" in found.failing[0].note


def test_two_files_in_blocks(tmp_path: Path) -> None:
    eight, other = (write(tmp_path / f"{n}.gguf", KINDS.Q8_0) for n in "ab")
    assert compare_weights(other, eight).verdict is Verdict.IDENTICAL
    assert compare(other, eight).verdict is Verdict.IDENTICAL
    wrong = write(tmp_path / "c.gguf", KINDS.Q8_0, SOURCE | {KEY: SOURCE[KEY] * 1.05})
    found = compare_weights(wrong, eight)
    assert found.verdict is Verdict.DRIFTED
    assert found.failing[0].note.startswith("not the same Q8_0:")
    four = compare_weights(write(tmp_path / "d.gguf", KINDS.Q4_0), eight)
    assert four.verdict is Verdict.INCONCLUSIVE
    assert "of the other's Q8_0: compare either with its source" in four.failing[0].note


def test_compare_reads_files_of_weights_too(tmp_path: Path) -> None:
    save_file(SOURCE, tmp_path / "a.safetensors")
    path = write(tmp_path / "a.gguf", KINDS.Q8_0)
    found = compare(path, tmp_path / "a.safetensors")
    assert found.verdict is Verdict.EQUIVALENT
    values = SOURCE[KEY].clone()
    values[0, 0] = float("nan")
    found = compare(path, SOURCE | {KEY: values}, weights=True)
    assert found.verdict is Verdict.INVALID
    shape = compare(path, SOURCE | {KEY: values[:5]}, weights=True)
    assert shape.verdict is Verdict.INCOMPARABLE
    assert np.isfinite(SOURCE[KEY].numpy()).all()


@pytest.mark.parametrize("kind", [KINDS.Q8_0, KINDS.Q4_0, KINDS.Q5_1])
def test_blocks_of_zero_are_right_where_there_is_nothing(kind: KINDS, tmp_path: Path) -> None:
    """A step of zero says zero: of a block of zeros, and of no other."""
    zeros = SOURCE[KEY].clone()
    zeros[5] = 0.0
    path = write(tmp_path / "a.gguf", kind, SOURCE | {KEY: zeros})
    assert compare_weights(path, SOURCE | {KEY: zeros}).verdict is Verdict.EQUIVALENT
    found = compare_weights(path, SOURCE)
    assert found.verdict is Verdict.DRIFTED
    assert [row.name for row in found.failing] == [KEY]


def test_another_shape_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", KINDS.Q8_0)
    other = SOURCE | {KEY: SOURCE[KEY].reshape(WIDTH, 3 * WIDTH)}
    found = compare_weights(path, other)
    assert found.verdict is Verdict.INCOMPARABLE
    assert f"shape [{3 * WIDTH}, {WIDTH}] against [{WIDTH}, {3 * WIDTH}]" in found.failing[0].note
