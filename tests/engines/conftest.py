"""Tiny pipelines of several classes, and a picture."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import truestep
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.running import Ran, run_engine
from truestep.testing import tiny
from truestep.testing.tiny.calls import picture
from truestep.verdict import Comparison


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `flux`, `sd`, `wan` and `cat.png`."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save("FluxPipeline", folder / "flux")
    tiny.save("StableDiffusionImg2ImgPipeline", folder / "sd")
    tiny.save("WanImageToVideoPipeline", folder / "wan")
    picture(0).save(folder / "cat.png")
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan with the port's shift, and inputs of a case beside it."""
    folder = tmp_path_factory.mktemp("engines") / "wan"
    tiny.save("WanPipeline", folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 3.0}))
    dice = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(1, 10, 32, generator=dice) for _ in range(2))
    cond[:, -3:] = uncond[:, -5:] = 0.0  # as the pipeline pads
    noise = torch.randn(1, 16, 3, 8, 8, generator=dice)
    inputs = {"noise": noise, "cond": cond, "uncond": uncond}
    save_file(inputs, folder.parent / "inputs.safetensors")
    return folder


@pytest.fixture(scope="session")
def reference(model: Path) -> Path:
    """The trusted pipeline's recording of the same inputs."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(str(model))
    inputs = load_file(model.parent / "inputs.safetensors")
    path = model.parent / "reference.safetensors"
    call = {
        "prompt_embeds": inputs["cond"],
        "negative_prompt_embeds": inputs["uncond"],
        "latents": inputs["noise"],
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "output_type": "latent",
    }
    truestep.record(pipe, call=call, floor="none", path=path)
    return path


@pytest.fixture(scope="session")
def ran_stand_in() -> Callable[..., Ran]:
    """Runs a program that imports stand-ins: its text, a folder of weights and inputs, faults."""

    def run(text: str, weights: Path, output: Path, *faults: str) -> Ran:
        with pytest.MonkeyPatch.context() as patch:
            stand_ins = str(Path(__file__).parent / "stand_ins")
            patch.setenv("PYTHONPATH", stand_ins, prepend=os.pathsep)
            return run_engine([sys.executable, "-c", text, str(weights), *faults], output)

    return run


@pytest.fixture(scope="session")
def judged_faults(ran_stand_in: Callable[..., Ran]) -> Callable[..., Callable[[str], Comparison]]:
    """Judges what a program makes, by fault, beside `reference.safetensors` in the folder above."""

    def judged(text: str, weights: Path, faults: Iterable[str]) -> Callable[[str], Comparison]:
        ran = ran_stand_in(text, weights, weights.parent / "run.safetensors", *faults)
        assert ran.code == 0
        # one process generates once a fault: each has to be a recording of its own
        paths = dict(zip(faults, (path for path, _ in ran.recordings), strict=True))
        known = run_of(weights.parent / "reference.safetensors")

        @cache
        def result(fault: str) -> Comparison:
            return check_run(run_of(paths[fault]), weights / "trusted", reference=known)

        return result

    return judged
