"""A pipeline that is called as the official one, with both branches in one call of its model."""

from __future__ import annotations

from typing import Any

import torch


class HYVideoDiffusionTransformer(torch.nn.Module):
    """The trusted model, called as the official one."""

    def __init__(self, trusted: Any) -> None:
        super().__init__()
        self.trusted = trusted

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        text_states: Any = None,
        text_mask: Any = None,
        text_states_2: Any = None,
        guidance: Any = None,
        return_dict: bool = True,
    ) -> Any:
        out = self.trusted(x, t, text_states, text_mask, text_states_2, guidance, return_dict=False)
        return {"x": out[0]} if return_dict else out[0]


class HunyuanVideoPipeline:
    """Text, noise and steps."""

    def __init__(self, transformer: Any, scheduler: Any, given: dict[str, torch.Tensor]) -> None:
        self.transformer, self.scheduler, self.given = transformer, scheduler, given

    def prepare_latents(self, shape: tuple[int, ...], latents: Any = None) -> torch.Tensor:
        return torch.randn(shape) if latents is None else latents

    @torch.no_grad()
    def __call__(self, steps: int, scale: float, embedded: float) -> torch.Tensor:
        text, mask, pooled = (
            torch.cat([self.given[f"uncond{kind}"], self.given[f"cond{kind}"]])
            for kind in ("", "_mask", "_pooled")
        )
        self.scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
        latents = self.prepare_latents((1, 4, 3, 8, 8), self.given["noise"])
        guidance = torch.tensor([embedded] * 2) * 1000.0
        for t in self.scheduler.timesteps:
            made = self.transformer(
                torch.cat([latents] * 2),
                t.repeat(2),
                text_states=text,
                text_mask=mask,
                text_states_2=pooled,
                guidance=guidance,
            )["x"]
            uncond, cond = made.chunk(2)
            guided = uncond + scale * (cond - uncond)
            latents = self.scheduler.step(guided, t, latents, return_dict=False)[0]
        return latents
