"""The adapter of LTX-2 on a stand-in with the official modules and signatures: faults and twins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import truestep
from bench.engines.tiny_ltx2 import call, make
from truestep.engines.named import run_of
from truestep.verdict import Comparison, Verdict

FAULTS = {
    "none": "",
    "shift": "schedule/sigmas",
    "time": "schedule/given",
    "sign": "step/0000/guided",
    "swapped": "step/0000/guided",
    "tail": "text/cond",
    "sound": "audio/latent/initial",
    "lyrics": "text/audio_encoder_hidden_states/cond",
    "weight": "step/0000/cond",
    "step": "step/0001/latent",
}
"""Fault to the first seam that is wrong."""

PROGRAM = """
import sys
import torch
from diffusers import LTX2VideoTransformer3DModel
from ltx_core.components.diffusion_steps import EulerDiffusionStep
from ltx_core.model.transformer import Modality, X0Model
from ltx_pipelines.utils.samplers import euler_denoising_loop
from safetensors.torch import load_file

folder, *faults = sys.argv[1:]
torch.set_num_threads(1)
given = load_file(f"{folder}/inputs.safetensors")
reference = load_file(f"{folder}/schedule.safetensors")

for fault in faults:
    texts = {name: given[name].clone() for name in ("cond", "uncond", "audio-cond", "audio-uncond")}
    noise = given["noise"].flatten(2).transpose(1, 2)
    sound = given["audio-noise"].flip(1) if fault == "sound" else given["audio-noise"]
    inner = LTX2VideoTransformer3DModel.from_pretrained(f"{folder}/trusted/transformer")
    if fault == "tail":
        texts["cond"][:, -3:] = 0.05
    if fault == "lyrics":
        texts["audio-cond"][:, -3:] = 0.05
    if fault == "swapped":
        texts["cond"], texts["uncond"] = texts["uncond"], texts["cond"]
        texts["audio-cond"], texts["audio-uncond"] = texts["audio-uncond"], texts["audio-cond"]
    if fault == "weight":
        inner.transformer_blocks[1].attn1.to_out[0].weight.data *= 1.5
    sigmas = reference["sigmas"]
    if fault == "shift":
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1] * 0.9, sigmas[-1:]])
    scale = -4.0 if fault == "sign" else 4.0
    video_at, audio_at = (reference[name].repeat(2, 1, 1, 1) for name in ("video", "audio"))

    def denoise(model, video, audio, sigmas, index):
        sigma = sigmas[index].expand(2)
        time = sigma * (0.999 if fault == "time" else 1.0)
        sides = [
            Modality(
                latent=latent.repeat(2, 1, 1),
                sigma=sigma,
                timesteps=time[:, None, None].expand(2, latent.shape[1], 1),
                positions=positions,
                context=torch.cat([texts[f"{kind}cond"], texts[f"{kind}uncond"]]),
            )
            for kind, latent, positions in (("", video, video_at), ("audio-", audio, audio_at))
        ]
        both = model(video=sides[0], audio=sides[1])
        halves = [x0.chunk(2) for x0 in both]
        return [uncond + scale * (cond - uncond) for cond, uncond in halves]

    stepper = EulerDiffusionStep()
    if fault == "step":
        stepper.factor = 1.02
    with torch.no_grad():
        euler_denoising_loop(sigmas, noise, sound, stepper, X0Model(inner), denoise)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, inputs, the trusted pipeline's recording, and its schedule and positions."""
    from diffusers import LTX2Pipeline
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("ltx2")
    make(folder / "ltx2")
    pipe = LTX2Pipeline.from_pretrained(str(folder / "ltx2" / "trusted"))
    path = folder / "reference.safetensors"
    truestep.record(pipe, call=call(folder / "ltx2"), floor="none", keep="all", path=path)
    run = run_of(path)
    given = run.steps[0].passes[0].arguments
    kept = {"sigmas": run.sigmas, "video": given["video_coords"], "audio": given["audio_coords"]}
    save_file({k: t.contiguous() for k, t in kept.items()}, folder / "ltx2/schedule.safetensors")
    return folder


@pytest.fixture(scope="module")
def judged(
    place: Path, judged_faults: Callable[..., Callable[[str], Comparison]]
) -> Callable[[str], Comparison]:
    return judged_faults(PROGRAM, place / "ltx2", FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_two_branches_is_named(
    fault: str, judged: Callable[[str], Comparison]
) -> None:
    result = judged(fault)
    first = result.first_divergence
    assert (first.name if first else "") == FAULTS[fault], result.sentence
    predictions = [row for row in result.rows if row.stage == "prediction"]
    assert len(predictions) == 8
    if fault == "none":
        assert result.verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL)
        assert {row.stage for row in result.rows} == {
            "schedule", "latent", "text", "prediction", "guidance", "update"
        }  # fmt: skip


def test_what_a_joint_model_is_called_with_is_read_from_its_dataclasses(
    judged: Callable[[str], Comparison],
) -> None:
    notes = judged("none").notes
    assert "converted: timesteps of 0 to 1, x 1000" in notes
    assert "converted: denoised samples to velocities: (x - x0) / sigma" in notes
    names = {row.name for row in judged("none").rows}
    assert {"audio/latent/initial", "text/audio_encoder_hidden_states/cond"} <= names


def test_a_reference_of_video_and_sound_is_read_by_its_video(place: Path) -> None:
    run = run_of(place / "reference.safetensors")
    assert [len(step.passes) for step in run.steps] == [2, 2, 2, 2]
    assert {round(weight, 3) for weight in run.weights.values()} == {-3.0, 4.0}
