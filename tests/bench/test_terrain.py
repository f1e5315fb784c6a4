"""The terrain UNet: the torch port computes what the published graph computes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

# The benchmarks are not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.faults import terrain

if TYPE_CHECKING:
    from bench.faults.terrain import Array, TerrainPort

    Official = Callable[[Mapping[str, Array]], dict[str, Array]]

# Rounding alone reaches 2e-6 to 1.5e-5 (three seeds at sigma 80, 5.7 and 0.4).
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def official() -> Official:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("terrain_diffusion")
    return terrain.load_official()


@pytest.fixture(scope="module")
def port() -> TerrainPort:
    for name in ("onnx", "diffusers", "terrain_diffusion"):
        pytest.importorskip(name)
    return terrain.load_port()


def difference(port: TerrainPort, official: Official, seed: int, strength: float = 1.0) -> float:
    """Largest absolute difference between the two, relative to the rms of the published one."""
    feeds = terrain.inputs(seed, strength=strength)
    expected = official({name: tensor.numpy() for name, tensor in feeds.items()})["denoised"]
    actual = port(*feeds.values()).numpy()
    assert actual.shape == expected.shape == (1, 1, 128, 128)
    return float(np.abs(actual - expected).max() / np.sqrt(np.mean(expected**2)))


@pytest.mark.parametrize(("seed", "strength"), [(0, 1.0), (1, 0.5)])
def test_port_agrees_with_the_published_graph(
    port: TerrainPort, official: Official, seed: int, strength: float
) -> None:
    assert difference(port, official, seed, strength) < TOLERANCE


def test_a_missing_bias_is_seen(port: TerrainPort, official: Official) -> None:
    bias = port.get_submodule("unet.down_blocks.2.resnets.1.conv1").bias
    assert isinstance(bias, torch.Tensor)
    kept = bias.clone()
    bias.zero_()
    try:
        assert difference(port, official, 0) > 10 * TOLERANCE
    finally:
        bias.copy_(kept)
    assert difference(port, official, 0) < TOLERANCE


def test_a_bias_that_a_one_channel_norm_removes_is_not(port: TerrainPort) -> None:
    feeds = terrain.inputs(0, size=32).values()
    before = port(*feeds)
    bias = port.get_submodule("unet.down_blocks.0.resnets.1.conv1").bias
    assert isinstance(bias, torch.Tensor)
    kept = bias.clone()
    bias.zero_()
    try:
        torch.testing.assert_close(port(*feeds), before, rtol=0, atol=1e-5)
    finally:
        bias.copy_(kept)


def test_the_port_is_frozen_and_takes_other_sizes(port: TerrainPort) -> None:
    assert not port.training
    assert {p.dtype for p in port.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in port.parameters())
    denoised = port(*terrain.inputs(0, size=32).values())
    assert denoised.shape == (1, 1, 32, 32)
    assert denoised.std() > 0.05
    assert denoised.abs().max() <= 1


def test_inputs_repeat_and_stay_in_range() -> None:
    first, again, other = (terrain.inputs(seed, size=16) for seed in (3, 3, 4))
    assert list(first) == ["noisy", "sigma", "difficulty"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noisy"], other["noisy"])
    assert first["sigma"].item() == 80
    assert 0 <= first["difficulty"].item() <= 1
    assert terrain.inputs(3, strength=0.5)["sigma"].item() == pytest.approx(0.4)
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


def test_inputs_refuse_what_the_model_cannot_take() -> None:
    with pytest.raises(ValueError, match="size must be a positive multiple of 16, got 40"):
        terrain.inputs(0, size=40)
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1, got 0"):
        terrain.inputs(0, strength=0)


@pytest.mark.parametrize(
    ("load", "module"),
    [(terrain.load_official, "onnxruntime"), (terrain.load_port, "onnx")],
)
def test_a_missing_library_names_the_install_command(
    load: Callable[[], object], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as caught:
        load()
    assert str(caught.value) == (
        f"the terrain model needs {module}; run `pip install onnxruntime onnx diffusers && "
        "pip install --no-deps adaptive-terrain-diffusion==0.4.2`"
    )
