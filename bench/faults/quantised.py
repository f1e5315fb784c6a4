"""Healthy quantisations, and one tensor of each damaged: what `check --meant` is measured on.

A kind of damage is developed (what the judgement was made looking at) or held out (written before
the first run of the benchmark, and not looked at until it was over). So are the makers: the
judgement knows the reference formulae; those held out make the same format in another way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from truestep.measure.quantisers import QUANTISERS
from truestep.runtime.pipeline import Pipeline
from truestep.runtime.quantising import Layer, layers_of

__all__ = ["DAMAGES", "MAKERS", "Damage", "Maker", "damaged", "made"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Maker:
    """Someone's quantiser.

    Attributes:
        apply: A float32 weight to what is kept of it.
        family: What it would be declared as.
        held_out: Not looked at while the judgement was made.
    """

    apply: Callable[[Tensor], Tensor]
    family: str
    held_out: bool = False


def _reference(name: str) -> Callable[[Tensor], Tensor]:
    def apply(weight: Tensor) -> Tensor:
        found = QUANTISERS[name](weight)
        return weight if found is None else found.values

    return apply


def _int8(scale: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Rows of whole numbers to 127, with a scale that is made otherwise."""

    def apply(weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        step = scale(rows.abs()).clamp_min(1e-12)
        return ((rows / step).round().clamp(-128, 127) * step).reshape(weight.shape)

    return apply


def _amax(rows: Tensor) -> Tensor:
    return rows.amax(1, keepdim=True) / 127


def _asymmetric(weight: Tensor) -> Tensor:
    """256 steps from the least to the largest number of a row, with a whole zero point."""
    rows = weight.flatten(1)
    least, most = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    step = (most - least).clamp_min(1e-12) / 255
    zero = (-least / step).round()
    code = ((rows / step).round() + zero).clamp(0, 255)
    return ((code - zero) * step).reshape(weight.shape)


def _e4m3_of_240(weight: Tensor) -> Tensor:
    """e4m3 scaled to 240, as machines do whose format ends there."""
    rows = weight.flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 240
    return ((rows / scale).to(torch.float8_e4m3fn).float() * scale).reshape(weight.shape)


def _library(name: str) -> Callable[[Tensor], Tensor]:
    """The gguf package's own quantiser, and what it reads of what it wrote."""

    def apply(weight: Tensor) -> Tensor:
        import gguf

        if weight.numel() % 32:
            return weight
        kind = getattr(gguf.GGMLQuantizationType, name)
        flat = weight.float().reshape(-1, 32).numpy()
        numbers = gguf.quants.dequantize(gguf.quants.quantize(flat, kind), kind)
        return torch.from_numpy(numbers.copy()).reshape(weight.shape)

    return apply


def _groups_of_64(weight: Tensor) -> Tensor:
    """Four bits from least to largest number in groups of 64, scales in bfloat16."""
    if weight.numel() % 64:
        return _groups(weight, weight.flatten(1))
    return _groups(weight, weight.reshape(-1, 64))


def _groups(weight: Tensor, groups: Tensor) -> Tensor:
    least, most = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = ((most - least) / 15).clamp_min(1e-12).to(torch.bfloat16).float()
    code = ((groups - least) / step).round().clamp(0, 15)
    return (code * step + least).reshape(weight.shape)


def _clipped_q4(weight: Tensor) -> Tensor:
    """Four bits in blocks of 32 with the step of the least squared error, not of the largest."""
    if weight.numel() % 32:
        return weight
    groups = weight.reshape(-1, 32)
    top = groups.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best, kept = torch.full_like(top, float("inf")), groups
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        step = share * top / 7
        values = (groups / step).round().clamp(-8, 7) * step
        error = (values - groups).square().sum(1, keepdim=True)
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better, values, kept)
    return kept.reshape(weight.shape)


def _groups_of_16(weight: Tensor) -> Tensor:
    if weight.numel() % 16:
        return weight
    groups = weight.reshape(-1, 16)
    step = (groups.abs().amax(1, keepdim=True) / 127).to(torch.float16).float().clamp_min(1e-7)
    return ((groups / step).round().clamp(-127, 127) * step).reshape(weight.shape)


def _by_chance(weight: Tensor) -> Tensor:
    """Up or down, the more often the nearer."""
    rows = weight.flatten(1)
    step = _amax(rows.abs()).clamp_min(1e-12)
    dice = torch.Generator("cpu").manual_seed(weight.numel())
    code = (rows / step + torch.rand(rows.shape, generator=dice)).floor()
    return (code.clamp(-128, 127) * step).reshape(weight.shape)


def _e4m3_with_room(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    scale = 1.1 * rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return ((rows / scale).to(torch.float8_e4m3fn).float() * scale).reshape(weight.shape)


def _nf4_bfloat16(weight: Tensor) -> Tensor:
    """The table of NF4 in blocks of 64, whose scales are kept in bfloat16."""
    found = QUANTISERS["nf4"](weight)
    if found is None:
        return weight
    tops = weight.reshape(-1, 64).abs().amax(1, keepdim=True).clamp_min(1e-12)
    return (found.values.reshape(-1, 64) / tops * tops.to(torch.bfloat16)).reshape(weight.shape)


def _rows_of_4_bits(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    return _groups(weight, rows)


MAKERS: Mapping[str, Maker] = {
    "int8": Maker(_reference("int8"), "int8"),
    "int8-tensor": Maker(_reference("int8-tensor"), "int8-tensor"),
    "fp8": Maker(_reference("fp8"), "fp8"),
    "fp8-channel": Maker(_reference("fp8-channel"), "fp8-channel"),
    "Q8_0": Maker(_reference("gguf:Q8_0"), "gguf:Q8_0"),
    "Q4_0": Maker(_reference("gguf:Q4_0"), "gguf:Q4_0"),
    "Q4_K": Maker(_reference("gguf:Q4_K"), "gguf:Q4_K"),
    "int8, scale in bfloat16": Maker(
        _int8(lambda rows: _amax(rows).to(torch.bfloat16).float()), "int8"
    ),
    "int8, range clipped to 99.9 %": Maker(
        _int8(lambda rows: rows.quantile(0.999, 1, keepdim=True) / 127), "int8"
    ),
    "int8, asymmetric": Maker(_asymmetric, "int8"),
    "e4m3 to 240": Maker(_e4m3_of_240, "fp8-channel"),
    "Q8_0 of the gguf package": Maker(_library("Q8_0"), "gguf:Q8_0"),
    "Q4_0 of the gguf package": Maker(_library("Q4_0"), "gguf:Q4_0"),
    "4 bits in groups of 64": Maker(_groups_of_64, "gguf:Q4_K"),
    "4 bits, clipped for the least error": Maker(_clipped_q4, "gguf:Q4_0"),
    "int8, steps of powers of two": Maker(
        _int8(lambda rows: torch.exp2(_amax(rows).clamp_min(1e-12).log2().ceil())), "auto", True
    ),
    "int8 in groups of 16, steps in float16": Maker(_groups_of_16, "int8"),
    "int8, rounded by chance": Maker(_by_chance, "int8", True),
    "e4m3 with a tenth of room": Maker(_e4m3_with_room, "fp8-channel", True),
    "NF4 with scales in bfloat16": Maker(_nf4_bfloat16, "nf4", True),
    "Q5_1 of the gguf package": Maker(_library("Q5_1"), "gguf:Q5_1", True),
    "4 bits, zero points and steps in whole rows": Maker(_rows_of_4_bits, "auto", True),
}


def made(pipe: Pipeline, maker: Maker) -> dict[str, Layer]:
    """Quantise a pipeline's layers in place."""
    layers = layers_of(pipe)
    for layer in layers.values():
        weight = layer.weight.data
        layer.weight.data = maker.apply(weight.float()).to(weight.dtype)
    return layers


@dataclass(frozen=True)
class Context:
    """What a damage may use.

    Attributes:
        name: Of the layer.
        trusted: Its weight before it was quantised, float32.
        layers: All of them, quantised.
        maker: The quantiser.
        dice: For where.
    """

    name: str
    trusted: Tensor
    layers: Mapping[str, Layer]
    maker: Maker
    dice: random.Random


@dataclass(frozen=True)
class Damage:
    """A fault of one tensor.

    Attributes:
        apply: The quantised weight, float32, to the damaged one; None where it has no place.
        held_out: Not looked at while the judgement was made.
    """

    apply: Callable[[Tensor, Context], Tensor | None]
    held_out: bool = False


def _row(weight: Tensor, context: Context) -> int:
    return context.dice.randrange(len(weight))


def _rows_exchanged(weight: Tensor, context: Context) -> Tensor | None:
    if len(weight) < 2:
        return None
    a, b = context.dice.sample(range(len(weight)), 2)
    order = torch.arange(len(weight))
    order[a], order[b] = b, a
    return weight[order]


def _row_zero(weight: Tensor, context: Context) -> Tensor:
    weight[_row(weight, context)] = 0
    return weight


def _row_with_the_next_scale(weight: Tensor, context: Context) -> Tensor | None:
    at = _row(weight, context)
    tops = context.trusted.flatten(1).abs().amax(1)
    other = (at + 1) % len(weight)
    gain = float(tops[other] / tops[at].clamp_min(1e-12))
    if abs(gain - 1) < 0.02:
        return None
    weight[at] *= gain
    return weight


def _sign(weight: Tensor, context: Context) -> Tensor:
    at = _row(weight, context)
    weight[at] = -weight[at]
    return weight


def _scaled(weight: Tensor, context: Context) -> Tensor:
    return weight * 1.1


def _transposed(weight: Tensor, context: Context) -> Tensor | None:
    return (
        weight.T.contiguous() if weight.ndim == 2 and weight.shape[0] == weight.shape[1] else None
    )


def _of_another(weight: Tensor, context: Context) -> Tensor | None:
    same = [
        layer
        for name, layer in context.layers.items()
        if name != context.name and layer.weight.shape == weight.shape
    ]
    return context.dice.choice(same).weight.data.float().clone() if same else None


def _shifted_by_a_block(weight: Tensor, context: Context) -> Tensor | None:
    if weight.numel() % 32 or weight.numel() < 64:
        return None
    return weight.reshape(-1, 32).roll(1, 0).reshape(weight.shape)


def _nibbles(weight: Tensor, context: Context) -> Tensor | None:
    """High and low halves of the bytes exchanged, in one row or, of short rows, in all."""
    if weight.numel() % 32:
        return None
    blocks = weight.reshape(-1, 2, 16)
    at = context.dice.randrange(len(blocks))
    blocks[at] = blocks[at].flip(0)
    return blocks.reshape(weight.shape)


def _zero_point(weight: Tensor, context: Context) -> Tensor:
    """One row a step too high."""
    at = _row(weight, context)
    values = weight[at].flatten().unique()
    step = torch.diff(values).min() if len(values) > 1 else values.abs().max()
    top = context.trusted.flatten(1)[at].abs().max()
    weight[at] += torch.maximum(step, top / 127)
    return weight


def _clipped(weight: Tensor, context: Context) -> Tensor:
    limit = 0.5 * weight.abs().max()
    return weight.clamp(-limit, limit)


def _block_with_the_next_scale(weight: Tensor, context: Context) -> Tensor | None:
    if weight.numel() % 32 or weight.numel() < 64:
        return None
    blocks, trusted = weight.reshape(-1, 32), context.trusted.reshape(-1, 32)
    at = context.dice.randrange(len(blocks))
    tops = trusted.abs().amax(1)
    gain = float(tops[(at + 1) % len(blocks)] / tops[at].clamp_min(1e-12))
    if abs(gain - 1) < 0.1:
        return None
    blocks[at] *= gain
    return blocks.reshape(weight.shape)


def _scale_in_8_bits(weight: Tensor, context: Context) -> Tensor | None:
    """Scales of rows kept in e5m2, which has two bits: up to an eighth off."""
    tops = context.trusted.flatten(1).abs().amax(1).clamp_min(1e-12)
    gain = (tops.to(torch.float8_e5m2).float() / tops).reshape(-1, *[1] * (weight.ndim - 1))
    return weight * gain if bool(((gain - 1).abs() > 0.02).any()) else None


DAMAGES: Mapping[str, Damage] = {
    "two rows exchanged": Damage(_rows_exchanged),
    "a row is 0": Damage(_row_zero),
    "a row with the next row's scale": Damage(_row_with_the_next_scale),
    "a row's sign turned": Damage(_sign),
    "scaled by 1.1": Damage(_scaled),
    "transposed": Damage(_transposed),
    "another layer's weight": Damage(_of_another, held_out=True),
    "shifted by a block": Damage(_shifted_by_a_block, held_out=True),
    "nibbles of a block exchanged": Damage(_nibbles, held_out=True),
    "a row's zero point one step off": Damage(_zero_point, held_out=True),
    "clipped at half the range": Damage(_clipped, held_out=True),
    "a block with the next block's scale": Damage(_block_with_the_next_scale),
    "scales kept in e5m2": Damage(_scale_in_8_bits),
    "bias of another layer": Damage(lambda weight, context: None, held_out=True),
}


def damaged(pipe: Pipeline, trusted: Pipeline, maker: Maker, kind: str, seed: int) -> str | None:
    """Quantise a pipeline in place and damage one layer of it.

    Returns:
        Which; None where this kind has no place in this model.
    """
    dice = random.Random(seed)
    layers, was = made(pipe, maker), layers_of(trusted)
    order = sorted(layers)
    dice.shuffle(order)
    if kind == "bias of another layer":
        return _bias(pipe, order)
    for name in order:
        weight = layers[name].weight.data
        before = was[name].weight.detach().float()
        if torch.equal(weight.float(), before):
            continue  # not quantised: its shape does not suit
        context = Context(name, before, layers, maker, dice)
        result = DAMAGES[kind].apply(weight.float().clone(), context)
        if result is not None and not torch.equal(result.to(weight.dtype), weight):
            layers[name].weight.data = result.to(weight.dtype).contiguous()
            return name
    return None


def _bias(pipe: Pipeline, order: list[str]) -> str | None:
    """The bias of another layer of the same length."""
    modules = {
        f"{model}.{fqn}": module
        for model in ("transformer", "transformer_2")
        if getattr(pipe, model) is not None
        for fqn, module in getattr(pipe, model).named_modules()
    }
    for name in order:
        own = modules[name].bias
        for other in order:
            theirs = modules[other].bias
            if other == name or own is None or theirs is None or own.shape != theirs.shape:
                continue
            if not torch.equal(own, theirs):
                own.data = theirs.data.clone()
                return name
    return None
