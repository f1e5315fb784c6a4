"""A model of video and sound that returns denoised samples, given all passes at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import LTX2VideoTransformer3DModel


@dataclass(frozen=True)
class Modality:
    """What the model is given of video, or of sound."""

    latent: torch.Tensor
    sigma: torch.Tensor
    timesteps: torch.Tensor
    positions: torch.Tensor
    context: torch.Tensor


class X0Model(torch.nn.Module):
    """Diffusers' transformer."""

    def __init__(self, inner: LTX2VideoTransformer3DModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, video: Modality, audio: Modality, perturbations: object = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.inner(
            hidden_states=video.latent,
            audio_hidden_states=audio.latent,
            encoder_hidden_states=video.context,
            audio_encoder_hidden_states=audio.context,
            timestep=video.timesteps * 1000,
            audio_timestep=audio.timesteps * 1000,
            sigma=video.sigma * 1000,
            audio_sigma=audio.sigma * 1000,
            video_coords=video.positions,
            audio_coords=audio.positions,
            use_cross_timestep=True,
            return_dict=False,
        )
        sides = zip((video, audio), made, strict=True)
        x0 = [side.latent - side.timesteps * velocity for side, velocity in sides]
        return x0[0], x0[1]
