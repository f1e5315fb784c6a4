"""Harmless changes of torch, whatever runs: threads, attention kernel, one rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from random import Random
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

JITTERS = 3
"""Jitter runs in a recording's own floor; `truestep record --runs` adds more."""

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
    """Operators as another library computes them: what elementary functions give moved by one unit
    in the last place, up or down, and what products, norms and functions give in 16 bits rounded
    once more.

    Where sigmoid is small it moves by more: libraries that add one half last, as by tanh, are off
    by a unit of that half (ONNX Runtime 1.31 measured 3e-8 wherever it is below 0.1, which is 1e-5
    of a probability of 0.003).

    Elementary functions are not rounded to nearest: exp, sin, pow and their like are one unit off
    here or there, by library and by instruction set. Where what they give is multiplied by a large
    number, as the frequencies of a timestep's embedding are, this is far more than any rounding of
    the result. A few elements are then all of it: were some left where they are, one run would not
    say how far off the next is (17 times, measured on a Wan of 16 frequencies; 2 times so). What
    every library gives exactly stays: zeros, ones as of exp(0), squares and roots. And where
    numbers are narrow, a library that fuses two operators rounds once where another rounds twice,
    in every layer: in 32 bits this is nothing beside what a sum rounds.

    Args:
        seed: Says which elements, and whether up or down.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._random = Random(seed)
        self._factor = self._random.randrange(_GOLDEN, 2**31, 2)
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
        name = _moved_by(func)
        if not name:
            return made
        first = made[0] if isinstance(made, tuple) else made
        if not isinstance(first, torch.Tensor) or first.dtype not in _INTEGER:
            return made
        wide = first.itemsize > 2
        if wide and (name not in ELEMENTARY or _is_rounded_power(name, args)):
            return made
        if wide:
            moves = self._directions(first, ones_stay=name not in _ACTIVATIONS)
        else:
            moves = self._roundings(first)
        most = torch.finfo(first.dtype).max / 4  # a product with inf would be no number
        unit = _UNIT * torch.finfo(first.dtype).eps
        size = first.clamp(-most, most)
        if wide and name == "sigmoid":
            size, moves = first.clamp(min=_BELOW_HALF / _UNIT), moves.masked_fill(first == 0, 0)
        moved = torch.addcmul(first, size, moves, value=unit)
        if wide and name == "sigmoid":
            moved = moved.maximum(first / 2)  # its logarithm stays one
        if isinstance(made, tuple):
            return (moved, *made[1:])
        written = (*args[:1], (kwargs or {}).get("out"))
        return made.copy_(moved) if any(made is each for each in written) else moved

    def _directions(self, made: torch.Tensor, *, ones_stay: bool) -> torch.Tensor:
        """1 or -1 for every number, by its bits: a library gives one answer to one question,
        however often it is asked."""
        mixed = made.contiguous().view(_INTEGER[made.dtype]) * self._factor
        up = torch.copysign(made.new_ones(()), mixed.view(made.dtype))
        return up.masked_fill_(made.abs() == 1, 0) if ones_stay else up

    def _roundings(self, made: torch.Tensor) -> torch.Tensor:
        """Up or down for one number in twelve, which is the variance of a rounding.

        Which ones is read from a pool of random numbers, anywhere in it: every operator of a model
        draws, and random numbers of its own would cost more than most of them.
        """
        key = (made.dtype, made.device)
        if key not in self._pools:
            draw = torch.randint(0, 24, (_POOL,), generator=self._generator, dtype=torch.int8)
            self._pools[key] = ((draw == 0).to(made.dtype) - (draw == 1).to(made.dtype)).to(
                made.device
            )
        count, pool = made.numel(), self._pools[key]
        start = self._random.randrange(_POOL if count > _POOL else _POOL + 1 - count)
        if start + count > _POOL:
            pool = pool.repeat(-(-(start + count) // _POOL))
        return pool[start : start + count].view(made.shape)


_POOL = 2**16


@cache
def _moved_by(operator: Any) -> str:
    """Its name without an ending for in-place, if `OtherFunctions` moves what it gives."""
    name: str = operator._schema.name.removeprefix("aten::").removesuffix("_")
    return name if name in NARROW else ""


def _is_rounded_power(name: str, args: tuple[Any, ...]) -> bool:
    """Whether it is one product or one root, which every processor rounds to nearest."""
    return name == "pow" and not isinstance(args[1], torch.Tensor) and args[1] in (0.5, 1, 2)


_GOLDEN = 0x9E3779B1 >> 1 | 1
"""Least factor that mixes the bits of a number: its half of the golden ratio of 2**32."""

_UNIT = 0.7
"""Of a number x, x * 0.7 epsilon is between 0.7 and 1.4 units: added, it gives the next number."""

_BELOW_HALF = 0.25
"""Of epsilon: the unit in the last place of numbers from a quarter to one half."""

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


_ACTIVATIONS = frozenset(("silu", "gelu", "mish", "softplus"))
"""Of them, those that give 1 by chance alone."""

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
