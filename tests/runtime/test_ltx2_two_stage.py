"""Two stages of LTX-2: bit-equal to diffusers' own sequence, and recorded like any run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.case import Case
from truestep.errors import CaseError, FileFormatError, TruestepError
from truestep.recording.format import Recording
from truestep.replay.record import record
from truestep.replay.stages import replay
from truestep.runtime.loading import load
from truestep.runtime.ltx2.latents import from_tokens
from truestep.runtime.ltx2.two_stage import second_stage
from truestep.runtime.pipeline import generate

FRAME = 4 * 6
"""Tokens of a frame of the second stage."""


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bench.faults.tiny import build_tiny_upsampler

    return build_tiny_upsampler(tmp_path_factory.mktemp("upsampler") / "latent_upsampler")


@pytest.fixture(scope="module")
def first(tiny_ltx2: dict[str, Path], ltx2_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_ltx2["2.3"]), **ltx2_case).replace(steps=2)


@pytest.fixture(scope="module")
def initial(first: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("first") / "first.safetensors"
    record(first, path=path, floor="none")
    return path


@pytest.fixture(scope="module")
def second(first: Case, initial: Path, upsampler: Path) -> Case:
    return second_stage(first, initial, upsampler=upsampler)


def of_diffusers(case: Case, upsampler: Path) -> list[torch.Tensor]:
    """Latent and sound of diffusers' three pipelines, with one generator."""
    import diffusers
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
    from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES

    dtype = getattr(torch, case.dtype)
    pipe = diffusers.LTX2Pipeline.from_pretrained(case.model, dtype=dtype)
    model = LTX2LatentUpsamplerModel.from_pretrained(upsampler, dtype=dtype)
    larger = diffusers.LTX2LatentUpsamplePipeline(vae=pipe.vae, latent_upsampler=model)
    for each in (pipe, larger):
        each.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(case.seed)
    given: dict[str, Any] = {
        "prompt": case.prompt,
        "negative_prompt": case.negative_prompt,
        "num_frames": case.num_frames,
        "max_sequence_length": case.max_sequence_length,
        "generator": generator,
        "output_type": "latent",
        "return_dict": False,
    }
    video, sound = pipe(
        **given,
        height=case.height,
        width=case.width,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        spatio_temporal_guidance_blocks=list(case.settings.stg_blocks or ()),
    )
    video = larger(latents=video, output_type="latent", return_dict=False)[0]
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, use_dynamic_shifting=False, shift_terminal=None
    )
    sigmas = [sigma for sigma in STAGE_2_DISTILLED_SIGMA_VALUES if sigma]
    made = pipe(
        **given,
        height=2 * case.height,
        width=2 * case.width,
        latents=video,
        audio_latents=sound,
        num_inference_steps=3,
        noise_scale=sigmas[0],
        sigmas=sigmas,
        guidance_scale=1.0,
        audio_guidance_scale=1.0,
        guidance_rescale=0.0,
        audio_guidance_rescale=0.0,
        stg_scale=0.0,
        audio_stg_scale=0.0,
        modality_scale=1.0,
        audio_modality_scale=1.0,
    )
    return list(made)


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        ("2.3", {}),
        ("2.3", {"dtype": "bfloat16"}),
        ("2.0", {}),
    ],
)
def test_latents_are_bit_equal_to_diffusers(
    tiny_ltx2: dict[str, Path],
    first: Case,
    upsampler: Path,
    tmp_path: Path,
    version: str,
    changes: dict[str, Any],
) -> None:
    case = first.replace(model=str(tiny_ltx2[version]), **changes)
    video, sound = of_diffusers(case, upsampler)
    path = tmp_path / "first.safetensors"
    record(case, path=path, floor="none")
    pipe = load(second_stage(case, path, upsampler=upsampler))
    made = generate(pipe)
    mean, deviation = (
        v.view(1, -1, 1, 1, 1).float() for v in (pipe.vae.latents_mean, pipe.vae.latents_std)
    )
    assert torch.equal(from_tokens(pipe, made.video) * deviation + mean, video)
    audio_vae = pipe.audio_vae
    own = made.audio * audio_vae.latents_std.float() + audio_vae.latents_mean.float()
    assert torch.equal(own, sound.transpose(1, 2).flatten(2, 3))
    assert pipe.forwards == 3  # no guidance


def test_a_second_stage_is_a_case_of_its_own(first: Case, second: Case, initial: Path) -> None:
    assert (second.height, second.width) == (2 * first.height, 2 * first.width)
    assert (second.steps, second.guidance_scale) == (3, 1.0)
    assert second.settings.initial == str(initial)
    assert second.settings.stg_blocks == first.settings.stg_blocks
    assert second.id != first.id
    own = set(second.canonical()["settings"]) - set(first.canonical()["settings"])
    assert {"initial", "upsampler", "sigma_schedule"} <= own


def test_a_second_stage_is_recorded_and_replayed(second: Case, tmp_path: Path) -> None:
    recording = record(second, path=tmp_path / "second.safetensors", floor="none")
    assert recording["video/frames"].shape[-2:] == (second.height, second.width)
    assert recording["schedule/sigmas"].tolist() == pytest.approx([0.909375, 0.725, 0.421875, 0])
    again = replay(load(second), recording)
    assert not again.failures
    for name, value in again.outputs.items():
        assert torch.equal(value, recording[name]), name
    assert {"latent/initial", "audio/latent/initial"} <= set(again.outputs)


def test_the_start_is_mostly_noise_that_is_not_the_first_stages(
    first: Case, second: Case, initial: Path
) -> None:
    pipe = load(second)
    pipe.prepare(pipe)
    made = pipe.make_latent(pipe)
    other = load(first.replace(height=second.height, width=second.width))
    other.prepare(other)
    same_seed = other.make_latent(other)
    for own, noise in zip(made, same_seed, strict=True):
        correlation = torch.corrcoef(torch.stack([own.flatten(), noise.flatten()]))[0, 1]
        assert abs(correlation) < 0.3
    sound = Recording.open(initial)["audio/latent/final"]
    rest = made.audio - (1 - 0.909375) * sound
    assert float(rest.std()) == pytest.approx(0.909375, abs=0.2)


def test_the_first_frame_of_a_second_stage_is_the_images(
    first: Case, upsampler: Path, tmp_path: Path
) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (128, 192, 3), dtype=np.uint8)
    image = tmp_path / "first.png"
    Image.fromarray(pixels).save(image)
    case = first.replace(image=str(image))
    record(case, path=tmp_path / "first.safetensors", floor="none")
    later = second_stage(case, tmp_path / "first.safetensors", upsampler=upsampler)
    pipe = load(later)
    alone = load(case.replace(height=later.height, width=later.width))
    alone.prepare(alone)
    expected = alone.make_latent(alone).video[:, :FRAME]
    made = generate(pipe)
    assert torch.equal(made.video[:, :FRAME], expected)
    assert not torch.equal(made.video[:, FRAME : 2 * FRAME], expected)


def test_the_sampler_of_the_first_stage_is_kept(first: Case, upsampler: Path) -> None:
    later = second_stage(first.replace(sampler="res2s"), "x", upsampler=upsampler)
    assert later.settings.sampler == "res2s"


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"upsampler": None}, "initial is set, and upsampler is not", "--set upsampler=PATH"),
        ({"initial": None}, "upsampler is set, and initial is not", "drop upsampler"),
        ({"steps": 4}, "schedule has 3 steps, not 4", "--set steps=3"),
        ({"sigma_schedule": None}, "initial has no effect", "sigma_schedule=distilled_stage_2"),
        ({"sigma_schedule": "distilled", "steps": 8}, "initial has no effect", "steps=3"),
        ({"initial": "nowhere.safetensors"}, "there is no recording to start", "truestep run"),
        ({"upsampler": "nowhere"}, "the latent upsampler cannot be used", "--set upsampler"),
        ({"height": 64}, "of another size", "needed: 96x32, 17 frames"),
        ({"width": 128, "height": 192}, "of another size", "96x64, 17 frames; needed: 64x96"),
        ({"num_frames": 25}, "of another size", "25 frames, which the upsampler makes 2 times"),
        ({"fps": 12}, "of another length, or of other clips", "set fps"),
        ({"videos_per_prompt": 2}, "of another length, or of other clips", "needed: 2 of"),
    ],
)
def test_what_does_not_fit_is_said_before_any_forward(
    second: Case, changes: dict[str, Any], message: str, hint: str
) -> None:
    pipe = load(second.replace(**changes))
    encoded: list[object] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *args: encoded.append(args))
    with pytest.raises(CaseError, match=message) as caught:
        generate(pipe)
    assert hint in str(caught.value)
    assert not encoded
    assert pipe.forwards == 0


def refused(case: Case) -> TruestepError:
    pipe = load(case)
    with pytest.raises(TruestepError) as caught:
        generate(pipe)
    assert pipe.forwards == 0
    return caught.value


def test_a_recording_of_video_alone_is_no_start(
    second: Case, initial: Path, tmp_path: Path
) -> None:
    full = Recording.open(initial)
    mute = {name: value for name, value in full.items() if not name.startswith("audio/")}
    rows = tuple(row for row in full.manifest.tensors if row.name in mute)
    manifest = full.manifest.model_copy(update={"tensors": rows})
    Recording.in_memory(mute, manifest).save(tmp_path / "mute.safetensors")
    error = refused(second.replace(initial=str(tmp_path / "mute.safetensors")))
    assert isinstance(error, FileFormatError)
    assert "it has no audio/latent/final" in str(error)
    nameless = full.manifest.model_copy(update={"case": None})
    Recording.in_memory(dict(full), nameless).save(tmp_path / "nameless.safetensors")
    error = refused(second.replace(initial=str(tmp_path / "nameless.safetensors")))
    assert "it does not say of what case it is" in str(error)


def test_a_sketch_or_another_file_is_no_start(second: Case, first: Case, tmp_path: Path) -> None:
    record(first, path=tmp_path / "sketch.safetensors", floor="none", level="sketch")
    error = refused(second.replace(initial=str(tmp_path / "sketch.safetensors")))
    assert "it has no latent/final" in str(error)
    assert "its level is sketch; needed: full" in str(error)
    (tmp_path / "other.safetensors").write_bytes(b"no recording")
    assert isinstance(
        refused(second.replace(initial=str(tmp_path / "other.safetensors"))), FileFormatError
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 16}, "has 16 channels, the model 8"),
        ({"temporal_upsample": True}, "changes the number of frames"),
        ({"rational_spatial_scale": 1.5}, "which the upsampler makes 1.5 times as large"),
        ({"_class_name": "AutoencoderKL"}, "its class is AutoencoderKL, not LTX2LatentUpsampler"),
    ],
)
def test_an_upsampler_that_does_not_fit_is_refused(
    second: Case, upsampler: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(upsampler, tmp_path / "other")
    own = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**own, **config}), "utf-8")
    error = refused(second.replace(upsampler=str(folder)))
    assert message in " ".join(str(error).split())


def test_an_upsampler_without_weights_is_refused(upsampler: Path, first: Case) -> None:
    empty = upsampler.parent / "empty"
    empty.mkdir(exist_ok=True)
    shutil.copy(upsampler / "config.json", empty)
    with pytest.raises(CaseError, match="it has no weights"):
        second_stage(first, "x", upsampler=empty)


def test_only_ltx2_has_a_second_stage(tiny_case: dict[str, Any], upsampler: Path) -> None:
    with pytest.raises(CaseError, match="only an LTX-2 case has a second stage"):
        second_stage(Case(model="x", **tiny_case), "x", upsampler=upsampler)


def test_a_resampler_of_another_scale_makes_its_size(first: Case, tmp_path: Path) -> None:
    """Half as large again: 64x64 to 96x96."""
    from bench.faults.tiny import build_tiny_upsampler

    folder = build_tiny_upsampler(tmp_path / "rational", rational_spatial_scale=1.5)
    case = first.replace(width=64, height=64)
    record(case, path=tmp_path / "first.safetensors", floor="none")
    later = second_stage(case, tmp_path / "first.safetensors", upsampler=folder)
    assert (later.width, later.height) == (96, 96)
    assert generate(load(later)).video.shape == (1, 3 * 3 * 3, 8)
