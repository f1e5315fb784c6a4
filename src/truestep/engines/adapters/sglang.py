"""SGLang-Diffusion: stages in spawned workers; they load its plugins, of which this is one.

Source: PyPI sglang 0.5.23 (multimodal_gen/runtime/pipelines_core). Read in source, not run: it
needs a GPU.
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

_PIPELINES = "sglang.multimodal_gen.runtime.pipelines_core"

ENGINE = Engine(
    name="sglang",
    packages=(f"{_PIPELINES}.composed_pipeline_base",),
    boundaries=(
        Boundary(f"{_PIPELINES}.composed_pipeline_base:ComposedPipelineBase.forward", "generation"),
        Boundary(f"{_PIPELINES}.stages.denoising:DenoisingStage.forward", "run"),
    ),
    latent=("hidden_states",),
    timestep=("timestep",),
    text=("encoder_hidden_states",),
    notes=("started by its plugin entry point, too: SGLANG_PLUGINS=truestep allows it",),
)
