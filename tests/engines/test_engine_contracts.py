"""Adapters on stand-ins with the module paths, signatures and conventions of the real engines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import truestep
from truestep.calls.recording import read
from truestep.engines.assembling import _closed
from truestep.engines.conventions import AS_IT_IS
from truestep.engines.expected import Predicted
from truestep.engines.masked import unread
from truestep.engines.named import run_of
from truestep.engines.ordered import check_run
from truestep.engines.run import Pass
from truestep.engines.running import run_engine
from truestep.engines.seams import _counts
from truestep.engines.trusted import Denoiser
from truestep.replay.isolation import Flow
from truestep.replay.recorded import Recorded
from truestep.testing import tiny
from truestep.verdict import Comparison, Verdict

PROGRAM = Path(__file__).parent / "stand_ins" / "generate.py"
SIZE = {"height": 64, "width": 64}


def judged(
    engine: str, model: Path, reference: Path, folder: Path, *faults: str
) -> dict[str, Comparison]:
    """A right generation and one a fault, recorded and judged."""
    inputs = reference.parent / "inputs.safetensors"
    words = [sys.executable, str(PROGRAM), engine, str(model), str(inputs), "none", *faults]
    made = run_engine(words, folder / "run.safetensors")
    assert (made.code, made.failures) == (0, [])
    assert len(made.recordings) == 1 + len(faults)
    known = run_of(reference)
    found = {}
    for fault, (path, _) in zip(("none", *faults), made.recordings, strict=True):
        told: Any = read(path).recording.manifest.settings["engine"]
        assert told["name"] == engine
        found[fault] = check_run(run_of(path), model, reference=known)
    return found


def stages(result: Comparison) -> set[str | None]:
    return {row.stage for row in result.rows}


def first(result: Comparison) -> tuple[str, str]:
    assert result.verdict is Verdict.DRIFTED, result.sentence
    assert result.first_divergence is not None
    return result.first_divergence.stage or "", result.first_divergence.name


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and the trusted recording beside its inputs."""
    folder = tmp_path_factory.mktemp("hunyuan")
    tiny.save("HunyuanVideoPipeline", folder / "model")
    place = folder / "model" / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "shift": 7.0}))
    pipe = tiny.pipeline("HunyuanVideoPipeline")
    pipe.scheduler.set_shift(7.0)
    dice = torch.Generator().manual_seed(0)
    given = {"noise": torch.randn(1, 4, 3, 8, 8, generator=dice)}
    for name, used in (("cond", 6), ("uncond", 4)):
        given[name] = torch.randn(1, 10, 32, generator=dice)
        given[f"{name}_mask"] = (torch.arange(10) < used)[None].long()
        given[f"{name}_pooled"] = torch.randn(1, 32, generator=dice)
    save_file(given, folder / "inputs.safetensors")
    call = {
        "prompt_embeds": given["cond"],
        "prompt_attention_mask": given["cond_mask"],
        "pooled_prompt_embeds": given["cond_pooled"],
        "negative_prompt_embeds": given["uncond"],
        "negative_prompt_attention_mask": given["uncond_mask"],
        "negative_pooled_prompt_embeds": given["uncond_pooled"],
        "latents": given["noise"],
        "num_inference_steps": 3,
        "true_cfg_scale": 5.0,
        "guidance_scale": 6.0,
        "num_frames": 9,
        "output_type": "latent",
    }
    path = folder / "reference.safetensors"
    truestep.record(pipe, call=call | SIZE, floor="none", path=path)
    return folder / "model", path


def test_other_conditions_have_the_trusted_names(
    hunyuan: tuple[Path, Path], tmp_path: Path
) -> None:
    found = judged("hunyuan", *hunyuan, tmp_path, "pooled", "mask")
    right = found["none"]
    assert right.verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL), right.sentence
    assert {"schedule", "latent", "text", "prediction", "guidance", "update"} <= stages(right)
    names = {row.name for row in right.rows}
    assert {"text/pooled_projections/cond", "text/encoder_attention_mask/uncond"} <= names
    assert not any("of the reference" in note for note in right.notes)  # all is the engine's own
    assert first(found["pooled"]) == ("text", "text/pooled_projections/cond")
    assert first(found["mask"]) == ("text", "text/encoder_attention_mask/cond")
    red = [row for row in found["pooled"].rows if row.stage == "prediction"]
    assert all(row.verdict.passed for row in red)  # of the engine's own text each is right


@pytest.fixture(scope="module")
def cosmos(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cosmos")
    tiny.save("Cosmos2TextToImagePipeline", folder / "model")
    pipe = tiny.pipeline("Cosmos2TextToImagePipeline")
    dice = torch.Generator().manual_seed(0)
    given = {"noise": torch.randn(1, 16, 1, 8, 8, generator=dice)}
    given |= {name: torch.randn(1, 10, 32, generator=dice) for name in ("cond", "uncond")}
    save_file(given, folder / "inputs.safetensors")
    call = {
        "prompt_embeds": given["cond"],
        "negative_prompt_embeds": given["uncond"],
        "latents": given["noise"],
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    path = folder / "reference.safetensors"
    truestep.record(pipe, call=call | SIZE, floor="none", path=path)
    return folder / "model", path


def test_a_flow_as_edm_writes_it_is_judged_to_its_last_prediction(
    cosmos: tuple[Path, Path], tmp_path: Path
) -> None:
    found = judged("cosmos_predict2", *cosmos, tmp_path, "solver", "time", "sign")
    right = found["none"]
    assert right.verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL), right.sentence
    assert {"schedule", "latent", "text", "prediction", "guidance", "update"} <= stages(right)
    assert sum(row.stage == "prediction" for row in right.rows) == 8  # the last is no update's
    assert sum(row.stage == "guidance" for row in right.rows) == 4
    assert any("stepped by denoised samples" in note for note in right.notes)
    assert first(found["solver"])[0] == "update"
    assert first(found["time"]) == ("schedule", "schedule/given")
    assert first(found["sign"])[0] == "guidance"
    # cond + 3 (cond - uncond) is a scale of 4, and of -3 in its place one of -2
    text = "the run combines by other weights: uncond - 2 (cond - uncond)"
    assert text in found["sign"].notes


def test_only_as_many_predictions_as_a_step_has_are_a_step_without_an_update() -> None:
    def placed(late: int) -> list[Any]:
        called = [("model", "model"), ("model", "model"), ("scheduler", "step")]
        calls: Any = [
            SimpleNamespace(component=c, method=m, kind="scheduler" if m == "step" else "model")
            for c, m in [*called, *called[:1] * late, ("vae", "decode")]
        ]
        before = [("prediction", 0)] * 2 + [("update", 0)]
        return _closed(calls, [*before, *[("decoding", None)] * (late + 1)])[3:]

    assert placed(2) == [("prediction", 1), ("prediction", 1), ("decoding", None)]
    assert placed(1) == [("decoding", None)] * 2  # what it is for is not known
    assert placed(0) == [("decoding", None)]


def test_numbers_of_steps_are_no_times() -> None:
    assert _counts(torch.arange(4))
    assert not _counts(torch.tensor([3, 2, 1, 0]))
    assert not _counts(torch.arange(4.0))


def test_a_runner_of_a_pipeline_of_diffusers_is_one_generation(
    model: Path, reference: Path, tmp_path: Path
) -> None:
    found = judged("xdit", model, reference, tmp_path, "shift")
    assert found["none"].verdict in (Verdict.EQUIVALENT, Verdict.IDENTICAL)
    assert first(found["shift"]) == ("schedule", "schedule/sigmas")


def test_rows_of_padding_that_nothing_reads_are_found_and_passed_over(
    hunyuan: tuple[Path, Path],
) -> None:
    model = tiny.pipeline("HunyuanVideoPipeline").transformer
    given = load_file(hunyuan[0].parent / "inputs.safetensors")
    arguments = {
        "hidden_states": given["noise"],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": given["cond"],
        "encoder_attention_mask": given["cond_mask"],
        "pooled_projections": given["cond_pooled"],
        "guidance": torch.tensor([6000.0]),
    }

    def found(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
        denoiser = Denoiser(model, {"return_dict": False}, AS_IT_IS)
        one = Pass({}, {}, given["noise"], "model")
        with torch.no_grad():
            output = denoiser(**arguments | changes)
            return unread(Predicted(one, None, output, denoiser, arguments | changes), (0, "cond"))

    idle = found()
    name = "module/context_embedder/0/cond/out.0"
    assert idle[name].any(dim=-1)[0].tolist() == [False] * 6 + [True] * 4  # of the padding alone
    assert not any("/(root)/" in key and "/out" in key for key in idle)
    assert found(encoder_attention_mask=torch.ones(1, 10)) == {}  # all text is read

    right = torch.randn(1, 10, idle[name].shape[-1], generator=torch.Generator().manual_seed(0))
    recorded = Recorded(Flow(), model, unread=idle)
    for row, harmless in ((9, True), (2, False)):
        wrong = right.clone()
        wrong[:, row] += 1.0
        actual, expected = recorded.read(name, wrong, right)
        assert torch.equal(actual, expected) is harmless
