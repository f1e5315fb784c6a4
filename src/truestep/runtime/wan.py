"""Wan 2.1 and 2.2 text-to-video: the stages, bit-equal to `diffusers.WanPipeline` (0.42.1)."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch

from truestep.case import RunSettings
from truestep.errors import CaseError
from truestep.runtime.attention import set_backend
from truestep.runtime.guidance import classifier_free, combination_dtype
from truestep.runtime.pipeline import (
    Branch,
    Pipeline,
    Schedule,
    Stages,
    Step,
    follow_plan,
)
from truestep.runtime.sizes import require_multiple, wrong_frames
from truestep.runtime.text import RECIPES


def prepare(pipe: Pipeline) -> None:
    """Check sizes, scales and attention backend against the models, and apply the backend.

    Raises:
        CaseError: diffusers would round the size silently or refuse it.
    """
    settings = pipe.settings
    transformer, vae = pipe.first_transformer, pipe.vae
    patch = transformer.config.patch_size
    spatial, temporal = vae.config.scale_factor_spatial, vae.config.scale_factor_temporal
    for key, patch_size in (("height", patch[1]), ("width", patch[2])):
        require_multiple(pipe, key, math.lcm(16, spatial * patch_size))
    if (settings.num_frames - 1) % temporal:
        fitting = (settings.num_frames - 1) // temporal * temporal + 1
        raise wrong_frames(pipe, 1, temporal, fitting)
    _check_positions(pipe)
    if settings.guidance_scale_2 is not None and pipe.boundary_ratio is None:
        raise CaseError(
            "guidance_scale_2 is set, but the model has one expert",
            measured="boundary_ratio is not in its model_index.json",
            hint="leave guidance_scale_2 out of the case",
        )
    if settings.attention_backend is not None:
        for model in (pipe.transformer, pipe.transformer_2):
            if model is not None:
                set_backend(model, settings.attention_backend)
    follow_plan(pipe)


def _check_positions(pipe: Pipeline) -> None:
    """Refuse a size beyond the last position that the rotary embedding knows.

    Source:
        diffusers 0.42.1, models/transformers/transformer_wan.py: `WanRotaryPosEmbed` slices tables
        of `rope_max_seq_len` positions, whose views then do not fit.
    """
    config, vae = pipe.first_transformer.config, pipe.vae.config
    positions = getattr(config, "rope_max_seq_len", None)
    if positions is None:
        return  # a port: it says of itself what it holds
    largest = [positions * patch for patch in config.patch_size]
    pixels = {
        "num_frames": (largest[0] - 1) * vae.scale_factor_temporal + 1,
        "height": largest[1] * vae.scale_factor_spatial,
        "width": largest[2] * vae.scale_factor_spatial,
    }
    for key, have, limit in zip(pixels, _latent_size(pipe), largest, strict=True):
        if have > limit:
            raise CaseError(
                f"{key} {getattr(pipe.settings, key)} does not fit the model",
                measured=f"it must be {pixels[key]} at most: its rotary embedding has "
                f"{positions:,} positions an axis",
                hint=f"--set {key}={pixels[key]}",
            )


def clean(prompt: str) -> str:
    """Normalise a prompt exactly as diffusers' Wan pipeline does (ftfy, entities, white space)."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    cleaned: str = prompt_clean(prompt)
    return cleaned


def encode_text(pipe: Pipeline, prompts: list[str]) -> torch.Tensor:
    """Prompts to embeddings `b l c` by the settings' recipe; a row a video."""
    return RECIPES[pipe.settings.text_recipe](
        pipe.tokenizer,
        pipe.text_encoder,
        [clean(prompt) for prompt in prompts],
        max_length=pipe.settings.max_sequence_length,
        device=pipe.device,
    ).repeat_interleave(pipe.settings.videos_per_prompt or 1, 0)


def configured_scheduler(scheduler: Any, settings: RunSettings) -> Any:
    """The folder's scheduler, or another class or shift where the settings ask for one."""
    if settings.scheduler is None and settings.flow_shift is None:
        return scheduler
    import diffusers

    name = settings.scheduler or type(scheduler).__name__
    shift = settings.flow_shift
    if shift is None:
        shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
    if name == "UniPCMultistepScheduler":
        return diffusers.UniPCMultistepScheduler.from_config(
            scheduler.config,
            flow_shift=shift,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
        )
    if name == "FlowMatchEulerDiscreteScheduler":
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift)
    raise CaseError(
        f"flow_shift cannot be set on a {name}",
        hint="--set scheduler=FlowMatchEulerDiscreteScheduler",
    )


def make_schedule(pipe: Pipeline) -> Schedule:
    """Reset the scheduler for the settings' number of steps."""
    pipe.scheduler = configured_scheduler(pipe.scheduler, pipe.settings)
    pipe.scheduler.set_timesteps(pipe.settings.steps, device=pipe.device)
    pipe.scheduler.set_begin_index(0)
    timesteps = pipe.scheduler.timesteps
    experts = torch.ones(len(timesteps), dtype=torch.int64)
    if pipe.boundary_ratio is not None:
        boundary = pipe.boundary_ratio * pipe.scheduler.config.num_train_timesteps
        experts[(timesteps < boundary).cpu()] = 2
    return Schedule(pipe.scheduler.sigmas, timesteps, experts)


def _latent_size(pipe: Pipeline) -> tuple[int, int, int]:
    """Frames, height and width of the latent."""
    settings, config = pipe.settings, pipe.vae.config
    return (
        (settings.num_frames - 1) // config.scale_factor_temporal + 1,
        settings.height // config.scale_factor_spatial,
        settings.width // config.scale_factor_spatial,
    )


def make_latent(pipe: Pipeline) -> torch.Tensor:
    """Standard normal noise `b c f h w`, float32, from a CPU generator with the case's seed."""
    settings = pipe.settings
    channels = pipe.first_transformer.config.in_channels
    shape = (settings.videos_per_prompt or 1, channels, *_latent_size(pipe))
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(pipe.device)


def predict(
    pipe: Pipeline, latent: torch.Tensor, step: Step, embeddings: torch.Tensor, branch: Branch
) -> torch.Tensor:
    """One forward of the step's expert: latent `b c f h w` to a velocity of the same shape."""
    model = pipe.expert(step.expert)
    dtype = pipe.first_transformer.dtype
    if pipe.expand_timesteps:
        grid = torch.ones(latent.shape[2:], device=latent.device)[:, ::2, ::2]
        timestep = (grid * step.timestep).flatten().unsqueeze(0).expand(latent.shape[0], -1)
    else:
        timestep = step.timestep.expand(latent.shape[0])
    cached = (
        model.cache_context(
            branch,
            step_index=step.index,
            sigma=step.sigma,
            num_inference_steps=len(pipe.scheduler.timesteps),
        )
        if hasattr(model, "cache_context")
        else nullcontext()
    )
    pipe.forwards += latent.shape[0]
    with cached:
        prediction: torch.Tensor = model(
            hidden_states=latent.to(dtype),
            timestep=timestep,
            encoder_hidden_states=embeddings.to(dtype),
            return_dict=False,
        )[0]
    return prediction


def combine(pipe: Pipeline, step: Step, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance with the scale of the step's expert."""
    settings = pipe.settings
    second = (
        settings.guidance_scale if settings.guidance_scale_2 is None else settings.guidance_scale_2
    )
    scale = settings.guidance_scale if step.expert == 1 else second
    return classifier_free(
        cond,
        uncond,
        scale=scale,
        rescale=settings.guidance_rescale or 0.0,
        dtype=combination_dtype(settings),
    )


def update(pipe: Pipeline, step: Step, guided: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """One scheduler step: the latent at the next, smaller sigma."""
    following: torch.Tensor = pipe.scheduler.step(guided, step.timestep, latent, return_dict=False)[
        0
    ]
    return following


def decode(pipe: Pipeline, latent: torch.Tensor) -> torch.Tensor:
    """Undo the latent normalisation and decode to frames `b c f h w` in [-1, 1].

    Source:
        diffusers 0.42.1, pipelines/wan/pipeline_wan.py: the reciprocal of the deviation is taken
        and divided by in the VAE's dtype, which rounds differently from a multiplication.
    """
    vae = pipe.vae
    latent = latent.to(next(vae.parameters()).device, dtype=vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latent.device, latent.dtype)
    inverse = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latent.device, latent.dtype)
    frames: torch.Tensor = vae.decode(latent / inverse + mean, return_dict=False)[0]
    return frames


STAGES = Stages(
    prepare=prepare,
    encode_text=encode_text,
    make_schedule=make_schedule,
    make_latent=make_latent,
    predict=predict,
    combine=combine,
    update=update,
    decode=decode,
)
