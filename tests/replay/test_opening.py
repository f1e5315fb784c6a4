"""Components of plain pipelines are opened, inside the run: module, operator and line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

import truestep
from truestep.errors import UsageError
from truestep.testing import tiny
from truestep.verdict import Comparison, Verdict

Change = Callable[[Any], object]


def built(name: str) -> Any:
    pipe = tiny.pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def trusted(name: str) -> tuple[Any, truestep.Recording]:
    pipe = built(name)
    call = {k: v for k, v in tiny.example_call(name).items() if k != "generator"}
    return pipe, truestep.record(pipe, call=call)


def opened(name: str, change: Change, **options: Any) -> Comparison:
    pipe, reference = trusted(name)
    candidate = built(name)
    change(candidate)
    return truestep.check(candidate, reference, depth="modules", trusted=pipe, **options)


def without_bias(path: str) -> Change:
    def change(pipe: Any) -> None:
        component, _, fqn = path.partition(".")
        getattr(pipe, component).get_submodule(fqn).bias = None

    return change


def scaled_weight(path: str) -> Change:
    def change(pipe: Any) -> None:
        component, _, fqn = path.partition(".")
        getattr(pipe, component).get_submodule(fqn).weight.data.mul_(1.02)

    return change


class Louder(JointAttnProcessor2_0):
    """What it gives the image is scaled."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        image, text = super().__call__(*args, **kwargs)
        return image * 1.01, text


class InTwoParts(JointAttnProcessor2_0):
    """The same in another way."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        image, text = super().__call__(*args, **kwargs)
        return image * 0.5 + image * 0.5, text


def processor(of: type) -> Change:
    return lambda pipe: pipe.transformer.transformer_blocks[0].attn.set_processor(of())


def other_gelu(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[0].ff.net[0].gelu = torch.nn.functional.gelu


def wider_norm(pipe: Any) -> None:
    pipe.vae.decoder.conv_norm_out.eps = 1e-3


def scaled_latent(pipe: Any) -> None:
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: decode(z * 1.05, *args, **kwargs)


FAULTS: dict[str, tuple[str, Change, str, str]] = {
    "flux bias": (
        "FluxPipeline",
        without_bias("transformer.transformer_blocks.0.attn.to_q"),
        "transformer.transformer_blocks.0.attn.to_q",
        "query = attn.to_q(hidden_states) (for aten.addmm); bias is missing",
    ),
    "flux activation": (
        "FluxPipeline",
        other_gelu,
        "transformer.transformer_blocks.0.ff.net.0",
        "(default for approximate = 'tanh')",
    ),
    "sdxl unet": (
        "StableDiffusionXLPipeline",
        scaled_weight("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "weight differs by 0.02",
    ),
    "sdxl second text encoder": (
        "StableDiffusionXLPipeline",
        without_bias("text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "hidden_states = self.fc1(hidden_states) (for aten.addmm); bias is missing",
    ),
    "sdxl vae": (
        "StableDiffusionXLPipeline",
        wider_norm,
        "vae.decoder.conv_norm_out",
        "sample = self.conv_norm_out(sample) (eps = 0.001 for eps = 1e-06)",
    ),
    "sdxl decoding": (
        "StableDiffusionXLPipeline",
        scaled_latent,
        "vae.decode",
        "adds aten.mul.Tensor at ",
    ),
    "qwen norm with complex rotary positions": (
        "QwenImagePipeline",
        scaled_weight("transformer.transformer_blocks.0.attn.norm_q"),
        "transformer.transformer_blocks.0.attn.norm_q",
        "weight differs by 0.02",
    ),
    "sd3 attention processor": (
        "StableDiffusion3Pipeline",
        processor(Louder),
        "transformer.transformer_blocks.0.attn",
        "return image * 1.01, text",
    ),
    "wan block": (
        "WanPipeline",
        without_bias("transformer.blocks.0.ffn.net.2"),
        "transformer.blocks.0.ffn.net.2",
        "bias is missing",
    ),
}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_a_fault_is_named_at_its_module_and_line(name: str) -> None:
    pipeline, change, fqn, operator = FAULTS[name]
    result = opened(pipeline, change)
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == fqn
    assert operator in (result.first_divergence.operator or "")
    assert f"(first divergence: `{fqn}`" in result.sentence
    assert result.looked_at[-1].endswith(" modules")
    introduced = [row.name for row in result.rows if row.origin == "introduced"]
    assert result.first_divergence.name in introduced


TWINS: dict[str, tuple[str, Change]] = {
    "unchanged": ("FluxPipeline", lambda pipe: None),
    "fused": ("FluxPipeline", lambda pipe: pipe.transformer.fuse_qkv_projections()),
    "processor": ("StableDiffusion3Pipeline", processor(InTwoParts)),
    "unet": (
        "StableDiffusionXLPipeline",
        lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    ),
    "slices": ("StableDiffusionXLPipeline", lambda pipe: pipe.vae.enable_slicing()),
}


@pytest.mark.parametrize("name", sorted(TWINS))
def test_a_benign_twin_names_nothing(name: str) -> None:
    result = opened(*TWINS[name])
    assert result.verdict.passed
    assert result.first_divergence is None
    assert not any("module" in note for note in result.notes)


def test_what_is_built_in_another_way_is_not_taken_for_the_fault_beside_it() -> None:
    def change(pipe: Any) -> None:
        pipe.transformer.fuse_qkv_projections()
        without_bias("transformer.single_transformer_blocks.0.proj_out")(pipe)

    result = opened("FluxPipeline", change)
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "transformer.single_transformer_blocks.0.proj_out"


def scaled_step(pipe: Any) -> None:
    step = pipe.scheduler.step

    @functools.wraps(step)
    def scaled(*args: Any, **kwargs: Any) -> Any:
        sample, *others = step(*args, **kwargs)
        return (sample * 1.01, *others)

    pipe.scheduler.step = scaled


def brighter(pipe: Any) -> None:
    decode = pipe.image_processor.postprocess
    pipe.image_processor.postprocess = lambda image, **kwargs: decode(image * 1.1, **kwargs)


def test_a_place_without_modules_is_said_in_words() -> None:
    result = opened("StableDiffusionXLPipeline", scaled_step)
    assert result.sentence.startswith("drifted: scheduler.step at step 0: output")
    assert "no module named: scheduler (DDIMScheduler) is no torch module" in result.notes
    result = opened("StableDiffusionXLPipeline", brighter)
    assert result.sentence.startswith("drifted: code after the last call")
    assert any(
        note.startswith("no module named: `code after the last call: ")
        and note.endswith("` is in no component")
        for note in result.notes
    )


def boom(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("no such kernel")


def test_a_module_that_raises_is_named_with_the_line() -> None:
    def change(pipe: Any) -> None:
        pipe.unet.down_blocks[0].resnets[0].forward = boom

    result = opened("StableDiffusionXLPipeline", change)
    assert result.verdict is Verdict.INVALID
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "unet.down_blocks.0.resnets.0"
    line = result.first_divergence.operator or ""
    assert line.endswith(': raise ValueError("no such kernel")')
    assert "test_opening.py:" in line
    assert result.sentence.endswith(
        "(first divergence: `unet.down_blocks.0.resnets.0`): raised ValueError: no such kernel, "
        "after unet.forward was called"
    )
    assert not built("StableDiffusionXLPipeline").unet.conv_in._forward_hooks


def test_a_method_that_raises_is_named_and_code_outside_of_components_is_not() -> None:
    def method(pipe: Any) -> None:
        pipe.vae.decode = boom

    def code(pipe: Any) -> None:
        pipe.image_processor.postprocess = boom

    result = opened("StableDiffusionXLPipeline", method)
    assert result.verdict is Verdict.INVALID
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "vae.decode"
    result = opened("StableDiffusionXLPipeline", code)
    assert result.verdict is Verdict.INVALID
    assert "no module named: it raised outside every component" in result.notes


def test_nothing_is_named_where_the_trusted_side_is_not_the_reference() -> None:
    _, reference = trusted("FluxPipeline")
    change = without_bias("transformer.proj_out")
    candidate, other = built("FluxPipeline"), built("FluxPipeline")
    change(candidate)
    change(other)
    result = truestep.check(candidate, reference, depth="modules", trusted=other)
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "transformer.forward (cond) at step 0: output 0"
    assert (
        "no module named: the trusted side is not the reference here (transformer.forward gives "
        "other values)"
    ) in result.notes


def test_both_sides_are_left_as_they_were() -> None:
    pipe, reference = trusted("StableDiffusionXLPipeline")
    candidate = built("StableDiffusionXLPipeline")
    scaled_latent(candidate)
    classes = [[type(m) for m in side.unet.modules()] for side in (pipe, candidate)]
    truestep.check(candidate, reference, depth="modules", trusted=pipe)
    assert classes == [[type(m) for m in side.unet.modules()] for side in (pipe, candidate)]
    for side in (pipe, candidate):
        modules = [m for part in (side.unet, side.vae) for m in part.modules()]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        assert "forward" not in vars(side.vae)


def test_an_object_alone_cannot_be_opened() -> None:
    pipe, reference = trusted("FluxPipeline")
    for other in (None, pipe):
        with pytest.raises(UsageError) as raised:
            truestep.check(pipe, reference, depth="modules", trusted=other)
        assert "an object cannot be loaded again as it was" in str(raised.value)
        assert "trusted=another_pipeline" in str(raised.value)
    with pytest.raises(UsageError, match="trusted is of a pipeline object at depth 'modules'"):
        truestep.check(pipe, reference, trusted=built("FluxPipeline"))


def test_names_of_a_rename_map_are_checked_before_any_forward() -> None:
    with pytest.raises(UsageError, match="matches no module of the candidate"):
        opened("FluxPipeline", lambda pipe: None, rename={"blocks.*": "transformer_blocks.*"})
    pipe, reference = trusted("FluxPipeline")
    with pytest.raises(UsageError, match="a rename map is of no use at depth 'steps'"):
        truestep.check(pipe, reference, rename={"proj_out": "proj_out"})


def test_the_callers_randomness_is_left_as_it_is() -> None:
    torch.manual_seed(1234)
    before = torch.random.get_rng_state()
    result = opened("FluxPipeline", without_bias("transformer.proj_out"))
    assert result.verdict is Verdict.DRIFTED
    assert torch.equal(torch.random.get_rng_state(), before)
