"""vLLM-Omni: diffusion workers that load its general plugins, of which this is one.

Source: PyPI vllm-omni 0.30.0 (diffusion/worker, diffusion/distributed/cfg_parallel.py). Read in
source, not run: it needs a GPU.
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

_WORKER = "vllm_omni.diffusion.worker.diffusion_model_runner"

ENGINE = Engine(
    name="vllm_omni",
    packages=("vllm_omni.diffusion",),
    boundaries=(Boundary(f"{_WORKER}:DiffusionModelRunner.execute_model", "generation"),),
    latent=("hidden_states",),
    timestep=("timestep",),
    text=("encoder_hidden_states",),
    notes=("started by its plugin entry point, too; ranks of guidance hold one branch each",),
)
