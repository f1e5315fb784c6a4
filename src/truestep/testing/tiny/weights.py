"""Seeded weights: every parameter is drawn by its name; no gate is zero, no norm explodes."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn


def randomise(module: nn.Module, *, seed: int, name: str) -> None:
    """Draw every trainable parameter anew, in place.

    Matrices and kernels have unit gain (1 / sqrt(fan-in)), vectors of norms lie around 1, biases
    and tables that libraries set to zero are small and random. Layers that a library starts at
    zero (the last of a diffusion transformer, a control net's outputs) would otherwise hide
    everything before them. Buffers and frozen parameters stay as the class computes them.

    Args:
        module: A model. Its numbers are drawn where it is, and are others on another device.
        seed: The pipeline's seed.
        name: The component's name, so that two encoders of one class differ.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    seen: set[int] = set()
    for key, parameter in module.named_parameters():
        drawn = parameter.requires_grad and parameter.is_floating_point()
        if id(parameter) in seen or not drawn:
            continue
        seen.add(id(parameter))
        digest = hashlib.sha256(f"{seed}/{name}/{key}".encode()).digest()
        generator = torch.Generator(parameter.device)
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        with torch.no_grad():
            parameter.copy_(_scaled(key, parameter, noise, id(parameter) in embeddings))


def _scaled(
    key: str, parameter: torch.Tensor, noise: torch.Tensor, embedding: bool
) -> torch.Tensor:
    last = key.rpartition(".")[2]
    if embedding:
        return noise
    if last in ("weight_g", "original0"):  # magnitudes of normalised weights
        return 1 + 0.1 * noise
    if parameter.ndim <= 1 or parameter.numel() == max(parameter.shape):
        norm = "weight" in last or "scale" in last or "gamma" in last
        centre = 1.0 if norm and "table" not in last else 0.0
        return centre + 0.1 * noise
    if last in ("weight", "original1", "weight_v") or "proj" in last:
        return noise / math.sqrt(max(1, parameter.numel() // max(1, parameter.shape[0])))
    return 0.3 * noise
