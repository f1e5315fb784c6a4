"""Official FLUX.1: `denoise()` is given its sigmas and steps by itself; guidance is embedded.

Source: github.com/black-forest-labs/flux at 802fb471 (src/flux/sampling.py, model.py).
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

ENGINE = Engine(
    name="flux",
    packages=("flux.sampling",),
    boundaries=(
        Boundary("flux.sampling:get_noise", "noise"),
        Boundary("flux.sampling:denoise", "run"),
        Boundary("flux.modules.conditioner:HFEmbedder.__call__", "text"),
        Boundary("flux.modules.autoencoder:AutoEncoder.decode", "decode"),
    ),
    latent=("img",),
    timestep=("timesteps",),
    text=("txt",),
    called={"y": "pooled_projections"},
    notes=("what the run calls its timesteps are sigmas, with the closing zero",),
)
