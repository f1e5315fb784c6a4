"""Harmless changes of torch, whatever runs: threads, attention kernel, one rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from random import Random
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


class OtherFunctions(TorchDispatchMode):
    """Operators as another library computes them: half of what elementary functions give moved by
    one unit in the last place, and what products, norms and functions give in 16 bits rounded once
    more.

    Elementary functions are not rounded to nearest: exp, sin, pow and their like are one unit off
    here or there, by library and by instruction set. Where what they give is multiplied by a large
    number, as the frequencies of a timestep's embedding are, this is far more than any rounding of
    the result. And where numbers are narrow, a library that fuses two operators rounds once where
    another rounds twice, in every layer: in 32 bits this is nothing beside what a sum rounds.

    Args:
        seed: Says which elements, and whether up or down.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._start = Random(seed)
        self._pools: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiled runs in this mode; to keep dynamo out costs more than most operators."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and move what it gave."""
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        first = made[0] if isinstance(made, tuple) and made else made
        of = _of(first)
        if not of or name.removesuffix("_") not in (ELEMENTARY if of == HALF else NARROW):
            return made
        moved = self._moved(first)
        if isinstance(made, tuple):
            return (moved, *made[1:])
        return made.copy_(moved) if name.endswith("_") else moved

    def _moved(self, made: torch.Tensor) -> torch.Tensor:
        """A tensor with some elements moved up or down one unit; zeros and inf stay.

        Which ones is read from a pool of random numbers, anywhere in it: every operator of a model
        draws, and random numbers of its own would cost more than most of them.
        """
        key = (made.dtype, made.device)
        if key not in self._pools:
            draw = torch.randint(
                0, _of(made), (_POOL,), generator=self._generator, dtype=torch.int8
            )
            moves = (draw == 0).to(made.dtype) - (draw == 1).to(made.dtype)
            self._pools[key] = (moves * (_UNIT * torch.finfo(made.dtype).eps)).to(made.device)
        count, pool = made.numel(), self._pools[key]
        start = self._start.randrange(_POOL if count > _POOL else _POOL + 1 - count)
        if start + count > _POOL:
            pool = pool.repeat(-(-(start + count) // _POOL))
        moves = pool[start : start + count].view(made.shape)
        most = torch.finfo(made.dtype).max / 4  # a product with inf would be no number
        return torch.addcmul(made, made.clamp(-most, most), moves)


HALF, TWELFTH = 4, 24
"""Two elements of so many are moved."""

_POOL = 2**16
_UNIT = 0.7
"""Of a number x, x * 0.7 epsilon is between 0.7 and 1.4 units: added, it gives the next number."""


ELEMENTARY = frozenset(
    (
        "exp",
        "exp2",
        "expm1",
        "pow",
        "sin",
        "cos",
        "tan",
        "tanh",
        "sigmoid",
        "erf",
        "polar",
        "rsqrt",
        "_softmax",
        "silu",
        "gelu",
        "mish",
        "softplus",
    )
)
"""Operators that compute a function which no processor rounds to nearest. Logarithms are left out:
models take whole numbers from them, as the buckets of relative positions, and a whole number that
turns over is no rounding."""


NARROW = ELEMENTARY | frozenset(
    (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "native_layer_norm",
        "native_group_norm",
        "_fused_rms_norm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)
"""Operators whose results fused kernels do not round, as what follows is computed with them."""


def _of(made: Any) -> int:
    """Of how many elements of a result two are moved: those of 32 bits and more are one unit off,
    narrower ones are rounded from such, which has the variance of one in twelve."""
    if not isinstance(made, torch.Tensor) or made.dtype not in _INTEGER:
        return 0
    return HALF if made.itemsize > 2 else TWELFTH


def one_rounding(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One element in twelve moved one unit in the last place, up or down at random; zeros stay.

    A rounding to nearest has a variance of 1/12 of a squared unit: this has the same, and stays
    among the dtype's own numbers.

    Args:
        tensor: Any shape; float64, float32, bfloat16 or float16. What is not finite stays.
        generator: A CPU generator.
    """
    bits = tensor.contiguous().view(_INTEGER[tensor.dtype])
    draw = torch.randint(0, 24, bits.shape, generator=generator, dtype=torch.int8)
    move = ((draw == 0).to(bits.dtype) - (draw == 1).to(bits.dtype)).to(bits.device)
    stays = (tensor == 0) | ~torch.isfinite(tensor)
    return torch.where(stays, tensor, (bits + move).view(tensor.dtype))
