"""Faults of latents: the initial noise, patches, frames, and what is kept between steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import PIPELINES, fault
from bench.faults.targets import around, models, narrowed, need, on_output, temporal_factor
from truestep.joint import each

Tensor = torch.Tensor


def _noise_through(pipe: Any, change: Callable[[Any, Tensor], Tensor]) -> None:
    """Pass the initial noise, of video and of sound, through `change(pipe, noise)`."""

    def changed(original: Callable[..., Any], inner: Any) -> Any:
        return each(lambda noise: change(inner, noise), original(inner))

    around(pipe, "make_latent", changed)


@fault(
    acts="stage latent",
    source="https://github.com/huggingface/diffusers/issues/11056",
)
def noise_drawn_in_bfloat16(pipe: Any) -> None:
    """Bug: the initial noise is drawn in bfloat16 instead of float32."""

    def drawn(inner: Any, noise: Tensor) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(inner.settings.seed)
        made = torch.randn(noise.shape, generator=generator, dtype=torch.bfloat16)
        return made.to(noise)

    _noise_through(pipe, drawn)


@fault(
    acts="stage latent, generator",
    source="https://github.com/huggingface/diffusers/issues/13298",
    subjects=PIPELINES,
)
def noise_from_another_generator(pipe: Any) -> None:
    """Bug: the seed feeds another generator, as when the noise is drawn on another device."""

    def drawn(inner: Any, noise: Tensor) -> Tensor:
        import numpy as np

        made = np.random.RandomState(inner.settings.seed % 2**32).standard_normal(noise.shape)
        return torch.from_numpy(made).to(noise)

    _noise_through(pipe, drawn)


@fault(acts="stage latent, axes", source="https://github.com/hao-ai-lab/FastVideo/pull/921")
def noise_drawn_frame_first(pipe: Any) -> None:
    """Bug: the noise is drawn as frames of channels and permuted, so the stream is spent anew."""

    def drawn(inner: Any, noise: Tensor) -> Tensor:
        b, c, f, h, w = noise.shape
        generator = torch.Generator("cpu").manual_seed(inner.settings.seed)
        made = torch.randn((b, f, c, h, w), generator=generator)
        return made.transpose(1, 2).contiguous().to(noise)

    _noise_through(pipe, drawn)


@fault(acts="stage latent, scale", subjects=PIPELINES)
def noise_scaled(pipe: Any) -> None:
    """Bug: the initial noise is 1 % too large."""
    _noise_through(pipe, lambda inner, noise: noise * 1.01)


@fault(acts="stage latent, seed", subjects=PIPELINES)
def seed_off_by_one(pipe: Any) -> None:
    """Bug: the first sample of a request is seeded with the second one's seed."""
    pipe.settings.seed += 1


def _patches_through(pipe: Any, change: Callable[[Any, Tensor], Tensor]) -> None:
    """Pass the output projection's rows `(pt ph pw c)` through `change(model, rows)`."""
    for model in models(pipe):
        need(hasattr(model, "proj_out"), "the model has no output projection")
        config: Any = model.config

        def hook(_: Any, args: tuple[Any, ...], output: Tensor, config: Any = config) -> Tensor:
            return change(config, output)

        on_output(model.proj_out, hook)


@fault(
    acts="transformer, unpatchify",
    source="https://github.com/NVIDIA/flashdreams/pull/338",
)
def patch_transposed(pipe: Any) -> None:
    """Bug: the rows and columns inside each patch are exchanged."""

    def transposed(config: Any, output: Tensor) -> Tensor:
        made: Tensor = output.unflatten(-1, (*config.patch_size, -1)).transpose(-3, -2).flatten(-4)
        return made

    _patches_through(pipe, transposed)


@fault(acts="transformer, unpatchify", source="https://github.com/cloneofsimo/minRF/issues/6")
def patch_channels_first(pipe: Any) -> None:
    """Bug: the projection's channels are read as channel, row, column, not row, column, channel."""

    def reordered(config: Any, output: Tensor) -> Tensor:
        split = output.unflatten(-1, (-1, *config.patch_size))
        made: Tensor = split.movedim(-4, -1).flatten(-4)
        return made

    _patches_through(pipe, reordered)


@fault(acts="every step, update", subjects=PIPELINES)
def latent_kept_in_bfloat16(pipe: Any) -> None:
    """Bug: the latent is stored as bfloat16 between steps; in a bfloat16 pipeline it already is."""

    def stored(original: Callable[..., Tensor], inner: Any, *args: Any) -> Tensor:
        return narrowed(original(inner, *args), torch.bfloat16)

    around(pipe, "update", stored)


def _last_latent_through(pipe: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Pass the last step's latent through `change`."""

    def last(original: Callable[..., Tensor], inner: Any, step: Any, *args: Any) -> Tensor:
        following = original(inner, step, *args)
        final = step.index == len(inner.scheduler.timesteps) - 1
        return change(following) if final else following

    around(pipe, "update", last)


@fault(acts="last step, update, last two latent frames")
def latent_frames_swapped(pipe: Any) -> None:
    """Bug: the last two latent frames are in each other's place."""

    def swapped(latent: Tensor) -> Tensor:
        order = [*range(latent.shape[2] - 2), latent.shape[2] - 1, latent.shape[2] - 2]
        return latent[:, :, order]

    need(pipe.settings.num_frames > temporal_factor(pipe), "one latent frame")
    _last_latent_through(pipe, swapped)


@fault(acts="last step, update, last latent frame")
def latent_frame_repeated(pipe: Any) -> None:
    """Bug: the last latent frame is a copy of the one before."""

    def repeated(latent: Tensor) -> Tensor:
        return torch.cat([latent[:, :, :-1], latent[:, :, -2:-1]], dim=2)

    need(pipe.settings.num_frames > temporal_factor(pipe), "one latent frame")
    _last_latent_through(pipe, repeated)


@fault(acts="every step, prediction, one corner")
def latent_corner_lost(pipe: Any) -> None:
    """Bug: a parallel run leaves the last patch of the last frame without a prediction."""

    def lost(original: Callable[..., Tensor], inner: Any, *args: Any) -> Tensor:
        made = original(inner, *args).clone()
        made[:, :, -1, -2:, -2:] = 0
        return made

    around(pipe, "predict", lost)
