"""Cosmos text-to-world: the stages, bit-equal to `diffusers.CosmosTextToWorldPipeline` (0.42.1).

A prediction is the denoised sample x0: the model's output through the preconditioning of Karras et
al. 2022, because that is what this pipeline's guidance combines.

No safety checker runs here. diffusers' pipeline refuses to be built without `cosmos_guardrail`, as
NVIDIA's licence of the weights asks for a guardrail: run one on prompts and frames that are shown
to anyone. diffusers also passes frames through 8 bits for its checker; `decode` does not.

Source:
    diffusers 0.42.1, pipelines/cosmos/pipeline_cosmos_text2world.py and
    schedulers/scheduling_edm_euler.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from truestep.errors import CaseError, UsageError
from truestep.runtime.attention import set_backend
from truestep.runtime.guidance import combination_dtype, rescaled
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

FPS = 30
"""Frames a second that diffusers' pipeline tells the model by default."""


def require_torchvision(concat_padding_mask: bool) -> None:
    """Refuse a transformer that resizes its padding mask with torchvision where there is none.

    Raises:
        UsageError: diffusers found no torchvision when it was imported.

    Source:
        diffusers 0.42.1, models/transformers/transformer_cosmos.py: `transforms` is imported only
        where torchvision is installed, and used without a check.
    """
    from diffusers.models.transformers import transformer_cosmos

    if concat_padding_mask and not hasattr(transformer_cosmos, "transforms"):
        raise UsageError(
            "running this Cosmos model needs the package 'torchvision', which is not installed",
            likely="its transformer has concat_padding_mask, and diffusers resizes the mask with "
            "torchvision",
            hint="pip install torchvision",
        )


def prepare(pipe: Pipeline) -> None:
    """Check the settings against the models, and apply attention backend and plan.

    Raises:
        CaseError: diffusers would round the size silently, refuse it or fail in a model, or a
            setting has no meaning for this family.
        UsageError: The transformer needs torchvision, and it is not installed.
    """
    settings = pipe.settings
    require_torchvision(bool(pipe.transformer.config.concat_padding_mask))
    _check_scheduler(pipe.scheduler)
    for key in ("scheduler", "flow_shift", "guidance_scale_2"):
        if getattr(settings, key) is not None:
            raise CaseError(
                f"{key} is set, but a Cosmos model has none to choose",
                measured="it has one transformer and its own EDMEulerScheduler",
                hint=f"leave {key} out of the case",
            )
    _check_size(pipe)
    if settings.attention_backend is not None:
        set_backend(pipe.transformer, settings.attention_backend)
    follow_plan(pipe)


def _check_scheduler(scheduler: Any) -> None:
    missing = [
        name
        for name in ("precondition_inputs", "precondition_outputs")
        if not hasattr(scheduler, name)
    ]
    if missing:
        raise UsageError(
            f"a {type(scheduler).__name__} cannot drive a Cosmos model",
            measured=f"it has no {' and no '.join(missing)}",
            hint="use diffusers.EDMEulerScheduler or one with its interface",
        )


def _check_size(pipe: Pipeline) -> None:
    """Height, width and frames: multiples, and what the positions and statistics reach."""
    settings, config, vae = pipe.settings, pipe.transformer.config, pipe.vae.config
    patch, spatial = config.patch_size, vae.spatial_compression_ratio
    for key, patch_size in (("height", patch[1]), ("width", patch[2])):
        require_multiple(pipe, key, math.lcm(16, spatial * patch_size))
    period = vae.temporal_compression_ratio * patch[0]
    first = vae.temporal_compression_ratio * (patch[0] - 1) + 1
    if (settings.num_frames - first) % period or settings.num_frames < first:
        fitting = max(settings.num_frames - first, 0) // period * period + first
        raise wrong_frames(pipe, first, period, fitting)
    latent, limits = _latent_shape(pipe)[2:], _limits(pipe)
    largest = {
        "num_frames": (limits[0] - 1) * vae.temporal_compression_ratio + 1,
        "height": limits[1] * spatial,
        "width": limits[2] * spatial,
    }
    for key, have, limit in zip(largest, latent, limits, strict=True):
        if have > limit:
            raise CaseError(
                f"{key} {getattr(settings, key)} does not fit the model",
                measured=f"it must be {largest[key]} at most: positions, or the VAE's latent "
                f"statistics, end at {limit} in the latent",
                hint=f"--set {key}={largest[key]}",
            )


def _limits(pipe: Pipeline) -> tuple[int, int, int]:
    """Largest latent frames, height and width that the models have positions and statistics for."""
    config, vae = pipe.transformer.config, pipe.vae.config
    patches = [
        size // patch for size, patch in zip(config.max_size, config.patch_size, strict=True)
    ]
    reach = patches if config.extra_pos_embed_type else [max(patches)] * 3
    frames, height, width = (n * p for n, p in zip(reach, config.patch_size, strict=True))
    if vae.latents_mean is not None:
        known = len(vae.latents_mean) // vae.latent_channels
        frames = min(frames, known) if known > 1 else frames
    return frames, height, width


def encode_text(pipe: Pipeline, prompts: list[str]) -> torch.Tensor:
    """Prompts, as they are, to embeddings `b l c` by the settings' recipe; a row a video.

    A negative prompt that is not given is empty; diffusers' pipeline then takes the
    `DEFAULT_NEGATIVE_PROMPT` of its file, which is to be written into the case.
    """
    return RECIPES[pipe.settings.text_recipe](
        pipe.tokenizer,
        pipe.text_encoder,
        prompts,
        max_length=pipe.settings.max_sequence_length,
        device=pipe.device,
    ).repeat_interleave(pipe.settings.videos_per_prompt or 1, 0)


def make_schedule(pipe: Pipeline) -> Schedule:
    """Reset the scheduler: sigmas of Karras et al. from `sigma_max`, timesteps 0.25 log(sigma)."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(pipe.settings.steps, device=pipe.device)
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True  # `predict` scales, without the scheduler's counter
    experts = torch.ones(len(scheduler.timesteps), dtype=torch.int64)
    return Schedule(scheduler.sigmas, scheduler.timesteps, experts)


def _latent_shape(pipe: Pipeline) -> tuple[int, int, int, int, int]:
    settings, vae = pipe.settings, pipe.vae.config
    return (
        settings.videos_per_prompt or 1,
        pipe.transformer.config.in_channels,
        (settings.num_frames - 1) // vae.temporal_compression_ratio + 1,
        settings.height // vae.spatial_compression_ratio,
        settings.width // vae.spatial_compression_ratio,
    )


def make_latent(pipe: Pipeline) -> torch.Tensor:
    """Normal noise `b c f h w` of deviation `sigma_max`, float32, from a CPU generator."""
    generator = torch.Generator("cpu").manual_seed(pipe.settings.seed)
    noise = torch.randn(_latent_shape(pipe), generator=generator, dtype=torch.float32)
    made: torch.Tensor = noise.to(pipe.device) * pipe.scheduler.config.sigma_max
    return made


def predict(
    pipe: Pipeline, latent: torch.Tensor, step: Step, embeddings: torch.Tensor, branch: Branch
) -> torch.Tensor:
    """One forward: latent `b c f h w` to the denoised sample x0 of the same shape, float32.

    The scheduler's counter is neither read nor moved: any step may be predicted at any time.

    Source:
        Karras et al. 2022 (arXiv 2206.00364), equation 7; rounding of diffusers 0.42.1: c_out times
        the output is rounded to the model's dtype, the sum is float32.
    """
    model, scheduler = pipe.transformer, pipe.scheduler
    dtype = model.dtype
    latent = latent.to(torch.promote_types(torch.float32, dtype))
    sigma = torch.tensor(step.sigma, dtype=latent.dtype)
    pipe.forwards += latent.shape[0]
    output = model(
        hidden_states=scheduler.precondition_inputs(latent, sigma).to(dtype),
        timestep=step.timestep.expand(latent.shape[0]).to(dtype),
        encoder_hidden_states=embeddings.to(dtype),
        fps=FPS if pipe.settings.fps is None else pipe.settings.fps,
        padding_mask=latent.new_zeros(
            1, 1, pipe.settings.height, pipe.settings.width, dtype=dtype
        ),  # shared by a batch; all zeros, as in diffusers
        return_dict=False,
    )[0]
    denoised: torch.Tensor = scheduler.precondition_outputs(latent, output, sigma)
    return denoised


def output_scale(scheduler: Any) -> Callable[[Step], float]:
    """Factor of the network's output in x0, by step: c_out of Karras et al. 2022."""

    def scale(step: Step) -> float:
        data = float(scheduler.config.sigma_data)
        return step.sigma * data / math.hypot(step.sigma, data)

    return scale


def combine(pipe: Pipeline, step: Step, cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance of denoised samples: `cond + s (cond - uncond)`.

    The scale counts from 0: 7 here pulls as far as 8 in Wan's form, `uncond + s (cond - uncond)`.
    """
    settings, own = pipe.settings, cond.dtype
    dtype = combination_dtype(settings)
    if dtype is not None:
        cond, uncond = cond.to(dtype), uncond.to(dtype)
    guided = cond + settings.guidance_scale * (cond - uncond)
    if settings.guidance_rescale:
        guided = rescaled(guided, cond, share=settings.guidance_rescale)
    return guided.to(own)


def update(pipe: Pipeline, step: Step, guided: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """One Euler step of the scheduler towards the denoised sample `guided`."""
    following: torch.Tensor = pipe.scheduler.step(
        guided, step.timestep, latent, return_dict=False, pred_original_sample=guided
    )[0]
    return following


def decode(pipe: Pipeline, latent: torch.Tensor) -> torch.Tensor:
    """Undo the latent normalisation and decode to frames `b c f h w` in about [-1, 1].

    Source:
        diffusers 0.42.1, pipelines/cosmos/pipeline_cosmos_text2world.py: statistics are one number
        a channel and latent frame, applied in float32 before the cast to the VAE's dtype.
    """
    vae, sigma_data = pipe.vae, pipe.scheduler.config.sigma_data
    home = next(vae.parameters()).device
    latent = latent.to(home, torch.promote_types(torch.float32, vae.dtype))
    if vae.config.latents_mean is None:
        latent = latent / sigma_data
    else:
        mean, deviation = (
            torch.tensor(values)
            .view(1, vae.config.latent_channels, -1, 1, 1)[:, :, : latent.shape[2]]
            .to(latent)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latent = latent * deviation / sigma_data + mean
    frames: torch.Tensor = vae.decode(latent.to(vae.dtype), return_dict=False)[0]
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
