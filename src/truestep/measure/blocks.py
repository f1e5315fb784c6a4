"""Blocks of GGUF: codes with scales inside, taken apart as ggml defines them. Pure.

A value is step * code + offset, with a code between two limits. Rounding to the nearest is the same
for every producer: builds and importance matrices choose other steps, and for these the codes are
the nearest (ggml, ggml-quants.c; Q8_0 and the like round before their step is rounded to float16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

_CHUNK = 1 << 18
"""Elements at once."""

HALF = 2.0**-11
"""Of a number in steps: what a step may turn that is rounded to float16 after it was used."""

TINY = 2.0**-24
"""The smallest float16."""

EXACT = 2.0**-20
"""Likewise of computing in float32, as ggml does."""


@dataclass(frozen=True)
class Parts:
    """A run of blocks taken apart; all of shape (blocks, groups, elements of a group) broadcast.

    Attributes:
        codes: Whole numbers.
        step, offset: Of each group.
        unit: What steps are whole multiples of, of each block: those below half of it are zero.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor
    unit: Tensor | None = None

    def values(self) -> Tensor:
        """The numbers that the codes stand for: float32, (blocks, elements of a block)."""
        return (self.step * self.codes + self.offset).reshape(len(self.codes), -1)


@dataclass(frozen=True)
class Format:
    """How one kind of block is made.

    Attributes:
        elements, size: Of a block, in numbers and bytes.
        lowest, highest: Codes that it has.
        slack: Of a code, what its distance to the nearest may be.
        coarse: Largest rel_l2 of weights that it suits.
        apart: Takes uint8 (blocks, size) apart.
    """

    name: str
    elements: int
    size: int
    lowest: int
    highest: int
    slack: float
    coarse: float
    apart: Callable[[Tensor], Parts]


@dataclass(frozen=True)
class Packed:
    """A tensor in blocks.

    Attributes:
        data: uint8, (rows, bytes of a row).
        shape: Of the numbers.
    """

    format: Format
    data: Tensor
    shape: tuple[int, ...]

    def rows(self, rows: slice) -> Tensor:
        """The numbers of some rows of the first axis: float32."""
        count = self.shape[0] if len(self.shape) > 1 else 1
        blocks = self.data.reshape(-1, self.format.size)
        start, stop, _ = rows.indices(count)
        each, rest = divmod(len(blocks), count)
        if rest:  # a shape from before, whose rows are no whole blocks
            return self._numbers(blocks).reshape(self.shape)[rows]
        shape = (stop - start, *self.shape[1:]) if len(self.shape) > 1 else self.shape
        return self._numbers(blocks[start * each : stop * each]).reshape(shape)

    def _numbers(self, blocks: Tensor) -> Tensor:
        parts = blocks.split(max(_CHUNK // self.format.elements, 1))
        found = [self.format.apart(part).values() for part in parts if len(part)]
        return torch.cat(found) if found else torch.empty(0)

    def take(self, rows: torch.Tensor) -> Packed | None:
        """Some rows of the first axis, in an order; None where these are not whole."""
        if len(self.shape) < 2 or self.data.numel() // self.format.size % self.shape[0]:
            return None
        data = self.data.reshape(self.shape[0], -1).index_select(0, rows)
        shape = (len(rows), *self.shape[1:])
        return Packed(self.format, data, shape)


@dataclass(frozen=True)
class Nearest:
    """How many codes are not the nearest under their own steps, and what rounding took.

    `broken`: blocks whose step or offset is not finite.
    """

    off: int
    rel_l2: float
    broken: int = 0


def nearest(packed: Packed, source: Tensor, read: Callable[..., None] = lambda *_: None) -> Nearest:
    """Whether every code of a tensor is the nearest to another's numbers.

    Args:
        packed: The codes.
        source: The same shape, of any float dtype.
        read: Told the chunks that have been read.
    """
    form = packed.format
    flat = source.detach().reshape(-1, form.elements)
    blocks = packed.data.reshape(-1, form.size)
    count = max(_CHUNK // form.elements, 1)
    off, broken, lost, whole = 0, 0, 0.0, 0.0
    for raw, numbers in zip(blocks.split(count), flat.split(count), strict=True):
        parts = form.apart(raw)
        wide = numbers.to(torch.float32).reshape(parts.codes.shape)
        target = (wide - parts.offset) / parts.step
        best = target.round().clamp(form.lowest, form.highest)
        size = parts.codes.abs() + (parts.offset / parts.step).abs() + 1
        slack = 2 * (form.slack + EXACT) * size
        worse = (target - parts.codes).abs() > (target - best).abs() + slack
        none = parts.step == 0
        off += int((worse & ~none).sum())
        if bool(none.any()):  # then what it should say is below what a step can be
            unit = TINY if parts.unit is None else parts.unit.abs().clamp_min(TINY)
            reach = unit * max(form.highest, -form.lowest)
            off += int((((wide - parts.offset).abs() > reach) & none).sum())
        fine = (parts.step.isfinite() & parts.offset.isfinite()).flatten(1).all(1)
        broken += int((~fine).sum())
        taken = parts.values().reshape(parts.codes.shape) - wide
        lost += float(taken.square().sum(dtype=torch.float64))
        whole += float(wide.square().sum(dtype=torch.float64))
        read(raw, numbers)
    rel_l2 = math.sqrt(lost / whole) if whole else (math.inf if lost else 0.0)
    return Nearest(off, rel_l2, broken)


def _half(raw: Tensor) -> Tensor:
    """float16 numbers in bytes: float32, (blocks, 1, 1)."""
    return raw.contiguous().view(torch.float16).to(torch.float32).reshape(len(raw), -1, 1)


def _nibbles(raw: Tensor) -> Tensor:
    """All low halves, then all high ones."""
    return torch.cat([raw & 15, raw >> 4], dim=-1)


def _small(raw: Tensor, *, middle: int, minimum: bool, fifth: bool) -> Parts:
    """Q4_0, Q4_1, Q5_0, Q5_1: one group of 32."""
    step, at = _half(raw[:, :2]), 2
    offset = torch.zeros_like(step)
    if minimum:
        offset, at = _half(raw[:, 2:4]), 4
    high = torch.zeros(len(raw), 32, dtype=torch.uint8)
    if fifth:
        bits = raw[:, at : at + 4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)
        high, at = (bits & 1).reshape(len(raw), 32) << 4, at + 4
    codes = (_nibbles(raw[:, at : at + 16]) | high).to(torch.float32) - middle
    return Parts(codes.reshape(len(raw), 1, 32), step, offset)


def _q8_0(raw: Tensor) -> Parts:
    step = _half(raw[:, :2])
    codes = raw[:, 2:].contiguous().view(torch.int8).to(torch.float32)
    return Parts(codes.reshape(len(raw), 1, 32), step, torch.zeros_like(step))


def _two_bits(raw: Tensor) -> Tensor:
    """64 bytes: 256 codes of two bits, 128 of each half, 32 of each shift."""
    halves = raw.reshape(len(raw), 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).reshape(1, 1, 4, 1)
    return (halves >> shifts) & 3


def _q2_k(raw: Tensor) -> Parts:
    scales, codes = raw[:, :16], _two_bits(raw[:, 16:80])
    step, least = _half(raw[:, 80:82]), _half(raw[:, 82:84])
    return Parts(
        codes.reshape(len(raw), 16, 16).to(torch.float32),
        step * (scales & 15).unsqueeze(-1),
        -least * (scales >> 4).unsqueeze(-1),
        step,
    )


def _q3_k(raw: Tensor) -> Parts:
    mask, low = raw[:, :32], _two_bits(raw[:, 32:96])
    packed, step = raw[:, 96:108], _half(raw[:, 108:110])
    bits = torch.arange(8, dtype=torch.uint8).reshape(1, 8, 1)
    high = ((mask.unsqueeze(1) >> bits) & 1).reshape(len(raw), 2, 4, 32)
    codes = low.to(torch.float32) - 4 * (1 - high.to(torch.float32))
    first, second, top = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat(
        [
            (first & 15) | ((top & 3) << 4),
            (second & 15) | (((top >> 2) & 3) << 4),
            (first >> 4) | (((top >> 4) & 3) << 4),
            (second >> 4) | (((top >> 6) & 3) << 4),
        ],
        dim=1,
    )
    each = step * (scales.to(torch.float32) - 32).unsqueeze(-1)
    return Parts(codes.reshape(len(raw), 16, 16), each, torch.zeros_like(each), step)


def _six_bits(raw: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes: eight scales and eight minima of six bits."""
    low, middle, top = raw[:, :4], raw[:, 4:8], raw[:, 8:12]
    scales = torch.cat([low & 63, (top & 15) | ((low >> 6) << 4)], dim=1)
    minima = torch.cat([middle & 63, (top >> 4) | ((middle >> 6) << 4)], dim=1)
    return scales.unsqueeze(-1), minima.unsqueeze(-1)


def _q45_k(raw: Tensor, *, fifth: bool) -> Parts:
    step, least = _half(raw[:, :2]), _half(raw[:, 2:4])
    scales, minima = _six_bits(raw[:, 4:16])
    at = 48 if fifth else 16
    nibbles = raw[:, at : at + 128].reshape(len(raw), 4, 1, 32)
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=2).reshape(len(raw), 8, 32)
    if fifth:
        bits = torch.arange(8, dtype=torch.uint8).reshape(1, 8, 1)
        codes = codes | (((raw[:, 16:48].unsqueeze(1) >> bits) & 1) << 4)
    return Parts(codes.to(torch.float32), step * scales, -least * minima, step)


def _q6_k(raw: Tensor) -> Parts:
    low, high = raw[:, :128].reshape(len(raw), 2, 64), raw[:, 128:192].reshape(len(raw), 2, 1, 32)
    scales = raw[:, 192:208].contiguous().view(torch.int8).to(torch.float32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).reshape(1, 1, 4, 1)
    nibbles = torch.cat([low & 15, low >> 4], dim=2).reshape(len(raw), 2, 4, 32)
    codes = nibbles | (((high >> shifts) & 3) << 4)
    unit = _half(raw[:, 208:210])
    step = unit * scales.unsqueeze(-1)
    whole = codes.to(torch.float32).reshape(len(raw), 16, 16) - 32
    return Parts(whole, step, torch.zeros_like(step), unit)


FORMATS = {
    2: Format(
        "Q4_0", 32, 18, -8, 7, HALF, 0.2, lambda r: _small(r, middle=8, minimum=False, fifth=False)
    ),
    3: Format(
        "Q4_1", 32, 20, 0, 15, HALF, 0.2, lambda r: _small(r, middle=0, minimum=True, fifth=False)
    ),
    6: Format(
        "Q5_0",
        32,
        22,
        -16,
        15,
        HALF,
        0.1,
        lambda r: _small(r, middle=16, minimum=False, fifth=True),
    ),
    7: Format(
        "Q5_1", 32, 24, 0, 31, HALF, 0.1, lambda r: _small(r, middle=0, minimum=True, fifth=True)
    ),
    8: Format("Q8_0", 32, 34, -127, 127, HALF, 0.03, _q8_0),
    10: Format("Q2_K", 256, 84, 0, 3, 0.0, 0.5, _q2_k),
    11: Format("Q3_K", 256, 110, -4, 3, 0.0, 0.3, _q3_k),
    12: Format("Q4_K", 256, 144, 0, 15, 0.0, 0.2, lambda r: _q45_k(r, fifth=False)),
    13: Format("Q5_K", 256, 176, 0, 31, 0.0, 0.1, lambda r: _q45_k(r, fifth=True)),
    14: Format("Q6_K", 256, 210, -32, 31, 0.0, 0.05, _q6_k),
}
"""Number in the file to format."""
