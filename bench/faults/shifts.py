"""Benign shifts: arithmetic of other kernels, fusions and machines, drawn by a seed.

Each changes where and when rounding happens and nothing else, in layers that the seed chooses. Over
a free run such roundings grow, and move the end as far as small faults do. Beside them faults of
any size, to be matched with a shift by the distance of their ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.faults.targets import blocks, linears, middles, models, self_attention, with_attention

Tensor = torch.Tensor
Forward = Callable[..., Any]
Shift = Callable[[Any, random.Random], None]
Fault = Callable[[Any, float], None]


def _some(modules: list[Any], dice: random.Random) -> list[Any]:
    """At least a third of the modules, in their order."""
    count = dice.randint(max(len(modules) // 3, 1), len(modules))
    chosen = set(dice.sample(range(len(modules)), count))
    return [module for at, module in enumerate(modules) if at in chosen]


def _linears(pipe: Any) -> list[nn.Linear]:
    return [layer for model in models(pipe) for layer in linears(model)]


def _norms(pipe: Any) -> list[Any]:
    return [
        module
        for model in models(pipe)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__
    ]


def split_sums(pipe: Any, dice: random.Random) -> None:
    """Matrix products summed in parts, in another order, as split-K kernels do."""

    def forward(layer: nn.Linear, ranges: list[tuple[int, int]], x: Tensor) -> Tensor:
        parts = [functional.linear(x[..., a:b], layer.weight[:, a:b]) for a, b in ranges]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total if layer.bias is None else total + layer.bias

    for layer in _some(_linears(pipe), dice):
        count = dice.randint(2, min(8, layer.in_features))
        cuts = sorted(dice.sample(range(1, layer.in_features), count - 1))
        ranges = list(zip([0, *cuts], [*cuts, layer.in_features], strict=True))
        dice.shuffle(ranges)
        layer.forward = _bound(forward, layer, ranges)


def wide_sums(pipe: Any, dice: random.Random) -> None:
    """Matrix products summed in a wider type and rounded once."""

    def forward(layer: nn.Linear, wide: torch.dtype, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(wide)
        return functional.linear(x.to(wide), layer.weight.to(wide), bias).to(x.dtype)

    for layer in _some(_linears(pipe), dice):
        own = layer.weight.dtype
        wide = torch.float64 if own == torch.float32 else dice.choice(_WIDER)
        layer.forward = _bound(forward, layer, wide)


_WIDER = (torch.float32, torch.float64)


def accumulators(pipe: Any, dice: random.Random) -> None:
    """The last bit of some accumulators rounded the other way."""

    def forward(layer: nn.Linear, share: float, number: int, x: Tensor) -> Tensor:
        made = functional.linear(x, layer.weight, layer.bias)
        order = torch.Generator().manual_seed(number)
        drawn = torch.rand(made.shape, generator=order)
        up = torch.where(drawn < share / 2, torch.inf, -torch.inf).to(made.dtype)
        return torch.where(drawn < share, torch.nextafter(made, up), made)

    share = dice.choice((0.05, 0.2, 0.5))
    for layer in _some(_linears(pipe), dice):
        layer.forward = _bound(forward, layer, share, dice.randrange(1 << 30))


def bias_apart(pipe: Any, dice: random.Random) -> None:
    """The bias added after the product was rounded, not in it."""

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        made = functional.linear(x, layer.weight)
        return made if layer.bias is None else made + layer.bias

    for layer in _some(_linears(pipe), dice):
        layer.forward = _bound(forward, layer)


def norms_otherwise(pipe: Any, dice: random.Random) -> None:
    """Norms in a wider type, or with the affine part applied after the cast."""

    def forward(norm: Any, original: Forward, way: str, x: Tensor) -> Any:
        wide = torch.float64 if x.dtype == torch.float32 else torch.float32
        eps = getattr(norm, "eps", 1e-6) or 0.0
        high = x.to(wide)
        if isinstance(norm, nn.LayerNorm):
            mean = high.mean(-1, keepdim=True)
            spread = (high - mean).square().mean(-1, keepdim=True)
            made = (high - mean) * torch.rsqrt(spread + eps)
        elif tuple(getattr(norm, "dim", ())) == tuple(x.shape[-1:]):
            made = high * torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)
        else:
            return original(x)
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if way == "late":
            made = made.to(x.dtype)
        made = made if weight is None else made * weight.to(made.dtype)
        made = made if bias is None else made + bias.to(made.dtype)
        return made.to(x.dtype)

    for norm in _some(_norms(pipe), dice):
        norm.forward = _bound(forward, norm, norm.forward, dice.choice(("wide", "late")))


def attention_blocks(pipe: Any, dice: random.Random) -> None:
    """Attention over blocks of keys with a running softmax, as flash kernels do."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("attn_mask") is not None or any(arg is not None for arg in args[:1]):
            return functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        wide = torch.promote_types(query.dtype, torch.float32)
        top = query.new_full((*query.shape[:-1], 1), -torch.inf, dtype=wide)
        total, made = torch.zeros_like(top), torch.zeros(query.shape, dtype=wide)
        for keys, values in zip(key.split(size, -2), value.split(size, -2), strict=True):
            scores = (query @ keys.transpose(-1, -2)).to(wide) * scale
            now = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, kept = (scores - now).exp(), (top - now).exp()
            total = total * kept + weights.sum(-1, keepdim=True)
            made = made * kept + weights.to(query.dtype).to(wide) @ values.to(wide)
            top = now
        return (made / total).to(query.dtype)

    size = dice.choice((3, 5, 8, 13, 16, 32))
    for model in models(pipe):
        with_attention(model, attend)


def attention_wide(pipe: Any, dice: random.Random) -> None:
    """Attention as its definition, in a wider type, keys in another order."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("attn_mask") is not None or any(arg is not None for arg in args[:1]):
            return functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        order = list(range(key.shape[-2]))
        random.Random(number).shuffle(order)
        key, value = key[..., order, :].to(wide), value[..., order, :].to(wide)
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        scores = query.to(wide) @ key.transpose(-1, -2) * scale
        return (scores.softmax(-1) @ value).to(query.dtype)

    number, wide = dice.randrange(1 << 30), dice.choice(_WIDER)
    for model in models(pipe):
        with_attention(model, attend)


def activations(pipe: Any, dice: random.Random) -> None:
    """Outputs of feed-forward layers through a wider type of their activation."""

    def forward(module: Any, original: Forward, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float32 else torch.float32
        if isinstance(module, nn.SiLU):
            return (x.to(wide) * torch.sigmoid(x.to(wide))).to(x.dtype)
        way = getattr(module, "approximate", "none")
        return functional.gelu(module.proj(x).to(wide), approximate=way).to(x.dtype)

    found = [
        module
        for model in models(pipe)
        for module in model.modules()
        if isinstance(module, nn.SiLU)
        or (type(module).__name__ == "GELU" and hasattr(module, "proj"))
    ]
    for module in _some(found, dice):
        module.forward = _bound(forward, module, module.forward)


def residual_sums(pipe: Any, dice: random.Random) -> None:
    """What a block adds is added in a wider type and rounded once, or in halves."""

    def forward(original: Forward, way: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = original(x, *args, **kwargs)
        if not isinstance(made, Tensor) or made.shape != x.shape:
            return made
        added = made - x
        if way == "halves":
            return (x + added * 0.5) + added * 0.5
        return x + added

    chosen = list(blocks(pipe))
    for block in _some(chosen, dice):
        block.forward = _bound(forward, block.forward, dice.choice(("halves", "again")))


def projections(pipe: Any, dice: random.Random) -> None:
    """Query, key and value of self-attention from one product of stacked weights."""

    def forward(layers: list[nn.Linear], at: int, size: int, x: Tensor) -> Tensor:
        weight = torch.cat([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        bias = torch.cat(biases) if biases else None
        return functional.linear(x, weight, bias)[..., at : at + size]

    for block in _some(list(blocks(pipe)), dice):
        attention = self_attention(block)
        layers = [attention.to_q, attention.to_k, attention.to_v]
        dice.shuffle(layers)
        at = 0
        for layer in layers:
            layer.forward = _bound(forward, layers, at, layer.out_features)
            at += layer.out_features


def mixed(pipe: Any, dice: random.Random) -> None:
    """Two or three of them at once, as a whole other engine."""
    names = [name for name in SHIFTS if name not in ("mixed", "compiled")]
    for name in dice.sample(names, dice.randint(2, 3)):
        SHIFTS[name](pipe, dice)


def compiled(pipe: Any, dice: random.Random) -> None:
    """The transformer compiled: fused, reordered, casts left out between fused operations."""
    from bench.faults.benign import compiled as compile_it

    compile_it(pipe)


SHIFTS: Mapping[str, Shift] = {
    "split sums": split_sums,
    "wide sums": wide_sums,
    "accumulators": accumulators,
    "bias apart": bias_apart,
    "norms otherwise": norms_otherwise,
    "attention in blocks": attention_blocks,
    "attention in a wider type": attention_wide,
    "activations": activations,
    "residual sums": residual_sums,
    "projections": projections,
    "mixed": mixed,
    "compiled": compiled,
}
"""By name; a seed says in which layers and how."""


def _bound(forward: Forward, *first: Any) -> Forward:
    def bound(*args: Any, **kwargs: Any) -> Any:
        return forward(*first, *args, **kwargs)

    return bound


# Faults of any size


def _middle_linears(pipe: Any) -> Iterator[nn.Linear]:
    for block in middles(pipe):
        yield linears(block)[len(linears(block)) // 2]


def gain(pipe: Any, size: float) -> None:
    """The weights of a layer in the middle scaled."""
    for layer in _middle_linears(pipe):
        layer.weight.data = _rounded(layer.weight.data, layer.weight.data.double() * (1 + size))


def offset(pipe: Any, size: float) -> None:
    """A constant on what a layer in the middle gives."""

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        made = functional.linear(x, layer.weight, layer.bias)
        return _rounded(made, made.double() + size)

    for layer in _middle_linears(pipe):
        layer.forward = _bound(forward, layer)


def noise(pipe: Any, size: float) -> None:
    """Weights of a layer in the middle damaged at random."""
    for layer in _middle_linears(pipe):
        order = torch.Generator().manual_seed(3)
        weight = layer.weight.data.double()
        drawn = torch.randn(weight.shape, generator=order, dtype=torch.float64)
        damaged = weight + size * float(weight.square().mean().sqrt()) * drawn
        layer.weight.data = _rounded(layer.weight.data, damaged)


def scores(pipe: Any, size: float) -> None:
    """Scores of every self-attention scaled."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = (kwargs.pop("scale", None) or query.shape[-1] ** -0.5) * (1 + size)
        return functional.scaled_dot_product_attention(
            query, key, value, *args, scale=scale, **kwargs
        )

    for block in blocks(pipe):
        with_attention(self_attention(block), attend)


def residual(pipe: Any, size: float) -> None:
    """The output of a block in the middle scaled, in what it adds."""

    def forward(original: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = original(x, *args, **kwargs)
        if not isinstance(made, Tensor) or made.shape != x.shape:
            return made
        return _rounded(made, x.double() + (made.double() - x.double()) * (1 + size))

    for block in middles(pipe):
        block.forward = _bound(forward, block.forward)


def guidance(pipe: Any, size: float) -> None:
    """Guidance at another scale."""
    scale = pipe.settings.guidance_scale * (1 + size)
    pipe.settings = pipe.settings.model_copy(update={"guidance_scale": scale})


def _rounded(like: Tensor, wide: Tensor) -> Tensor:
    """In the working precision, where the pipeline is raised in that one."""
    return wide.to(like.dtype)


FAULTS: Mapping[str, Fault] = {
    "gain": gain,
    "offset": offset,
    "noise": noise,
    "scores": scores,
    "residual": residual,
    "guidance": guidance,
}
"""By name; a size of 1 is gross."""
