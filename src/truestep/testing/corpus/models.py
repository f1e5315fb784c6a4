"""Faults inside models: adapters, attention, norms, activations, embeddings, decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from truestep.testing.corpus.editing import around, denoiser
from truestep.testing.corpus.entry import NotApplicable, fault
from truestep.testing.corpus.subjects import LowRank

_OUT = "denoiser.forward out*"


def _first(module: nn.Module, test: Any, what: str) -> Any:
    for part in module.modules():
        if test(part):
            return part
    raise NotApplicable(f"{type(module).__name__} has no {what}")


def _attention(module: nn.Module) -> Any:
    return _first(module, lambda m: hasattr(m, "to_q") and hasattr(m, "to_k"), "attention")


@fault("sdxl", at=_OUT)
def adapter_scale(pipe: Any) -> None:
    """The adapter's scale is left at one."""
    for module in denoiser(pipe).modules():
        if isinstance(module, LowRank):
            module.scale = 1.0


@fault("sdxl", at=_OUT)
def adapter_rank_divided_twice(pipe: Any) -> None:
    """The adapter's scale is divided by its rank once more."""
    for module in denoiser(pipe).modules():
        if isinstance(module, LowRank):
            module.scale /= module.down.shape[0]


@fault("sdxl", at=_OUT)
def adapter_missing_in_one_layer(pipe: Any) -> None:
    """One layer's adapter was not loaded."""
    adapter = _first(denoiser(pipe), lambda m: isinstance(m, LowRank), "adapter")
    adapter.scale = 0.0


@fault("flux", "sd3", "pixart", "svd", "lumina2", "cogvideox-i2v", at=_OUT)
def keys_and_values_swapped(pipe: Any) -> None:
    """The weights of keys and values of one attention are swapped."""
    attention = _first(
        denoiser(pipe),
        lambda m: hasattr(m, "to_q") and hasattr(m, "to_v")
        and m.to_k.weight.shape == m.to_v.weight.shape,
        "attention",
    )  # fmt: skip
    attention.to_k.weight.data, attention.to_v.weight.data = (
        attention.to_v.weight.data,
        attention.to_k.weight.data,
    )


@fault("flux", "sd3", "qwen", "wan-i2v", "z-image", "sana", "mochi", "hunyuan", at=_OUT)
def epsilon_of_norms(pipe: Any) -> None:
    """The norms' epsilon is a thousand times larger."""
    for module in denoiser(pipe).modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, getattr(module, name) * 1000)


@fault("flux", "kontext", "klein-kv", at=_OUT)
def rope_base(pipe: Any) -> None:
    """The rope's base is another one."""
    denoiser(pipe).pos_embed.theta *= 2


@fault("sd3", "pixart", "flux", "wan-i2v", "cogvideox-i2v", "hunyuan", at=_OUT)
def exact_gelu(pipe: Any) -> None:
    """The activation is computed exactly, where the weights were trained with its approximation."""
    changed = 0
    for module in denoiser(pipe).modules():
        if getattr(module, "approximate", None) == "tanh":
            module.approximate = "none"
            changed += 1
    if not changed:
        raise NotApplicable("no approximate gelu")


@fault("sdxl", "inpaint", "controlnet", at=_OUT)
def time_embedding_flipped(pipe: Any) -> None:
    """Sine and cosine of the time's embedding are swapped."""
    projection = denoiser(pipe).time_proj
    projection.flip_sin_to_cos = not projection.flip_sin_to_cos


@fault("sd3", "pixart", at=_OUT)
def attention_scale(pipe: Any) -> None:
    """The attention's queries are scaled once more."""
    attention = _attention(denoiser(pipe))
    around(attention.to_q, "forward", lambda call, x: call(x) * 0.5)


@fault("flux", "sdxl", "wan-i2v", "audioldm2", at="vae.decode out*")
def decoder_bias_left_out(pipe: Any) -> None:
    """A layer of the decoder lacks its bias."""
    decoder = pipe.vae.decoder
    norm = _first(
        decoder,
        lambda m: getattr(m, "bias", None) is not None and isinstance(m, nn.GroupNorm | nn.Conv3d),
        "norm with a bias",
    )
    with torch.no_grad():
        norm.bias.zero_()


@fault("sdxl", "img2img", at=("vae.decode out*", "vae.encode out*"))
def tiles_not_blended(pipe: Any) -> None:
    """The decoder works in tiles that are not blended."""
    vae = pipe.vae
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 8
    vae.tile_overlap_factor = 0.0


@fault("controlnet", at="controlnet.forward out*")
def control_bias_left_out(pipe: Any) -> None:
    """The biases of the control net's outputs were not loaded."""
    with torch.no_grad():
        for block in pipe.controlnet.controlnet_down_blocks:
            block.bias.zero_()


@fault("wan-i2v", "svd", at="image_encoder.forward out*")
def image_positions_shifted(pipe: Any) -> None:
    """The image encoder's embeddings of positions are shifted by one."""
    table = _first(
        pipe.image_encoder,
        lambda m: isinstance(m, nn.Embedding),
        "embedding of positions",
    )
    table.weight.data = table.weight.data.roll(1, 0)


@fault("audioldm2", at="vocoder.forward out*")
def vocoder_slope(pipe: Any) -> None:
    """The vocoder's leaky activation has another slope."""
    pipe.vocoder.config.leaky_relu_slope *= 2


@fault("audioldm2", at="language_model.forward out*")
def language_model_positions(pipe: Any) -> None:
    """The language model's embeddings of positions are shifted by one."""
    table = pipe.language_model.transformer.wpe
    table.weight.data = table.weight.data.roll(1, 0)


@fault("cogvideox-i2v", "hunyuan", "mochi", at="vae.decode out*")
def decoder_bias_over_time(pipe: Any) -> None:
    """One convolution of the decoder over time lost its bias."""
    convolution = _first(pipe.vae.decoder, lambda m: isinstance(m, nn.Conv3d), "convolution")
    with torch.no_grad():
        convolution.bias.zero_()
