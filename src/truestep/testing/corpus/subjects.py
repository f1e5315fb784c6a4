"""Families of pipelines as tiny random subjects, each set up so that what can go wrong shows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import PIL.Image
import torch
from torch import nn

from truestep.testing import tiny
from truestep.testing.corpus.editing import denoiser, with_function

PROMPTS = (
    "A small Red cube, on a wooden table",
    "Two green birds over the Sea at dawn",
    "An old Train in heavy snow",
)
"""Of the draws; capitals, so that a text that should be in lower case shows."""

NEGATIVES = ("Blurry, low quality", "Dark and noisy", "Deformed")


@dataclass(frozen=True)
class Subject:
    """One family: how its pipeline is built and called.

    Attributes:
        name: Short and unique.
        pipeline: The class of diffusers.
        about: What this family has that others have not.
        call: Arguments beside the example's: values, or functions of the draw.
        prepare: Sets a built pipeline up, from the draw: what a random tiny one leaves neutral.
    """

    name: str
    pipeline: str
    about: str
    call: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any, int], None] | None = None

    def build(self, draw: int = 0, dtype: str = "float32") -> Any:
        """A fresh pipeline; one draw and type give the same bits each time."""
        pipe = tiny.pipeline(self.pipeline, seed=draw, dtype=dtype)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        _scale_latents(pipe, draw)
        if self.prepare is not None:
            self.prepare(pipe, draw)
        return pipe

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """Arguments of the pipeline's call, without a generator: `seed` makes it."""
        call = tiny.example_call(self.pipeline, seed=draw)
        call.pop("generator", None)
        if "prompt" in call:
            call["prompt"] = PROMPTS[draw % len(PROMPTS)]
        if "negative_prompt" in call:
            call["negative_prompt"] = NEGATIVES[draw % len(NEGATIVES)]
        for name, value in self.call.items():
            call[name] = value(draw) if callable(value) else value
        return call


def _scale_latents(pipe: Any, draw: int) -> None:
    """Give what normalises latents values that are not neutral: 1, 0, or the same everywhere."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return
    config = vae.config
    if getattr(config, "shift_factor", None) is not None:
        vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    generator = torch.Generator().manual_seed(draw)
    norm = dict(vae.named_children()).get("bn")
    if norm is not None:
        norm.running_mean += 0.1 * torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_var *= 1 + torch.rand(norm.running_var.shape, generator=generator)
    for name, centre in (("latents_mean", 0.0), ("latents_std", 1.0)):
        held = getattr(config, name, None)
        if isinstance(held, list | tuple) and len(set(held)) == 1:
            drawn = centre + 0.2 * torch.randn(len(held), generator=generator)
            vae.register_to_config(**{name: [round(v, 4) for v in drawn.tolist()]})
        held = dict(vae.named_buffers()).get(name)
        if held is not None and held.unique().numel() == 1:
            held.copy_(centre + 0.2 * torch.randn(held.shape, generator=generator))


class LowRank(nn.Module):
    """A linear layer and what an adapter of low rank adds to it, scaled."""

    def __init__(self, layer: nn.Linear, draw: int, rank: int = 2, scale: float = 0.8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1000 + draw)
        weight = layer.weight
        down = torch.randn(rank, layer.in_features, generator=generator)
        up = torch.randn(layer.out_features, rank, generator=generator)
        self.layer = layer
        self.down = nn.Parameter((down / math.sqrt(layer.in_features)).to(weight.dtype))
        self.up = nn.Parameter((up / math.sqrt(rank)).to(weight.dtype))
        self.scale = scale

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer of x `... i` to `... o`, and the adapter's part."""
        plain: torch.Tensor = self.layer(x)
        return plain + self.scale * ((x @ self.down.T) @ self.up.T)


def adapted(pipe: Any, draw: int) -> None:
    """Put an adapter of low rank on the queries of every attention of the denoiser."""
    for index, module in enumerate(list(denoiser(pipe).modules())):
        if isinstance(getattr(module, "to_q", None), nn.Linear):
            module.to_q = LowRank(module.to_q, draw + index)


def ancestral(pipe: Any, draw: int) -> None:
    """Euler's ancestral scheduler: it scales its input and draws noise at every step."""
    from diffusers import EulerAncestralDiscreteScheduler

    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)


def _ancestral_and_adapted(pipe: Any, draw: int) -> None:
    ancestral(pipe, draw)
    adapted(pipe, draw)


def _guided(pipe: Any, draw: int) -> None:
    """Build the denoiser anew with an embedding of the guidance scale."""
    from truestep.testing.tiny.weights import randomise

    old = pipe.transformer
    config = {k: v for k, v in old.config.items() if not k.startswith("_")}
    new = type(old)(**{**config, "guidance_embeds": True})
    randomise(new, seed=draw, name="transformer")
    pipe.transformer = new.to(old.dtype).eval()


def _small_condition(pipe: Any, draw: int) -> None:
    """Resize the picture to 64 by 64 pixels, not to a million."""
    original = inspect.unwrap(type(pipe).__call__).__globals__["calculate_dimensions"]
    with_function(pipe, "__call__", "calculate_dimensions", lambda _, ratio: original(4096, ratio))


def _shifted(pipe: Any, draw: int) -> None:
    """Shift time by what the pipeline computes."""
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config, use_dynamic_shifting=True)


def wide(draw: int) -> PIL.Image.Image:
    """A picture of another size than what is generated, so that it has to be resized."""
    return tiny_picture(draw).resize((58, 42), PIL.Image.Resampling.BICUBIC)


def soft_mask(draw: int) -> PIL.Image.Image:
    """A mask with a soft edge, off the middle, so that its threshold and its order show."""
    y, x = numpy.meshgrid(numpy.arange(32), numpy.arange(32), indexing="ij")
    distance = numpy.hypot(x - 10 - draw % 3, (y - 18) / 1.4)
    return PIL.Image.fromarray((255 * (1.25 - distance / 10).clip(0, 1)).astype("uint8"))


def soft_masks(draw: int) -> list[PIL.Image.Image]:
    """Masks of a video: from the fifth frame another one."""
    first, second = soft_mask(draw), soft_mask(draw).transpose(PIL.Image.Transpose.ROTATE_90)
    return [first if frame < 4 else second for frame in range(9)]


def tiny_picture(draw: int) -> PIL.Image.Image:
    """The example picture of a draw."""
    from truestep.testing.tiny.inputs import picture

    return picture(draw)


_FLAT = {"height": 32, "width": 64}

SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(
            "flux",
            "FluxPipeline",
            "two encoders, packed latents, rope ids, guidance embedding, shift by resolution",
            {**_FLAT, "negative_prompt": None, "guidance_scale": 3.5, "max_sequence_length": 24},
            _guided,
        ),
        Subject(
            "kontext",
            "FluxKontextPipeline",
            "edit: the picture's latents follow in the sequence, with ids of their own",
            {"image": wide, "negative_prompt": None},
        ),
        Subject(
            "fill",
            "FluxFillPipeline",
            "inpainting: masked picture and packed mask as channels",
            {"image": wide, "mask_image": soft_mask},
        ),
        Subject(
            "control",
            "FluxControlPipeline",
            "control picture as channels",
            {"control_image": wide},
        ),
        Subject(
            "qwen",
            "QwenImagePipeline",
            "language model with a prompt template, guidance that keeps the norm",
            {**_FLAT, "max_sequence_length": 256},
        ),
        Subject(
            "qwen-edit",
            "QwenImageEditPipeline",
            "edit: a language model that sees the picture",
            prepare=_small_condition,
        ),
        Subject(
            "sdxl",
            "StableDiffusionXLPipeline",
            "two encoders side by side, pooled text, size ids, ancestral scheduler, adapter",
            prepare=_ancestral_and_adapted,
        ),
        Subject(
            "sd3",
            "StableDiffusion3Pipeline",
            "three encoders, batched guidance, shift factor",
        ),
        Subject(
            "inpaint",
            "StableDiffusionInpaintPipeline",
            "latents blended by a mask at every step",
            {"image": wide, "mask_image": soft_mask},
        ),
        Subject(
            "controlnet",
            "StableDiffusionControlNetPipeline",
            "a control net whose outputs are added",
            {"image": wide, "controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.9},
        ),
        Subject(
            "img2img",
            "StableDiffusionImg2ImgPipeline",
            "starts from a noised picture",
            {"image": wide, "num_inference_steps": 5},
        ),
        Subject(
            "wan-i2v",
            "WanImageToVideoPipeline",
            "picture to video: an image encoder and a masked condition",
            {"image": wide},
        ),
        Subject(
            "vace",
            "WanVACEPipeline",
            "video control: inactive and reactive parts, a mask, a scale",
            {"mask": soft_masks, "conditioning_scale": 0.8},
        ),
        Subject(
            "cogvideox-i2v",
            "CogVideoXImageToVideoPipeline",
            "picture to video: padded condition, rope computed outside",
            {"image": wide},
        ),
        Subject(
            "audioldm2",
            "AudioLDM2Pipeline",
            "audio: two encoders, a language model that goes on, a vocoder",
        ),
        Subject(
            "stable-audio",
            "StableAudioPipeline",
            "audio: duration embedded, a solver of stochastic equations",
        ),
        Subject(
            "hunyuan",
            "HunyuanVideoPipeline",
            "video: template cropped from a language model's text, guidance embedding",
            {"true_cfg_scale": 2.0, "max_sequence_length": 256},
        ),
        Subject("mochi", "MochiPipeline", "video: schedule of its own, batched guidance"),
        Subject(
            "z-image",
            "ZImagePipeline",
            "chat template, lists of latents, reversed time and sign",
            {"max_sequence_length": 32},
        ),
        Subject(
            "sana",
            "SanaPipeline",
            "text in lower case after an instruction, masks to the denoiser",
            {"max_sequence_length": 24, "complex_human_instruction": ["Improve the prompt:"]},
        ),
        Subject(
            "pixart",
            "PixArtSigmaPipeline",
            "text masked in the denoiser",
            {"max_sequence_length": 32},
        ),
        Subject(
            "svd",
            "StableVideoDiffusionPipeline",
            "picture to video: noise on the condition, guidance by frame",
            {"num_frames": 3},
        ),
        Subject(
            "klein-kv",
            "Flux2KleinKVPipeline",
            "edit: keys and values of the picture are kept from the first step",
            prepare=_shifted,
        ),
        Subject(
            "lumina2",
            "Lumina2Pipeline",
            "system prompt, reversed time and sign, guidance that keeps the norm",
            {"max_sequence_length": 160},
        ),
        Subject(
            "ltx-i2v",
            "LTXImageToVideoPipeline",
            "picture to video: a timestep for every token, the first frame kept",
            {"image": wide},
        ),
    )
}
"""Subjects by name."""
