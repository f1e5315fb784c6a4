"""Faults of guidance: from the predictions of two branches to one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import PIPELINES, fault
from bench.faults.targets import around, edm, need, shapes
from truestep.joint import each, floating

Tensor = torch.Tensor
Combine = Callable[..., Tensor]


def scale_of(pipe: Any, step: Any) -> float:
    """The guidance scale of a step's expert, as one of `uncond + scale (cond - uncond)`."""
    settings = pipe.settings
    second = settings.guidance_scale_2
    scale: float = settings.guidance_scale if step.expert == 1 or second is None else second
    return scale + edm(pipe)  # Cosmos: `cond + scale (cond - uncond)`


def _combine_with(pipe: Any, combine: Callable[[Any, Any, Tensor, Tensor], Tensor]) -> None:
    """Replace the formula of guidance by `combine(pipe, step, cond, uncond)`."""
    need(pipe.settings.guided, "the case has no guidance")
    pipe.combine = combine


def _scaled(pipe: Any, factor: float) -> None:
    need(pipe.settings.guided, "the case has no guidance")
    pipe.settings.guidance_scale *= factor
    if pipe.settings.guidance_scale_2 is not None:
        pipe.settings.guidance_scale_2 *= factor


@fault(acts="stage guidance, scale", subjects=PIPELINES)
def guidance_tenth_more(pipe: Any) -> None:
    """Bug: the guidance scale is 10 % too large."""
    _scaled(pipe, 1.1)


@fault(acts="stage guidance, scale", subjects=PIPELINES)
def guidance_hundredth_more(pipe: Any) -> None:
    """Bug: the guidance scale is 1 % too large."""
    _scaled(pipe, 1.01)


@fault(
    acts="stage guidance, formula",
    source="https://github.com/threestudio-project/threestudio/issues/289",
)
def guidance_from_cond(pipe: Any) -> None:
    """Bug: guidance starts from the conditional prediction, which adds one to the scale."""

    def combine(inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        return cond + scale_of(inner, step) * (cond - uncond)

    _combine_with(pipe, combine)


@fault(
    acts="stage guidance, formula",
    source="https://github.com/Nerogar/OneTrainer/issues/775",
)
def guidance_branches_swapped(pipe: Any) -> None:
    """Bug: the two halves of a batch are unpacked as cond, uncond instead of uncond, cond."""

    def combine(inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        return cond + scale_of(inner, step) * (uncond - cond)

    _combine_with(pipe, combine)


def _rescaled(pipe: Any, dims: tuple[int, ...], phi: float) -> None:
    def rescale(original: Combine, inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        guided = original(inner, step, cond, uncond)
        ratio = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return guided * (phi * ratio + 1 - phi)

    need(pipe.settings.guided, "the case has no guidance")
    around(pipe, "combine", rescale)


@fault(
    acts="stage guidance, rescale",
    source="https://github.com/lucidrains/denoising-diffusion-pytorch/issues/256",
)
def guidance_rescaled(pipe: Any) -> None:
    """Bug: guidance is rescaled (phi 0.7) on one side only."""
    _rescaled(pipe, (1, 2, 3, 4), 0.7)


@fault(acts="stage guidance, rescale")
def guidance_rescaled_by_channel(pipe: Any) -> None:
    """Bug: a slight rescale (phi 0.1) takes its deviations by channel, not over the sample."""
    _rescaled(pipe, (2, 3, 4), 0.1)


@fault(acts="stage guidance, channels", source="https://github.com/facebookresearch/DiT/issues/41")
def guidance_on_some_channels(pipe: Any) -> None:
    """Bug: only the first three channels are guided, a left-over of pixel models."""

    def partial(original: Combine, inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        guided = original(inner, step, cond[:, :3], uncond[:, :3])
        return torch.cat([guided, cond[:, 3:].to(guided.dtype)], dim=1)

    need(pipe.settings.guided, "the case has no guidance")
    around(pipe, "combine", partial)


def _unguided_where(pipe: Any, skip: Callable[[Any, Any], bool]) -> None:
    def skipping(original: Combine, inner: Any, step: Any, cond: Any, *others: Any) -> Any:
        return cond if skip(inner, step) else original(inner, step, cond, *others)

    need(pipe.settings.guided, "the case has no guidance")
    around(pipe, "combine", skipping)


@fault(acts="step 0, guidance", subjects=PIPELINES)
def first_step_unguided(pipe: Any) -> None:
    """Bug: the first step is not guided."""
    _unguided_where(pipe, lambda inner, step: step.index == 0)


@fault(acts="last step, guidance", subjects=PIPELINES)
def last_step_unguided(pipe: Any) -> None:
    """Bug: the last step is not guided."""
    _unguided_where(pipe, lambda inner, step: step.index == inner.settings.steps - 1)


@fault(acts="stage guidance, every step but the first", subjects=PIPELINES)
def uncond_one_step_late(pipe: Any) -> None:
    """Bug: each step is guided away from the unconditional prediction of the step before."""
    earlier: list[Any] = []

    def late(original: Combine, inner: Any, step: Any, cond: Any, uncond: Any, *others: Any) -> Any:
        known = earlier.pop() if earlier else uncond
        fits = step.index > 0 and shapes(known) == shapes(uncond)
        earlier[:] = [uncond]
        used = each(lambda old, new: old.to(new), known, uncond) if fits else uncond
        return original(inner, step, cond, used, *others)

    need(pipe.settings.guided, "the case has no guidance")
    around(pipe, "combine", late)


@fault(acts="stage prediction, branch uncond", subjects=PIPELINES)
def uncond_text_zeroed(pipe: Any) -> None:
    """Bug: the unconditional branch is given zeros instead of the encoded negative prompt."""

    def zeroed(
        original: Combine, inner: Any, latent: Any, step: Any, text: Any, branch: str
    ) -> Any:
        text = each(floating(torch.zeros_like), text) if branch == "uncond" else text
        return original(inner, latent, step, text, branch)

    need(pipe.settings.guided, "the case has no guidance")
    around(pipe, "predict", zeroed)


@fault(acts="step of the second expert, guidance")
def second_scale_ignored(pipe: Any) -> None:
    """Bug: the second expert is guided with the scale of the first."""
    need(pipe.boundary_ratio is not None, "the model has one expert")
    second = pipe.settings.guidance_scale_2
    need(second not in (None, pipe.settings.guidance_scale), "both scales are the same")
    pipe.settings.guidance_scale_2 = None
