"""The class that users of the official HunyuanVideo call."""

from __future__ import annotations

from typing import Any

from hyvideo.diffusion.pipelines.pipeline_hunyuan_video import (
    HunyuanVideoPipeline,
    HYVideoDiffusionTransformer,
)


class HunyuanVideoSampler:
    """Calls its pipeline."""

    def __init__(self, trusted: Any, scheduler: Any, given: Any) -> None:
        self.pipeline = HunyuanVideoPipeline(HYVideoDiffusionTransformer(trusted), scheduler, given)

    def predict(self, **options: Any) -> Any:
        return self.pipeline(**options)
