"""FastVideo: stages in worker processes; the pipeline's scheduler is one of diffusers' kind.

Source: PyPI fastvideo 0.2.1 (pipelines/stages).
"""

from __future__ import annotations

from truestep.engines.engine import Boundary, Engine

_PIPELINES = "fastvideo.pipelines"

ENGINE = Engine(
    name="fastvideo",
    packages=("fastvideo",),
    boundaries=(
        Boundary(f"{_PIPELINES}.composed_pipeline_base:ComposedPipelineBase.forward", "generation"),
        Boundary(f"{_PIPELINES}.stages.denoising:DenoisingStage.forward", "run"),
    ),
    latent=("hidden_states",),
    timestep=("timestep",),
    text=("encoder_hidden_states",),
    notes=("its workers are killed at the end: what they recorded is read from their spool",),
)
