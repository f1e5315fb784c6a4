"""DiffSynth-Studio's WanVideoPipeline on tiny weights: run_diffsynth.py FOLDER FAULT OUTPUT"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.pipelines.wan_video import WanVideoPipeline, WanVideoUnit_PromptEmbedder
from safetensors.torch import load_file, save_file

folder, fault, output = sys.argv[1:]
given = load_file(f"{folder}/inputs.safetensors")
dit = WanModel(
    dim=256, in_dim=16, ffn_dim=512, out_dim=16, text_dim=4096, freq_dim=256, eps=1e-6,
    patch_size=(1, 2, 2), num_heads=2, num_layers=2, has_image_input=False,
)  # fmt: skip
dit.load_state_dict(load_file(f"{folder}/official.safetensors"), strict=True)
pipe = WanVideoPipeline(device="cpu", torch_dtype=torch.float32)
pipe.dit = dit.eval()
kept = {}


class Vae(torch.nn.Module):
    """Keeps the latent, and decodes nothing."""

    upsampling_factor = 8

    class model:  # noqa: N801 (the engine's name)
        z_dim = 16

    def decode(self, latent: torch.Tensor, **_: Any) -> torch.Tensor:
        kept["raw"] = latent.clone()
        return torch.zeros(1, 3, 1, 8, 8)


pipe.vae = Vae()
texts = {"p": given["cond"].clone(), "n": given["uncond"].clone()}
if fault == "tail":
    texts["p"][:, -3:] = 0.05
if fault == "swapped":
    texts = {"p": texts["n"], "n": texts["p"]}
pipe.generate_noise = lambda shape, **_: given["noise"].clone()
WanVideoUnit_PromptEmbedder.encode_prompt = lambda self, pipe, prompt: texts[prompt]
if fault == "time":
    model_fn = pipe.model_fn
    pipe.model_fn = lambda **k: model_fn(**{**k, "timestep": k["timestep"] * 0.999})
if fault == "order":
    step, latents = pipe.scheduler.step, []

    def late(velocity: Any, time: Any, latent: Any, **options: Any) -> Any:
        """Step from the latent of the step before."""
        latents.append(latent)
        return step(velocity, time, latents[max(len(latents) - 2, 0)], **options)

    pipe.scheduler.step = late
with torch.no_grad():
    pipe(
        prompt="p", negative_prompt="n", seed=0, height=64, width=64, num_frames=9,
        cfg_scale=-5.0 if fault == "sign" else 5.0, num_inference_steps=4,
        sigma_shift=6.0 if fault == "shift" else 5.0, tiled=False, output_type="floatpoint",
    )  # fmt: skip
save_file({"raw": kept["raw"].contiguous()}, output)
