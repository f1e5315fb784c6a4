"""Official Cosmos-Predict2: a flow in the form of EDM, whose solver is given denoised samples.

Source: github.com/nvidia-cosmos/cosmos-predict2 at 661da477 (cosmos_predict2/pipelines,
cosmos_predict2/schedulers/rectified_flow_scheduler.py, cosmos_predict2/models).
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

_PIPELINES = (
    "cosmos_predict2.pipelines.text2image:Text2ImagePipeline",
    "cosmos_predict2.pipelines.video2world:Video2WorldPipeline",
)

ENGINE = Engine(
    name="cosmos_predict2",
    packages=("cosmos_predict2.pipelines",),
    boundaries=(
        *(Boundary(f"{pipeline}.__call__", "generation") for pipeline in _PIPELINES),
        Boundary("imaginaire.utils.misc:arch_invariant_rand", "noise"),
        *(Boundary(f"{pipeline}.decode", "decode") for pipeline in _PIPELINES),
    ),
    latent=("x_B_C_T_H_W",),
    timestep=("timesteps_B_T",),
    text=("crossattn_emb",),
)
