"""Official HunyuanVideo: a pipeline of diffusers' kind, with both branches in one call.

Source: github.com/Tencent-Hunyuan/HunyuanVideo at fa14b001 (hyvideo/inference.py,
hyvideo/diffusion/pipelines/pipeline_hunyuan_video.py, hyvideo/modules/models.py).
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

_PIPELINE = "hyvideo.diffusion.pipelines.pipeline_hunyuan_video:HunyuanVideoPipeline"

ENGINE = Engine(
    name="hunyuan",
    packages=("hyvideo.diffusion.pipelines",),
    boundaries=(
        Boundary("hyvideo.inference:HunyuanVideoSampler.predict", "generation"),
        Boundary(f"{_PIPELINE}.__call__", "generation"),
        Boundary(f"{_PIPELINE}.prepare_latents", "noise"),
    ),
    latent=("x",),
    timestep=("t",),
    text=("text_states",),
    called={"text_mask": "encoder_attention_mask", "text_states_2": "pooled_projections"},
)
