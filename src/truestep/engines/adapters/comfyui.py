"""ComfyUI: k-diffusion samplers, which are functions; the guider returns denoised samples.

Source: github.com/comfyanonymous/ComfyUI at a125cd84 (comfy/samplers.py, comfy/sample.py).
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

ENGINE = Engine(
    name="comfyui",
    packages=("comfy.samplers",),
    boundaries=(
        Boundary("execution:PromptExecutor.execute", "generation"),
        Boundary("comfy.samplers:CFGGuider.outer_sample", "run"),
        Boundary("comfy.samplers:sampling_function", "guided"),
        Boundary("comfy.samplers:calc_cond_batch", "passes", branches=("cond", "uncond")),
        Boundary("comfy.sample:prepare_noise", "noise"),
    ),
    latent=("x_in", "x"),
    timestep=("timestep", "t", "sigma"),
    text=("context",),
    ends_in_vae=True,
    notes=("a `.latent` file holds the latent in the space of the VAE",),
)
