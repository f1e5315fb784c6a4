"""The decoder, which brings the latent into the space of its VAE itself."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL


class AutoEncoder(torch.nn.Module):
    """Diffusers' VAE with the scale inside."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.scale_factor, self.shift_factor = vae.config.scaling_factor, vae.config.shift_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z / self.scale_factor + self.shift_factor)
