"""Faults of the schedule: sigmas, timesteps, and what of them the model is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import PIPELINES, fault
from bench.faults.targets import around, edm, narrowed, need

Tensor = torch.Tensor


def _shift(scheduler: Any) -> float:
    """The shift that the scheduler's configuration names; 1 where it has none."""
    config = scheduler.config
    need(not hasattr(scheduler, "precondition_noise"), "the schedule has no shift")
    need(not config.get("use_dynamic_shifting"), "the shift depends on the size")
    found: float = config.get("flow_shift", config.get("shift", 1.0))
    return found


def _sigmas_through(pipe: Any, change: Callable[[Any, Tensor], Tensor]) -> None:
    """Pass the sigmas `n+1` through `change(pipe, sigmas)`; the timesteps follow them."""

    def scheduled(original: Callable[..., Any], inner: Any) -> Any:
        made = original(inner)
        scheduler = inner.scheduler
        sigmas = change(inner, made.sigmas)
        timesteps = (
            scheduler.precondition_noise(sigmas[:-1])
            if edm(inner)
            else sigmas[:-1] * scheduler.config.num_train_timesteps
        )
        scheduler.sigmas = sigmas
        scheduler.timesteps = timesteps.to(made.timesteps)
        return replace(made, sigmas=sigmas, timesteps=scheduler.timesteps)

    around(pipe, "make_schedule", scheduled)


def _timestep_through(pipe: Any, change: Callable[[Any, Any], Tensor]) -> None:
    """Tell the model the timestep `change(pipe, step)` instead of the step's own."""

    def told(
        original: Callable[..., Tensor], inner: Any, latent: Tensor, step: Any, *rest: Any
    ) -> Any:
        return original(inner, latent, replace(step, timestep=change(inner, step)), *rest)

    around(pipe, "predict", told)


@fault(
    acts="stage schedule, shift", source="https://github.com/leejet/stable-diffusion.cpp/pull/1697"
)
def shift_missing(pipe: Any) -> None:
    """Bug: the flow shift of the checkpoint is not applied."""
    used = pipe.settings.flow_shift or _shift(pipe.scheduler)
    need(used != 1, "the shift is 1")
    pipe.settings.flow_shift = 1.0


@fault(acts="stage schedule, shift")
def shift_slightly_off(pipe: Any) -> None:
    """Bug: the flow shift is 2 % too large."""
    pipe.settings.flow_shift = 1.02 * (pipe.settings.flow_shift or _shift(pipe.scheduler))


@fault(acts="stage schedule, sigmas", source="https://github.com/huggingface/diffusers/pull/13962")
def sigmas_shifted_again(pipe: Any) -> None:
    """Bug: the shift is applied to sigmas that are shifted already."""

    def again(inner: Any, sigmas: Tensor) -> Tensor:
        shift = inner.settings.flow_shift or _shift(inner.scheduler)
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    need((pipe.settings.flow_shift or _shift(pipe.scheduler)) != 1, "the shift is 1")
    _sigmas_through(pipe, again)


@fault(acts="stage schedule, sigmas", source="https://github.com/sgl-project/sglang/pull/33552")
def sigma_grid_off_by_one(pipe: Any) -> None:
    """Bug: the sigmas divide [0, 1] into one part fewer, so the last step has no length."""

    def grid(inner: Any, sigmas: Tensor) -> Tensor:
        shift = inner.settings.flow_shift or _shift(inner.scheduler)
        even = torch.linspace(1, 0, len(sigmas) - 1, dtype=sigmas.dtype, device=sigmas.device)
        moved = shift * even / (1 + (shift - 1) * even)
        return torch.cat([moved, moved[-1:]])

    name = pipe.settings.scheduler or type(pipe.scheduler).__name__
    need(name == "FlowMatchEulerDiscreteScheduler", "a step without length is not a number")
    need(pipe.settings.steps > 2, "too few steps")
    _sigmas_through(pipe, grid)


@fault(acts="stage schedule, sigmas")
def sigma_grid_ends_early(pipe: Any) -> None:
    """Bug: N of N+1 evenly spaced sigmas are taken where the reference ends at 1/1000."""

    def grid(inner: Any, sigmas: Tensor) -> Tensor:
        shift = inner.settings.flow_shift or _shift(inner.scheduler)
        even = torch.linspace(1, 0, len(sigmas), dtype=sigmas.dtype, device=sigmas.device)
        return shift * even / (1 + (shift - 1) * even)

    need(not edm(pipe), "the sigmas are not evenly spaced")
    _sigmas_through(pipe, grid)


@fault(
    acts="last step, sigma",
    source="https://github.com/huggingface/diffusers/pull/10267",
    subjects=PIPELINES,
)
def last_sigma_not_zero(pipe: Any) -> None:
    """Bug: the last sigma is the smallest of training, 0.001, instead of 0."""

    def ended(inner: Any, sigmas: Tensor) -> Tensor:
        last = sigmas.new_tensor([1 / inner.scheduler.config.num_train_timesteps])
        return torch.cat([sigmas[:-1], last])

    ends = pipe.scheduler.config.get("final_sigmas_type", "zero")
    need(ends == "zero", "the last sigma is not zero")
    _sigmas_through(pipe, ended)


@fault(acts="stage schedule, sigmas", subjects=PIPELINES)
def sigmas_in_float16(pipe: Any) -> None:
    """Bug: the sigmas are computed in float16."""
    _sigmas_through(pipe, lambda inner, sigmas: narrowed(sigmas, torch.float16))


@fault(
    acts="stage schedule, sigmas",
    source="https://github.com/Comfy-Org/ComfyUI/pull/16001",
    subjects=PIPELINES,
)
def sigmas_in_bfloat16(pipe: Any) -> None:
    """Bug: the sigmas are made in the model's bfloat16."""
    _sigmas_through(pipe, lambda inner, sigmas: narrowed(sigmas, torch.bfloat16))


@fault(acts="every step, timestep", subjects=PIPELINES)
def timestep_of_next_step(pipe: Any) -> None:
    """Bug: the model is told the timestep of the following step."""

    def following(inner: Any, step: Any) -> Tensor:
        timesteps = inner.scheduler.timesteps
        made: Tensor = timesteps[min(step.index + 1, len(timesteps) - 1)].to(step.timestep)
        return made

    _timestep_through(pipe, following)


@fault(
    acts="every step, timestep",
    source="https://github.com/utensils/mold/issues/786",
    subjects=PIPELINES,
)
def timestep_in_bfloat16(pipe: Any) -> None:
    """Bug: the timestep is rounded to bfloat16, whose step is 4 above 512, before the embedding."""
    _timestep_through(pipe, lambda inner, step: narrowed(step.timestep, torch.bfloat16))


@fault(acts="every step, timestep", subjects=PIPELINES)
def timestep_truncated(pipe: Any) -> None:
    """Bug: the timestep is truncated to a whole number."""
    _timestep_through(pipe, lambda inner, step: step.timestep.floor())


@fault(acts="every step, timestep", subjects=PIPELINES)
def timestep_in_unit_range(pipe: Any) -> None:
    """Bug: the model is told the timestep in [0, 1] instead of [0, 1000]."""
    _timestep_through(pipe, lambda inner, step: step.timestep / 1000)


@fault(acts="every step, timestep", subjects=PIPELINES)
def timestep_slightly_scaled(pipe: Any) -> None:
    """Bug: timesteps count 999 training steps instead of 1000."""
    _timestep_through(pipe, lambda inner, step: step.timestep * 0.999)


@fault(
    acts="expert switch",
    source="https://github.com/hao-ai-lab/FastVideo/pull/804",
    subjects=PIPELINES,
)
def expert_boundary_moved(pipe: Any) -> None:
    """Bug: the switch between the experts happens a tenth of the timesteps later."""
    need(pipe.boundary_ratio is not None, "the model has one expert")
    pipe.boundary_ratio = pipe.boundary_ratio - 0.1


@fault(acts="expert switch", source="https://github.com/OpenMOSS/MOVA/pull/32", subjects=PIPELINES)
def expert_boundary_by_index(pipe: Any) -> None:
    """Bug: the boundary between the experts is taken as a share of the steps, not of the time."""

    def by_index(original: Callable[..., Any], inner: Any) -> Any:
        made = original(inner)
        last = (1 - inner.boundary_ratio) * len(made.experts)
        return replace(made, experts=1 + (torch.arange(len(made.experts)) >= last).long())

    need(pipe.boundary_ratio is not None, "the model has one expert")
    around(pipe, "make_schedule", by_index)


@fault(acts="every step, choice of the expert", subjects=PIPELINES)
def experts_exchanged(pipe: Any) -> None:
    """Bug: the experts for high and low noise are loaded in each other's place."""
    need(
        pipe.transformer_2 is not None and pipe.transformer is not None, "the model has one expert"
    )
    pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
