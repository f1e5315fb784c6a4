"""Our stages against diffusers.CosmosTextToWorldPipeline: bit for bit; and every plan on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from truestep.case import Case
from truestep.errors import CaseError, ModelLoadError, UsageError
from truestep.recording.format import Recording
from truestep.replay.check import check, check_pipeline
from truestep.replay.record import record_pipeline
from truestep.runtime.accelerate import accelerate
from truestep.runtime.attention import text_attention
from truestep.runtime.loading import NOTES, load
from truestep.runtime.pipeline import Pipeline, generate
from truestep.verdict import Verdict

Tensor = torch.Tensor


class Checker:
    """What diffusers' pipeline insists on: an object that finds everything safe."""

    def to(self, device: Any) -> Checker:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def diffusers_pipeline(case: Case) -> Any:
    import diffusers

    pipe = diffusers.CosmosTextToWorldPipeline.from_pretrained(
        case.model, safety_checker=Checker(), dtype=getattr(torch, case.dtype)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_run(pipe: Any, case: Case, *, output_type: str = "latent") -> Tensor:
    """What the pipeline generates for a case, by its own public interface."""
    result = pipe(
        prompt=case.prompt,
        negative_prompt=case.negative_prompt,
        height=case.height,
        width=case.width,
        num_frames=case.num_frames,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        num_videos_per_prompt=case.settings.videos_per_prompt or 1,
        max_sequence_length=case.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(case.seed),
        output_type=output_type,
        **({} if case.settings.fps is None else {"fps": case.settings.fps}),
    ).frames
    assert isinstance(result, Tensor)
    return result


@pytest.fixture
def case(tiny_cosmos: Path, cosmos_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_cosmos), **cosmos_case)


@pytest.fixture(scope="module")
def recorded(tiny_cosmos: Path, cosmos_case: dict[str, Any]) -> tuple[Case, Recording]:
    """A case whose prompts are mostly padding, and its recording with a floor."""
    own = Case(model=str(tiny_cosmos), **{**cosmos_case, "max_sequence_length": 24})
    return own, record_pipeline(load(own), case=own)


@pytest.fixture
def padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with `concat_padding_mask`, and a stand-in for torchvision's nearest resize."""
    from diffusers.models.transformers import transformer_cosmos

    from bench.faults.tiny import build_tiny_cosmos

    def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
        return torch.nn.functional.interpolate(mask, size=size, mode=interpolation)

    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=resize),
        InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", stand_in, raising=False)
    return build_tiny_cosmos(tmp_path / "padded", concat_padding_mask=True)


# --- the same bits as diffusers -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"steps": 20, "seed": 7},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a blue one"},
        {"fps": 16},
        {"height": 32, "num_frames": 1},
        {"videos_per_prompt": 2},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_latent_is_bit_equal_to_diffusers(changes: dict[str, Any], dtype: str, case: Case) -> None:
    own = case.replace(**changes, dtype=dtype)
    expected = diffusers_run(diffusers_pipeline(own), own)
    actual = generate(load(own))
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frames_are_bit_equal_to_diffusers(
    dtype: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = case.replace(dtype=dtype)
    theirs = diffusers_pipeline(own)
    decoded: list[Tensor] = []
    decode = theirs.vae.decode

    def watched(*args: Any, **kwargs: Any) -> Any:
        decoded[:] = decode(*args, **kwargs)
        return (decoded[0],)

    monkeypatch.setattr(theirs.vae, "decode", watched)
    shown = diffusers_run(theirs, own, output_type="pt")
    frames = generate(load(own), output="frames")
    assert frames.dtype == getattr(torch, dtype)
    assert torch.equal(frames, decoded[0])
    # For its checker, diffusers cuts frames down to 8 bits.
    cut = (theirs.video_processor.postprocess_video(frames, output_type="np") * 255).astype("uint8")
    assert torch.equal((shown * 255).round().byte().permute(0, 1, 3, 4, 2), torch.from_numpy(cut))


@pytest.mark.parametrize("ends", ["zero", "sigma_min"])
def test_schedules_that_end_elsewhere_are_bit_equal(ends: str, case: Case) -> None:
    import diffusers

    theirs, ours = diffusers_pipeline(case), load(case)
    for pipe in (theirs, ours):
        pipe.scheduler = diffusers.EDMEulerScheduler.from_config(
            pipe.scheduler.config, final_sigmas_type=ends
        )
    assert torch.equal(generate(ours), diffusers_run(theirs, case))


def test_a_vae_without_statistics_is_bit_equal(case: Case) -> None:
    theirs, ours = diffusers_pipeline(case), load(case)
    for pipe in (theirs, ours):
        pipe.vae.register_to_config(latents_mean=None, latents_std=None)
    latent = generate(ours)
    expected = theirs.vae.decode(latent / 0.5, return_dict=False)[0]
    with torch.no_grad():
        assert torch.equal(ours.decode(ours, latent), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_loaded_as_diffusers_loads_them(dtype: str, case: Case) -> None:
    own = case.replace(dtype=dtype)
    theirs, ours = diffusers_pipeline(own), load(own)
    for part in ("text_encoder", "transformer", "vae"):
        expected = getattr(theirs, part).state_dict()
        for name, tensor in getattr(ours, part).state_dict().items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
    assert ours.transformer.learnable_pos_embed.pos_emb_t.dtype == torch.float32


def test_a_padding_mask_is_given_and_shared_by_a_batch(
    padded: Path, cosmos_case: dict[str, Any]
) -> None:
    own = Case(model=str(padded), **cosmos_case)
    theirs, ours = diffusers_pipeline(own), load(own)
    expected = diffusers_run(theirs, own)
    assert torch.equal(generate(ours), expected)
    ours.settings.cfg = "batched"
    assert _apart(generate(ours), expected) < 1e-5
    assert ours.fallbacks == ()


# --- what cannot be ----------------------------------------------------------------------------


def test_a_model_that_needs_torchvision_says_so(
    tmp_path: Path, cosmos_case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.transformers import transformer_cosmos

    from bench.faults.tiny import build_tiny_cosmos

    monkeypatch.delattr(transformer_cosmos, "transforms", raising=False)
    folder = build_tiny_cosmos(tmp_path / "model", concat_padding_mask=True)
    with pytest.raises(UsageError, match="needs the package 'torchvision'") as caught:
        load(Case(model=str(folder), **cosmos_case))
    assert "pip install torchvision" in str(caught.value)


def test_only_components_of_known_libraries_are_loaded(
    tiny_cosmos: Path, tmp_path: Path, cosmos_case: dict[str, Any]
) -> None:
    folder = shutil.copytree(tiny_cosmos, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["os", "system"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"os\.system, not of diffusers or transformers"):
        load(Case(model=str(folder), **cosmos_case))


def test_a_missing_component_is_a_clear_error(
    tiny_cosmos: Path, tmp_path: Path, cosmos_case: dict[str, Any]
) -> None:
    folder = shutil.copytree(tiny_cosmos, tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="the model could not be loaded") as caught:
        load(Case(model=str(folder), **cosmos_case))
    assert "truestep doctor " in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"height": 20}, "height 20 does not fit the model", "--set height=16"),
        ({"num_frames": 6}, "num_frames 6 does not fit the model", "--set num_frames=5"),
        ({"num_frames": 33}, "num_frames 33 does not fit the model", "--set num_frames=29"),
        ({"width": 80}, "width 80 does not fit the model", "--set width=64"),
        ({"flow_shift": 3.0}, "flow_shift is set", "leave flow_shift out"),
        ({"scheduler": "UniPCMultistepScheduler"}, "scheduler is set", "leave scheduler out"),
        ({"guidance_scale_2": 2.0}, "guidance_scale_2 is set", "leave guidance_scale_2 out"),
        ({"attention_backend": "nope"}, "attention backend 'nope'", "truestep doctor"),
    ],
)
def test_settings_that_do_not_fit_are_errors_not_roundings(
    changes: dict[str, Any], message: str, hint: str, case: Case
) -> None:
    with pytest.raises(CaseError, match=message) as caught:
        generate(load(case.replace(**changes)))
    assert hint in str(caught.value)


def test_another_kind_of_scheduler_is_refused(case: Case) -> None:
    import diffusers

    pipe = load(case)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler cannot drive a Cosmos"):
        generate(pipe)


def test_fps_belongs_to_cosmos_and_to_the_case_where_it_is_set(
    case: Case, tiny_wan: dict[str, Path], tiny_case: dict[str, Any]
) -> None:
    assert "fps" not in case.canonical()["settings"]
    assert case.replace(fps=24).id != case.id
    assert torch.equal(generate(load(case)), generate(load(case.replace(fps=30))))
    with pytest.raises(CaseError, match="fps is set, but a Wan model"):
        load(Case(model=str(tiny_wan["wan21"]), **tiny_case).replace(fps=24))


def test_that_no_safety_checker_runs_is_said() -> None:
    assert "no safety checker" in NOTES["CosmosTextToWorldPipeline"]


# --- plans -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({}, Verdict.IDENTICAL),
        ({"text_cache": True}, Verdict.IDENTICAL),
        ({"cfg": "batched"}, Verdict.EQUIVALENT),
        ({"text_attention": "collapsed"}, Verdict.EQUIVALENT),
        (
            {"cfg": "batched", "text_attention": "collapsed", "text_cache": True},
            Verdict.EQUIVALENT,
        ),
        ({"fps": 24}, Verdict.DRIFTED),
        ({"guidance_scale": 4.04}, Verdict.DRIFTED),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_plans_are_judged_against_a_recording(
    settings: dict[str, Any], verdict: Verdict, recorded: tuple[Case, Recording]
) -> None:
    own, recording = recorded
    candidate = own.replace(**settings)
    result = check_pipeline(load(candidate), recording, case=own, candidate=candidate)
    assert result.verdict is verdict, result.sentence
    assert result.notes == ()


def test_collapsed_text_is_exact_in_float64(
    recorded: tuple[Case, Recording], float64_rotation: None
) -> None:
    own, recording = recorded
    model = load(own).transformer.double()
    given = {
        "hidden_states": recording["latent/initial"].double() / 80,
        "timestep": torch.tensor([0.5], dtype=torch.float64),
        "encoder_hidden_states": recording["text/cond"].double(),
        "fps": 30,
        "return_dict": False,
    }
    model.learnable_pos_embed.float()  # asks for float32
    with torch.no_grad():
        full = model(**given)[0]
        with text_attention(model, collapsed=True, cache=False) as installed:
            short = model(**given)[0]
        assert installed.reasons == []
        again = model(**given)[0]
    assert not torch.equal(short, full)
    assert _apart(short, full) < 1e-12
    assert torch.equal(again, full)


@pytest.fixture
def float64_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions as diffusers' `apply_rotary_emb`, but not rounded to float32."""
    from diffusers.models import embeddings

    def apply(x: Tensor, tables: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        cos, sin = (table.to(x.dtype) for table in tables)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    monkeypatch.setattr(embeddings, "apply_rotary_emb", apply)


@pytest.mark.parametrize("reuse", ["delta", "drop"])
def test_adaptive_guidance_skips_forwards(reuse: str, case: Case) -> None:
    pipe = load(case.replace(adaptive_gate=0.5, adaptive_reuse=reuse))
    adaptive = generate(pipe)
    assert pipe.forwards == 2 * 2 + 2
    assert torch.isfinite(adaptive).all()
    assert 0 < _apart(adaptive, generate(load(case))) < 0.5


def test_accelerated_diffusers_pipeline_is_the_same_and_left_as_it_was(
    padded: Path, cosmos_case: dict[str, Any]
) -> None:
    own = Case(model=str(padded), **{**cosmos_case, "max_sequence_length": 24})
    pipe = diffusers_pipeline(own)
    expected, before = diffusers_run(pipe, own), dict(vars(pipe.transformer))
    shapes: list[torch.Size] = []

    handle = pipe.transformer.patch_embed.register_forward_pre_hook(
        lambda module, args: shapes.append(args[0].shape)
    )
    with accelerate(pipe, cfg="batched", text="collapsed", text_cache=True) as done:
        assert _apart(diffusers_run(pipe, own), expected) < 1e-5
    handle.remove()
    assert (done.batched, done.single, done.reasons) == (own.steps, 0, ())
    # Both branches, the mask as one channel more, and not one row more.
    assert {shape[:2] for shape in shapes} == {(2, 9)}
    assert vars(pipe.transformer).keys() == before.keys()
    assert torch.equal(diffusers_run(pipe, own), expected)


# --- replay and drill --------------------------------------------------------------------------


def test_updates_are_replayed_from_any_state_of_the_scheduler(
    recorded: tuple[Case, Recording],
) -> None:
    own, recording = recorded
    pipe = load(own)
    generate(pipe)
    pipe.scheduler._step_index = 2
    assert check_pipeline(pipe, recording, case=own).verdict is Verdict.IDENTICAL


def _stale_counter(pipe: Pipeline) -> None:
    update = pipe.update

    def stale(inner: Pipeline, *args: Any) -> Tensor:
        made = update(inner, *args)
        inner.scheduler._step_index = 1
        return made

    pipe.update = stale


def _without_last_x0_cast(pipe: Pipeline) -> None:
    predict = pipe.predict

    def raw(inner: Pipeline, latent: Tensor, step: Any, *args: Any) -> Tensor:
        return predict(inner, latent, step, *args).bfloat16().float()

    pipe.predict = raw


@pytest.mark.parametrize(
    ("fault", "stage"), [(_stale_counter, "update"), (_without_last_x0_cast, "prediction")]
)
def test_a_fault_is_found_in_its_own_stage(
    fault: Callable[[Pipeline], None], stage: str, recorded: tuple[Case, Recording]
) -> None:
    own, recording = recorded
    pipe = load(own)
    fault(pipe)
    result = check_pipeline(pipe, recording, case=own)
    assert result.verdict is Verdict.DRIFTED
    assert {row.stage for row in result.rows if not row.verdict.passed} == {stage}


def test_the_floor_holds_a_run_in_float64(recorded: tuple[Case, Recording]) -> None:
    floor = recorded[1].manifest.noise_floor
    assert floor is not None
    raised = next(run for run in floor.runs if run.detail == "float32 against float64")
    assert {"step/0000/cond", "step/0000/guided", "video/frames"} <= {
        t.name for t in raised.tensors
    }


def _one_norm_scaled(pipe: Pipeline) -> None:
    pipe.transformer.transformer_blocks[1].attn2.norm_k.weight.data *= 1.05


def test_a_drill_names_the_module(recorded: tuple[Case, Recording]) -> None:
    own, recording = recorded
    result = check(own, recording, depth="modules", apply=_one_norm_scaled)
    assert result.verdict is Verdict.DRIFTED
    assert "transformer_blocks.1.attn2.norm_k" in result.sentence


def _apart(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_reused_guidance_follows_the_scale_of_the_networks_output(case: Case) -> None:
    def latent(**settings: Any) -> Tensor:
        return generate(load(case.replace(steps=20, **settings)))

    exact = latent()
    drift = {
        reuse: float((latent(adaptive_gate=0.5, adaptive_reuse=reuse) - exact).norm())
        for reuse in ("delta", "drop")
    }
    assert 0 < 4 * drift["delta"] < drift["drop"]
