"""Official LTX-2: a model of video and sound that returns denoised samples, all passes at once.

Source: github.com/Lightricks/LTX-2 at 400fd310 (packages/ltx-pipelines, utils/samplers.py;
packages/ltx-core, model/transformer/model.py and components/diffusion_steps.py).
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

_STEPS = "ltx_core.components.diffusion_steps"

ENGINE = Engine(
    name="ltx2",
    packages=("ltx_core.model.transformer",),
    boundaries=(
        Boundary("ltx_pipelines.utils.samplers:euler_denoising_loop", "run"),
        Boundary(f"{_STEPS}:EulerDiffusionStep.step", "update"),
    ),
    latent=("video/latent",),
    timestep=("video/timesteps",),
    text=("video/context",),
    called={
        "video/sigma": "sigma",
        "video/positions": "video_coords",
        "audio/latent": "audio_hidden_states",
        "audio/context": "audio_encoder_hidden_states",
        "audio/timesteps": "audio_timestep",
        "audio/sigma": "audio_sigma",
        "audio/positions": "audio_coords",
    },
    notes=("of the sound its noise and text are judged, and what it is predicted from",),
)
