"""Settings of an LTX-2 run: controls resolved and checked against the models, and its sizes."""

from __future__ import annotations

import math

import torch

from truestep.controls import Controls, find_profile, resolve
from truestep.errors import CaseError, UsageError
from truestep.runtime.attention import set_backend
from truestep.runtime.ltx2.plan import (
    LAST,
    SIGMAS,
    configured_scheduler,
    one_list,
    perturbed_blocks,
    wanted_passes,
)
from truestep.runtime.ltx2.two_stage import check_initial
from truestep.runtime.pipeline import Branch, Pipeline
from truestep.runtime.sizes import require_multiple, wrong_frames

FPS = 24.0
"""Frames a second that diffusers' pipeline tells the model by default."""


def prepare(pipe: Pipeline) -> None:
    """Resolve the controls, check everything against the models and configure the scheduler.

    Raises:
        CaseError: A setting is missing, has no meaning for this family, or does not fit the model;
            nothing is rounded.
        FileFormatError: The recording to start from is damaged or lacks a part.
        UsageError: The profile is unknown.
    """
    settings = pipe.settings
    if settings.profile is None:
        raise CaseError(
            "an LTX-2 case must name the reference that it follows",
            measured="engines that run LTX-2 disagree in a dozen choices",
            hint="--set profile=diffusers-0.42.1  # or another of truestep show profile",
        )
    pipe.controls = controls = resolve(settings)
    _check_family(pipe)
    _check_size(pipe)
    _check_blocks(pipe, controls)
    _check_text(pipe)
    _check_steps(pipe, controls)
    check_initial(pipe, sigma=first_sigma(controls), audio_length=audio_length(pipe))
    pipe.scheduler = configured_scheduler(pipe.scheduler, controls)
    if settings.attention_backend is not None:
        set_backend(pipe.transformer, settings.attention_backend)
    pipe.refused = _without_effect(pipe, controls)


def version(pipe: Pipeline) -> str:
    """`2.3`, whose text is modulated by the timestep, or `2.0`."""
    return "2.3" if pipe.transformer.config.cross_attn_mod else "2.0"


def of(pipe: Pipeline) -> Controls:
    """The run's controls.

    Raises:
        UsageError: `prepare` has not been called.
    """
    if pipe.controls is None:
        raise UsageError("the pipeline is not prepared", hint="call pipeline.prepare(pipeline)")
    return pipe.controls


_ELSEWHERE = {
    "scheduler": "mu, terminal_sigma and sigma_schedule say what the schedule is",
    "flow_shift": "mu is the shift of LTX-2's schedule",
    "guidance_scale_2": "there is one transformer; audio_guidance_scale is the sound's",
    "adaptive_gate": "skip_step leaves out passes in LTX-2",
    "adaptive_agreement": "skip_step leaves out passes in LTX-2",
}


def _check_family(pipe: Pipeline) -> None:
    settings, profile = pipe.settings, find_profile(of(pipe).profile)
    for key, instead in _ELSEWHERE.items():
        if getattr(settings, key) is not None:
            raise CaseError(
                f"{key} is set, but an LTX-2 model has none", measured=instead, hint=f"drop {key}"
            )
    if settings.cfg != "sequential":
        raise CaseError(
            f"cfg={settings.cfg} is for models with two passes",
            measured="LTX-2 has up to four",
            hint="--set pass_batching=separate  # or cond_uncond, or all",
        )
    if settings.text_attention != "full" or settings.text_cache:
        raise CaseError(
            "text_attention and text_cache are not for LTX-2",
            measured="its connector replaces the padding, and LTX-2.3 modulates the text with the "
            "timestep: there is nothing to collapse or to keep",
            hint="drop both",
        )
    if settings.text_recipe != "per_branch_connector":
        raise CaseError(
            f"the text recipe {settings.text_recipe} is not for LTX-2",
            measured="its text goes through a connector that replaces the padding",
            hint="--set text_recipe=per_branch_connector",
        )
    found = version(pipe)
    if found not in profile.versions:
        raise CaseError(
            f"the profile {profile.name} is not for LTX-{found}",
            measured=f"it is for LTX-{' and '.join(profile.versions)}",
            hint="truestep show profile",
        )


def _check_size(pipe: Pipeline) -> None:
    settings = pipe.settings
    spatial, temporal = ratios(pipe)
    for key in ("height", "width"):
        require_multiple(pipe, key, spatial)
    if (settings.num_frames - 1) % temporal:
        fitting = max(round((settings.num_frames - 1) / temporal), 0) * temporal + 1
        raise wrong_frames(pipe, 1, temporal, fitting)
    if audio_length(pipe) < 1:
        raise CaseError(
            "the clip is too short for any sound",
            measured=f"{settings.num_frames} frames at {frame_rate(pipe):g} a second",
            hint="--set num_frames=121",
        )


def _check_blocks(pipe: Pipeline, controls: Controls) -> None:
    count = len(pipe.transformer.transformer_blocks)
    video, audio = perturbed_blocks(controls)
    for key, blocks in (("stg_blocks", video), ("audio_stg_blocks", audio)):
        bad = [block for block in blocks if block >= count]
        if bad:
            raise CaseError(
                f"{key} names block {bad[0]}, which the model has not",
                measured=f"its blocks are 0 to {count - 1}",
                hint=f"--set {key}={count - 1}  # or --set stg_scale=0 --set audio_stg_scale=0",
            )
    for key, scale, blocks in (
        ("stg_blocks", controls.stg_scale, controls.stg_blocks),
        ("audio_stg_blocks", controls.audio_stg_scale, controls.audio_stg_blocks),
    ):
        if scale and not blocks and not (key.startswith("audio") and one_list(controls)):
            raise CaseError(
                f"{key} is empty, and its scale is {scale:g}",
                hint=f"--set {key}=28  # or set the scale to 0",
            )


def _check_text(pipe: Pipeline) -> None:
    config, length = pipe.connectors.config, pipe.settings.max_sequence_length
    registers = (
        config.video_connector_num_learnable_registers,
        config.audio_connector_num_learnable_registers,
    )
    multiple = math.lcm(*(count or 1 for count in registers))
    if length % multiple:
        raise CaseError(
            f"max_sequence_length {length} does not fit the text connector",
            measured=f"it must be a multiple of {multiple}",
            hint=f"--set max_sequence_length={max(round(length / multiple), 1) * multiple}",
        )


def _check_steps(pipe: Pipeline, controls: Controls) -> None:
    fixed = SIGMAS.get(controls.sigma_schedule)
    if fixed is not None and pipe.settings.steps != len(fixed):
        raise CaseError(
            f"the {controls.sigma_schedule} schedule has {len(fixed)} steps, not "
            f"{pipe.settings.steps}",
            hint=f"--set steps={len(fixed)}",
        )
    if fixed is None and pipe.settings.steps < 2:
        raise CaseError(
            "one step cannot be stretched to a last sigma",
            measured=f"its only sigma is 1, and the last one is to be {controls.terminal_sigma:g}",
            hint="--set steps=2",
        )
    if controls.sampler == "res2s" and fixed is None and controls.terminal_sigma <= LAST:
        raise CaseError(
            f"terminal_sigma {controls.terminal_sigma:g} is below the last sigma of res2s",
            measured=f"it ends at {LAST:g}",
            hint="--set terminal_sigma=0.1",
        )
    if pipe.vae.config.timestep_conditioning:
        raise CaseError(
            "the video VAE is conditioned on a timestep, which no LTX-2 or 2.3 model is",
            hint="give a model folder of LTX-2 or LTX-2.3",
        )


def _without_effect(pipe: Pipeline, controls: Controls) -> tuple[str, ...]:
    """What the settings ask for and the model cannot do."""
    if "perturbed" in passes(pipe) and not pipe.transformer.config.perturbed_attn:
        return (
            "spatio-temporal guidance has no effect: the transformer was configured without "
            "perturbed_attn, and its perturbed pass is the conditional one again",
        )
    return ()


def ratios(pipe: Pipeline) -> tuple[int, int]:
    """Pixels a latent side, and frames a latent frame."""
    return pipe.vae.spatial_compression_ratio, pipe.vae.temporal_compression_ratio


def frame_rate(pipe: Pipeline) -> float:
    """Frames a second."""
    return float(FPS if pipe.settings.fps is None else pipe.settings.fps)


def latent_shape(pipe: Pipeline) -> tuple[int, int, int]:
    """Latent frames, height and width."""
    settings, (spatial, temporal) = pipe.settings, ratios(pipe)
    return (
        (settings.num_frames - 1) // temporal + 1,
        settings.height // spatial,
        settings.width // spatial,
    )


def audio_length(pipe: Pipeline) -> int:
    """Latent frames of the sound: as long as the video."""
    config = pipe.audio_vae.config
    a_second = (
        config.sample_rate
        / config.mel_hop_length
        / float(pipe.audio_vae.temporal_compression_ratio)
    )
    return round(pipe.settings.num_frames / frame_rate(pipe) * float(a_second))


def passes(pipe: Pipeline) -> tuple[Branch, ...]:
    """Passes of this run's steps."""
    return wanted_passes(pipe.settings.guidance_scale, of(pipe))


def skips(pipe: Pipeline, index: int) -> bool:
    """Whether a step keeps the last denoised estimate, without any forward (`skip_step`).

    The midpoints of `res2s` never do, and its steps are counted without them.

    Source:
        ltx-core components/guiders.py, `should_skip_step`.
    """
    period = of(pipe).skip_step + 1
    if of(pipe).sampler == "res2s":
        index, midpoint = divmod(index, 2)
        return not midpoint and index % period != 0
    return index % period != 0


def first_sigma(controls: Controls) -> float:
    """Where the schedule starts."""
    return SIGMAS.get(controls.sigma_schedule, (1.0,))[0]


def given_tokens(pipe: Pipeline, tokens: torch.Tensor) -> torch.Tensor | None:
    """1 for video tokens of the given image and 0 for the others, `b n`; None without an image."""
    if pipe.settings.image is None:
        return None
    frames, height, width = latent_shape(pipe)
    mask = tokens.new_zeros(tokens.shape[0], frames, height * width)
    mask[:, 0] = 1.0
    return mask.flatten(1)
