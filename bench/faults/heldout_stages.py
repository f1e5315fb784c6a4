"""Held-out faults around models: text, pictures, noise, schedule, guidance, update, decoding.

`HELD` here holds those inside models (`heldout`) as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch.nn import functional

from bench.faults.guidance import _unguided_where
from bench.faults.heldout import HELD, NO_CAUSE, PLAIN, STAGED, Held, _normal, held
from bench.faults.latents import _noise_through
from bench.faults.schedule import _sigmas_through, _timestep_through
from bench.faults.targets import around, narrowed
from bench.faults.vae import _frames_through, _statistics_with
from truestep.testing.corpus.editing import around as wrapped
from truestep.testing.corpus.editing import edit, with_function

__all__ = ["HELD", "NO_CAUSE", "PLAIN", "STAGED", "Held"]

Tensor = torch.Tensor

MEAN, STD = "latent mean, latent statistics", "latent std, latent deviation, latent statistics"
SCALING, SHIFT = "scaling factor, latent scale", "shift factor, latent shift"
LAYER, TEMPLATE = "text layer, layer, hidden layer", "text template, template, tokens, prompt"
PADDING = "text padding, padding, mask, tokens"
RANGE, RESIZE = "image range, range", "resize, image resize, resample"
CHANNELS = "channel order, image channels, order, permuted"


# Text


@held("wan", "text", PADDING)
def wan_padded_on_the_left(pipe: Any) -> None:
    """The tokenizer pads on the left."""
    pipe.tokenizer.padding_side = "left"


@held("digits", "text", TEMPLATE)
def digits_prompt_in_template(pipe: Any) -> None:
    """Prompts stand in a template that the model was not trained with."""

    def templated(original: Callable[..., Tensor], inner: Any, prompts: list[str]) -> Tensor:
        return original(inner, [f"a {prompt}".strip() for prompt in prompts])

    around(pipe, "encode_text", templated)


@held("flux", "text", LAYER)
def flux_text_layer_before_last(pipe: Any) -> None:
    """The long encoder's layer before the last is taken."""
    old = "output_hidden_states=False)[0]"
    edit(pipe, "_get_t5_prompt_embeds", (old, "output_hidden_states=True).hidden_states[-2]"))


@held("sdxl", "text", LAYER)
def sdxl_text_layer_third_last(pipe: Any) -> None:
    """The third last hidden layer of both encoders, not the second last."""
    old = "prompt_embeds = prompt_embeds.hidden_states[-2]"
    edit(pipe, "encode_prompt", (old, old.replace("-2", "-3")))


@held("pixart", "text", TEMPLATE)
def pixart_prompt_in_template(pipe: Any) -> None:
    """Prompts go with a prefix."""
    edit(
        pipe, "_text_preprocessing", ("text.lower().strip()", '"photo of " + text.lower().strip()')
    )


@held("ltx-i2v", "text", PADDING)
def ltx_mask_off_by_one(pipe: Any) -> None:
    """The text's mask leaves out the last token that is no padding."""
    old = "prompt_attention_mask = text_inputs.attention_mask"
    new = f"{old} * text_inputs.attention_mask.roll(-1, 1)"
    edit(pipe, "_get_t5_prompt_embeds", (old, new))


@held("sd3", "text", PADDING)
def sd3_padded_with_end(pipe: Any) -> None:
    """The long encoder's text is padded with token 1, the end of the text, not with 0."""
    old = "text_input_ids = text_inputs.input_ids"
    new = f"{old}.masked_fill(text_inputs.input_ids == 0, 1)"
    edit(pipe, "_get_t5_prompt_embeds", (old, new))


# Guidance


@held("wan", "guidance", "guidance scale")
def wan_scale_of_another_model(pipe: Any) -> None:
    """The guidance scale is 5.5, not 4."""
    pipe.settings.guidance_scale = 5.5


@held("cosmos", "guidance", "guidance scale, guidance formula")
def cosmos_guided_from_uncond(pipe: Any) -> None:
    """Guidance starts from the unconditional prediction, which takes one from the scale."""

    def combine(inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        return uncond + inner.settings.guidance_scale * (cond - uncond)

    pipe.combine = combine


@held("cosmos", "guidance", "guidance formula")
def cosmos_branches_swapped(pipe: Any) -> None:
    """The two predictions are taken for each other."""
    around(
        pipe,
        "combine",
        lambda original, inner, step, cond, uncond: original(inner, step, uncond, cond),
    )


@held("digits", "guidance", "guidance rescale")
def digits_rescaled(pipe: Any) -> None:
    """The guided prediction is rescaled with a share of 0.25."""
    pipe.settings.guidance_rescale = 0.25


@held("wan", "guidance", "guidance rescale, guidance formula")
def wan_rescaled_by_uncond(pipe: Any) -> None:
    """The guided prediction is given the deviation of the unconditional one."""

    def rescale(original: Any, inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        guided = original(inner, step, cond, uncond)
        dims = (1, 2, 3, 4)
        made: Tensor = guided * uncond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return made

    around(pipe, "combine", rescale)


@held("sd3", "guidance", "guidance scale, guidance formula")
def sd3_scale_less_one(pipe: Any) -> None:
    """The guidance scale is taken less one."""
    edit(pipe, "__call__", ("+ self.guidance_scale *", "+ (self.guidance_scale - 1) *"))


@held("sdxl", "guidance", "guidance rescale")
def sdxl_rescaled(pipe: Any) -> None:
    """The guided prediction is rescaled with a share of 0.5."""
    old = "self._guidance_rescale = guidance_rescale"
    edit(pipe, "__call__", (old, "self._guidance_rescale = 0.5"))


@held("flux", "guidance", "guidance scale")
def flux_embedded_scale(pipe: Any) -> None:
    """The embedded guidance scale is 4, not 3.5."""
    edit(pipe, "__call__", ("torch.full([1], guidance_scale,", "torch.full([1], 4.0,"))


@held("digits", "guidance", "guidance missing")
def digits_unguided_in_the_middle(pipe: Any) -> None:
    """Steps 5 to 8 are not guided."""
    _unguided_where(pipe, lambda inner, step: 5 <= step.index <= 8)


@held("pixart", "guidance", "guidance scale, guidance formula")
def pixart_scale_of_another_model(pipe: Any) -> None:
    """The guidance scale is 7, not 4.5."""
    edit(pipe, "__call__", ("noise_pred_uncond + guidance_scale *", "noise_pred_uncond + 7.0 *"))


# Schedule


@held("wan", "shift", "flow shift")
def wan_shift_of_another_size(pipe: Any) -> None:
    """The flow shift is 5, not 3."""
    pipe.settings.flow_shift = 5.0


@held("digits", "shift", "flow shift")
def digits_shift_as_logarithm(pipe: Any) -> None:
    """The shift is the logarithm of the flow shift, as where it is an exponent."""
    shift = pipe.settings.flow_shift or pipe.scheduler.config.shift
    pipe.settings.flow_shift = math.log(shift) if shift != 1 else 1.5


@held("flux", "shift", "flow shift")
def flux_shifts_exchanged(pipe: Any) -> None:
    """The shifts of the smallest and of the largest picture are exchanged."""

    def exchanged(tokens: int, least: int, most: int, base: float, largest: float) -> float:
        return largest + (base - largest) * (tokens - least) / (most - least)

    with_function(pipe, "__call__", "calculate_shift", exchanged)


@held("sd3", "shift", "flow shift")
def sd3_shift_fixed(pipe: Any) -> None:
    """The shift is 3, and does not depend on the size."""
    pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    pipe.scheduler.set_shift(3.0)


@held("cosmos", "sigma", "sigma grid, sigma range, largest sigma, sigma max")
def cosmos_largest_sigma(pipe: Any) -> None:
    """The largest sigma is 70, not 80; the noise is made for 80."""

    def smaller(inner: Any, sigmas: Tensor) -> Tensor:
        other = deepcopy(inner.scheduler)
        other.register_to_config(sigma_max=70.0)
        other.set_timesteps(inner.settings.steps)
        made: Tensor = other.sigmas.to(sigmas)
        return made

    _sigmas_through(pipe, smaller)


@held("digits", "sigma", "time convention, sigma convention, timestep")
def digits_time_reversed(pipe: Any) -> None:
    """The model is told the time from the picture, not from the noise."""
    _timestep_through(pipe, lambda inner, step: 1000 - step.timestep)


@held("wan", "sigma", "scaled, sign")
def wan_velocity_reversed(pipe: Any) -> None:
    """The velocity points from the noise to the picture: its sign is the other one."""
    around(pipe, "predict", lambda original, inner, *args: -original(inner, *args))


@held("pixart", "off by one", "off by one, sigma grid, timesteps, schedule")
def pixart_steps_not_offset(pipe: Any) -> None:
    """The timesteps are one less: the offset of the steps is 0, not 1."""
    pipe.scheduler.register_to_config(steps_offset=0)


@held("digits", "off by one", "sigma grid")
def digits_grid_of_one_step_more(pipe: Any) -> None:
    """The sigmas are those of one step more, without the first."""

    def later(inner: Any, sigmas: Tensor) -> Tensor:
        other = deepcopy(inner.scheduler)
        other.set_timesteps(inner.settings.steps + 1)
        made: Tensor = other.sigmas[1:].to(sigmas)
        return made

    _sigmas_through(pipe, later)


@held("wan", "noise", "precision")
def wan_noise_in_float16(pipe: Any) -> None:
    """The initial noise went through float16."""
    _noise_through(pipe, lambda inner, noise: narrowed(noise, torch.float16))


@held("cosmos", "noise", "scaled")
def cosmos_noise_of_another_sigma(pipe: Any) -> None:
    """The noise is scaled by 70, where the reference has 80."""
    _noise_through(pipe, lambda inner, noise: noise * (70 / 80))


@held("digits", "noise", "seed")
def digits_seed_of_later_sample(pipe: Any) -> None:
    """The seed is that of the eighth sample of a batch."""
    pipe.settings.seed += 7


@held("sdxl", "sigma", "prediction type, sigma convention, attribute")
def sdxl_velocity_for_noise(pipe: Any) -> None:
    """The scheduler takes the prediction for a velocity."""
    pipe.scheduler.register_to_config(prediction_type="v_prediction")


# Latents


@held("wan", "latents", STD)
def wan_variance_for_deviation(pipe: Any) -> None:
    """Latents are multiplied by the variance, not by its root."""
    _statistics_with(pipe, lambda latent, mean, std: latent * std**2 + mean)


@held("digits", "latents", f"{MEAN}, order")
def digits_means_of_next_channel(pipe: Any) -> None:
    """Each channel is given the mean of the next."""
    _statistics_with(pipe, lambda latent, mean, std: latent * std + mean.roll(1, 1))


@held("cosmos", "latents", MEAN)
def cosmos_mean_subtracted(pipe: Any) -> None:
    """The mean is taken off, not added."""
    _statistics_with(pipe, lambda latent, mean, std: latent * std - mean)


@held("flux", "latents", SHIFT)
def flux_shift_subtracted(pipe: Any) -> None:
    """The shift factor is taken off, not added."""
    edit(pipe, "__call__", ("+ self.vae.config.shift_factor", "- self.vae.config.shift_factor"))


@held("sd3", "latents", SCALING)
def sd3_scaling_of_another_model(pipe: Any) -> None:
    """The scaling factor is 0.18215, that of another model."""
    pipe.vae.register_to_config(scaling_factor=0.18215)


@held("pixart", "latents", SCALING)
def pixart_scaled_the_other_way(pipe: Any) -> None:
    """Latents are multiplied by the scaling factor, not divided by it."""
    old = "latents.to(self.vae.dtype) / self.vae.config.scaling_factor"
    edit(pipe, "__call__", (old, old.replace(" / ", " * ")))


@held("ltx-i2v", "latents", MEAN)
def ltx_mean_before_deviation(pipe: Any) -> None:
    """The mean is added before the multiplication by the deviation."""
    old = "latents = latents * latents_std / scaling_factor + latents_mean"
    edit(
        pipe,
        "_denormalize_latents",
        (old, "latents = (latents + latents_mean) * latents_std / scaling_factor"),
    )


# Pictures


@held("kontext", "image", f"{RANGE}, image normalisation")
def kontext_image_of_another_encoder(pipe: Any) -> None:
    """The picture is normalised with CLIP's mean and deviation."""

    def normalised(images: Tensor) -> Tensor:
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        return (images - mean) / std

    pipe.image_processor.normalize = normalised


@held("kontext", "image", CHANNELS)
def kontext_colours_turned(pipe: Any) -> None:
    """Red, green and blue of the picture are blue, red and green."""
    wrapped(pipe.image_processor, "preprocess", lambda call, *a, **k: call(*a, **k).roll(1, 1))


@held("ltx-i2v", "image", RESIZE)
def ltx_image_bilinear(pipe: Any) -> None:
    """The picture is resized bilinearly."""
    pipe.video_processor.register_to_config(resample="bilinear")


@held("wan", "image", f"{RANGE}, scaled")
def wan_frames_from_zero(pipe: Any) -> None:
    """Frames are returned from 0 to 1, not from -1 to 1."""
    _frames_through(pipe, lambda frames: (frames + 1) / 2)


@held("digits", "image", CHANNELS)
def digits_colours_reversed(pipe: Any) -> None:
    """Red and blue of the frames are exchanged."""
    _frames_through(pipe, lambda frames: frames.flip(1))


# Nothing that is looked for


@held("digits", NO_CAUSE)
def digits_thresholded(pipe: Any) -> None:
    """The guided prediction is cut at the 95th percentile of its size."""

    def cut(original: Any, inner: Any, step: Any, *passes: Tensor) -> Tensor:
        guided = original(inner, step, *passes)
        most = float(guided.abs().flatten().quantile(0.95))
        made: Tensor = guided.clamp(-most, most)
        return made

    around(pipe, "combine", cut)


@held("wan", NO_CAUSE)
def wan_guidance_projected(pipe: Any) -> None:
    """Only what stands orthogonal to the conditional prediction is guided."""

    def projected(original: Any, inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        difference = cond - uncond
        along = (difference * cond).sum() / cond.square().sum() * cond
        made: Tensor = cond + (inner.settings.guidance_scale - 1) * (difference - along)
        return made

    around(pipe, "combine", projected)


@held("wan", NO_CAUSE)
def wan_sigmas_jittered(pipe: Any) -> None:
    """Each sigma between the first and the last is up to 2 % off."""

    def jittered(inner: Any, sigmas: Tensor) -> Tensor:
        factors = 1 + 0.02 * _normal(sigmas.shape, 61).clamp(-1, 1).to(sigmas)
        return torch.cat([sigmas[:1], (sigmas * factors)[1:-1], sigmas[-1:]])

    _sigmas_through(pipe, jittered)


@held("wan", NO_CAUSE)
def wan_noise_smoothed(pipe: Any) -> None:
    """The noise is smoothed over the width."""
    _noise_through(pipe, lambda inner, noise: 0.9 * noise + 0.1 * noise.roll(1, -1))


@held("digits", NO_CAUSE)
def digits_noise_with_offset(pipe: Any) -> None:
    """The noise of each channel has an offset, as for darker and brighter pictures."""
    _noise_through(pipe, lambda inner, n: n + 0.1 * _normal((*n.shape[:2], 1, 1, 1), 62).to(n))


@held("digits", NO_CAUSE)
def digits_update_churned(pipe: Any) -> None:
    """Each step adds a little noise."""

    def churned(original: Any, inner: Any, step: Any, *args: Any) -> Tensor:
        made = original(inner, step, *args)
        noise = _normal(made.shape, 100 + step.index).to(made)
        following: Tensor = made + 0.02 * noise
        return following

    around(pipe, "update", churned)


@held("cosmos", NO_CAUSE)
def cosmos_text_noised(pipe: Any) -> None:
    """Noise of training is added to the encoded text."""

    def noised(original: Callable[..., Tensor], inner: Any, prompts: list[str]) -> Tensor:
        made = original(inner, prompts)
        return made + 0.05 * made.std() * _normal(made.shape, 63).to(made)

    around(pipe, "encode_text", noised)


@held("wan", NO_CAUSE)
def wan_frames_sharpened(pipe: Any) -> None:
    """Decoded frames are sharpened."""

    def sharpened(frames: Tensor) -> Tensor:
        smooth = functional.avg_pool3d(frames, (1, 3, 3), 1, (0, 1, 1))
        return frames + 0.2 * (frames - smooth)

    _frames_through(pipe, sharpened)


@held("pixart", NO_CAUSE)
def pixart_prediction_blended(pipe: Any) -> None:
    """The guided prediction keeps a tenth of that of the step before."""
    old = "latents = self.scheduler.step(noise_pred, t,"
    kept = "noise_pred = noise_pred if i == 0 else 0.9 * noise_pred + 0.1 * kept; kept = noise_pred"
    edit(pipe, "__call__", (old, f"{kept}; {old}"))
