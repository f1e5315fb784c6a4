"""Guidance of both modalities, and the step that follows it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch

from truestep.joint import Joint
from truestep.runtime.guidance import deviation_ratio
from truestep.runtime.ltx2 import sampler
from truestep.runtime.ltx2.settings import given_tokens, of, passes
from truestep.runtime.pipeline import Branch, Pipeline, Step


def guided_estimate(
    cond: torch.Tensor,
    others: Mapping[Branch, torch.Tensor],
    *,
    guidance: float,
    stg: float,
    modality: float,
    rescale: float,
    std_scope: str,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Guidance of one modality's denoised samples.

    `g = c + (s-1)(c-u) + stg (c-p) + (m-1)(c-m)`, then `g (phi std(c)/std(g) + 1 - phi)`; terms
    whose pass did not run are left out.

    Args:
        cond: x0 with the prompt, `b n c`.
        others: x0 of the passes that ran: `uncond`, `perturbed`, `modality`.
        guidance, stg, modality: Their scales s, stg and m.
        rescale: Share phi, 0 to 1.
        std_scope: Deviation over the `whole` tensor, or of each `sample`; unbiased.
        dtype: To compute in, at least; None is that of `cond`. The result is in that of `cond`.

    Source:
        ltx-core components/guiders.py, `MultiModalGuider.calculate`; with `sample` in the order of
        operations of diffusers 0.42.1, `rescale_noise_cfg`.
    """
    own = cond.dtype
    wide = own if dtype is None else dtype
    c = cond.to(wide)
    terms = {"uncond": guidance - 1, "perturbed": stg, "modality": modality - 1}
    g = c
    for branch, scale in terms.items():
        if branch in others:
            g = g + scale * (c - others[branch].to(wide))  # type: ignore[index]
    if rescale:
        g = _rescaled(g, c, share=rescale, std_scope=std_scope)
    return g.to(own)


def _rescaled(
    guided: torch.Tensor, cond: torch.Tensor, *, share: float, std_scope: str
) -> torch.Tensor:
    """A constant estimate has no deviation to bring back, and is kept."""
    whole = std_scope == "whole"
    ratio = deviation_ratio(guided, cond, whole=whole)
    if whole:
        return guided * (share * ratio + (1 - share))
    return share * (guided * ratio) + (1 - share) * guided


def combine(pipe: Pipeline, step: Step, cond: Joint, *others: Joint) -> Joint:
    """Guidance of both modalities; `others` are the predictions of the passes after `cond`."""
    controls, scale = of(pipe), pipe.settings.guidance_scale
    ran = dict(zip(passes(pipe)[1:], others, strict=False))
    name = controls.guidance_dtype
    wanted = pipe.transformer.dtype if name == "model" else getattr(torch, name)
    by_modality = (
        ("video", scale, controls.stg_scale, controls.modality_scale, controls.guidance_rescale),
        (
            "audio",
            controls.audio_guidance_scale,
            controls.audio_stg_scale,
            controls.audio_modality_scale,
            controls.audio_guidance_rescale,
        ),
    )
    made = []
    for part, guidance, stg, modality, rescale in by_modality:
        own = getattr(cond, part)
        made.append(
            guided_estimate(
                own,
                {branch: getattr(value, part) for branch, value in ran.items()},
                guidance=guidance,
                stg=stg,
                modality=modality,
                rescale=rescale,
                std_scope=controls.std_scope,
                dtype=wanted if name == "model" else torch.promote_types(own.dtype, wanted),
            )
        )
    return Joint(*made)


def update(pipe: Pipeline, step: Step, guided: Joint, latent: Joint) -> Joint:
    """One step of both modalities towards the guided estimate; given tokens stay."""
    advance = sampler.advance if of(pipe).sampler == "res2s" else _euler
    moved = advance(pipe, step, guided, latent)
    given = given_tokens(pipe, latent.video)
    if given is not None:
        kept = torch.where(given.unsqueeze(-1) > 0, latent.video, moved.video)
        moved = moved._replace(video=kept)
    return moved


def _euler(pipe: Pipeline, step: Step, guided: Joint, latent: Joint) -> Joint:
    scheduler = pipe.scheduler
    twin = copy.copy(scheduler)  # a step moves the counter, which is the same for both
    return Joint(
        *(
            solver.step((x - g) / step.sigma, step.timestep, x, return_dict=False)[0]
            for solver, x, g in zip((scheduler, twin), latent, guided, strict=True)
        )
    )
