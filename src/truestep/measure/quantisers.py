"""Quantisers of weights, as their formats define them: what each makes of a tensor. Pure.

Every one rounds to the nearest code of a grid; they differ in the grid, and in what shares a step.
What is returned is not the codes, but the numbers that they stand for.

Sources: llama.cpp's ggml-quants.c (`quantize_row_*_ref`, `make_qkx2_quants`) for Q*; OCP 8-bit
floating point specification 1.0 for e4m3; bitsandbytes' functional.py for the table of NF4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

_LARGEST_E4M3 = 448.0
_SMALLEST_NORMAL_E4M3 = 2.0**-6
_BITS_E4M3 = 3
"""Of the mantissa."""

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Quantised:
    """What a quantiser makes of a tensor; both float32, of its shape.

    Attributes:
        values: The numbers that its codes stand for.
        reach: How far each may lie from what it was: half a step, and more where it is clipped.
    """

    values: Tensor
    reach: Tensor


@dataclass(frozen=True)
class Quantiser:
    """A way to quantise a weight.

    Attributes:
        name: As the command line has it: `int8`, `gguf:Q4_K`.
        text: What shares a step, in words.
        bits: Of a weight, steps among them.
        apply: Takes a float32 weight, outermost axis first; None where its shape does not suit.
    """

    name: str
    text: str
    bits: float
    apply: Callable[[Tensor], Quantised | None]

    def __call__(self, weight: Tensor) -> Quantised | None:
        """What it makes of a weight of any float dtype; None of what it leaves as it is."""
        if weight.ndim < 2 or not weight.numel():
            return None
        return self.apply(weight.detach().float())


def _finished(weight: Tensor, values: Tensor, half: Tensor) -> Quantised:
    """Numbers in blocks, as the weight lies; clipped ones reach as far as they are clipped."""
    values = values.reshape(weight.shape)
    reach = half.reshape(weight.shape)
    return Quantised(values, torch.maximum(reach, (values - weight).abs()))


def _symmetric(weight: Tensor, groups: Tensor) -> Quantised:
    """Whole numbers to 127 either way, one step a group: `scale = amax / 127`."""
    step = groups.abs().amax(1, keepdim=True) / 127
    safe = torch.where(step > 0, step, torch.ones_like(step))
    values = (groups / safe).round().clamp(-127, 127) * step
    return _finished(weight, values, (step / 2).expand_as(groups))


def _int8(weight: Tensor) -> Quantised:
    return _symmetric(weight, weight.flatten(1))


def _int8_tensor(weight: Tensor) -> Quantised:
    return _symmetric(weight, weight.reshape(1, -1))


def _e4m3(weight: Tensor, groups: Tensor, scale: Tensor) -> Quantised:
    """`scale * e4m3(weight / scale)`; a step is an eighth of the power of two below."""
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    inner = (groups / safe).clamp(-_LARGEST_E4M3, _LARGEST_E4M3)
    values = inner.to(torch.float8_e4m3fn).float() * scale
    exponent = inner.abs().clamp_min(_SMALLEST_NORMAL_E4M3).log2().floor()
    return _finished(weight, values, torch.exp2(exponent - _BITS_E4M3 - 1) * scale)


def _fp8(weight: Tensor) -> Quantised:
    groups = weight.reshape(1, -1)
    return _e4m3(weight, groups, groups.abs().amax(1, keepdim=True) / _LARGEST_E4M3)


def _fp8_channel(weight: Tensor) -> Quantised:
    groups = weight.flatten(1)
    return _e4m3(weight, groups, groups.abs().amax(1, keepdim=True) / _LARGEST_E4M3)


def _fp8_cast(weight: Tensor) -> Quantised:
    return _e4m3(weight, weight.reshape(1, -1), torch.ones(1, 1, device=weight.device))


def blocks_of(weight: Tensor, size: int) -> Tensor | None:
    """A weight as blocks of so many numbers in a row, which may run over the ends of rows.

    llama.cpp takes rows of whole blocks; ComfyUI-GGUF lays others out anew where the whole is.
    """
    return weight.reshape(-1, size) if weight.numel() % size == 0 else None


def _halved(numbers: Tensor) -> Tensor:
    """Steps as they are stored: in float16."""
    return numbers.to(torch.float16).float()


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step != 0, 1 / torch.where(step != 0, step, torch.ones_like(step)), 0.0)


def _small_signed(codes: int) -> Callable[[Tensor], Quantised | None]:
    """Q4_0 and Q5_0: the number that is furthest from 0 gets the lowest code."""
    middle = codes // 2

    def apply(weight: Tensor) -> Quantised | None:
        groups = blocks_of(weight, 32)
        if groups is None:
            return None
        furthest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
        step = furthest / -middle
        code = (groups * _inverse(step) + middle + 0.5).floor().clamp(0, codes - 1) - middle
        step = _halved(step)
        return _finished(weight, code * step, (step.abs() / 2).expand_as(groups))

    return apply


def _small_least(codes: int) -> Callable[[Tensor], Quantised | None]:
    """Q4_1 and Q5_1: from the least to the largest number of a block."""

    def apply(weight: Tensor) -> Quantised | None:
        groups = blocks_of(weight, 32)
        if groups is None:
            return None
        least, most = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        step = (most - least) / (codes - 1)
        code = ((groups - least) * _inverse(step) + 0.5).floor().clamp(0, codes - 1)
        step = _halved(step)
        return _finished(weight, code * step + _halved(least), (step / 2).expand_as(groups))

    return apply


def _q8_0(weight: Tensor) -> Quantised | None:
    groups = blocks_of(weight, 32)
    if groups is None:
        return None
    step = groups.abs().amax(1, keepdim=True) / 127
    code = (groups * _inverse(step)).round()
    step = _halved(step)
    return _finished(weight, code * step, (step / 2).expand_as(groups))


def _searched(groups: Tensor, codes: int, begin: float, tries: int) -> tuple[Tensor, Tensor]:
    """Step and least number (at most 0) of every block that take its numbers best.

    Source: ggml's `make_qkx2_quants`; numbers count by their size, and steps are tried in tenths
    around that of the whole range.
    """
    weights = (groups.square().mean(1, keepdim=True)).sqrt() + groups.abs()
    least = groups.amin(1, keepdim=True).clamp_max(0)
    most = groups.amax(1, keepdim=True)
    wide = (most - least).clamp_min(1e-30)
    total, sum_x = weights.sum(1, keepdim=True), (weights * groups).sum(1, keepdim=True)

    def error(step: Tensor, low: Tensor, code: Tensor) -> Tensor:
        return (weights * (step * code + low - groups).square()).sum(1, keepdim=True)

    best_step, best_least = wide / codes, least
    code = ((groups - least) / best_step).round().clamp(0, codes)
    best = error(best_step, best_least, code)
    for trial in range(tries + 1):
        code = ((groups - least) * ((begin + 0.1 * trial + codes) / wide)).round().clamp(0, codes)
        sum_l = (weights * code).sum(1, keepdim=True)
        sum_l2 = (weights * code.square()).sum(1, keepdim=True)
        sum_xl = (weights * groups * code).sum(1, keepdim=True)
        under = total * sum_l2 - sum_l.square()
        safe = torch.where(under > 0, under, torch.ones_like(under))
        step = (total * sum_xl - sum_x * sum_l) / safe
        low = (sum_l2 * sum_x - sum_l * sum_xl) / safe
        above = low > 0
        step = torch.where(above, sum_xl / sum_l2.clamp_min(1e-30), step)
        low = torch.where(above, torch.zeros_like(low), low)
        found = error(step, low, code)
        better = (under > 0) & (found < best)
        best = torch.where(better, found, best)
        best_step = torch.where(better, step, best_step)
        best_least = torch.where(better, low, best_least)
    return best_step, -best_least


def _super(codes: int, begin: float, tries: int) -> Callable[[Tensor], Quantised | None]:
    """Q4_K and Q5_K: eight blocks of 32, whose steps and minima have six bits of one step each."""
    fallback = _small_signed(32) if codes == 15 else _small_least(32)

    def apply(weight: Tensor) -> Quantised | None:
        groups = blocks_of(weight, 256)
        if groups is None:  # llama.cpp: Q5_0 for Q4_K, Q5_1 for Q5_K
            return fallback(weight)
        blocks = groups.reshape(-1, 32)
        step, minimum = _searched(blocks, codes, begin, tries)

        def packed(numbers: Tensor) -> Tensor:
            eight = numbers.reshape(-1, 8)
            unit = eight.amax(1, keepdim=True) / 63
            code = (eight * _inverse(unit)).round().clamp(0, 63)
            return (code * _halved(unit)).reshape(-1, 1)

        step, minimum = packed(step), packed(minimum)
        code = ((blocks + minimum) * _inverse(step)).round().clamp(0, codes)
        return _finished(weight, code * step - minimum, (step / 2).expand_as(blocks))

    return apply


def _nf4(weight: Tensor) -> Quantised | None:
    groups = blocks_of(weight, 64)
    if groups is None:
        return None
    table = torch.tensor(_NF4, device=weight.device)
    between = (table[1:] + table[:-1]) / 2
    scale = groups.abs().amax(1, keepdim=True)
    inner = groups * _inverse(scale)
    at = torch.bucketize(inner, between)
    gap = torch.diff(table)
    inside = (torch.bucketize(inner, table) - 1).clamp(0, len(gap) - 1)
    return _finished(weight, table[at] * scale, gap[inside] / 2 * scale)


def _int4(weight: Tensor) -> Quantised | None:
    """Groups of 128 in a row (whole rows where these are no multiple): 15 steps from least to
    largest."""
    rows = weight.flatten(1)
    groups = rows.reshape(-1, 128) if rows.shape[1] % 128 == 0 else rows
    least, most = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True)
    step = (most.clamp_min(0) - least) / 15
    code = ((groups - least) * _inverse(step)).round().clamp(0, 15)
    return _finished(weight, code * step + least, (step / 2).expand_as(groups))


def _each() -> tuple[Quantiser, ...]:
    return (
        Quantiser("int8", "int8, one step a row", 8.0, _int8),
        Quantiser("int8-tensor", "int8, one step a tensor", 8.0, _int8_tensor),
        Quantiser("fp8", "e4m3, one scale a tensor", 8.0, _fp8),
        Quantiser("fp8-channel", "e4m3, one scale a row", 8.0, _fp8_channel),
        Quantiser("fp8-cast", "e4m3 without a scale", 8.0, _fp8_cast),
        Quantiser("int4", "15 steps in groups of 128", 4.25, _int4),
        Quantiser("nf4", "NF4 in blocks of 64", 4.5, _nf4),
        Quantiser("gguf:Q8_0", "Q8_0", 8.5, _q8_0),
        Quantiser("gguf:Q5_1", "Q5_1", 6.0, _small_least(32)),
        Quantiser("gguf:Q5_0", "Q5_0", 5.5, _small_signed(32)),
        Quantiser("gguf:Q5_K", "Q5_K", 5.5, _super(31, -0.5, 15)),
        Quantiser("gguf:Q4_1", "Q4_1", 5.0, _small_least(16)),
        Quantiser("gguf:Q4_0", "Q4_0", 4.5, _small_signed(16)),
        Quantiser("gguf:Q4_K", "Q4_K", 4.5, _super(15, -1.0, 20)),
    )


QUANTISERS = {quantiser.name: quantiser for quantiser in _each()}
"""By the name that the command line has for it."""


def rms(tensor: Tensor) -> float:
    """Root mean square, in float64."""
    return math.sqrt(float(tensor.double().square().mean())) if tensor.numel() else 0.0
