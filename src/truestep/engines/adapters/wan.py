"""Official Wan 2.1 and 2.2: `WanT2V.generate`, also of its image and text-image pipelines.

Source: github.com/Wan-Video/Wan2.1 at 9737cba9 (wan/text2video.py), Wan2.2 at 42bf4cfa.
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

_PIPELINES = (
    "wan.text2video:WanT2V",
    "wan.image2video:WanI2V",
    "wan.first_last_frame2video:WanFLF2V",
    "wan.vace:WanVace",
    "wan.textimage2video:WanTI2V",
)

ENGINE = Engine(
    name="wan",
    packages=("wan.text2video", "wan.textimage2video"),
    boundaries=(
        *(Boundary(f"{pipeline}.generate", "generation") for pipeline in _PIPELINES),
        Boundary("wan.modules.t5:T5EncoderModel.__call__", "text"),
        Boundary("wan.modules.vae:WanVAE.decode", "decode"),
        Boundary("wan.modules.vae2_1:Wan2_1_VAE.decode", "decode"),
        Boundary("wan.modules.vae2_2:Wan2_2_VAE.decode", "decode"),
    ),
    latent=("x",),
    timestep=("t",),
    text=("context",),
)
