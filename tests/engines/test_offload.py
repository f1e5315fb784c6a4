"""Models whose weights are elsewhere, or in fewer bits, between calls: judged as any other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import truestep
from truestep.runtime import lent
from truestep.testing import tiny

CALL = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 3}
CPU = torch.device("cpu")


def modules_of(pipe: Any) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def sequential(pipe: Any) -> None:
    import accelerate

    for module in modules_of(pipe):
        accelerate.cpu_offload(module, execution_device=CPU)


def to_disk(pipe: Any) -> None:
    import accelerate

    accelerate.disk_offload(pipe.transformer, tempfile.mkdtemp(), execution_device=CPU)


def leaves(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


def blocks(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def stored_narrow(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=pipe.transformer.dtype
    )


WAYS: list[Callable[[Any], None]] = [sequential, to_disk, leaves, blocks, stored_narrow]


def wrong(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.weight.mul_(1.5)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> truestep.CallCase:
    folder = tmp_path_factory.mktemp("flux") / "flux"
    tiny.save("FluxPipeline", folder)
    return truestep.CallCase(model=str(folder), dtype="bfloat16", call=CALL)


@pytest.fixture(scope="module")
def reference(case: truestep.CallCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    truestep.record(case, path=path)
    return path


@pytest.mark.parametrize(
    ("way", "lends"), [*((way, True) for way in WAYS), (to_disk, False), (stored_narrow, False)]
)
def test_an_offloaded_model_is_judged_in_both_precisions(
    way: Callable[[Any], None],
    lends: bool,
    case: truestep.CallCase,
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lends:
        monkeypatch.setattr(lent, "LEAST", 1)
    same = truestep.check(case, reference, apply=way)
    assert same.verdict.value == "identical", same.sentence
    assert not any("not judged" in note for note in same.notes), same.notes

    def faulty(pipe: Any) -> None:
        wrong(pipe)
        way(pipe)

    found = truestep.check(case, reference, apply=faulty, depth="modules")
    first = found.first_divergence
    assert found.verdict.value == "drifted"
    assert first is not None
    assert first.fqn == "transformer.transformer_blocks.0.attn.to_q"
    assert first.operator is not None
    assert "query = attn.to_q(hidden_states); weight differs by 0.5" in first.operator


@pytest.mark.parametrize("way", [sequential, stored_narrow])
def test_a_trusted_side_may_be_offloaded(
    way: Callable[[Any], None], case: truestep.CallCase, reference: Path
) -> None:
    recording = truestep.record(case, apply=way)
    floor = recording.manifest.noise_floor
    assert floor is not None
    plain = truestep.recording.format.Recording.open(reference).manifest.noise_floor
    assert plain is not None
    kinds = {run.kind for run in plain.runs} - {"instructions"}
    assert {run.kind for run in floor.runs} >= kinds
    assert truestep.check(case, recording).verdict.value == "identical"


def test_weights_in_eight_bits_between_calls_are_another_model(
    case: truestep.CallCase, reference: Path
) -> None:
    def eight(pipe: Any) -> None:
        pipe.transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
        )

    found = truestep.check(case, reference, apply=eight)
    assert found.verdict.value == "drifted"
    assert not any("not judged" in note for note in found.notes)


def test_hooks_stay_as_they_were(case: truestep.CallCase, reference: Path) -> None:
    kept: list[Any] = []

    def both(pipe: Any) -> None:
        stored_narrow(pipe)
        kept.append(pipe)

    truestep.check(case, reference, apply=both)
    registry = kept[0].transformer.x_embedder._diffusers_hook
    hook = registry.hooks["layerwise_casting"]
    assert (hook.storage_dtype, hook.compute_dtype) == (torch.bfloat16, torch.bfloat16)
    assert {p.dtype for p in kept[0].transformer.parameters()} == {torch.bfloat16}


def test_offloaded_weights_go_back_to_where_they_were(
    case: truestep.CallCase, reference: Path
) -> None:
    kept: list[Any] = []

    def both(pipe: Any) -> None:
        sequential(pipe)
        kept.append(pipe)

    truestep.check(case, reference, apply=both)
    weights = list(kept[0].transformer.parameters())
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert all(w.is_meta for w in weights)
