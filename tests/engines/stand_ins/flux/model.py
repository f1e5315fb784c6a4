"""The denoiser: other names of arguments, and ids with a batch."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel


class Flux(torch.nn.Module):
    """Diffusers' transformer."""

    def __init__(self, inner: FluxTransformer2DModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self,
        img: torch.Tensor,
        img_ids: torch.Tensor,
        txt: torch.Tensor,
        txt_ids: torch.Tensor,
        timesteps: torch.Tensor,
        y: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        made: torch.Tensor = self.inner(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=y,
            timestep=timesteps,
            img_ids=img_ids[0],
            txt_ids=txt_ids[0],
            guidance=guidance,
            return_dict=False,
        )[0]
        return made
