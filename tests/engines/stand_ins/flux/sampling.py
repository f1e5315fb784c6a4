"""Noise, what the model is given, the schedule, and the loop over it."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from .model import Flux
from .modules.conditioner import HFEmbedder

LATE = False
"""A fault: each update starts from the latent of the step before."""


def get_noise(
    num_samples: int, height: int, width: int, device: str, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    shape = (num_samples, 16, height // 8, width // 8)
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def prepare(
    t5: HFEmbedder, clip: HFEmbedder, img: torch.Tensor, prompt: str
) -> dict[str, torch.Tensor]:
    b, c, h, w = (*img.shape[:2], img.shape[2] // 2, img.shape[3] // 2)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(1, h * w, 3).float()
    tokens = img.reshape(b, c, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * 4)
    txt = t5([prompt])
    return {
        "img": tokens,
        "img_ids": ids,
        "txt": txt,
        "txt_ids": torch.zeros(1, txt.shape[1], 3),
        "vec": clip([prompt]),
    }


def get_schedule(num_steps: int, image_seq_len: int, max_shift: float = 1.15) -> list[float]:
    mu = 0.5 + (max_shift - 0.5) * (image_seq_len - 256) / (4096 - 256)
    times = torch.linspace(1, 0, num_steps + 1)
    return (math.exp(mu) / (math.exp(mu) + (1 / times - 1))).tolist()  # type: ignore[no-any-return]


def denoise(
    model: Flux,
    img: torch.Tensor,
    img_ids: torch.Tensor,
    txt: torch.Tensor,
    txt_ids: torch.Tensor,
    vec: torch.Tensor,
    timesteps: list[float],
    guidance: float = 4.0,
) -> torch.Tensor:
    scale, before = torch.full((1,), guidance), img
    for now, following in pairwise(timesteps):
        pred = model(
            img=img,
            img_ids=img_ids,
            txt=txt,
            txt_ids=txt_ids,
            y=vec,
            timesteps=torch.full((1,), now),
            guidance=scale,
        )
        start = before if LATE else img
        img, before = start + (following - now) * pred, img
    return img


def unpack(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    b, h, w = len(x), height // 16, width // 16
    return x.reshape(b, h, w, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, 16, h * 2, w * 2)
