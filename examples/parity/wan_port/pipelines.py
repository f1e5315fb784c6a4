"""Both sides of the pipeline parity tests: diffusers' pipeline, and truestep's with the port."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from truestep import Case
from truestep.models import digits
from truestep.parity import Family, Loaded

sys.path.insert(0, str(Path(__file__).parents[3]))

FAMILY = Family("wan", weights_dir=digits.path())
CASE = Case(
    model="builtin:digits", prompt="a red three moving left", steps=8, settings={"device": "cpu"}
)
_PARTS = (
    "diffusers/models/autoencoders/autoencoder_kl_wan.py",
    "diffusers/schedulers/scheduling_flow_match_euler_discrete.py",
    "transformers/activations.py",
    "transformers/models/umt5/modeling_umt5.py",
    "transformers/tokenization_utils_tokenizers.py",
)
SHARED = {
    **dict.fromkeys(_PARTS, "not ported: the runtime uses the library's own"),
    "wan_port/pipelines.py": "this test's loaders, one a side",
}

Output = Literal["latent", "frames"]


def load_official(output: Output) -> Loaded:
    """`diffusers.WanPipeline` by its public interface."""
    pipe = FAMILY.official_class("diffusers:WanPipeline").from_pretrained(
        digits.path(),
        dtype=torch.float32,  # else the text encoder runs in its file's float16
    )
    pipe.set_progress_bar_config(disable=True)
    kind = "latent" if output == "latent" else "pt"

    def call(latent: torch.Tensor) -> dict[str, torch.Tensor]:
        made = pipe(
            prompt=CASE.prompt,
            negative_prompt=CASE.negative_prompt or None,
            height=CASE.height,
            width=CASE.width,
            num_frames=CASE.num_frames,
            num_inference_steps=CASE.steps,
            guidance_scale=CASE.guidance_scale,
            max_sequence_length=CASE.max_sequence_length,
            latents=latent,
            output_type=kind,
        ).frames
        return {output: made if output == "latent" else made.transpose(1, 2) * 2 - 1}

    return Loaded(call, module=pipe.transformer, weights=weights())


def load_port(output: Output) -> Loaded:
    """truestep's stages, with the port in the place of the transformer."""
    from truestep.runtime.loading import load
    from truestep.runtime.pipeline import generate

    pipe = load(CASE)
    use: Callable[..., None] = FAMILY.port_class("examples.parity.wan_port.port:use")
    use(pipe)

    def call(latent: torch.Tensor) -> dict[str, torch.Tensor]:
        pipe.make_latent = lambda _: latent
        made = generate(pipe, output=output)
        return {output: made.clamp(-1, 1) if output == "frames" else made}

    return Loaded(call, module=pipe.transformer, weights=weights())


def weights() -> list[Path]:
    """Files of every model in the folder."""
    return FAMILY.weights("*/*.safetensors")


def make_inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The initial latent: 5 latent frames of 8x8, 8 channels."""
    return {"latent": torch.randn(1, 8, 5, 8, 8, generator=generator)}
