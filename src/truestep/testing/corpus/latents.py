"""Faults of latents: packing, ids of positions, scaling, what is decoded and how."""

from __future__ import annotations

from typing import Any

from truestep.testing.corpus.editing import derive, edit
from truestep.testing.corpus.entry import fault

_LATENTS = ("denoiser.forward in hidden_states", "denoiser.forward in sample")
_DECODED = "vae.decode in z"


@fault("flux", "qwen", at=_LATENTS)
def packed_by_channel_last(pipe: Any) -> None:
    """Channels of a packed patch vary fastest, not slowest."""
    edit(pipe, "_pack_latents", ("permute(0, 2, 4, 1, 3, 5)", "permute(0, 2, 4, 3, 5, 1)"))


@fault("flux", "control", at=_LATENTS)
def patch_transposed(pipe: Any) -> None:
    """Rows and columns inside a packed patch are swapped."""
    edit(pipe, "_pack_latents", ("permute(0, 2, 4, 1, 3, 5)", "permute(0, 2, 4, 1, 5, 3)"))


@fault("flux", "qwen", at=_DECODED)
def unpacked_transposed(pipe: Any) -> None:
    """Rows and columns inside a patch are swapped as it is unpacked."""
    edit(pipe, "_unpack_latents", ("permute(0, 3, 1, 4, 2, 5)", "permute(0, 3, 1, 5, 2, 4)"))


@fault("flux", "kontext", "fill", at="denoiser.forward in img_ids")
def ids_transposed(pipe: Any) -> None:
    """Rows and columns are swapped in the ids of positions."""
    edit(
        pipe,
        "_prepare_latent_image_ids",
        ("latent_image_ids[..., 1] = latent_image_ids[..., 1]", "latent_image_ids[..., 0] ="
         " latent_image_ids[..., 0]"),
        ("latent_image_ids[..., 2] = latent_image_ids[..., 2]", "latent_image_ids[..., 1] ="
         " latent_image_ids[..., 1]"),
        ("latent_image_ids[..., 0] = latent_image_ids[..., 0]", "latent_image_ids[..., 2] ="
         " latent_image_ids[..., 2]"),
    )  # fmt: skip


@fault("flux", at="denoiser.forward in img_ids")
def ids_from_one(pipe: Any) -> None:
    """Ids of positions count from one."""
    edit(pipe, "_prepare_latent_image_ids", ("torch.arange(height)", "torch.arange(1, height + 1)"))


@fault("qwen", at="denoiser.forward in img_shapes*")
def shapes_transposed(pipe: Any) -> None:
    """Height and width are swapped in the shape that the rope is computed from."""
    old = "[[(1, height // self.vae_scale_factor // 2, width // self.vae_scale_factor // 2)]]"
    new = "[[(1, width // self.vae_scale_factor // 2, height // self.vae_scale_factor // 2)]]"
    edit(pipe, "__call__", (old, new))


@fault("flux", at="denoiser.forward in txt_ids")
def text_ids_counted(pipe: Any) -> None:
    """The text's ids of positions are counted, where this family leaves them zero."""
    old = "torch.zeros(prompt_embeds.shape[1], 3)"
    new = "torch.arange(prompt_embeds.shape[1])[:, None].repeat(1, 3)"
    edit(pipe, "encode_prompt", (old, new))


@fault("klein-kv", at="denoiser.forward in txt_ids")
def text_ids_not_counted(pipe: Any) -> None:
    """The text's ids of positions are zero, where this family counts them."""
    edit(pipe, "_prepare_text_ids", ("l = torch.arange(L)", "l = torch.arange(L) * 0"))


@fault("kontext", at="denoiser.forward in img_ids")
def condition_ids_unmarked(pipe: Any) -> None:
    """The picture's ids do not say that it is the condition."""
    edit(pipe, "prepare_latents", ("image_ids[..., 0] = 1", "image_ids[..., 0] = 0"))


@fault("klein-kv", at="denoiser.forward in img_ids")
def condition_ids_scale(pipe: Any) -> None:
    """The picture's ids are one step away, not ten."""
    edit(pipe, "_prepare_image_ids", ("scale: int = 10", "scale: int = 1"))


@fault("klein-kv", at="denoiser.forward in num_ref_tokens")
def reference_tokens_miscounted(pipe: Any) -> None:
    """One token of the picture is not among those whose keys and values are kept."""
    old = "num_ref_tokens=image_latents.shape[1]"
    edit(pipe, "__call__", (old, old + " - 1"))


@fault("klein-kv", at=("denoiser.forward in kv_cache*", "denoiser.forward in *"))
def cache_not_given(pipe: Any) -> None:
    """Later steps go without the keys and values of the picture."""
    edit(pipe, "__call__", ("elif kv_cache is not None:", "elif False:"))


@fault("klein-kv", at=("denoiser.forward in kv_cache*", "denoiser.forward out*"))
def cached_keys_for_values(pipe: Any) -> None:
    """The picture's kept keys stand in place of its values."""
    old = "with self.progress_bar"
    edit(
        pipe, "__call__",
        ("elif kv_cache is not None:", "elif kv_cache is not None and _swap(kv_cache):"),
        (old, f"_swap = {_SWAP}\n    {old}"),
    )  # fmt: skip


_SWAP = (
    "lambda cache: [setattr(b, 'v_ref', b.k_ref) for b in cache.double_block_caches] is not None"
)


@fault(
    "sd3", "sdxl", "controlnet", "mochi", "hunyuan", "sana", "pixart", "z-image", "audioldm2",
    "flux", "lumina2",
    at=_DECODED,
)  # fmt: skip
def scaling_factor(pipe: Any) -> None:
    """The scaling factor of the latents is five in a hundred off."""
    pipe.vae.register_to_config(scaling_factor=pipe.vae.config.scaling_factor * 1.05)


@fault("sd3", "flux", "z-image", "lumina2", at=_DECODED)
def shift_left_out(pipe: Any) -> None:
    """Latents are not shifted before they are decoded."""
    edit(pipe, "__call__", (" + self.vae.config.shift_factor", ""))


@fault("sd3", "flux", "z-image", "lumina2", at=_DECODED)
def shifted_before_scaling(pipe: Any) -> None:
    """Latents are shifted before they are scaled."""
    old = "(latents / self.vae.config.scaling_factor) + self.vae.config.shift_factor"
    new = "(latents + self.vae.config.shift_factor) / self.vae.config.scaling_factor"
    edit(pipe, "__call__", (old, new))


@fault("qwen", "wan-i2v", "vace", at=_DECODED)
def deviation_inverted(pipe: Any) -> None:
    """Latents are divided by their deviation before they are decoded."""
    edit(
        pipe,
        "__call__",
        ("latents / latents_std + latents_mean", "latents * latents_std + latents_mean"),
    )


@fault("qwen", "wan-i2v", "vace", at=_DECODED)
def mean_left_out(pipe: Any) -> None:
    """Latents are decoded without their mean."""
    edit(pipe, "__call__", ("latents / latents_std + latents_mean", "latents / latents_std"))


@fault("klein-kv", at=_DECODED)
def variance_for_deviation(pipe: Any) -> None:
    """Latents are multiplied by their variance, not its root."""
    edit(pipe, "__call__", ("latents * latents_bn_std +", "latents * latents_bn_std**2 +"))


@fault("ltx-i2v", at=_DECODED)
def denormalised_twice(pipe: Any) -> None:
    """Latents are multiplied by their deviation twice."""
    edit(pipe, "_denormalize_latents", ("latents * latents_std /", "latents * latents_std**2 /"))


@fault("hunyuan", at=_DECODED)
def scaled_the_other_way(pipe: Any) -> None:
    """Latents are multiplied by the scaling factor before they are decoded."""
    old = "latents.to(self.vae.dtype) / self.vae.config.scaling_factor"
    edit(pipe, "__call__", (old, old.replace("/", "*")))


@fault("cogvideox-i2v", "svd", at=_DECODED)
def decoded_unscaled(pipe: Any) -> None:
    """Latents are decoded without being scaled."""
    names = (
        "1 / self.vae_scaling_factor_image * latents",
        "1 / self.vae.config.scaling_factor * latents",
    )
    old = names["StableVideo" in type(pipe).__name__]
    edit(pipe, "decode_latents", (old, "latents"))


@fault("sdxl", at="scheduler.* in sample")
def noise_not_scaled(pipe: Any) -> None:
    """The first noise lacks the scheduler's scale."""
    edit(pipe, "prepare_latents", ("latents * self.scheduler.init_noise_sigma", "latents"))


@fault("sdxl", at="denoiser.forward in added_cond_kwargs.time_ids")
def size_ids_swapped(pipe: Any) -> None:
    """Crop and target size are swapped in the size ids."""
    old = "original_size + crops_coords_top_left + target_size"
    edit(pipe, "_get_add_time_ids", (old, "original_size + target_size + crops_coords_top_left"))


@fault("cogvideox-i2v", "stable-audio", at="denoiser.forward in *rotary*")
def rope_shifted(pipe: Any) -> None:
    """The rope computed by the pipeline is that of the next position."""
    old, new = {
        "CogVideoXImageToVideoPipeline": (
            "image_rotary_emb=image_rotary_emb,",
            "image_rotary_emb=image_rotary_emb and tuple(r.roll(1, 0) for r in image_rotary_emb),",
        ),
        "StableAudioPipeline": (
            "rotary_embedding=rotary_embedding,",
            "rotary_embedding=tuple(r.roll(1, 0) for r in rotary_embedding),",
        ),
    }[type(pipe).__name__]
    edit(pipe, "__call__", (old, new))


@fault("ltx-i2v", at="denoiser.forward in rope_interpolation_scale*")
def frame_rate_in_rope(pipe: Any) -> None:
    """The rope's scale over time lacks the frame rate."""
    old = "self.vae_temporal_compression_ratio / frame_rate,"
    edit(pipe, "__call__", (old, "self.vae_temporal_compression_ratio / 24,"))


@fault("sd3", "pixart", "qwen", "wan-i2v", "klein-kv", at="run.run out*")
def output_not_centred(pipe: Any) -> None:
    """What is decoded is not moved from -1..1 to 0..1."""
    name = "video_processor" if hasattr(pipe, "video_processor") else "image_processor"
    derive(getattr(pipe, name), {"denormalize": staticmethod(lambda images: images.clamp(0, 1))})


@fault("audioldm2", at=("vocoder.forward in spectrogram", "run.run out*"))
def spectrogram_transposed(pipe: Any) -> None:
    """The spectrogram's bands are turned upside down."""
    old = "self.vocoder(mel_spectrogram)"
    edit(pipe, "mel_spectrogram_to_waveform", (old, "self.vocoder(mel_spectrogram.flip(-1))"))
