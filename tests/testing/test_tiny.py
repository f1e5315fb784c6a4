"""Tiny pipelines: every family's shape agrees, they run, and a seed gives its bits."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from truestep.errors import UsageError
from truestep.testing import tiny
from truestep.testing.outputs import leaves

SAMPLE = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "FluxFillPipeline",
    "FluxControlPipeline",
    "FluxKontextPipeline",
    "QwenImagePipeline",
    "WanPipeline",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
    "LTXPipeline",
    "LTX2Pipeline",
    "CogVideoXPipeline",
    "HunyuanVideoPipeline",
    "MochiPipeline",
    "ZImagePipeline",
    "SanaPipeline",
    "Cosmos2TextToImagePipeline",
    "Cosmos3OmniPipeline",
    "QwenImage21Pipeline",
    "Kandinsky6TI2VAPipeline",
    "PixArtSigmaPipeline",
    "AudioLDM2Pipeline",
    "StableAudioPipeline",
    "flux/FluxAutoBlocks/image2image",
    "qwenimage/QwenImageAutoBlocks/text2image",
    "wan/WanBlocks",
]
"""One or two of each common family, and modular ones."""


def run(pipe: Any, name: str) -> list[torch.Tensor]:
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(leaves(pipe(**tiny.example_call(name))))


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in pairs)


def test_tables_that_a_class_draws_for_itself_are_of_the_seed_too() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = tiny.pipeline("StableAudioPipeline").transformer.time_proj.weight
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, tiny.pipeline("StableAudioPipeline").transformer.time_proj.weight)
    other = tiny.pipeline("StableAudioPipeline", seed=1).transformer.time_proj.weight
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", SAMPLE)
def test_it_runs_and_one_seed_gives_one_picture(name: str) -> None:
    pipe = tiny.pipeline(name)
    first = run(pipe, name)
    assert first
    assert all(bool(torch.isfinite(leaf).all()) for leaf in first)
    assert max(float(leaf.float().std()) for leaf in first) > 0.01
    assert equal(first, run(tiny.pipeline(name), name))


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, component in pipe.components.items()
        if isinstance(component, torch.nn.Module)
        for key, value in component.state_dict().items()
    }


def test_a_seed_is_its_bits_and_another_seed_is_others() -> None:
    one, again, other = (weights(tiny.pipeline("FluxPipeline", seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(one[key], again[key]) for key in one)
    same = [key for key in one if torch.equal(one[key], other[key])]
    assert all("position_ids" in key for key in same)


def test_no_weight_is_constant() -> None:
    """A gate or last layer that starts at zero would hide every fault before it."""
    for name in ("FluxPipeline", "WanPipeline", "StableDiffusionControlNetPipeline"):
        pipe = tiny.pipeline(name)
        for slot, component in pipe.components.items():
            if isinstance(component, torch.nn.Module):
                for key, value in component.named_parameters():
                    assert value.numel() == 1 or float(value.detach().std()) > 0, (name, slot, key)


def test_the_seed_of_the_weights_changes_the_picture() -> None:
    name = "StableDiffusionPipeline"
    assert not equal(run(tiny.pipeline(name, seed=0), name), run(tiny.pipeline(name, seed=1), name))


def test_a_folder_that_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    """transformers loads no processor of vision and language without torchvision."""
    if importlib.util.find_spec("torchvision"):
        pytest.skip("torchvision is installed")
    with pytest.raises(UsageError, match="of QwenImageEditPipeline could not be loaded here") as e:
        tiny.save("QwenImageEditPipeline", tmp_path / "edit")
    assert e.value.where == "processor (Qwen2VLProcessor) reads videos by torchvision"
    assert e.value.hint == "pip install torchvision"
    assert not (tmp_path / "edit").exists()


def test_a_call_has_a_new_generator_each_time() -> None:
    first, second = (tiny.example_call("FluxPipeline") for _ in range(2))
    assert first["generator"] is not second["generator"]
    assert torch.equal(
        torch.randn(3, generator=first["generator"]), torch.randn(3, generator=second["generator"])
    )


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionPipeline", "WanPipeline"])
def test_a_saved_folder_loads_and_gives_the_same_picture(tmp_path: Path, name: str) -> None:
    tiny.save(name, tmp_path / "tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "tiny")
    assert type(loaded).__name__ == name
    made = tiny.pipeline(name)
    for part, component in made.components.items():
        if isinstance(component, torch.nn.Module):
            weights = loaded.components[part].state_dict()
            assert weights.keys() == component.state_dict().keys()
            assert all(torch.equal(weights[k], v) for k, v in component.state_dict().items())
            for weight in loaded.components[part].parameters():
                weight.data = weight.data.clone()  # old kernels sum by where memory begins
    assert equal(run(loaded, name), run(made, name))


def test_the_type_of_the_weights() -> None:
    pipe = tiny.pipeline("StableDiffusionPipeline", dtype="bfloat16")
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16
    assert all(bool(torch.isfinite(leaf).all()) for leaf in run(pipe, "StableDiffusionPipeline"))


def test_an_unknown_class_is_named_with_its_neighbours() -> None:
    with pytest.raises(UsageError) as caught:
        tiny.pipeline("FluxPipline")
    assert "has no pipeline 'FluxPipline'" in str(caught.value)
    assert "nearest names: FluxPipeline" in str(caught.value)
    assert caught.value.hint == "truestep tiny FluxPipeline tiny"


def test_an_unknown_modular_configuration_is_named_with_its_neighbours() -> None:
    with pytest.raises(UsageError, match="no modular configuration 'flux/FluxBlocks'") as caught:
        tiny.pipeline("flux/FluxBlocks")
    assert "flux/FluxAutoBlocks/text2image" in str(caught.value)


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UsageError, match="runs exported ONNX graphs"):
        tiny.pipeline("OnnxStableDiffusionPipeline")
    with pytest.raises(UsageError, match="needs packages of which one is not installed"):
        tiny.pipeline("SpectrogramDiffusionPipeline")


def test_what_is_listed_can_be_asked_for() -> None:
    assert {"FluxPipeline", "WanVACEPipeline"} <= set(tiny.names())
    assert not [name for name in tiny.names() if "Modular" in name or "Blocks" in name]
    assert {"flux/FluxAutoBlocks/image2image", "wan/WanBlocks"} <= set(tiny.modular_names())


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(UsageError, match="no floating-point type 'int8'"):
        tiny.pipeline("FluxPipeline", dtype="int8")


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        tiny.save("FluxPipeline", tmp_path)
