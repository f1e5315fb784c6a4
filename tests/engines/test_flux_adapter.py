"""The adapter of flux on a stand-in with the official modules and signatures: faults and twins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import truestep
from bench.engines.tiny_flux import call, make
from truestep.engines.assembling import PARTIAL
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.running import Ran
from truestep.verdict import Comparison, Verdict

FAULTS = {
    "none": "",
    "shift": "schedule/sigmas",
    "noise": "latent/initial",
    "time": "schedule/given",
    "sign": "guidance/guidance/cond",
    "tail": "text/cond",
    "pooled": "text/pooled_projections/cond",
    "weight": "step/0000/cond",
    "order": "step/0002/latent",
    "latent": "entering/decoder",
    "scale": "video/frames",
}
"""Fault to the first seam that is wrong."""

PROGRAM = """
import os, signal, sys
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from flux import sampling
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from safetensors.torch import load_file

folder, *faults = sys.argv[1:]
torch.set_num_threads(1)
given = load_file(f"{folder}/inputs.safetensors")
for fault in faults:
    inner = FluxTransformer2DModel.from_pretrained(f"{folder}/trusted/transformer")
    model = Flux(inner)
    ae = AutoEncoder(AutoencoderKL.from_pretrained(f"{folder}/trusted/vae"))
    text, pooled = given["cond"].clone(), given["cond-pooled"]
    if fault == "tail":
        text[:, -3:] = 0.05
    if fault == "pooled":
        pooled = given["other-pooled"]
    if fault == "time":
        call = Flux.__call__
        Flux.__call__ = lambda self, **k: call(self, **{**k, "timesteps": k["timesteps"] * 0.999})
    if fault == "weight":
        inner.transformer_blocks[1].attn.to_out[0].weight.data *= 1.5
    if fault == "scale":
        ae.scale_factor = 0.5
    if fault == "killed":
        steps = iter([None, None, signal.SIGKILL])
        model.register_forward_hook(lambda *_: (n := next(steps)) and os.kill(os.getpid(), n))
    sampling.LATE = fault == "order"
    with torch.no_grad():
        noise = sampling.get_noise(1, 64, 64, "cpu", torch.float32, 4 if fault == "noise" else 3)
        inputs = sampling.prepare(HFEmbedder(text), HFEmbedder(pooled), noise, "a cat")
        times = sampling.get_schedule(4, 16, 1.5 if fault == "shift" else 1.15)
        end = sampling.denoise(
            model, **inputs, timesteps=times, guidance=-3.5 if fault == "sign" else 3.5
        )
        end = sampling.unpack(end, 64, 64)
        ae.decode(end * 0.98 if fault == "latent" else end)
    if fault == "time":
        Flux.__call__ = call
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, inputs, and the trusted pipeline's recording."""
    from diffusers import FluxPipeline

    folder = tmp_path_factory.mktemp("flux")
    make(folder / "flux")
    pipe = FluxPipeline.from_pretrained(str(folder / "flux" / "trusted"))
    path = folder / "reference.safetensors"
    truestep.record(pipe, call=call(folder / "flux"), floor="none", keep="all", path=path)
    return folder


@pytest.fixture(scope="module")
def judged(
    place: Path, judged_faults: Callable[..., Callable[[str], Comparison]]
) -> Callable[[str], Comparison]:
    return judged_faults(PROGRAM, place / "flux", FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_the_right_one_passes(
    fault: str, judged: Callable[[str], Comparison]
) -> None:
    result = judged(fault)
    first = result.first_divergence
    assert (first.name if first else "") == FAULTS[fault], result.sentence
    if not FAULTS[fault]:
        assert result.verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL)
        assert {row.stage for row in result.rows} == {
            "schedule", "latent", "text", "guidance", "prediction", "update", "decoding"
        }  # fmt: skip
    elif FAULTS[fault] != "step/0000/cond":
        predictions = [row for row in result.rows if row.stage == "prediction"]
        assert len(predictions) == 4
        assert all(row.verdict.passed for row in predictions)


def test_what_is_called_otherwise_is_said(judged: Callable[[str], Comparison]) -> None:
    notes = judged("none").notes
    assert "converted: timesteps of 1 to 0, with the closing zero: sigmas" in notes
    way = "over its scale, plus its shift"
    inside = f"converted: latent for the VAE, by the engine's decoder: {way}"
    assert inside in notes
    assert not any("not judged" in note for note in notes)
    assert inside not in judged("scale").notes  # a wrong decoder says nothing of its space


def test_a_decoder_that_is_wrong_accuses_no_latent(judged: Callable[[str], Comparison]) -> None:
    failed = [row.name for row in judged("scale").rows if not row.verdict.passed]
    assert failed == ["video/frames"]
    assert judged("scale").first_divergence is not None
    assert judged("scale").first_divergence.stage == "decoding"


def test_a_scale_that_a_model_is_given_is_guidance(judged: Callable[[str], Comparison]) -> None:
    assert judged("sign").first_divergence is not None
    assert judged("sign").first_divergence.stage == "guidance"
    assert [r.name for r in judged("sign").rows if not r.verdict.passed] == [FAULTS["sign"]]


def test_a_killed_process_leaves_the_steps_that_ended(
    place: Path, tmp_path: Path, ran_stand_in: Callable[..., Ran]
) -> None:
    ran = ran_stand_in(PROGRAM, place / "flux", tmp_path / "run.safetensors", "killed")
    assert ran.code == 137
    ((path, recording),) = ran.recordings
    assert PARTIAL in recording.recording.manifest.notes
    run = run_of(path)
    assert len(run.steps) == 2
    known = run_of(place / "reference.safetensors")
    result = check_run(run, place / "flux" / "trusted", reference=known)
    predictions = [row for row in result.rows if row.stage == "prediction"]
    assert len(predictions) == 2
    assert all(row.verdict.passed for row in result.rows if row.stage != "schedule")
