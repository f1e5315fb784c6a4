"""What steps a latent; of video and of sound by the same object."""

from __future__ import annotations

import torch


class EulerDiffusionStep:
    """Euler's; a factor other than 1 is a fault."""

    factor = 1.0

    def step(
        self,
        sample: torch.Tensor,
        denoised_sample: torch.Tensor,
        sigmas: torch.Tensor,
        step_index: int,
    ) -> torch.Tensor:
        velocity = (sample - denoised_sample) / sigmas[step_index]
        return sample + velocity * (sigmas[step_index + 1] - sigmas[step_index]) * self.factor
