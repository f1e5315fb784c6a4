"""Modular pipelines: cut at their components, guiders among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.bench_coverage import differences
from tests.calls.loops import replayed, through_a_file
from truestep.calls.check import check
from truestep.calls.record import record
from truestep.calls.subject import Subject, subject_of
from truestep.testing import tiny
from truestep.verdict import Verdict

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TEXTS = {"prompt": "a cat", "negative_prompt": "bad", "num_inference_steps": 3}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wan": (
        "WanBlocks",
        "WanPipeline",
        {**TEXTS, "height": 16, "width": 16, "num_frames": 5, "output": "videos"},
    ),
    "flux": (
        "FluxAutoBlocks",
        "FluxPipeline",
        {"prompt": "a", "num_inference_steps": 3, "height": 32, "width": 32, "output": "images"},
    ),
    "qwen": (
        "QwenImageAutoBlocks",
        "QwenImagePipeline",
        {**TEXTS, "height": 32, "width": 32, "output": "images"},
    ),
}


def modular(name: str, change: Callable[[Any], None] | None = None) -> Subject:
    """A modular pipeline of tiny components, built anew."""
    from diffusers import modular_pipelines

    blocks, standard, call = CASES[name]
    pipeline = getattr(modular_pipelines, blocks)().init_pipeline()
    expected = {component.name for component in pipeline.blocks.expected_components}
    parts = tiny.pipeline(standard).components
    pipeline.update_components(
        **{key: part for key, part in parts.items() if key in expected and part is not None}
    )
    if change is not None:
        change(pipeline)
    return subject_of(pipeline, **call)


@pytest.mark.parametrize("name", CASES)
def test_replays_bit_for_bit(name: str, tmp_path: Path) -> None:
    reference = through_a_file(modular(name), tmp_path)
    for made in (False, True):
        assert differences(replayed(modular(name), reference, made=made), reference) == []
    guided = [call.stage for call in reference.calls if call.kind == "guider"]
    assert guided == ([] if name == "flux" else ["guidance"] * 3)


@pytest.mark.parametrize("name", ["wan", "qwen"])
def test_a_guidance_scale_is_the_guiders_fault(name: str) -> None:
    def scaled(pipeline: Any) -> None:
        pipeline.guider.guidance_scale *= 1.01

    reference = record(modular(name))
    assert check(modular(name), reference).verdict is Verdict.IDENTICAL
    result = check(modular(name, scaled), reference)
    assert result.sentence.startswith("drifted: guider.forward at step 0: output pred")
    assert {row.fqn for row in result.failing} == {"guider.forward"}
