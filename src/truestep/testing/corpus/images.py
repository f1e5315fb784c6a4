"""Faults of what conditions beside the text: pictures, masks, controls, videos."""

from __future__ import annotations

from typing import Any

from truestep.testing.corpus.editing import around, edit
from truestep.testing.corpus.entry import NotApplicable, fault

_ENCODED = "vae.encode in x"
_LATENTS = ("denoiser.forward in hidden_states", "denoiser.forward in sample")
_NEXT = ("*.forward in *", "scheduler.* in sample", "vae.decode in z")


def _processor(pipe: Any) -> Any:
    names = ("control_image_processor", "video_processor", "image_processor")
    held = [getattr(pipe, name, None) for name in names]
    for processor in held:
        if processor is not None and hasattr(processor, "preprocess"):
            return processor
    raise NotApplicable(f"{type(pipe).__name__} has no image processor")


@fault(
    "kontext", "inpaint", "img2img", "wan-i2v", "cogvideox-i2v", "ltx-i2v", "svd", "klein-kv",
    "control",
    at=_ENCODED,
)  # fmt: skip
def range_not_centred(pipe: Any) -> None:
    """The picture is given from 0 to 1, not from -1 to 1."""
    _processor(pipe).normalize = lambda images: images


@fault("kontext", "fill", "img2img", "wan-i2v", "klein-kv", "cogvideox-i2v", at=_ENCODED)
def colours_reversed(pipe: Any) -> None:
    """Blue and red of the picture are swapped."""
    around(_processor(pipe), "preprocess", lambda call, *a, **k: call(*a, **k).flip(1))


@fault("kontext", "fill", "inpaint", "wan-i2v", "cogvideox-i2v", "ltx-i2v", at=_ENCODED)
def resized_by_nearest(pipe: Any) -> None:
    """The picture is resized without interpolation."""
    _processor(pipe).register_to_config(resample="nearest")


@fault("kontext", "inpaint", "wan-i2v", at=_ENCODED)
def resized_by_bilinear(pipe: Any) -> None:
    """The picture is resized by another filter."""
    _processor(pipe).register_to_config(resample="bilinear")


@fault("controlnet", at="controlnet.forward in controlnet_cond")
def control_resized_by_nearest(pipe: Any) -> None:
    """The control picture is resized without interpolation."""
    _processor(pipe).register_to_config(resample="nearest")


@fault("controlnet", at="controlnet.forward in controlnet_cond")
def control_centred(pipe: Any) -> None:
    """The control picture is given from -1 to 1, not from 0 to 1."""
    edit(pipe, "prepare_image", (".to(dtype=torch.float32)", ".to(dtype=torch.float32) * 2 - 1"))


@fault("wan-i2v", at="image_encoder.forward in pixel_values")
def encoder_image_not_normalised(pipe: Any) -> None:
    """The image encoder's picture lacks the mean and deviation that it was trained with."""
    pipe.image_processor.do_normalize = False


@fault("svd", at="image_encoder.forward in pixel_values")
def encoder_image_not_standardised(pipe: Any) -> None:
    """The image encoder's picture lacks the mean and deviation that it was trained with."""
    edit(pipe, "_encode_image", ("do_normalize=True", "do_normalize=False"))


@fault("svd", at="image_encoder.forward in pixel_values")
def resized_without_antialiasing(pipe: Any) -> None:
    """The image encoder's picture is made smaller without a filter."""
    old = "_resize_with_antialiasing(image, (224, 224))"
    edit(pipe, "_encode_image", (old, "torch.nn.functional.interpolate(image, (224, 224))"))


@fault("wan-i2v", at="denoiser.forward in encoder_hidden_states_image")
def image_layer(pipe: Any) -> None:
    """The image encoder's last layer, not the one before it."""
    edit(pipe, "encode_image", ("image_embeds.hidden_states[-2]", "image_embeds.last_hidden_state"))


@fault("svd", at="denoiser.forward in encoder_hidden_states")
def negative_image_not_zero(pipe: Any) -> None:
    """The unguided pass sees the picture as well."""
    old = "torch.zeros_like(image_embeddings)"
    edit(pipe, "_encode_image", (old, "image_embeddings.clone()"))


@fault("svd", at=_LATENTS)
def negative_latents_not_zero(pipe: Any) -> None:
    """The unguided pass is given the picture's latents as well."""
    edit(pipe, "_encode_vae_image", ("torch.zeros_like(image_latents)", "image_latents.clone()"))


@fault("svd", at=_LATENTS)
def condition_scaled(pipe: Any) -> None:
    """The picture's latents are scaled, where this family takes them as they are."""
    old = ".latent_dist.mode()"
    edit(pipe, "_encode_vae_image", (old, old + " * self.vae.config.scaling_factor"))


@fault("svd", at=(_ENCODED, "random.*"))
def condition_without_noise(pipe: Any) -> None:
    """The picture is encoded without its little noise."""
    edit(pipe, "__call__", ("image = image + noise_aug_strength * noise", "image = image"))


@fault("svd", at="denoiser.forward in added_time_ids")
def frames_a_second(pipe: Any) -> None:
    """The frame rate is given as it is, not less one."""
    edit(pipe, "__call__", ("fps = fps - 1", "fps = fps"))


@fault("kontext", at=_LATENTS)
def condition_unscaled(pipe: Any) -> None:
    """The picture's latents are neither shifted nor scaled."""
    old = "(image_latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor"
    edit(pipe, "_encode_vae_image", (old, "image_latents"))


@fault("kontext", at=_LATENTS)
def condition_shifted_after(pipe: Any) -> None:
    """The picture's latents are scaled before they are shifted."""
    old = "(image_latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor"
    new = "image_latents * self.vae.config.scaling_factor - self.vae.config.shift_factor"
    edit(pipe, "_encode_vae_image", (old, new))


@fault("fill", "control", at=_LATENTS)
def condition_not_shifted(pipe: Any) -> None:
    """The condition's latents are scaled but not shifted."""
    method = "prepare_mask_latents" if "Fill" in type(pipe).__name__ else "__call__"
    edit(pipe, method, (" - self.vae.config.shift_factor)", ")"))


@fault("wan-i2v", at=_LATENTS)
def condition_not_normalised(pipe: Any) -> None:
    """The condition's latents lack mean and deviation."""
    old = "latent_condition = (latent_condition - latents_mean) * latents_std"
    edit(pipe, "prepare_latents", (old, "latent_condition = latent_condition"))


@fault("qwen-edit", at=_LATENTS)
def condition_deviation_inverted(pipe: Any) -> None:
    """The picture's latents are multiplied by the deviation."""
    edit(
        pipe,
        "_encode_vae_image",
        ("- latents_mean) / latents_std", "- latents_mean) * latents_std"),
    )


@fault("klein-kv", at=_LATENTS)
def condition_variance(pipe: Any) -> None:
    """The picture's latents are divided by the variance, not its root."""
    edit(pipe, "_encode_vae_image", ("/ latents_bn_std", "/ latents_bn_std**2"))


@fault("cogvideox-i2v", at=_LATENTS)
def condition_not_scaled(pipe: Any) -> None:
    """The picture's latents are not scaled."""
    old = "image_latents = self.vae_scaling_factor_image * image_latents"
    edit(pipe, "prepare_latents", (old, "image_latents = image_latents"))


@fault("cogvideox-i2v", at=_LATENTS)
def condition_repeated(pipe: Any) -> None:
    """The picture's latents are repeated over the frames, not followed by zeros."""
    old = "torch.cat([image_latents, latent_padding], dim=1)"
    edit(pipe, "prepare_latents", (old, "image_latents.repeat(1, num_frames, 1, 1, 1)"))


@fault("img2img", at="scheduler.add_noise in original_samples")
def start_not_scaled(pipe: Any) -> None:
    """The picture's latents are noised without being scaled."""
    edit(pipe, "prepare_latents", ("self.vae.config.scaling_factor * init_latents", "init_latents"))


@fault("kontext", "wan-i2v", at=(*_LATENTS, "random.*", "*random*"))
def condition_sampled(pipe: Any) -> None:
    """The picture's latents are drawn from their distribution, not its middle."""
    method = "prepare_latents" if "Video" in type(pipe).__name__ else "_encode_vae_image"
    edit(pipe, method, ('sample_mode="argmax"', 'sample_mode="sample"'))


@fault("control", "cogvideox-i2v", "svd", at=_LATENTS)
def condition_first(pipe: Any) -> None:
    """The condition's channels stand before the latents'."""
    edits = {
        "FluxControlPipeline": ("[latents, control_image]", "[control_image, latents]"),
        "CogVideoXImageToVideoPipeline": (
            "[latent_model_input, latent_image_input]",
            "[latent_image_input, latent_model_input]",
        ),
        "StableVideoDiffusionPipeline": (
            "[latent_model_input, image_latents]",
            "[image_latents, latent_model_input]",
        ),
    }
    edit(pipe, "__call__", edits[type(pipe).__name__])


@fault("wan-i2v", at=_LATENTS)
def mask_behind_condition(pipe: Any) -> None:
    """The mask's channels stand behind the condition's."""
    old = "torch.concat([mask_lat_size, latent_condition], dim=1)"
    edit(pipe, "prepare_latents", (old, "torch.concat([latent_condition, mask_lat_size], dim=1)"))


@fault("fill", at=_LATENTS)
def mask_before_condition(pipe: Any) -> None:
    """The mask's channels stand before the masked picture's."""
    old = "torch.cat((masked_image_latents, mask), dim=-1)"
    edit(pipe, "__call__", (old, "torch.cat((mask, masked_image_latents), dim=-1)"))


@fault("qwen-edit", at=_LATENTS)
def condition_before_latents(pipe: Any) -> None:
    """The picture's tokens stand before the latents' in the sequence."""
    old = "torch.cat([latents, image_latents], dim=1)"
    edit(pipe, "__call__", (old, "torch.cat([image_latents, latents], dim=1)"))


@fault("wan-i2v", at=_LATENTS)
def frame_mask_inverted(pipe: Any) -> None:
    """The mask says that all frames but the first are given."""
    old = "mask_lat_size = mask_lat_size.to(latent_condition.device)"
    edit(pipe, "prepare_latents", (old, "mask_lat_size = 1 - mask_lat_size"))


@fault("fill", at=_ENCODED)
def masked_image_inverted(pipe: Any) -> None:
    """What is to be painted anew is kept of the picture, and the rest is not."""
    edit(pipe, "__call__", ("init_image * (1 - mask_image)", "init_image * mask_image"))


@fault("fill", at=_LATENTS)
def mask_inverted(pipe: Any) -> None:
    """The mask given to the denoiser is inverted."""
    edit(pipe, "prepare_mask_latents", ("mask = mask[:, 0, :, :]", "mask = 1 - mask[:, 0, :, :]"))


@fault("fill", at=_LATENTS)
def mask_pixels_transposed(pipe: Any) -> None:
    """The pixels of the mask under one latent stand in the other order."""
    old = "mask.permute(0, 2, 4, 1, 3)"
    edit(pipe, "prepare_mask_latents", (old, "mask.permute(0, 4, 2, 1, 3)"))


@fault("inpaint", at=_NEXT)
def blend_inverted(pipe: Any) -> None:
    """What is to be painted anew is kept, and the rest is painted."""
    old = "(1 - init_mask) * init_latents_proper + init_mask * latents"
    edit(pipe, "__call__", (old, "init_mask * init_latents_proper + (1 - init_mask) * latents"))


@fault("inpaint", at=_NEXT)
def mask_not_binarised(pipe: Any) -> None:
    """A soft mask stays soft."""
    pipe.mask_processor.register_to_config(do_binarize=False)


@fault("inpaint", at=_NEXT)
def mask_resized_smoothly(pipe: Any) -> None:
    """The mask is made smaller by averaging, not by its nearest pixel."""
    old = "torch.nn.functional.interpolate(\n        mask,"
    new = "torch.nn.functional.interpolate(mode='area', input=mask,"
    edit(pipe, "prepare_mask_latents", (old, new))


@fault("inpaint", at=("scheduler.add_noise in *", *_NEXT))
def blend_at_this_step(pipe: Any) -> None:
    """The kept part is noised for this step, not for the next."""
    edit(pipe, "__call__", ("noise_timestep = timesteps[i + 1]", "noise_timestep = timesteps[i]"))


@fault("vace", at=_ENCODED)
def reactive_and_inactive_swapped(pipe: Any) -> None:
    """What is kept of the video and what is changed are swapped."""
    old = ("inactive = video * (1 - mask)", "inactive = video * mask")
    edit(
        pipe,
        "prepare_video_latents",
        old,
        ("reactive = video * mask", "reactive = video * (1 - mask)"),
    )


@fault("vace", at="denoiser.forward in control_hidden_states")
def control_mask_frames(pipe: Any) -> None:
    """The mask of another frame stands for a group of frames."""
    edit(pipe, "prepare_masks", ('mode="nearest-exact"', 'mode="nearest"'))


@fault("vace", at="denoiser.forward in control_hidden_states")
def control_mask_inverted(pipe: Any) -> None:
    """The mask given to the denoiser is inverted."""
    edit(pipe, "prepare_masks", ("mask_ = mask_[0, :, :, :]", "mask_ = 1 - mask_[0, :, :, :]"))


@fault("vace", at="denoiser.forward in control_hidden_states_scale")
def control_scale_of_video(pipe: Any) -> None:
    """The control's scale is left at one."""
    old = "control_hidden_states_scale=conditioning_scale"
    edit(pipe, "__call__", (old, "control_hidden_states_scale=torch.ones_like(conditioning_scale)"))


@fault("controlnet", at="controlnet.forward in conditioning_scale")
def control_scale(pipe: Any) -> None:
    """The control's scale is left at one."""
    old = "cond_scale = controlnet_cond_scale * controlnet_keep[i]"
    edit(pipe, "__call__", (old, "cond_scale = 1.0 * controlnet_keep[i]"))


@fault("controlnet", at="controlnet.forward in conditioning_scale")
def control_to_the_end(pipe: Any) -> None:
    """The control does not end where it should."""
    edit(pipe, "__call__", (" or (i + 1) / len(timesteps) > e)", ")"))


@fault("controlnet", at="denoiser.forward in mid_block_additional_residual")
def control_not_in_the_middle(pipe: Any) -> None:
    """What the control net gives for the middle block is not added."""
    old = "mid_block_additional_residual=mid_block_res_sample"
    edit(pipe, "__call__", (old, old + " * 0"))


@fault("controlnet", at="denoiser.forward in down_block_additional_residuals*")
def control_without_unguided(pipe: Any) -> None:
    """The control is left out of the unguided pass."""
    old = "down_block_additional_residuals=down_block_res_samples"
    new = old.partition("=")[0] + "=[torch.cat([d[:1] * 0, d[1:]]) for d in down_block_res_samples]"
    edit(pipe, "__call__", (old, new))


@fault("controlnet", at="controlnet.forward in encoder_hidden_states")
def control_prompts_swapped(pipe: Any) -> None:
    """The control net is given the prompts in the other order."""
    old = "controlnet_prompt_embeds = prompt_embeds\n"
    edit(pipe, "__call__", (old, "controlnet_prompt_embeds = prompt_embeds.flip(0)\n"))


@fault("ltx-i2v", at="denoiser.forward in timestep")
def first_frame_at_the_timestep(pipe: Any) -> None:
    """The given first frame has the timestep of the others."""
    old = "timestep.unsqueeze(-1) * (1 - conditioning_mask)"
    new = "timestep.unsqueeze(-1) * torch.ones_like(conditioning_mask)"
    edit(pipe, "__call__", (old, new))


@fault("ltx-i2v", at=_LATENTS)
def first_frame_noised(pipe: Any) -> None:
    """The given first frame is mixed with noise."""
    old = "init_latents * conditioning_mask + noise * (1 - conditioning_mask)"
    new = "init_latents * conditioning_mask * 0.9 + noise * (1 - 0.9 * conditioning_mask)"
    edit(pipe, "prepare_latents", (old, new))
