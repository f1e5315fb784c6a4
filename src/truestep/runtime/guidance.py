"""How the predictions of the guidance branches become one."""

from __future__ import annotations

import torch


def classifier_free(cond: torch.Tensor, uncond: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Classifier-free guidance in the predictions' own dtype.

    Args:
        cond: Prediction with the prompt, any shape.
        uncond: Prediction with the negative prompt, same shape.
        scale: Guidance scale; 1 returns `cond` up to rounding.

    Source:
        Ho & Salimans 2022 (arXiv 2207.12598) in the form of Imagen (arXiv 2205.11487, eq. 2);
        arithmetic order of diffusers 0.42.1, pipelines/wan/pipeline_wan.py.
    """
    return uncond + scale * (cond - uncond)
