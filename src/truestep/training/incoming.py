"""Gradients that come to modules: where they are 0, others are drawn in their place.

A gate that begins at zero (adaLN-zero), or a LoRA's second factor, hands on nothing: every product
with that is 0, whatever a module's backward does with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from truestep.training.pulling import Recorded

Key = tuple[str, int]


def silent(recorded: Recorded) -> bool:
    """Whether gradients came to a call, all of them 0."""
    return bool(recorded.pulled) and not any(bool(g.any()) for g in recorded.pulled.values())


def with_drawn(
    calls: Mapping[Key, Recorded], kept: Collection[Key]
) -> tuple[dict[Key, Recorded], list[Key]]:
    """Calls, each of which has something to pull back.

    Args:
        calls: What came to each.
        kept: Calls that stay as they are: what they pull back is handed on.

    Returns:
        All calls, and those whose gradients are drawn, of the size of the others'.
    """
    size = _size(calls)
    changed = [key for key, own in calls.items() if key not in kept and silent(own)]
    found = dict(calls)
    for key in changed:
        pulled = {
            path: _drawn(gradient, size, f"{key[0]}/{key[1]}/{path}")
            for path, gradient in calls[key].pulled.items()
        }
        found[key] = replace(calls[key], pulled=pulled)
    return found, changed


def _size(calls: Mapping[Key, Recorded]) -> float:
    squares, count = 0.0, 0
    for own in calls.values():
        for gradient in own.pulled.values():
            if bool(gradient.any()):
                squares += float(gradient.double().square().sum())
                count += gradient.numel()
    return (squares / count) ** 0.5 if count else 1.0


def _drawn(like: torch.Tensor, size: float, name: str) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(like.shape, generator=generator, dtype=torch.float64) * size
    return values.to(like.device, like.dtype)
