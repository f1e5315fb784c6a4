"""Latents: noise and the given image to tokens, and tokens to frames and sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from truestep.errors import CaseError
from truestep.joint import Joint
from truestep.runtime.ltx2.settings import (
    audio_length,
    first_sigma,
    latent_shape,
    of,
    ratios,
)
from truestep.runtime.ltx2.two_stage import (
    noised,
    renormalised,
    spent,
    starting_point,
    upsampled,
    upsampler_scale,
)
from truestep.runtime.pipeline import Pipeline


def make_latent(pipe: Pipeline) -> Joint:
    """Normal noise, the video's drawn first; its first frame is the image's, where one is given.

    A second stage's is the upsampled clip of the first, under as much noise as its first sigma is.
    """
    on_device = of(pipe).generator_device == "device"
    generator = torch.Generator(pipe.device if on_device else "cpu")
    generator.manual_seed(pipe.settings.seed)
    if pipe.settings.initial is not None:
        return _second_latent(pipe, generator)

    def noise(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, device=generator.device)
        return drawn.to(pipe.device)

    audio_vae = pipe.audio_vae
    count = pipe.settings.videos_per_prompt or 1
    video = noise(count, pipe.transformer.config.in_channels, *latent_shape(pipe))
    if pipe.settings.image is not None:
        video = _given_image(pipe, video)
    sound = noise(
        count,
        audio_vae.config.latent_channels,
        audio_length(pipe),
        audio_vae.config.mel_bins // audio_vae.mel_compression_ratio,
    )
    return Joint(to_tokens(pipe, video), sound.transpose(1, 2).flatten(2, 3))


def _second_latent(pipe: Pipeline, generator: torch.Generator) -> Joint:
    start = Joint(*(part.to(pipe.device) for part in starting_point(pipe)))
    spent(pipe, generator)
    sigma = first_sigma(of(pipe))
    frames, height, width = latent_shape(pipe)
    scale = upsampler_scale(Path(str(pipe.settings.upsampler)))
    before = (frames, round(height / scale), round(width / scale))
    small = from_tokens(pipe, start.video, shape=before)
    video = noised(to_tokens(pipe, upsampled(pipe, small)), sigma=sigma, generator=generator)
    if pipe.settings.image is not None:
        video = to_tokens(pipe, _given_image(pipe, from_tokens(pipe, video)))
    sound = noised(renormalised(pipe, start.audio), sigma=sigma, generator=generator)
    return Joint(video, sound)


def _given_image(pipe: Pipeline, video: torch.Tensor) -> torch.Tensor:
    """A latent whose first frame is the image's."""
    first = _image_latent(pipe)
    mask = torch.zeros_like(video[:, :1])
    mask[:, :, 0] = 1.0
    return first.repeat(1, 1, video.shape[2], 1, 1) * mask + video * (1 - mask)


def to_tokens(pipe: Pipeline, latent: torch.Tensor) -> torch.Tensor:
    """`b c f h w` to `b (f h w) c`: patches of the transformer, which are one element in LTX-2."""
    batch, channels, frames, height, width = latent.shape
    config = pipe.transformer.config
    p, t = config.patch_size, config.patch_size_t
    cut = latent.reshape(batch, channels, frames // t, t, height // p, p, width // p, p)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)


def from_tokens(
    pipe: Pipeline, tokens: torch.Tensor, *, shape: tuple[int, int, int] | None = None
) -> torch.Tensor:
    """The reverse of `to_tokens`; `shape` is `f h w`, this run's by default."""
    frames, height, width = shape or latent_shape(pipe)
    config = pipe.transformer.config
    p, t = config.patch_size, config.patch_size_t
    cut = tokens.reshape(tokens.shape[0], frames // t, height // p, width // p, -1, t, p, p)
    return cut.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _image_latent(pipe: Pipeline) -> torch.Tensor:
    """The image as a normalised latent frame `1 c 1 h w`, float32.

    Raises:
        CaseError: The image cannot be read.
    """
    from diffusers.pipelines.ltx2.utils import apply_image_conditioning_crf
    from diffusers.video_processor import VideoProcessor
    from PIL import Image, UnidentifiedImageError

    settings, vae, path = pipe.settings, pipe.vae, Path(str(pipe.settings.image))
    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise CaseError(
            "the image cannot be read",
            where=str(path),
            measured=str(error),
            hint="give --set image=PATH",
        ) from None
    crf = of(pipe).image_crf
    if crf:
        picture = Image.fromarray(apply_image_conditioning_crf(np.array(picture), crf))
    pixels = VideoProcessor(vae_scale_factor=ratios(pipe)[0], resample="bilinear").preprocess(
        picture, height=settings.height, width=settings.width
    )
    encoded = vae.encode(pixels.to(pipe.device, vae.dtype).unsqueeze(2)).latent_dist.mode()
    mean, deviation = (
        value.view(1, -1, 1, 1, 1).to(pipe.device, torch.float32)
        for value in (vae.latents_mean, vae.latents_std)
    )
    latent: torch.Tensor = (encoded.to(torch.float32) - mean) / deviation
    return latent


def decode(pipe: Pipeline, latent: Joint) -> Joint:
    """Tokens to frames `b c f h w` in about [-1, 1] and to sound `b c n` in [-1, 1]."""
    vae, audio_vae = pipe.vae, pipe.audio_vae
    working = pipe.transformer.dtype
    video = from_tokens(pipe, latent.video).to(working)
    mean, deviation = (
        value.view(1, -1, 1, 1, 1).to(video.device, video.dtype)
        for value in (vae.latents_mean, vae.latents_std)
    )
    video = video * deviation / vae.config.scaling_factor + mean
    frames = vae.decode(video.to(vae.dtype), None, return_dict=False)[0]
    sound = latent.audio
    sound = sound * audio_vae.latents_std.to(sound) + audio_vae.latents_mean.to(sound)
    bins = audio_vae.config.mel_bins // audio_vae.mel_compression_ratio
    sound = sound.unflatten(2, (-1, bins)).transpose(1, 2)
    spectrogram = audio_vae.decode(sound.to(audio_vae.dtype), return_dict=False)[0]
    return Joint(frames, pipe.vocoder(spectrogram))
