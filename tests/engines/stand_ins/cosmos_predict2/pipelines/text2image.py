"""A loop as the official one: denoised samples, a prediction more than steps, no times."""

from __future__ import annotations

from typing import Any

import torch
from imaginaire.utils import misc


class RectifiedFlowAB2Scheduler:
    """Sigmas of Karras et al., and steps from denoised samples.

    Args:
        order: Of the solver, 1 or 2.
    """

    def __init__(self, order: int) -> None:
        self.order = order

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        ramp = torch.linspace(80.0 ** (1 / 7), 0.002 ** (1 / 7), num_inference_steps + 1).double()
        self.sigmas, self.timesteps = ramp**7, torch.arange(num_inference_steps)

    def step(self, x0_pred: Any, i: int, sample: Any, x0_prev: Any = None) -> Any:
        ratio = float(self.sigmas[i + 1] / self.sigmas[i])
        x0 = x0_pred
        if x0_prev is not None and self.order == 2:
            x0 = 1.5 * x0_pred - 0.5 * x0_prev
        return sample * ratio + x0 * (1 - ratio), x0_pred


class MiniTrainDIT(torch.nn.Module):
    """The trusted model, called as the official one."""

    def __init__(self, trusted: Any) -> None:
        super().__init__()
        self.trusted = trusted

    def forward(self, x_B_C_T_H_W: Any, timesteps_B_T: Any, crossattn_emb: Any) -> Any:  # noqa: N803
        return self.trusted(x_B_C_T_H_W, timesteps_B_T[:, 0], crossattn_emb, return_dict=False)[0]


class Text2ImagePipeline:
    """Noise, steps, and a last prediction that ends it."""

    def __init__(self, trusted: Any, given: dict[str, Any], order: int, late: float = 1.0) -> None:
        self.dit, self.given, self.late = MiniTrainDIT(trusted), given, late
        self.scheduler = RectifiedFlowAB2Scheduler(order)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent.clone()

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        t = sigma / (sigma + 1)
        made = self.dit(
            x_B_C_T_H_W=x * (1 - t), timesteps_B_T=t[:, None] * self.late, crossattn_emb=text
        )
        return (1 - t) * x - t * made

    @torch.no_grad()
    def __call__(self, steps: int, guidance: float) -> torch.Tensor:
        noise = misc.arch_invariant_rand(self.given["noise"].shape, torch.float32, "cpu", 0)
        sample, before = noise * 0 + self.given["noise"] * 80.0, None
        self.scheduler.set_timesteps(steps)
        for i in range(steps + 1):
            sigma = self.scheduler.sigmas[i].float()[None]
            cond, uncond = (self.denoise(sample, sigma, self.given[n]) for n in ("cond", "uncond"))
            x0 = cond + guidance * (cond - uncond)
            if i < steps:
                sample, before = self.scheduler.step(x0, i=i, sample=sample, x0_prev=before)
        return self.decode(x0)
