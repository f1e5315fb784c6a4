"""What engines write otherwise than the trusted pipeline, and how it is undone. Each has a name.

A conversion is chosen once for a whole run, from a closed list, and named in the result. None of
them has a free parameter, so none can take a fault for a convention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Change = Callable[[torch.Tensor, torch.Tensor | None, float | None], torch.Tensor]
"""A prediction, the latent and the sigma of its step to the prediction in another convention.

Raises ValueError where latent or sigma is not known."""


@dataclass(frozen=True)
class Conversion:
    """What an engine's denoiser returns instead of the trusted one's prediction.

    Attributes:
        name: In results; empty for none.
        to_engine: From the trusted convention.
        to_trusted: And back. What the engine rounded is made larger where this divides by a small
            sigma, so the trusted prediction is judged, and its floor measured, after both.
    """

    name: str
    to_engine: Change
    to_trusted: Change

    def there_and_back(
        self, value: torch.Tensor, latent: torch.Tensor | None, sigma: float | None
    ) -> torch.Tensor:
        """A trusted prediction with what the engine's convention rounds of it."""
        if self.to_engine is _same:
            return value
        return self.to_trusted(self.to_engine(value, latent, sigma), latent, sigma)


def _same(value: torch.Tensor, _latent: Any, _sigma: Any) -> torch.Tensor:
    return value


def _negated(value: torch.Tensor, _latent: Any, _sigma: Any) -> torch.Tensor:
    return -value


def _beside(value: torch.Tensor, latent: torch.Tensor | None, sigma: float | None) -> torch.Tensor:
    if latent is None or not sigma or latent.numel() != value.numel():
        raise ValueError("latent or sigma is not known")
    return latent.to(value.dtype).reshape(value.shape)


def _denoised(
    value: torch.Tensor, latent: torch.Tensor | None, sigma: float | None
) -> torch.Tensor:
    """x0 = x - sigma v, of flow matching."""
    return _beside(value, latent, sigma) - (sigma or 0.0) * value


def _velocity(
    value: torch.Tensor, latent: torch.Tensor | None, sigma: float | None
) -> torch.Tensor:
    return (_beside(value, latent, sigma) - value) / (sigma or 1.0)


AS_IT_IS = Conversion("", _same, _same)
DENOISED = Conversion("denoised samples to velocities: (x - x0) / sigma", _denoised, _velocity)
TURNED = Conversion("predictions of the other sign", _negated, _negated)
PREDICTIONS = (AS_IT_IS, DENOISED, TURNED)
"""Of what a denoiser returns."""


@dataclass(frozen=True)
class Form:
    """What guidance combines, and a step is given, where a model's prediction is neither.

    Attributes:
        name: In results.
        part: Of a prediction, and the latent that its model was given, what is combined.
        stepped: Of the combination, what the trusted scheduler is given; None: itself.
    """

    name: str
    part: Change
    stepped: Change | None = None


def _clean(value: torch.Tensor, given: torch.Tensor | None, sigma: float | None) -> torch.Tensor:
    wide, sigma = value.double(), sigma or 0.0
    return _beside(wide, given, sigma) - wide * (sigma / (1.0 + sigma))


def _noise(value: torch.Tensor, given: torch.Tensor | None, sigma: float | None) -> torch.Tensor:
    wide, sigma = value.double(), sigma or 0.0
    return _beside(wide, given, sigma) + wide / (1.0 + sigma)


def _noise_of(
    value: torch.Tensor, latent: torch.Tensor | None, sigma: float | None
) -> torch.Tensor:
    return _velocity(value.double(), latent, sigma).to(value.dtype)


FORMS = (
    Form("of a flow as EDM writes it, stepped by its noise: (x + v) / (1 + sigma)", _noise),
    Form(
        "of a flow as EDM writes it, stepped by denoised samples: (x - sigma v) / (1 + sigma)",
        _clean,
        _noise_of,
    ),
)
"""EDM's latent is x = x0 + sigma n: a flow's of time sigma / (1 + sigma), times 1 + sigma.

Source: EDM (2206.00364, eq. 7) with c_skip = c_in = 1 / (1 + sigma), c_out = -sigma / (1 + sigma).
"""

TIME_SCALES: Mapping[float, str] = {
    1.0: "",
    1000.0: "timesteps of 0 to 1, x 1000",
    0.001: "timesteps of 0 to 1000, / 1000",
}
"""Factor from the engine's time to the trusted model's, and its name."""


def squeezed(shape: torch.Size) -> tuple[int, ...]:
    """A shape without dimensions of size 1."""
    return tuple(size for size in shape if size != 1)


def as_shape(value: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, str]:
    """A tensor in the shape of another, where they differ by dimensions of 1, frames or packing.

    Returns:
        The tensor, and what was done; as it is where nothing fits.
    """
    if value.shape == like.shape:
        return value, ""
    if squeezed(value.shape) == squeezed(like.shape):
        return value.reshape(like.shape), "dimensions of size 1"
    if value.ndim == 5 and value.transpose(1, 2).shape == like.shape:
        return value.transpose(1, 2), "`b f c h w` to `b c f h w`"
    if value.ndim == 4 and like.ndim == 5 and value.transpose(0, 1)[None].shape == like.shape:
        return value.transpose(0, 1)[None], "`f c h w` to `b c f h w`"
    packed = _packed(value, like)
    return packed if packed is not None else (value, "")


def _packed(value: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, str] | None:
    """Patches of 2 x 2 to tokens, and back."""
    if value.ndim == 4 and like.ndim == 3 and value.shape[2] % 2 == value.shape[3] % 2 == 0:
        b, c, h, w = value.shape
        tokens = value.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        made = tokens.reshape(b, h * w // 4, c * 4)
        if made.shape == like.shape:
            return made, "2 x 2 patches to tokens"
    if value.ndim == 3 and like.ndim == 4 and like.shape[2] % 2 == like.shape[3] % 2 == 0:
        b, c, h, w = like.shape
        if value.shape == (b, h * w // 4, c * 4):
            pixels = value.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
            return pixels.reshape(b, c, h, w), "tokens to 2 x 2 patches"
    return None


def text_as(value: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Text embeddings in the length of others: zeros are padded, and zeros are cut off."""
    value, done = (value, "") if value.ndim == like.ndim else as_rank(value, like.ndim)
    if value.ndim < 2 or like.ndim != value.ndim or value.shape[-1] != like.shape[-1]:
        return value, done
    here, there = value.shape[-2], like.shape[-2]
    if here < there:
        padding = value.new_zeros(*value.shape[:-2], there - here, value.shape[-1])
        return torch.cat([value, padding], dim=-2), f"text padded by zeros from {here} to {there}"
    if here > there and not bool(value[..., there:, :].any()):
        return value[..., :there, :], f"zeros behind the text cut off, {here} to {there}"
    return value, done


def as_rank(value: torch.Tensor, rank: int) -> tuple[torch.Tensor, str]:
    """A tensor with leading dimensions of 1 added, or taken away."""
    before = value.ndim
    while value.ndim < rank:
        value = value[None]
    while value.ndim > rank and value.shape[0] == 1:
        value = value[0]
    return value, "" if value.ndim == before else "dimensions of size 1"


def out_of_vae(latent: torch.Tensor, config: Mapping[str, Any]) -> tuple[torch.Tensor, str]:
    """A latent in the space of a VAE as the denoiser has it, by the VAE's own configuration.

    Args:
        latent: `b c h w` or `b c f h w`.
        config: Of diffusers: `latents_mean` and `latents_std`, or `scaling_factor` and
            `shift_factor`.

    Returns:
        The latent, and what was done; as it is where the configuration says nothing.
    """
    statistics = _statistics(config, latent.ndim)
    if statistics is not None:
        mean, std = statistics
        moved = (latent.double() - mean) / std
        return moved.to(latent.dtype), "latent of the VAE: minus its mean, over its deviation"
    scale = config.get("scaling_factor")
    if scale:
        moved = (latent.double() - (config.get("shift_factor") or 0.0)) * scale
        return moved.to(latent.dtype), "latent of the VAE: minus its shift, by its scale"
    return latent, ""


def _statistics(config: Mapping[str, Any], rank: int) -> list[torch.Tensor] | None:
    """Mean and deviation of each channel, where a VAE's configuration has them."""
    values = [config.get("latents_mean"), config.get("latents_std")]
    if not all(values):
        return None
    shape = (1, -1, *[1] * (rank - 2))
    return [torch.tensor(each, dtype=torch.float64).reshape(shape) for each in values]


def into_vae(latent: torch.Tensor, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What pipelines may give a decoder of a latent, by the name of the way: the other of
    `out_of_vae`. A pipeline may pass over a shift that the configuration has."""
    found = {"": latent}
    statistics = _statistics(config, latent.ndim)
    if statistics is not None:
        mean, std = statistics
        moved = latent.double() * std + mean
        found["times its deviation, plus its mean"] = moved.to(latent.dtype)
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    if scale:
        found["over its scale"] = (latent.double() / scale).to(latent.dtype)
    if scale and shift:
        found["over its scale, plus its shift"] = (latent.double() / scale + shift).to(latent.dtype)
    return found


def with_closing_zero(sigmas: torch.Tensor | None, steps: int) -> torch.Tensor | None:
    """Sigmas with the last one, 0, which some engines leave out."""
    if sigmas is None or len(sigmas) != steps:
        return sigmas
    return torch.cat([sigmas, sigmas.new_zeros(1)])
