"""xDiT: transformers of its own inside of diffusers' pipelines and schedulers, on several ranks.

Source: github.com/xdit-project/xDiT at 175e0bfe (xfuser/model_executor). Its runners call a
pipeline of diffusers; its older pipelines wrap one.
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

_RUNNER = "xfuser.model_executor.models.runner_models.base_model:xFuserModel"

ENGINE = Engine(
    name="xdit",
    packages=("xfuser.model_executor",),
    boundaries=(Boundary(f"{_RUNNER}._run_pipe", "generation"),),
    latent=("hidden_states",),
    timestep=("timestep",),
    text=("encoder_hidden_states",),
    notes=("each rank is a process of torchrun, and is recorded by itself",),
)
