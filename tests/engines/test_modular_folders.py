"""Folders of modular pipelines: recorded, checked, and refused before any forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import truestep
from truestep.engines import diffusers
from truestep.engines.arguments import Signature, named_missing
from truestep.errors import CaseError, ModelLoadError, UsageError
from truestep.testing import tiny
from truestep.testing.tiny.calls import picture
from truestep.verdict import Verdict

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
VIDEO = {"num_frames": 5, **SMALL}
THREE = {"num_inference_steps": 3}


def scale(pipe: Any) -> None:
    pipe.guider.guidance_scale *= 1.01


def bias(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.proj_out.bias.add_(0.01)


def bright(pipe: Any) -> None:
    own = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: own(z * 1.01, *args, **kwargs)


def narrow(pipe: Any) -> None:
    own = pipe.vae.encode
    pipe.vae.encode = lambda x, *args, **kwargs: own(x * 1.05, *args, **kwargs)


def inverted(pipe: Any) -> None:
    """The mask is turned: what was kept is painted, and the other half is encoded."""
    own = pipe.mask_processor.preprocess
    pipe.mask_processor.preprocess = lambda *args, **kwargs: 1 - own(*args, **kwargs)


def cut(pipe: Any) -> None:
    own = pipe.text_encoder.forward
    pipe.text_encoder.forward = lambda ids, *args, **kwargs: own(ids.flip(-1), *args, **kwargs)


def karras(pipe: Any) -> None:
    kind, config = type(pipe.scheduler), pipe.scheduler.config
    pipe.scheduler = kind.from_config(config, use_karras_sigmas=True)


def slope(pipe: Any) -> None:
    own = pipe.unet.conv_out.forward
    pipe.unet.conv_out.forward = lambda x: own(x) * 1.01


Example = tuple[str, dict[str, Any], bool, Callable[[Any], None], str]

EXAMPLES: dict[str, Example] = {
    "flux": (
        "flux/FluxAutoBlocks/text2image",
        {**SMALL, "max_sequence_length": 16},
        False,
        bias,
        "transformer.forward",
    ),
    "flux image": (
        "flux/FluxAutoBlocks/image2image",
        {**SMALL, "max_sequence_length": 16},
        True,
        narrow,
        "vae.encode: output",
    ),
    "kontext": ("flux/FluxKontextAutoBlocks/text2image", SMALL, False, bright, "vae.decode"),
    "wan": ("wan/WanBlocks", VIDEO, False, scale, "guider.forward at step 0: output pred"),
    "wan image": ("wan/WanImage2VideoAutoBlocks/image2video", VIDEO, True, narrow, "vae.encode"),
    "qwen": ("qwenimage/QwenImageAutoBlocks/text2image", SMALL, False, scale, "guider.forward"),
    "z": ("z_image/ZImageAutoBlocks/text2image", SMALL, False, bright, "vae.decode"),
    "sd3": ("stable_diffusion_3/StableDiffusion3AutoBlocks/text2image", SMALL, False, cut, "text"),
    "sdxl": (
        "stable_diffusion_xl/StableDiffusionXLAutoBlocks/text2image",
        SMALL,
        False,
        slope,
        "unet.forward",
    ),
    "inpainting": (
        "stable_diffusion_xl/StableDiffusionXLAutoBlocks/inpainting",
        {**SMALL, **THREE, "strength": 0.8},
        True,
        inverted,
        "code before vae.encode (call 2): x",
    ),
    "ltx": (
        "ltx/LTXAutoBlocks/text2video",
        {**VIDEO, **THREE},
        False,
        karras,
        "scheduler.set_timesteps",
    ),
}


def example(name: str, folder: Path) -> truestep.CallCase:
    """The case of an example, its model and pictures written to a folder."""
    configuration, call, pictured, *_ = EXAMPLES[name]
    tiny.save(configuration, folder / "model")
    files = {}
    if pictured:
        picture(0).resize((32, 32)).save(folder / "cat.png")
        files["image"] = str(folder / "cat.png")
    if name == "inpainting":
        half = Image.new("L", (32, 32))
        half.paste(255, (16, 0, 32, 32))
        half.save(folder / "mask.png")
        files["mask_image"] = str(folder / "mask.png")
    return truestep.CallCase(
        model=str(folder / "model"), call={"prompt": "a cat", **call}, input=files
    )


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_is_identical_to_itself_and_a_fault_is_named(name: str, tmp_path: Path) -> None:
    configuration, _, _, fault, place = EXAMPLES[name]
    case = example(name, tmp_path)
    path = tmp_path / "reference.safetensors"
    truestep.record(case, path=path, floor="none")
    same = truestep.check(case, path)
    assert same.verdict is Verdict.IDENTICAL
    assert same.environment_differences == ()
    wrong = truestep.check(case, path, apply=fault)
    assert wrong.verdict is Verdict.DRIFTED
    assert wrong.sentence.startswith(f"drifted: {place}")
    settings = truestep.Recording.open(path).manifest.settings
    assert settings["pipeline"] == configuration.split("/")[1]


def test_what_blocks_give_is_asked_for_and_settings_are_changes(tmp_path: Path) -> None:
    case = example("flux", tmp_path).replace(**THREE)
    reference = truestep.record(case, floor="none")
    call = reference.manifest.settings["call"]
    assert call["output"] == "images"
    assert call["guidance_scale"] == 3.5
    assert "generator" not in call
    nothing = truestep.check(case, reference, settings={"guidance_scale": 3.5})
    assert "the change touched nothing" in nothing.sentence
    latents = truestep.check(case, reference, settings={"num_inference_steps": 4})
    assert latents.verdict is Verdict.DRIFTED
    karras_sigmas = truestep.check(case, reference, settings={"scheduler.use_karras_sigmas": True})
    assert karras_sigmas.sentence.startswith("drifted: scheduler.set_timesteps")


def test_a_folder_that_was_moved_is_loaded_from_where_it_is(tmp_path: Path) -> None:
    case = example("flux", tmp_path)
    reference = truestep.record(case, floor="none")
    shutil.move(tmp_path / "model", tmp_path / "moved")
    same = truestep.check(case, reference, settings={"model": str(tmp_path / "moved")})
    assert same.verdict is Verdict.IDENTICAL
    assert "the change touched nothing" in same.sentence


def test_blocks_run_on_a_folder_of_a_standard_pipeline(models: Path) -> None:
    case = truestep.CallCase(
        model=str(models / "flux"),
        pipeline="FluxAutoBlocks",
        call={"prompt": "a cat", **SMALL, "max_sequence_length": 16},
    )
    reference = truestep.record(case, floor="none")
    assert reference.manifest.settings["pipeline"] == "FluxAutoBlocks"
    assert truestep.check(case, reference).verdict is Verdict.IDENTICAL
    own = case.replace(pipeline="FluxModularPipeline")
    assert truestep.check(own, truestep.record(own, floor="none")).verdict is Verdict.IDENTICAL


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modular")
    tiny.save("flux/FluxAutoBlocks/text2image", folder / "flux")
    return folder / "flux"


def case_of(folder: Path, **fields: Any) -> truestep.CallCase:
    return truestep.CallCase(model=str(folder), **{"call": {"prompt": "a cat"}, **fields})


def test_arguments_and_blocks_that_there_are_not_are_refused(flux: Path) -> None:
    with pytest.raises(CaseError, match="the call has no argument 'heigt'") as caught:
        truestep.record(case_of(flux, call={"prompt": "a cat", "heigt": 3}))
    assert caught.value.where == "FluxAutoBlocks.input_names"
    assert caught.value.likely == "did you mean 'height'?"
    with pytest.raises(CaseError, match="diffusers has no blocks class 'FluxAutoBlock'") as caught:
        truestep.record(case_of(flux, pipeline="FluxAutoBlock"))
    assert caught.value.likely == "did you mean 'FluxAutoBlocks'?"
    with pytest.raises(CaseError, match="a generator is made from the case's seed"):
        truestep.record(case_of(flux, call={"generator": 3}))


def test_a_call_without_what_its_blocks_need_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = example("ltx", tmp_path)
    monkeypatch.setattr(diffusers, "_loaded", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(CaseError, match="the call needs prompt, which is not given"):
        truestep.record(truestep.CallCase(model=case.model, call=VIDEO))


def test_what_a_later_block_misses_is_named_when_it_runs() -> None:
    signature = Signature("Blocks.input_names", ("prompt",), {}, ())
    with (
        pytest.raises(CaseError, match="the call needs latents, which is not given"),
        named_missing(signature),
    ):
        raise ValueError("Required input 'latents' is missing")
    with pytest.raises(ValueError, match="no more"), named_missing(signature):
        raise ValueError("no more")


def altered(flux: Path, folder: Path, **changes: Any) -> Path:
    copy = folder / "copy"
    shutil.copytree(flux, copy)
    index = json.loads((copy / "modular_model_index.json").read_text())
    (copy / "modular_model_index.json").write_text(json.dumps({**index, **changes}))
    return copy


def test_code_of_its_own_and_parts_of_elsewhere_are_refused(flux: Path, tmp_path: Path) -> None:
    index = json.loads((flux / "modular_model_index.json").read_text())
    mine = [*index["vae"][:2], {**index["vae"][2], "type_hint": ["mine", "Mine"]}]
    with pytest.raises(ModelLoadError, match="brings code of its own") as caught:
        truestep.record(case_of(altered(flux, tmp_path, vae=mine)))
    assert caught.value.measured == "vae is of mine.Mine, not of diffusers or transformers"
    shutil.rmtree(tmp_path / "copy")
    elsewhere = [None, None, {**index["vae"][2], "pretrained_model_name_or_path": "some/model"}]
    folder = altered(flux, tmp_path, vae=elsewhere)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelLoadError, match="the folder has no vae") as caught:
        truestep.record(case_of(folder))
    assert caught.value.measured == "it is said to be in some/model"
    shutil.rmtree(folder)
    with pytest.raises(ModelLoadError, match="diffusers has no modular pipeline 'FluxPipeline'"):
        truestep.record(case_of(altered(flux, tmp_path, _class_name="FluxPipeline")))


def test_a_damaged_part_is_named(flux: Path, tmp_path: Path) -> None:
    folder = altered(flux, tmp_path)
    next((folder / "vae").glob("*.safetensors")).write_bytes(b"no weights")
    with pytest.raises(ModelLoadError, match="the model could not be loaded") as caught:
        truestep.record(case_of(folder))
    assert "Unable to load vae" in caught.value.measured


def test_a_configuration_that_is_not_given_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder of ltx/LTXBlocks could not be loaded") as caught:
        tiny.save("ltx/LTXBlocks", tmp_path / "ltx")
    assert "diffusers exports no LTXBlocks" in caught.value.measured
    assert not (tmp_path / "ltx").exists()
