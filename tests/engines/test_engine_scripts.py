"""A script of plain diffusers is an engine like any other."""

from __future__ import annotations

import sys
from pathlib import Path

import truestep
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.running import run_engine
from truestep.testing import tiny
from truestep.verdict import Verdict

SCRIPT = """
import sys, torch
from diffusers import StableDiffusionPipeline

torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
for scale in (1.0, 1.1):
    pipe.vae.register_to_config(scaling_factor=pipe.vae.config.scaling_factor * scale)
    pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
"""


def test_all_of_it_is_judged_down_to_what_the_decoder_is_given(tmp_path: Path) -> None:
    model = tmp_path / "sd"
    tiny.save("StableDiffusionPipeline", model)
    case = truestep.CallCase(
        model=str(model), call={"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 7.5}
    )
    reference = tmp_path / "reference.safetensors"
    truestep.record(case, floor="none", path=reference)
    made = run_engine([sys.executable, "-c", SCRIPT, str(model)], tmp_path / "run.safetensors")
    assert made.code == 0
    right, wrong = (run_of(path) for path, _ in made.recordings)
    known = run_of(reference)
    result = check_run(right, model, reference=known)
    assert result.verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL), result.sentence
    stages = {row.stage for row in result.rows}
    assert stages == {
        "schedule", "latent", "text", "prediction", "guidance", "update", "decoding"
    }  # fmt: skip
    result = check_run(wrong, model, reference=known)
    assert result.first_divergence is not None
    assert result.first_divergence.name == "entering/decoder"
    failed = [row.name for row in result.rows if not row.verdict.passed]
    assert failed == ["entering/decoder"]  # the decoder itself is right
