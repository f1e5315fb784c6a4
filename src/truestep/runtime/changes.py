"""Harmless changes of torch, whatever runs: threads, attention kernel, one rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

JITTERS = 3
"""Jitter runs in a recording's own floor; `truestep calibrate` adds more."""

_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Another number of torch threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def math_kernel() -> AbstractContextManager[None]:
    """Scaled dot product attention without a fused kernel, where a model leaves the choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.MATH])


def one_rounding(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One element in twelve moved one unit in the last place, up or down at random; zeros stay.

    A rounding to nearest has a variance of 1/12 of a squared unit: this has the same, and stays
    among the dtype's own numbers.

    Args:
        tensor: Any shape; float64, float32, bfloat16 or float16, finite.
        generator: A CPU generator.
    """
    bits = tensor.contiguous().view(_INTEGER[tensor.dtype])
    draw = torch.randint(0, 24, bits.shape, generator=generator, dtype=torch.int8)
    move = ((draw == 0).to(bits.dtype) - (draw == 1).to(bits.dtype)).to(bits.device)
    return torch.where(tensor == 0, tensor, (bits + move).view(tensor.dtype))
