"""Faults of decoding: latent statistics, tiles, the causal cache, the range of the frames."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import PIPELINES, fault
from bench.faults.targets import around, edm, narrowed, need, on_input, on_output, temporal_factor
from truestep.joint import each

Tensor = torch.Tensor


def _statistics_with(pipe: Any, undo: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Decode after `undo(latent, mean, std)` instead of `latent * std + mean`."""

    def decode(inner: Any, latent: Tensor) -> Tensor:
        vae = inner.vae
        latent = latent.to(next(vae.parameters()).device)
        # Cosmos: in float32, with statistics of each latent frame.
        sigma_data = inner.scheduler.config.sigma_data if edm(inner) else None
        latent = latent.to(vae.dtype) if sigma_data is None else latent / sigma_data
        mean, std = (
            torch.tensor(values)
            .view(1, latent.shape[1], -1, 1, 1)[:, :, : latent.shape[2]]
            .to(latent)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        undone = undo(latent, mean, std).to(vae.dtype)
        frames: Tensor = vae.decode(undone, return_dict=False)[0]
        return frames

    pipe.decode = decode


@fault(acts="stage decode", source="https://github.com/huggingface/diffusers/pull/7132")
def latent_statistics_missing(pipe: Any) -> None:
    """Bug: latents are decoded without undoing their normalisation."""
    _statistics_with(pipe, lambda latent, mean, std: latent)


@fault(acts="stage decode", source="https://github.com/madebyollin/taehv/issues/22")
def latent_deviation_inverted(pipe: Any) -> None:
    """Bug: latents are divided by the deviation, since its reciprocal is stored under its name."""
    _statistics_with(pipe, lambda latent, mean, std: latent / std + mean)


@fault(acts="stage decode")
def latent_mean_scaled(pipe: Any) -> None:
    """Bug: the mean is added before the multiplication by the deviation instead of after it."""
    _statistics_with(pipe, lambda latent, mean, std: (latent + mean) * std)


@fault(acts="stage decode, latent channel 0")
def latent_channel_mean_lost(pipe: Any) -> None:
    """Bug: the mean of one latent channel is 0."""

    def undo(latent: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        kept = mean.clone()
        kept[:, mean.abs().amax((0, 2, 3, 4)).argmax()] = 0
        return latent * std + kept

    _statistics_with(pipe, undo)


@fault(
    acts="stage decode, scale",
    source="https://github.com/priyammaz/PyTorch-Adventures/issues/4",
    subjects=PIPELINES,
)
def latent_slightly_scaled(pipe: Any) -> None:
    """Bug: latents are 0.5 % too large when they are decoded."""

    def larger(original: Callable[..., Any], inner: Any, latent: Any) -> Any:
        return original(inner, each(lambda part: part * 1.005, latent))

    around(pipe, "decode", larger)


def _frames_through(pipe: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Pass decoded frames, not the sound beside them, through `change`."""

    def decoded(original: Callable[..., Any], inner: Any, latent: Any) -> Any:
        made = original(inner, latent)
        if isinstance(made, tuple):
            return type(made)(change(made[0]), *made[1:])
        return change(made)

    around(pipe, "decode", decoded)


@fault(acts="stage decode, columns", source="https://github.com/Comfy-Org/ComfyUI/issues/163")
def tiles_without_overlap(pipe: Any) -> None:
    """Bug: left and right halves are decoded apart and joined without an overlap."""

    def tiled(original: Callable[..., Tensor], inner: Any, latent: Tensor) -> Tensor:
        halves = latent.tensor_split(2, dim=-1)
        return torch.cat([original(inner, half) for half in halves], dim=-1)

    around(pipe, "decode", tiled)


@fault(acts="stage decode, first latent frame")
def first_frame_from_second(pipe: Any) -> None:
    """Bug: the first latent frame is lost and the second is decoded in its place too."""

    def shifted(original: Callable[..., Tensor], inner: Any, latent: Tensor) -> Tensor:
        return original(inner, torch.cat([latent[:, :, 1:2], latent[:, :, 1:]], dim=2))

    need(pipe.settings.num_frames > temporal_factor(pipe), "one latent frame")
    around(pipe, "decode", shifted)


def _first_convolution(pipe: Any) -> nn.Module:
    decoder = pipe.vae.decoder
    found: nn.Module = getattr(decoder, "conv_in", None)
    need(isinstance(found, nn.Conv3d), "the VAE's decoder keeps no frames of the chunk before")
    return found


@fault(
    acts="vae, decoder.conv_in",
    source="https://github.com/vladmandic/sdnext/pull/4534",
    where=("decoder.conv_in",),
    model="vae",
)
def causal_cache_lost(pipe: Any) -> None:
    """Bug: one causal convolution does not see the frames of the chunk before."""
    on_input(_first_convolution(pipe), lambda module, args: args[:1])


@fault(
    acts="vae, decoder.conv_in, first frame",
    source="https://github.com/Wan-Video/Wan2.2/issues/230",
    where=("decoder.conv_in",),
    model="vae",
)
def causal_padding_repeated(pipe: Any) -> None:
    """Bug: one causal convolution pads the past with the first frame instead of with zeros."""

    def padded(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        first, *cache = args
        if cache and cache[0] is not None:
            return args
        return (first, first[:, :, :1].repeat(1, 1, module.kernel_size[0] - 1, 1, 1))

    on_input(_first_convolution(pipe), padded)


@fault(
    acts="stage decode, output range",
    source="https://github.com/tdrussell/diffusion-pipe/issues/545",
    subjects=PIPELINES,
)
def frames_clamped_to_unit(pipe: Any) -> None:
    """Bug: frames are clamped to [0, 1] although they are in [-1, 1]."""
    _frames_through(pipe, lambda frames: frames.clamp(0, 1))


@fault(acts="stage decode, last frame", subjects=PIPELINES)
def frame_repeated(pipe: Any) -> None:
    """Bug: the last frame is a copy of the one before."""

    need(pipe.settings.num_frames > 1, "one frame")
    _frames_through(pipe, lambda f: torch.cat([f[:, :, :-1], f[:, :, -2:-1]], dim=2))


@fault(
    acts="vae, convolutions of the decoder",
    where=(
        "decoder.conv_*",
        "decoder.*.conv[12]",
        "decoder.*.time_conv",
        "decoder.*.to_qkv",
        "decoder.*.proj",
        "decoder.*.resample.1",
    ),
    model="vae",
    subjects=PIPELINES,
)
def decoder_in_bfloat16(pipe: Any) -> None:
    """Bug: the decoder's convolutions hand on bfloat16; in a bfloat16 VAE they always do."""
    for module in pipe.vae.decoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            on_output(module, lambda _, args, output: narrowed(output, torch.bfloat16))
