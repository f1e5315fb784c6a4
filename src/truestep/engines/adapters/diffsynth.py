"""DiffSynth-Studio: a function calls the submodules of its denoiser, never the denoiser itself.

Source: PyPI diffsynth 2.1.12 (pipelines/wan_video.py, diffusion/base_pipeline.py).
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

_WAN = "diffsynth.pipelines.wan_video"
_NOISE = "diffsynth.diffusion.base_pipeline:BasePipeline.generate_noise"
_TEXT = f"{_WAN}:WanVideoUnit_PromptEmbedder.encode_prompt"

ENGINE = Engine(
    name="diffsynth",
    packages=("diffsynth",),
    boundaries=(
        Boundary(f"{_WAN}:WanVideoPipeline.__call__", "generation"),
        Boundary(f"{_WAN}:model_fn_wan_video", "prediction"),
        Boundary(_NOISE, "noise"),
        Boundary(_TEXT, "text"),
    ),
    latent=("latents",),
    timestep=("timestep",),
    text=("context", "prompt_emb"),
)
