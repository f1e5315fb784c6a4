"""Cases of plain pipelines: recorded, checked, and refused before any forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import truestep
from truestep.engines import diffusers
from truestep.errors import CaseError, FileFormatError, ModelLoadError, UsageError
from truestep.recording.format import Recording
from truestep.testing.tiny import calls as tiny_pictures
from truestep.verdict import Verdict

SMALL = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 16}


def flux(models: Path, **changes: Any) -> truestep.CallCase:
    case = truestep.CallCase(model=str(models / "flux"), call={"prompt": "a cat", **SMALL})
    return case.replace(**changes)


def image_to_image(models: Path) -> truestep.CallCase:
    return truestep.CallCase(
        model=str(models / "sd"),
        call={"prompt": "a cat", "num_inference_steps": 3, "strength": 0.8},
        input={"image": str(models / "cat.png")},
    )


def image_to_video(models: Path) -> truestep.CallCase:
    return truestep.CallCase(
        model=str(models / "wan"),
        call={"prompt": "a cat", "num_frames": 5, **SMALL},
        input={"image": str(models / "cat.png")},
    )


def bias(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.proj_out.bias.add_(0.01)


def brighter(pipe: Any) -> None:
    """The picture is scaled before it is encoded."""
    own = pipe.image_processor.preprocess
    pipe.image_processor.preprocess = lambda *a, **k: own(*a, **k) * 1.05


def narrower(pipe: Any) -> None:
    """The image is encoded with another scale, inside the encoder."""
    own = pipe.vae.encode
    pipe.vae.encode = lambda x, *a, **k: own(x * 1.05, *a, **k)


FAULTS: dict[str, tuple[Callable[[Path], truestep.CallCase], Callable[[Any], None], str]] = {
    "flux": (flux, bias, "transformer.forward (cond) at step 0: output"),
    "sd": (image_to_image, brighter, "code before vae.encode: x"),
    "wan": (image_to_video, narrower, "vae.encode: output"),
}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_a_case_is_identical_to_itself_and_a_fault_is_named_at_its_call(
    name: str, models: Path, tmp_path: Path
) -> None:
    make, fault, place = FAULTS[name]
    case = make(models)
    path = tmp_path / "reference.safetensors"
    truestep.record(case, path=path)
    same = truestep.check(case, path)
    assert same.verdict is truestep.Verdict.IDENTICAL
    assert same.case_id == case.id
    assert same.environment_differences == ()
    wrong = truestep.check(case, path, apply=fault)
    assert wrong.verdict is truestep.Verdict.DRIFTED
    assert wrong.sentence.startswith(f"drifted: {place}")
    assert wrong.actual.label == f"apply {fault.__name__}"


def test_inputs_are_kept_decoded_and_their_files_are_not_needed_again(
    models: Path, tmp_path: Path
) -> None:
    shutil.copy(models / "cat.png", tmp_path / "dog.png")
    case = truestep.CallCase(
        **{**image_to_image(models).model_dump(), "input": {"image": str(tmp_path / "dog.png")}}
    )
    recording = truestep.record(case, floor="none")
    (tmp_path / "dog.png").unlink()
    assert recording["input/image"].dtype is torch.uint8
    assert truestep.check(case, recording).verdict is truestep.Verdict.IDENTICAL


def test_a_changed_input_file_is_another_case_and_an_absent_one_is_said(
    models: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "dog.png"
    shutil.copy(models / "cat.png", picture)
    fields = {**image_to_image(models).model_dump(), "input": {"image": str(picture)}}
    case = truestep.CallCase(**fields)
    recording = truestep.record(case, floor="none")
    untold = {**recording.manifest.case, "sha256": {}}
    same = truestep.check(case, recording)
    assert same.verdict is truestep.Verdict.IDENTICAL
    assert same.notes == ()
    tiny_pictures.picture(1).save(picture)
    result = truestep.check(case, recording)
    assert result.verdict is truestep.Verdict.INCOMPARABLE
    assert "(sha256.input.image differ)" in result.sentence
    assert result.hint == "truestep record CASE --update  # takes the files as they are now"
    before = Recording(
        recording.manifest.model_copy(update={"case": untold}), tensors=dict(recording)
    )
    assert truestep.check(case, before).verdict is truestep.Verdict.IDENTICAL
    picture.unlink()
    result = truestep.check(case, recording)
    assert result.verdict is truestep.Verdict.IDENTICAL
    assert result.notes[0] == f"judged with the recorded image; {picture} is not there"


def test_another_file_of_an_input_is_a_change_and_its_copy_is_none(
    models: Path, tmp_path: Path
) -> None:
    case = image_to_image(models)
    recording = truestep.record(case, floor="none")
    tiny_pictures.picture(1).save(tmp_path / "other.png")
    shutil.copy(models / "cat.png", tmp_path / "copy.png")
    for name, verdict in (("other", "drifted"), ("copy", "identical")):
        files = {"image": str(tmp_path / f"{name}.png")}
        result = truestep.check(case, recording, settings={"input": files})
        assert result.verdict.value == verdict
        assert ("the change touched nothing" in result.sentence) == (name == "copy")


def test_defaults_are_recorded_and_another_one_is_said(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import FluxPipeline

    case = flux(models)
    recording = truestep.record(case, floor="none")
    call = recording.manifest.settings["call"]
    assert call["guidance_scale"] == 3.5
    assert call["output_type"] == "pil"
    assert call["prompt"] == "a cat"
    assert "generator" not in call
    assert recording.manifest.settings["scheduler_config"]["shift"] == 1.0
    inner = FluxPipeline.__call__
    defaults = list(inner.__wrapped__.__defaults__)
    defaults[defaults.index(3.5)] = 4.5
    monkeypatch.setattr(inner.__wrapped__, "__defaults__", tuple(defaults))
    result = truestep.check(case, recording)
    assert "default of guidance_scale: 4.5 here, 3.5 recorded" in result.notes


def test_settings_of_call_scheduler_and_precision_are_changes(models: Path) -> None:
    case = flux(models)
    recording = truestep.record(case)
    shifted = truestep.check(case, recording, settings={"scheduler.use_karras_sigmas": True})
    assert shifted.sentence.startswith("drifted: scheduler.set_timesteps")
    assert shifted.actual.label == "scheduler_settings.use_karras_sigmas=True"
    longer = truestep.check(case, recording, settings={"num_inference_steps": 4})
    assert longer.verdict is truestep.Verdict.DRIFTED
    with pytest.raises(CaseError, match="no argument 'num_steps'"):
        truestep.check(case, recording, settings={"num_steps": 4})
    expected = truestep.check(case, recording, expect="different")
    assert expected.verdict is truestep.Verdict.UNMET


def test_another_scheduler_several_prompts_and_pictures(models: Path) -> None:
    case = truestep.CallCase(
        model=str(models / "sd"),
        pipeline="StableDiffusionPipeline",
        scheduler="EulerDiscreteScheduler",
        scheduler_settings={"use_karras_sigmas": True},
        call={
            "prompt": ["a cat", "a dog"],
            "num_images_per_prompt": 2,
            "num_inference_steps": 2,
            "height": 32,
            "width": 32,
        },
    )
    recording = truestep.record(case, floor="none")
    assert recording.manifest.settings["components"]["scheduler"] == "EulerDiscreteScheduler"
    assert recording.manifest.settings["pipeline"] == "StableDiffusionPipeline"
    assert truestep.check(case, recording).verdict is truestep.Verdict.IDENTICAL


def test_a_reference_of_another_case_is_incomparable(models: Path) -> None:
    recording = truestep.record(flux(models), floor="none")
    result = truestep.check(flux(models, seed=1), recording)
    assert result.verdict is truestep.Verdict.INCOMPARABLE
    assert "(seed differ)" in result.sentence


def test_a_candidate_that_raises_or_ends_the_process_is_invalid_with_the_place(
    models: Path,
) -> None:
    case = flux(models)
    recording = truestep.record(case, floor="none")

    def raises(pipe: Any) -> None:
        def step(*args: Any, **kwargs: Any) -> None:
            raise ValueError("no more")

        pipe.scheduler.step = step

    result = truestep.check(case, recording, apply=raises)
    assert result.verdict is truestep.Verdict.INVALID
    assert "raised ValueError: no more, after scheduler.step was called" in result.sentence

    def leaves(pipe: Any) -> None:
        raise SystemExit(0)

    ended = truestep.check(case, recording, apply=leaves)
    assert ended.verdict is truestep.Verdict.INVALID
    assert "ended the process" in ended.sentence

    def broken(pipe: Any) -> None:
        raise KeyError("unet")

    with pytest.raises(UsageError, match="raised KeyError: 'unet'") as caught:
        truestep.check(case, recording, apply=broken)
    assert caught.value.likely.startswith("it is called with a FluxPipeline: vae, ")


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "argument": ({"heigt": 3}, "the call has no argument 'heigt'", "did you mean 'height'?"),
    "pipeline": (
        {"pipeline": "FluxPipelin"},
        "diffusers has no pipeline class 'FluxPipelin'",
        "did you mean 'FluxPipeline'?",
    ),
    "scheduler": (
        {"scheduler": "EulerDiscreteSchedule"},
        "diffusers has no scheduler class 'EulerDiscreteSchedule'",
        "did you mean 'EulerDiscreteScheduler'?",
    ),
    "setting": ({"scheduler.shft": 2}, "has no setting 'shft'", "did you mean 'shift'?"),
    "generator": ({"generator": 3}, "a generator is made from the case's seed", ""),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_cannot_be_is_refused_before_weights_are_loaded(
    name: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "_loaded", lambda *_: pytest.fail("it was loaded"))
    changes, what, likely = BAD[name]
    with pytest.raises(CaseError) as caught:
        truestep.record(flux(models, **changes))
    assert what in caught.value.what
    assert likely in caught.value.likely


def test_a_call_without_what_it_needs_is_refused(models: Path) -> None:
    case = truestep.CallCase(model=str(models / "wan"), call={"prompt": "a cat"})
    with pytest.raises(CaseError, match="the call needs image, which is not given"):
        truestep.record(case)


def test_an_input_that_cannot_be_read_is_named(models: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"no picture")
    case = image_to_image(models)
    for file, what in (("cat.png", "cannot identify image file"), ("dog.png", "no such file")):
        wrong = truestep.CallCase(**{**case.model_dump(), "input": {"image": str(tmp_path / file)}})
        with pytest.raises(FileFormatError, match="the picture cannot be read") as caught:
            truestep.record(wrong)
        assert what in caught.value.measured
        assert caught.value.where == str(tmp_path / file)


def test_a_model_that_brings_code_is_refused(models: Path, tmp_path: Path) -> None:
    index = json.loads((models / "flux" / "model_index.json").read_text())
    for key, value in (("_class_name", ["mine", "Mine"]), ("vae", ["mine", "Mine"])):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, key: value}))
        with pytest.raises(ModelLoadError, match="brings code of its own, which is not run"):
            truestep.record(truestep.CallCase(model=str(tmp_path)))


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="the model folder is not a diffusers model"):
        truestep.record(truestep.CallCase(model=str(tmp_path)))


@pytest.mark.parametrize("level", ["sketch", "stats"])
def test_levels_that_keep_no_tensors_are_compared_and_not_replayed(
    models: Path, tmp_path: Path, level: Any
) -> None:
    case = flux(models)
    whole = truestep.record(case, floor="none")
    small = truestep.record(case, level=level, floor="none", path=tmp_path / "small.safetensors")
    assert small.manifest.calls == whole.manifest.calls
    assert {name.partition("/")[0] for name in small} <= {"stats", "sketch"}
    for side in (whole, small):
        result = truestep.compare(side, small)
        assert result.verdict is (Verdict.EQUIVALENT if level == "sketch" else Verdict.INCONCLUSIVE)
    other = truestep.record(case.replace(prompt="a dog"), floor="none")
    result = truestep.compare(other, small)
    assert [difference.key for difference in result.case_differences] == ["call.prompt"]
    drifted = [row.stage for row in result.rows if row.verdict is Verdict.DRIFTED]
    assert drifted[0] == "text"
    for reference in (small, tmp_path / "small.safetensors"):
        with pytest.raises(UsageError, match=f"level '{level}' only: .* no tensors to replay"):
            truestep.check(case, reference)


def test_modules_are_opened_beside_the_case_as_it_is_prepared(models: Path, tmp_path: Path) -> None:
    """What prepares both sides is not taken for the fault."""
    (tmp_path / "prepared.py").write_text(
        "def other(pipe):\n    pipe.transformer.x_embedder.weight.data.mul_(1.5)\n"
    )
    case = flux(models, prepare=f"{tmp_path / 'prepared.py'}:other")
    recording = truestep.record(case)

    def dropped(pipe: Any) -> None:
        pipe.transformer.transformer_blocks[0].ff.net[2].bias = None

    result = truestep.check(case, recording, apply=dropped, depth="modules")
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "transformer.transformer_blocks.0.ff.net.2"
    assert "bias is missing" in (result.first_divergence.operator or "")
    with pytest.raises(UsageError, match="trusted is of a pipeline object"):
        truestep.check(case, recording, depth="modules", trusted=object())


def test_a_pipeline_object_is_recorded_and_checked_with_what_it_was_called(
    models: Path, tmp_path: Path
) -> None:
    from PIL import Image

    from truestep.testing import tiny

    picture = Image.open(models / "cat.png")
    call = {"prompt": "a cat", "image": picture, "num_inference_steps": 2}
    pipe = tiny.pipeline("StableDiffusionImg2ImgPipeline")
    pipe.set_progress_bar_config(disable=True)
    path = tmp_path / "reference.safetensors"
    betas = pipe.scheduler.betas
    truestep.record(pipe, call=call, path=path)
    assert pipe.scheduler.betas is betas  # what it is forced to hold, it does not keep
    assert truestep.check(pipe, Recording.open(path)).verdict is truestep.Verdict.IDENTICAL
    wrong = truestep.check(pipe, path, apply=narrower)
    assert wrong.sentence.startswith("drifted: vae.encode: output")
    with pytest.raises(UsageError, match="settings are of a case"):
        truestep.check(pipe, path, settings={"strength": 0.5})
