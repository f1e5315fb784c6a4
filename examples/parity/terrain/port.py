"""The terrain generator's sampler in torch, around the ported consistency UNet.

The network and its preconditioning are `bench/faults/terrain.py`, a `diffusers.UNet2DModel` with
the published weights; here are the one-step sampler and the way back to metres.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from bench.faults.terrain import SIGMA_MAX, SIGMA_MIN, TerrainPort

HEIGHT_RANGE = 22.16864013671875
ASINH_SCALE = 0.1


class Sampler(nn.Module):
    """One-step generation: noise, terrain and difficulty in, heights in metres out."""

    def __init__(self, network: TerrainPort) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        noise: torch.Tensor,
        source: torch.Tensor,
        strength: torch.Tensor,
        difficulty: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Sample in one step from a noisy terrain.

        Args:
            noise: `b 1 128 128`, standard normal.
            source: `b 1 128 128`, terrain in [-1, 1].
            strength: `b`, in (0, 1]; 1 is noise of sigma 80.
            difficulty: `b`, in [0, 1].

        Returns:
            `values` (`b 1 h w`, in [-1, 1]) and `heights` (`b h w`, metres).

        Source:
            terrain_diffusion/generator.py, `_strength_sigma`, `_sample_native`,
            `_from_model_space`.
        """
        sigma = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** strength
        values = self.network(noise * sigma[:, None, None, None] + source, sigma, difficulty)
        return {"values": values, "heights": heights(values[:, 0])}


def heights(values: torch.Tensor) -> torch.Tensor:
    """Metres of the model's values in [-1, 1]."""
    unit = ((values + 1) * 0.5).clamp(0, 1)
    scale = math.asinh(HEIGHT_RANGE / ASINH_SCALE)
    return (ASINH_SCALE * (unit * scale).sinh()).clamp(0, HEIGHT_RANGE)
