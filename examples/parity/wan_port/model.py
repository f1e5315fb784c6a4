"""A second Wan 2.1 / 2.2 text-to-video transformer, written from the architecture.

It shares no code, no module names and no weight layout with diffusers' `WanTransformer3DModel`:
patches enter through a linear layer, queries, keys and values through one, rotary positions turn
real pairs, and every norm is its own. `convert.py` brings the weights over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    """Sizes of a model, under the names that a diffusers `config.json` gives them."""

    patch_size: tuple[int, int, int]
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    cross_attn_norm: bool
    eps: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """Read the sizes from a diffusers configuration.

        Raises:
            ValueError: The model takes images, or normalises queries and keys in another way.
        """
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if values.get(key) is not None:
                raise ValueError(f"image conditioning is not ported: {key} = {values[key]}")
        if values.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
            raise ValueError(f"not ported: qk_norm = {values['qk_norm']}")
        taken = {key: values[key] for key in cls.__dataclass_fields__}
        taken["patch_size"] = tuple(taken["patch_size"])
        return cls(**taken)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: where norms, modulation and residuals are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RootMeanSquare(nn.Module):
    """Divide by the root mean square over all heads' channels, then scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        size = wide.square().mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(size + self.eps) * self.scale).to(x.dtype)


class Standardise(nn.Module):
    """Mean 0 and variance 1 over the channels of a token, in float32 at least."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        wide = wide - wide.mean(dim=-1, keepdim=True)
        return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)


class LearnedNorm(Standardise):
    """`Standardise`, then a learned gain and shift."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(eps)
        self.gain = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain + self.shift


class TwoLayers(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, inward: int, middle: int, outward: int, activation: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(inward, middle)
        self.act = activation
        self.down = nn.Linear(middle, outward)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of `b l (heads d)` queries over `b m (heads d)` keys and values."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Tokens attend to tokens; queries and keys are normalised, then turned by position."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RootMeanSquare(width, eps)
        self.k_norm = RootMeanSquare(width, eps)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = _turned(self.q_norm(q), angles, self.heads)
        k = _turned(self.k_norm(k), angles, self.heads)
        out: Tensor = self.out(_attend(q, k, v, self.heads))
        return out


class CrossAttention(nn.Module):
    """Tokens attend to the text."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = RootMeanSquare(width, eps)
        self.k_norm = RootMeanSquare(width, eps)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        k, v = self.kv(text).chunk(2, dim=-1)
        q = self.q_norm(self.q(x))
        out: Tensor = self.out(_attend(q, self.k_norm(k), v, self.heads))
        return out


class Layer(nn.Module):
    """Self-attention, cross-attention and a two-layer network, modulated by the timestep."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, heads, eps = config.width, config.num_attention_heads, config.eps
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm_in = Standardise(eps)
        self.self_attn = SelfAttention(width, heads, eps)
        self.cross_norm = LearnedNorm(width, eps) if config.cross_attn_norm else nn.Identity()
        self.cross = CrossAttention(width, heads, eps)
        self.norm_mlp = Standardise(eps)
        self.mlp = TwoLayers(width, config.ffn_dim, width, nn.GELU(approximate="tanh"))

    def forward(self, x: Tensor, text: Tensor, time: Tensor, angles: Tensor) -> Tensor:
        """Tokens `b l c`, text `b m c`, time `b l 6 c` (or l = 1), angles `l d/2`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.modulation + _wide(time)).unbind(
            -2
        )
        attended = self.self_attn((self.norm_in(x) * (1 + scale) + shift).to(x.dtype), angles)
        x = (_wide(x) + attended * gate).to(x.dtype)
        x = x + self.cross(self.cross_norm(x).to(x.dtype), text)
        made = self.mlp((self.norm_mlp(x) * (1 + mlp_scale) + mlp_shift).to(x.dtype))
        return (_wide(x) + _wide(made) * mlp_gate).to(x.dtype)


class Head(nn.Module):
    """Norm, modulation and projection to the values of a patch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(2, config.width) / config.width**0.5)
        self.norm = Standardise(config.eps)
        self.proj = nn.Linear(config.width, config.out_channels * math.prod(config.patch_size))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[..., None, :]).unbind(-2)
        out: Tensor = self.proj((self.norm(x) * (1 + scale) + shift).to(x.dtype))
        return out


class WanPort(nn.Module):
    """Predict a velocity from a noisy latent, the timestep and text embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.in_channels * math.prod(config.patch_size)
        self.patch_in = nn.Linear(patch, width)
        self.text_mlp = TwoLayers(config.text_dim, width, width, nn.GELU(approximate="tanh"))
        self.time_mlp = TwoLayers(config.freq_dim, width, width, nn.SiLU())
        self.time_modulation = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        """Working precision."""
        return self.patch_in.weight.dtype

    def set_attention_backend(self, backend: str) -> None:
        """Accept the one backend there is.

        Raises:
            ValueError: It is not `native`.
        """
        if backend != "native":
            raise ValueError(f"the port attends with torch's own kernels, not {backend!r}")

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """Run one forward.

        Args:
            hidden_states: Latent `b c f h w`.
            timestep: `b`, or `b l`: one a token, as in Wan 2.2 5B. In [0, 1000].
            encoder_hidden_states: Text embeddings `b m c`.
            return_dict: Return an object with `sample` instead of a tuple of one.
        """
        patch = self.config.patch_size
        sizes = [n // p for n, p in zip(hidden_states.shape[2:], patch, strict=True)]
        x = self.patch_in(_to_patches(hidden_states, sizes, patch))
        angles = rotary_angles(sizes, self.config.attention_head_dim).to(x.device)
        per_token = timestep if timestep.ndim == 2 else timestep[:, None]
        waves = sinusoids(per_token, self.config.freq_dim).to(self.time_mlp.up.weight.dtype)
        time = self.time_mlp(waves).to(x.dtype)
        modulation = self.time_modulation(functional.silu(time)).unflatten(-1, (6, -1))
        text = self.text_mlp(encoder_hidden_states)
        for layer in self.layers:
            x = layer(x, text, modulation, angles)
        out = _from_patches(self.head(x, time), sizes, patch)
        return SimpleNamespace(sample=out) if return_dict else (out,)


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of a timestep at `width / 2` rates from 1 down to 1e-4; float32.

    The rates are rounded to float32 as the model was trained with: at timestep 1000, one unit in
    the last place of a rate turns its phase by 6e-5.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    phase = timestep.float()[..., None] * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat((phase.cos(), phase.sin()), dim=-1)


def rotary_angles(sizes: list[int], head: int) -> Tensor:
    """Angle of every pair of a head's channels at every token: `(f h w) head/2`, float64.

    A third of the pairs, rounded down, turns with the height, as many with the width, the rest with
    the frame; pair i of n turns by position times 10000^(-i / n).
    """
    side = head // 6
    parts = []
    for axis, pairs in enumerate((head // 2 - 2 * side, side, side)):
        rates = 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))
        place = torch.arange(sizes[axis], dtype=torch.float64)
        shape = [1, 1, 1, pairs]
        shape[axis] = sizes[axis]
        parts.append((place[:, None] * rates).view(shape).expand(*sizes, pairs))
    return torch.cat(parts, dim=-1).flatten(0, 2)


def _turned(x: Tensor, angles: Tensor, heads: int) -> Tensor:
    """Turn neighbouring channels `b l (heads pairs 2)` as points of a plane."""
    pairs = x.unflatten(-1, (heads, -1, 2))
    quarter = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1)  # turned by 90 degrees
    precision = _wide(x).dtype
    cos, sin = (part.to(precision)[:, None, :, None] for part in (angles.cos(), angles.sin()))
    return (pairs * cos + quarter * sin).flatten(-3).to(x.dtype)


def _to_patches(latent: Tensor, sizes: list[int], patch: tuple[int, int, int]) -> Tensor:
    """`b c (f t) (h p) (w q)` to `b (f h w) (c t p q)`."""
    (f, h, w), (t, p, q) = sizes, patch
    cut = latent.reshape(*latent.shape[:2], f, t, h, p, w, q)
    return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def _from_patches(tokens: Tensor, sizes: list[int], patch: tuple[int, int, int]) -> Tensor:
    """`b (f h w) (t p q c)` to `b c (f t) (h p) (w q)`."""
    (f, h, w), (t, p, q) = sizes, patch
    cut = tokens.reshape(len(tokens), f, h, w, t, p, q, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return cut.reshape(len(tokens), -1, f * t, h * p, w * q)
