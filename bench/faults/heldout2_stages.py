"""The second set of held-out faults, around models: text, pictures, noise, schedule, latents.

`HELD2` here holds those inside models (`heldout2`) as well. What each must be told as is written
beside it: regular expressions for what is at fault, and for the value or the change of it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

from bench.faults.heldout import _normal
from bench.faults.heldout2 import HELD2, NO_CAUSE, PLAIN2, STAGED, Held2, held2, judged
from bench.faults.heldout_stages import (
    CHANNELS,
    LAYER,
    MEAN,
    PADDING,
    RANGE,
    RESIZE,
    SCALING,
    SHIFT,
    STD,
    TEMPLATE,
)
from bench.faults.latents import _noise_through
from bench.faults.schedule import _sigmas_through, _timestep_through
from bench.faults.targets import around, narrowed
from bench.faults.vae import _frames_through, _statistics_with
from truestep.testing.corpus.editing import around as wrapped
from truestep.testing.corpus.editing import edit, with_function

__all__ = ["HELD2", "NO_CAUSE", "PLAIN2", "STAGED", "Held2", "judged"]

Tensor = torch.Tensor

TIME = "timestep, timestep scale, time convention, scaled"
CONFIG = "attribute, scheduler config, configuration, sigma grid, timesteps, schedule"
SWAPPED = r"exchang|swap|order|revers|other way|each other|flip|halves"
SCALED = r"scal|factor|times|divid|multipl"
MOVED = r"shift|offset|added|constant"
LEFT_OUT = r"left out|missing|without|not (applied|added|subtracted|used|multiplied)|lacks|is 0\b"
GUIDED = r"guid|cfg"
PLACES = r"\bids?\b|position|rope|rotary|\brow|coordinate"


def _rebuilt(pipe: Any, **changes: Any) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)


# Text, in plain pipelines


@held2(
    "flux",
    "text",
    PADDING,
    r"length|padd|tokens",
    r"\b24\b|\b77\b|\d+ (tokens|rows)|longer|shorter|more|fewer",
)
def flux_text_length_of_short_encoder(pipe: Any) -> None:
    """The long encoder's text is padded to the short encoder's length."""
    old = "max_length=max_sequence_length,"
    edit(pipe, "_get_t5_prompt_embeds", (old, "max_length=self.tokenizer_max_length,"))


@held2("sd3", "text", TEMPLATE, r"prompt|text|token", r"lower|capital|\bcase")
def sd3_prompt_in_lower_case(pipe: Any) -> None:
    """The prompt of the long encoder is put into lower case."""
    old = "text_inputs = self.tokenizer_3(\n        prompt,"
    new = old.replace("prompt,", "[p.lower() for p in prompt],")
    edit(pipe, "_get_t5_prompt_embeds", (old, new))


@held2(
    "pixart",
    "text",
    f"{PADDING}, special tokens",
    r"special|end token|\beos\b|end of|</s>|token 1\b|last token",
)
def pixart_no_end_token(pipe: Any) -> None:
    """The tokenizer adds no special tokens, so the prompt has no end token."""
    edit(pipe, "encode_prompt", ("add_special_tokens=True", "add_special_tokens=False"))


@held2(
    "sana",
    "text",
    f"{PADDING}, order",
    r"token|row|text|place",
    r"first|shift|select|place|roll|later|earlier|\bbos\b|begin",
)
def sana_first_token_not_kept(pipe: Any) -> None:
    """The last tokens are taken as they are, and not the first with all but one of them."""
    old = "[0] + list(range(-max_length + 1, 0))"
    edit(pipe, "encode_prompt", (old, "list(range(-max_length, 0))"))


@held2("sd3", "text", LAYER, r"layer|hidden", r"-3|third|\b0\b|first|embedding|earlier|before")
def sd3_layer_of_first_encoder(pipe: Any) -> None:
    """The first encoder's third last hidden layer is taken, not its second last."""
    old = "prompt_embeds.hidden_states[-2]"
    new = "prompt_embeds.hidden_states[-2 if clip_model_index else -3]"
    edit(pipe, "_get_clip_prompt_embeds", (old, new))


@held2("flux", "text", "pooled, left out, zero", r"pooled|text_embeds", rf"zero|{LEFT_OUT}")
def flux_pooled_of_zeros(pipe: Any) -> None:
    """The pooled text that the model is given is zero."""
    old = "pooled_projections=pooled_prompt_embeds"
    edit(pipe, "__call__", (old, "pooled_projections=torch.zeros_like(pooled_prompt_embeds)"))


@held2(
    "sd3",
    "text",
    "pooled, second encoder, repeated",
    r"pooled",
    r"twice|repeat|second|half|same|\d+ ?(-|to) ?\d+",
)
def sd3_pooled_of_first_encoder_twice(pipe: Any) -> None:
    """The pooled text is the first encoder's twice, without the second's."""
    old = "torch.cat([pooled_prompt_embed, pooled_prompt_2_embed], dim=-1)"
    edit(pipe, "encode_prompt", (old, old.replace("prompt_2_embed", "prompt_embed")))


@held2("pixart", "text", f"{PADDING}, batched order", r"mask", SWAPPED)
def pixart_masks_in_other_order(pipe: Any) -> None:
    """Masks of prompt and negative prompt stand in the other order in the batch, texts do not."""
    old = "torch.cat([negative_prompt_attention_mask, prompt_attention_mask], dim=0)"
    new = "torch.cat([prompt_attention_mask, negative_prompt_attention_mask], dim=0)"
    edit(pipe, "__call__", (old, new))


@held2("sdxl", "text", "pooled, batched order, order", r"pooled|text_embeds", SWAPPED)
def sdxl_pooled_in_other_order(pipe: Any) -> None:
    """Pooled texts of prompt and negative prompt stand in the other order in the batch."""
    old = "torch.cat([negative_pooled_prompt_embeds, add_text_embeds], dim=0)"
    edit(
        pipe,
        "__call__",
        (old, "torch.cat([add_text_embeds, negative_pooled_prompt_embeds], dim=0)"),
    )


@held2(
    "cogvideox-i2v",
    "text",
    TEMPLATE,
    r"prompt|text|token",
    r"template|append|suffix|more|longer|words|behind|after|other (tokens|ids)|token\w* \d",
)
def cogvideox_prompt_with_suffix(pipe: Any) -> None:
    """Prompts go with words about quality behind them."""
    old = "text_inputs = self.tokenizer(\n        prompt,"
    new = old.replace("prompt,", '[p + " high quality" for p in prompt],')
    edit(pipe, "_get_t5_prompt_embeds", (old, new))


# Guidance, in plain pipelines


@held2("sdxl", "guidance", "guidance scale", GUIDED, r"\b7\.5\b|1\.5\b")
def sdxl_scale_of_another_model(pipe: Any) -> None:
    """The guidance scale is 7.5, not 5."""
    edit(pipe, "__call__", ("+ self.guidance_scale *", "+ 7.5 *"))


@held2("sd3", "guidance", "guidance rescale", r"rescal", r"0\.7\b|0\.70")
def sd3_rescaled(pipe: Any) -> None:
    """The guided prediction is rescaled with a share of 0.7."""
    old = "latents_dtype = latents.dtype"
    ratio = "noise_pred_text.std((1, 2, 3), keepdim=True) / noise_pred.std((1, 2, 3), keepdim=True)"
    edit(pipe, "__call__", (old, f"noise_pred = noise_pred * (0.7 * {ratio} + 0.3); {old}"))


@held2(
    "cogvideox-i2v",
    "guidance",
    "guidance missing, guidance scale",
    GUIDED,
    r"last|step 2|steps? .*\b2\b|without|missing|conditional",
)
def cogvideox_last_step_unguided(pipe: Any) -> None:
    """The last step, the third, is not guided."""
    old = "+ self.guidance_scale *"
    edit(pipe, "__call__", (old, "+ (1.0 if i == 2 else self.guidance_scale) *"))


@held2("ltx-i2v", "guidance", "guidance formula", GUIDED, r"negat|sign|opposite|-\s?\d")
def ltx_guided_away(pipe: Any) -> None:
    """Guidance leads away from the prompt: the difference of the passes has the other sign."""
    old = "(noise_pred_text - noise_pred_uncond)"
    edit(pipe, "__call__", (old, "(noise_pred_uncond - noise_pred_text)"))


@held2("flux", "guidance", "guidance scale, scaled", GUIDED, r"1000|3500|thousand")
def flux_embedded_scale_in_thousandths(pipe: Any) -> None:
    """The embedded guidance scale is multiplied by 1000 before the model does it again."""
    old = "torch.full([1], guidance_scale,"
    edit(pipe, "__call__", (old, "torch.full([1], guidance_scale * 1000,"))


@held2("inpaint", "guidance", "guidance scale", GUIDED, r"\b3(\.0+)?\b|0\.4\b")
def inpaint_scale_of_another_model(pipe: Any) -> None:
    """The guidance scale is 3, not 7.5."""
    edit(pipe, "__call__", ("+ self.guidance_scale *", "+ 3.0 *"))


# Time and schedule, in plain pipelines


@held2(
    "flux",
    "time",
    TIME,
    r"time",
    r"revers|1 - |1 minus|1000 - |from 1|other way|complement|picture|clean",
)
def flux_time_reversed(pipe: Any) -> None:
    """The model is told one minus the time."""
    edit(pipe, "__call__", ("timestep=timestep / 1000", "timestep=1 - timestep / 1000"))


@held2("ltx-i2v", "time", TIME, r"time", r"0\.001\b|1000|1e-0?3|thousand")
def ltx_time_divided(pipe: Any) -> None:
    """The model is told the time from 0 to 1, not from 0 to 1000."""
    old = "timestep = timestep.unsqueeze(-1) * (1 - conditioning_mask)"
    edit(pipe, "__call__", (old, f"{old} / 1000"))


@held2(
    "cogvideox-i2v",
    "time",
    f"{TIME}, off by one",
    r"time",
    r"more|larger|higher|\+ ?1\b|offset|plus|off by|shift|too far|later|earlier",
)
def cogvideox_time_one_more(pipe: Any) -> None:
    """The model is told the time plus one."""
    old = "timestep = t.expand(latent_model_input.shape[0])"
    edit(pipe, "__call__", (old, f"{old} + 1"))


@held2("sd3", "schedule", CONFIG, r"karras")
def sd3_karras(pipe: Any) -> None:
    """Sigmas are those of Karras et al., not evenly spaced."""
    _rebuilt(pipe, use_karras_sigmas=True)


@held2(
    "kontext", "schedule", "flow shift", r"shift|\bmu\b", r"0\.25\b|0\.9\b|m\w+_shift|mu\b.{0,20}\d"
)
def kontext_shifts_of_another_model(pipe: Any) -> None:
    """The shift of time lies between 0.25 and 0.9, not between 0.5 and 1.15."""
    pipe.scheduler.register_to_config(base_shift=0.25, max_shift=0.9)


@held2("ltx-i2v", "schedule", CONFIG, r"terminal|last|end|small|final", r"0\.1\b|0\.10|terminal")
def ltx_shift_terminal(pipe: Any) -> None:
    """The sigmas are stretched so that the last one is 0.1."""
    _rebuilt(pipe, shift_terminal=0.1)


@held2("flux", "schedule", CONFIG, r"sigma|grid|timestep", r"0\.05\b|\blast|end|smallest|evenly")
def flux_sigmas_end_lower(pipe: Any) -> None:
    """The sigmas end at 0.05 before the shift, not at one third."""
    old = "np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)"
    edit(pipe, "__call__", (old, "np.linspace(1.0, 0.05, num_inference_steps)"))


@held2("sdxl", "schedule", CONFIG, r"zero_snr|zero snr|rescale_betas|terminal")
def sdxl_zero_snr(pipe: Any) -> None:
    """The betas are rescaled to no signal at the last timestep."""
    _rebuilt(pipe, rescale_betas_zero_snr=True)


@held2(
    "pixart",
    "schedule",
    f"{CONFIG}, prediction type",
    r"prediction.?type|sample.{0,30}epsilon|epsilon.{0,30}sample|\bx0\b",
)
def pixart_prediction_is_sample(pipe: Any) -> None:
    """The scheduler takes the prediction for the picture, not for the noise."""
    _rebuilt(pipe, prediction_type="sample")


@held2("img2img", "schedule", CONFIG, r"clip_sample|clip|clamp")
def img2img_clipped(pipe: Any) -> None:
    """The scheduler clips the predicted picture to [-1, 1]."""
    _rebuilt(pipe, clip_sample=True)


@held2("cogvideox-i2v", "schedule", CONFIG, r"snr_shift|snr shift|snr")
def cogvideox_snr_shift(pipe: Any) -> None:
    """The scheduler shifts the ratio of signal to noise by 1, not by 3."""
    _rebuilt(pipe, snr_shift_scale=1.0)


@held2("sana", "schedule", CONFIG, r"solver.?order|(first|1st) order|order.*\b1\b")
def sana_first_order(pipe: Any) -> None:
    """The solver is of first order, not of second."""
    _rebuilt(pipe, solver_order=1)


@held2("inpaint", "schedule", CONFIG, r"beta_end|beta", r"0\.02\b|0\.012\b")
def inpaint_beta_end(pipe: Any) -> None:
    """The betas end at 0.02, not at 0.012."""
    _rebuilt(pipe, beta_end=0.02)


# Latents, in plain pipelines


@held2("flux", "latents", SCALING, SCALED, r"0\.130|2\.77|0\.36\d*\b")
def flux_scaling_of_another_model(pipe: Any) -> None:
    """Latents are divided by 0.13025, the scaling factor of another model, not by 0.3611."""
    old = "latents / self.vae.config.scaling_factor"
    edit(pipe, "__call__", (old, "latents / 0.13025"))


@held2("kontext", "latents", SHIFT, MOVED, r"0\.0609|0\.1159|0\.055\b|0\.0199|0\.01986")
def kontext_shift_of_another_model(pipe: Any) -> None:
    """The shift factor is 0.0609, that of another model, not 0.1159."""
    pipe.vae.register_to_config(shift_factor=0.0609)


@held2("sd3", "latents", SHIFT, MOVED, r"twice|\b2 |doubl|0\.2318|0\.1159")
def sd3_shift_added_twice(pipe: Any) -> None:
    """The shift factor is added twice."""
    old = "+ self.vae.config.shift_factor"
    edit(pipe, "__call__", (old, f"{old} * 2"))


@held2(
    "ltx-i2v",
    "latents",
    STD,
    r"std|deviation",
    LEFT_OUT + r"|is 1\b|\bones\b|1 everywhere|not undone",
)
def ltx_deviation_left_out(pipe: Any) -> None:
    """Latents are decoded without their deviation."""
    old = "latents = latents * latents_std / scaling_factor + latents_mean"
    edit(pipe, "_denormalize_latents", (old, old.replace("* latents_std ", "")))


@held2("ltx-i2v", "latents", MEAN, r"mean", LEFT_OUT)
def ltx_image_mean_left_out(pipe: Any) -> None:
    """The mean is not taken off the given picture's latents."""
    edit(pipe, "_normalize_latents", ("(latents - latents_mean)", "latents"))


@held2("img2img", "latents", SCALING, SCALED, r"0\.182|0\.504|0\.36\d*\b")
def img2img_picture_scaled_otherwise(pipe: Any) -> None:
    """The picture's latents are multiplied by 0.18215, not by 0.3611."""
    old = "self.vae.config.scaling_factor * init_latents"
    edit(pipe, "prepare_latents", (old, "0.18215 * init_latents"))


@held2(
    "cogvideox-i2v", "latents", SCALING, r"scal|factor|invert", r"0\.75|1\.15|1\.32|invert|divid"
)
def cogvideox_picture_scaled_the_other_way(pipe: Any) -> None:
    """The picture's latents are divided by the scaling factor, not multiplied by it."""
    pipe.vae.register_to_config(invert_scale_latents=True)


@held2("flux", "packing", f"{CHANNELS}, packing", r"pack|order|permut|channel|patch")
def flux_unpacked_channels_last(pipe: Any) -> None:
    """Latents are unpacked as if the channels of a patch varied fastest."""
    old = "width // 2, channels // 4, 2, 2)\n    latents = latents.permute(0, 3, 1, 4, 2, 5)"
    new = "width // 2, 2, 2, channels // 4)\n    latents = latents.permute(0, 5, 1, 3, 2, 4)"
    edit(pipe, "_unpack_latents", (old, new))


@held2(
    "flux",
    "noise",
    "order, packing",
    r"noise|latent|random|drawn",
    r"pack|order|permut|patch|shape",
)
def flux_noise_drawn_packed(pipe: Any) -> None:
    """The noise is drawn in the packed shape, so that the same numbers stand elsewhere."""
    packed = "(batch_size, (height // 2) * (width // 2), num_channels_latents * 4)"
    old = (
        "    latents = self._pack_latents(latents, batch_size, num_channels_latents, height, width)"
    )
    edit(pipe, "prepare_latents", ("randn_tensor(shape,", f"randn_tensor({packed},"), (old, ""))


@held2("sd3", "noise", "precision", r"bfloat16")
def sd3_noise_through_bfloat16(pipe: Any) -> None:
    """The noise went through bfloat16."""
    old = "randn_tensor(shape, generator=generator, device=device, dtype=dtype)"
    edit(pipe, "prepare_latents", (old, f"{old}.to(torch.bfloat16).to(dtype)"))


@held2("pixart", "noise", "scaled", r"noise|latent|sigma", r"1\.1\b|1\.10|10 ?%")
def pixart_noise_too_large(pipe: Any) -> None:
    """The noise is a tenth too large."""
    edit(pipe, "prepare_latents", ("self.scheduler.init_noise_sigma", "1.1"))


@held2("flux", "rope ids", "positions, scaled", PLACES, r"\b2(\.0)?\b|twice|doubl")
def flux_ids_of_latents(pipe: Any) -> None:
    """Ids of positions count latents, not patches of two by two: they are twice as far apart."""
    edit(
        pipe,
        "_prepare_latent_image_ids",
        ("torch.arange(height)", "2 * torch.arange(height)"),
        ("torch.arange(width)", "2 * torch.arange(width)"),
    )


@held2("kontext", "rope ids", "positions", PLACES, r"\b2\b")
def kontext_ids_of_second_picture(pipe: Any) -> None:
    """Ids say that the given picture is the second one."""
    edit(pipe, "prepare_latents", ("image_ids[..., 0] = 1", "image_ids[..., 0] = 2"))


@held2("sdxl", "size ids", "size, crop, time ids", r"time_ids|crop|size", r"\b16(\.0)?\b")
def sdxl_crop_ids(pipe: Any) -> None:
    """The size ids say that the picture was cropped at 16, 16."""
    old = "original_size + crops_coords_top_left + target_size"
    edit(pipe, "_get_add_time_ids", (old, old.replace("crops_coords_top_left", "(16, 16)")))


# Pictures, in plain pipelines


@held2(
    "kontext",
    "image",
    f"{RANGE}, scaled",
    r"range|normal|scaled|image|picture",
    r"0\.5\b|half|\b2\b",
)
def kontext_range_of_one(pipe: Any) -> None:
    """The picture is given from -0.5 to 0.5, not from -1 to 1."""
    pipe.image_processor.normalize = lambda images: images - 0.5


@held2("cogvideox-i2v", "image", RESIZE, r"resiz|resampl|bicubic|interpol", r"bicubic")
def cogvideox_image_bicubic(pipe: Any) -> None:
    """The picture is resized bicubically, not by Lanczos's filter."""
    pipe.video_processor.register_to_config(resample="bicubic")


@held2("ltx-i2v", "image", f"{RESIZE}, crop", r"crop")
def ltx_image_cropped(pipe: Any) -> None:
    """The picture is cropped to its middle, not stretched."""
    old = "self.video_processor.preprocess(image, height=height, width=width)"
    edit(pipe, "__call__", (old, f'{old[:-1]}, resize_mode="crop")'))


@held2(
    "inpaint",
    "image",
    CHANNELS,
    r"channel|colou?r|rgb|bgr|grey|gray",
    r"order|exchang|swap|bgr|permut|revers|flip|places",
)
def inpaint_green_and_blue(pipe: Any) -> None:
    """Green and blue of the picture are exchanged."""
    wrapped(pipe.image_processor, "preprocess", lambda call, *a, **k: call(*a, **k)[:, [0, 2, 1]])


# In truestep's own runtime


@held2(
    "digits",
    "text",
    f"{PADDING}, zero",
    r"token|row|text|embedding|position",
    r"first|\b0\b|start|begin",
    r"zero|\b0\b|missing|left out|lost",
)
def digits_first_token_zeroed(pipe: Any) -> None:
    """The first row of the encoded text is zero."""

    def zeroed(original: Callable[..., Tensor], inner: Any, prompts: list[str]) -> Tensor:
        made = original(inner, prompts).clone()
        made[:, 0] = 0
        return made

    around(pipe, "encode_text", zeroed)


@held2(
    "wan",
    "guidance",
    "guidance scale, guidance formula",
    GUIDED,
    r"-\s?4\b|negat|sign|opposite",
)
def wan_guided_away(pipe: Any) -> None:
    """Guidance leads away from the prompt: the scale is -4, not 4."""
    pipe.combine = lambda inner, step, cond, uncond: uncond - 4.0 * (cond - uncond)


@held2("digits", "guidance", "guidance scale", GUIDED, r"1\.75\b")
def digits_scale_lower(pipe: Any) -> None:
    """The guidance scale is 1.75, not 3."""
    pipe.settings.guidance_scale = 1.75


@held2(
    "digits",
    "guidance",
    "guidance missing",
    GUIDED,
    r"step",
    r"\b14\b|\b15\b|last|after|later|from",
)
def digits_unguided_at_the_end(pipe: Any) -> None:
    """The last six steps are not guided."""

    def combine(original: Any, inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        late = step.index >= len(inner.scheduler.timesteps) - 6
        return cond if late else original(inner, step, cond, uncond)

    around(pipe, "combine", combine)


@held2("cosmos", "sigma", "sigma grid, sigma range", r"sigma", r"\brho|spac|power|exponent|karras")
def cosmos_rho(pipe: Any) -> None:
    """Sigmas are spaced with a rho of 5, not of 7."""

    def other(inner: Any, sigmas: Tensor) -> Tensor:
        scheduler = deepcopy(inner.scheduler)
        scheduler.register_to_config(rho=5.0)
        scheduler.set_timesteps(inner.settings.steps)
        made: Tensor = scheduler.sigmas.to(sigmas)
        return made

    _sigmas_through(pipe, other)


@held2("digits", "time", TIME, r"time", r"0\.5\b|half|halv|500|\b2\b")
def digits_time_halved(pipe: Any) -> None:
    """The model is told half of the time."""
    _timestep_through(pipe, lambda inner, step: step.timestep / 2)


@held2("wan", "noise", "sign, scaled", r"noise|latent", r"sign|-1\b|negat")
def wan_noise_negated(pipe: Any) -> None:
    """The initial noise has the other sign."""
    _noise_through(pipe, lambda inner, noise: -noise)


@held2(
    "digits", "noise", "order, flipped", r"noise|latent", r"revers|flip|order|mirror|turned|places"
)
def digits_noise_mirrored(pipe: Any) -> None:
    """The initial noise is mirrored, left for right."""
    _noise_through(pipe, lambda inner, noise: noise.flip(-1))


@held2("wan", "cast", "precision", r"float16", r"^(?!.*bfloat16)")
def wan_latent_kept_in_float16(pipe: Any) -> None:
    """The latent is stored as float16 between steps."""
    around(
        pipe,
        "update",
        lambda original, inner, *args: narrowed(original(inner, *args), torch.float16),
    )


@held2("wan", "latents", STD, r"std|deviation", r"channel|next|order|place")
def wan_deviations_of_next_channel(pipe: Any) -> None:
    """Each channel is multiplied by the deviation of the next."""
    _statistics_with(pipe, lambda latent, mean, std: latent * std.roll(-1, 1) + mean)


@held2("digits", "latents", MEAN, r"mean", r"twice|doubl|\b2\b|again|once more")
def digits_mean_added_twice(pipe: Any) -> None:
    """The mean is added twice."""
    _statistics_with(pipe, lambda latent, mean, std: latent * std + 2 * mean)


@held2(
    "cosmos",
    "latents",
    f"{SCALING}, scaled",
    SCALED + r"|sigma.data",
    r"0\.5\b|half|halv|\b2\b|sigma_data",
)
def cosmos_sigma_data_left_out(pipe: Any) -> None:
    """Latents are not divided by sigma_data, 0.5, before they are decoded."""
    _statistics_with(pipe, lambda latent, mean, std: latent * 0.5 * std + mean)


@held2(
    "digits",
    "image",
    "order, flipped",
    r"frame|time|axis|decod|output",
    r"revers|flip|order|backward|places",
)
def digits_frames_backwards(pipe: Any) -> None:
    """Frames are returned in reverse."""
    _frames_through(pipe, lambda frames: frames.flip(2))


# Nothing that is looked for


@held2("kontext", NO_CAUSE)
def kontext_gamma(pipe: Any) -> None:
    """The picture is brightened by a gamma of 0.7."""
    pipe.image_processor.normalize = lambda images: images.clamp(0, 1) ** 0.7 * 2 - 1


@held2("sdxl", NO_CAUSE)
def sdxl_noise_of_two_seeds(pipe: Any) -> None:
    """The noise is a mixture of that of two seeds."""
    plain = torch.randn

    def mixed(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        made = plain(shape, generator=generator, dtype=dtype)
        return 0.8 * made + 0.6 * _normal(shape, 81).to(made)

    with_function(pipe, "prepare_latents", "randn_tensor", mixed)


@held2("flux", NO_CAUSE)
def flux_time_jittered(pipe: Any) -> None:
    """The model is told times that are off by up to 2 %, otherwise at each step."""
    old = "timestep=timestep / 1000"
    edit(pipe, "__call__", (old, f"{old} * (1 + 0.02 * np.sin(7 * i + 1))"))


@held2("wan", NO_CAUSE)
def wan_guided_by_power(pipe: Any) -> None:
    """The difference of the passes is raised to a power of 0.8 before it is scaled."""

    def combine(inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        difference = cond - uncond
        made: Tensor = uncond + 4.0 * difference.sign() * difference.abs() ** 0.8
        return made

    pipe.combine = combine
