"""Harmless twins: changes of the kind a port makes that must not change anything but rounding."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import ALL, PIPELINES, benign
from bench.faults.guidance import scale_of
from bench.faults.targets import (
    around,
    attentions,
    block_list,
    blocks,
    edm,
    feed_forward,
    linears,
    middles,
    models,
    need,
    on_input,
    on_output,
    replace_forward,
    residual,
    self_attention,
    temporal_factor,
    with_attention,
)
from bench.faults.transformer import _rope_at
from truestep.joint import each

Tensor = torch.Tensor
Stage = Callable[..., Tensor]
BOTH = ("wan", "module")

SUMS = "the same sums in another order"
MOVES = "the same numbers elsewhere in memory"
ROWS = "rows of a batch do not meet"


# Running


@benign(acts="nothing", why="nothing is changed", subjects=ALL)
def rerun(pipe: Any) -> None:
    """The same run again."""


@benign(acts="process, torch threads", why=SUMS, subjects=ALL)
def two_threads(pipe: Any) -> None:
    """Two torch threads; set for the whole process, so the caller restores the number."""
    torch.set_num_threads(2)


@benign(
    acts="process, float32 matrix products",
    why="on a CPU, another kernel of the same sums",
    subjects=PIPELINES,
)
def matmul_precision_high(pipe: Any) -> None:
    """`set_float32_matmul_precision("high")`; for the whole process, so the caller restores it."""
    need(pipe.device == "cpu", "on an accelerator this is TF32, with 10 bits")
    torch.set_float32_matmul_precision("high")


@benign(
    acts="transformer, forward",
    why="a compiler fuses and reorders, it does not approximate",
    slow=True,
)
def compiled(pipe: Any) -> None:
    """The transformer's forward compiled; with no compiler for inductor, as a traced graph."""
    backend = "inductor" if _has_compiler() else "aot_eager"
    for model in models(pipe):
        model.forward = torch.compile(model.forward, backend=backend)


def _has_compiler() -> bool:
    import shutil

    return any(shutil.which(name) for name in ("g++", "clang++", "cl"))


# Batches


def _in_batch(pipe: Any, row: int) -> None:
    def beside(value: Any, dim: int) -> Any:
        def pair(sample: Tensor) -> Tensor:
            neighbour = sample.roll(1, dims=dim)
            return torch.cat([sample, neighbour] if row == 0 else [neighbour, sample])

        return each(pair, value)

    def batched(original: Stage, inner: Any, latent: Any, step: Any, text: Any, branch: str) -> Any:
        made = original(inner, beside(latent, -1), step, beside(text, 1), branch)
        return each(lambda both: both.tensor_split(2)[row], made)

    around(pipe, "predict", batched)


@benign(acts="stage prediction", why=ROWS, subjects=PIPELINES)
def batch_row_zero(pipe: Any) -> None:
    """The sample as the first row of a batch of two."""
    _in_batch(pipe, 0)


@benign(acts="stage prediction", why=ROWS, subjects=PIPELINES)
def batch_row_one(pipe: Any) -> None:
    """The sample as the second row of a batch of two."""
    _in_batch(pipe, 1)


@benign(acts="stage prediction", why=ROWS)
def guidance_batched(pipe: Any) -> None:
    """Both branches in one forward, as `[uncond, cond]`; each call returns its own row."""
    seen: dict[str, Tensor] = {}

    def batched(
        original: Stage, inner: Any, latent: Tensor, step: Any, text: Tensor, branch: str
    ) -> Tensor:
        seen[branch] = text
        other = seen.get("cond" if branch == "uncond" else "uncond", text)
        other = other if other.shape == text.shape else text
        pair = [text, other] if branch == "uncond" else [other.to(text), text]
        made = original(inner, torch.cat([latent, latent]), step, torch.cat(pair).to(text), branch)
        return made.tensor_split(2)[branch == "cond"]

    need(pipe.settings.guided, "the case has no guidance")
    around(pipe, "predict", batched)


@benign(acts="stage text", why=ROWS, subjects=PIPELINES)
def text_in_batch(pipe: Any) -> None:
    """Each prompt encoded in one batch with another."""

    def batched(original: Stage, inner: Any, prompts: list[str]) -> Any:
        made = original(inner, [*prompts, "another prompt"])
        count = len(prompts)
        return each(lambda rows: rows[: len(rows) * count // (count + 1)], made)

    around(pipe, "encode_text", batched)


@benign(acts="stage decode", why=ROWS, subjects=PIPELINES)
def decode_in_batch(pipe: Any) -> None:
    """The latent decoded in one batch with another."""

    def batched(original: Stage, inner: Any, latent: Any) -> Any:
        both = each(lambda part: torch.cat([part, part.flip(-1)]), latent)
        return each(lambda made: made.tensor_split(2)[0], original(inner, both))

    around(pipe, "decode", batched)


# Attention


@benign(
    acts="transformer, every attention",
    why="another kernel of the same function",
    subjects=PIPELINES,
)
def attention_math_kernel(pipe: Any) -> None:
    """Attention by PyTorch's own math kernel instead of a fused one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.MATH]):
            return functional.scaled_dot_product_attention(*args, **kwargs)

    for model in models(pipe):
        with_attention(model, attend)


@benign(acts="transformer, every attention", why="the definition, in float32 or more", subjects=ALL)
def attention_written_out(pipe: Any) -> None:
    """Attention as softmax(q k) v, in float32 at least."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * scale
        made: Tensor = (scores.softmax(dim=-1) @ value.to(wide)).to(query.dtype)
        return made

    for model in models(pipe):
        with_attention(model, attend)


@benign(
    acts="transformer, every attention",
    why="softmax does not depend on the order of keys",
    subjects=PIPELINES,
)
def keys_reversed(pipe: Any) -> None:
    """Attention over the keys and values in reverse order."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return functional.scaled_dot_product_attention(
            query, key.flip(-2), value.flip(-2), *args, **kwargs
        )

    for model in models(pipe):
        with_attention(model, attend)


@benign(acts="transformer, every attention", why="the same rows of one matrix")
def projections_fused(pipe: Any) -> None:
    """Query, key and value from one fused projection."""
    for model in models(pipe):
        need(hasattr(model, "fuse_qkv_projections"), "the model cannot fuse its projections")
        model.fuse_qkv_projections()


@benign(acts="transformer, blocks.*.attn2", why="N equal keys weigh as much as one plus log N")
def text_padding_collapsed(pipe: Any) -> None:
    """Cross-attention over one padding row with a bias of log N instead of N equal rows."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = key.shape[-2]
        # Counted from the end over the whole batch: as many rows as equal the last one everywhere.
        equal = (key == key[..., -1:, :]).all(-1).all(0).all(0)
        count = int(equal.flip(0).long().cumprod(0).sum())
        bias = query.new_zeros(rows - count + 1, dtype=query.dtype)
        bias[-1] = math.log(count)
        kept = slice(0, rows - count + 1)
        return functional.scaled_dot_product_attention(
            query,
            key[..., kept, :],
            value[..., kept, :],
            attn_mask=bias.expand(query.shape[-2], -1),
        )

    for model in models(pipe):
        for block in block_list(model):
            with_attention(block.attn2, attend)


@benign(acts="transformer, rope", why="scores depend on differences of positions")
def rope_offset(pipe: Any) -> None:
    """All rotary positions one further."""
    for model in models(pipe):
        need(hasattr(model, "rope"), "the model has no rotary positions")
        spans = [n // p for n, p in zip(_latent_sizes(pipe), model.rope.patch_size, strict=True)]
        reach = getattr(model.rope, "max_seq_len", None) or max(model.rope.max_size)
        need(max(spans) < reach, "the tables end at this size")
    _rope_at(pipe, lambda axis, rows: rows + 1)


def _latent_sizes(pipe: Any) -> tuple[int, int, int]:
    settings, config = pipe.settings, pipe.vae.config
    spatial = config.get("scale_factor_spatial", config.get("spatial_compression_ratio"))
    return (
        (settings.num_frames - 1) // temporal_factor(pipe) + 1,
        settings.height // spatial,
        settings.width // spatial,
    )


@benign(acts="transformer, middle block, first attention", why="heads are a set", subjects=BOTH)
def heads_reordered(pipe: Any) -> None:
    """The heads of one attention in reverse order, in all its layers."""
    for block in middles(pipe):
        attention = self_attention(block)
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            _reverse_heads(layer.weight, attention.heads)
            _reverse_heads(layer.bias, attention.heads)
        for norm in (getattr(attention, "norm_q", None), getattr(attention, "norm_k", None)):
            weight = getattr(norm, "weight", None)
            if weight is not None and weight.numel() == attention.to_q.out_features:
                _reverse_heads(weight, attention.heads)
        output = attention.to_out[0].weight
        output.data.copy_(output.data.unflatten(1, (attention.heads, -1)).flip(1).flatten(1))


def _reverse_heads(parameter: Any, heads: int) -> None:
    if parameter is not None:
        split = parameter.data.unflatten(0, (heads, -1))
        parameter.data.copy_(split.flip(0).flatten(0, 1))


# Constants moved from one place to another


@benign(
    acts="transformer, blocks.*.attn1.norm_q and norm_k",
    why="powers of two are exact",
    subjects=PIPELINES,
)
def score_scale_moved(pipe: Any) -> None:
    """A factor of two moved from the norm of queries into that of keys."""
    for block in blocks(pipe):
        attention = self_attention(block)
        attention.norm_q.weight.data.mul_(0.5)
        attention.norm_k.weight.data.mul_(2)


@benign(acts="transformer, every attention", why="powers of two are exact", subjects=ALL)
def value_scale_moved(pipe: Any) -> None:
    """A factor of four moved from the output projection into the values."""
    for model in models(pipe):
        for attention in attentions(model):
            attention.to_out[0].weight.data.mul_(0.25)
            attention.to_v.weight.data.mul_(4)
            if attention.to_v.bias is not None:
                attention.to_v.bias.data.mul_(4)


@benign(acts="transformer, blocks.*.norm2 and attn2.to_q", why="a product of constants")
def norm_folded(pipe: Any) -> None:
    """The scale and shift before cross-attention folded into its query projection.

    Not in a 16-bit pipeline: the folded weights would be rounded once more.
    """
    for block in blocks(pipe):
        norm, queries = block.norm2, block.attn2.to_q
        need(getattr(norm, "weight", None) is not None, "the norm has no weights")
        need(queries.weight.itemsize >= 4, "16-bit weights would be rounded again")
        scale, shift = norm.weight.data.double(), norm.bias.data.double()
        weight = queries.weight.data.double()
        queries.bias.data.add_((weight @ shift).to(queries.bias.dtype))
        queries.weight.data.copy_(weight * scale)
        norm.weight.data.fill_(1)
        norm.bias.data.zero_()


@benign(acts="transformer, blocks.*.ffn", why="hidden units are a set", subjects=PIPELINES)
def hidden_units_reordered(pipe: Any) -> None:
    """The hidden units of every feed-forward in reverse order."""
    for block in blocks(pipe):
        layers = feed_forward(block).net
        first, last = layers[0].proj, layers[2]
        first.weight.data.copy_(first.weight.data.flip(0))
        if first.bias is not None:
            first.bias.data.copy_(first.bias.data.flip(0))
        last.weight.data.copy_(last.weight.data.flip(1))


@benign(acts="stage decode", why="one multiplication for a reciprocal and a division")
def latent_statistics_multiplied(pipe: Any) -> None:
    """Latents multiplied by the deviation, in float32, instead of divided by its reciprocal."""

    def decode(inner: Any, latent: Tensor) -> Tensor:
        vae = inner.vae
        latent = latent.to(next(vae.parameters()).device)
        wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean, dtype=torch.float64).view(shape).to(wide)
        std = torch.tensor(vae.config.latents_std, dtype=torch.float64).view(shape).to(wide)
        frames: Tensor = vae.decode((wide * std + mean).to(vae.dtype), return_dict=False)[0]
        return frames

    need(not edm(pipe), "the deviation is multiplied by, in float32")
    pipe.decode = decode


@benign(acts="stage guidance", why="the same formula, terms collected")
def guidance_reassociated(pipe: Any) -> None:
    """Guidance as (1 - s) uncond + s cond."""

    def combine(inner: Any, step: Any, cond: Tensor, uncond: Tensor) -> Tensor:
        scale = scale_of(inner, step)
        return (1 - scale) * uncond + scale * cond

    need(pipe.settings.guided, "the case has no guidance")
    pipe.combine = combine


@benign(acts="stage update", why="the same formula, in float64")
def euler_written_out(pipe: Any) -> None:
    """The Euler step written out in float64."""
    settings = pipe.settings
    name = settings.scheduler or type(pipe.scheduler).__name__
    need(name == "FlowMatchEulerDiscreteScheduler", "the scheduler is not Euler's")

    def update(inner: Any, step: Any, guided: Tensor, latent: Tensor) -> Tensor:
        sigmas = inner.scheduler.sigmas.double()
        length = (sigmas[step.index + 1] - sigmas[step.index]).to(latent.device)
        made: Tensor = (latent.double() + length * guided.double()).to(guided.dtype)
        return made

    pipe.update = update


@benign(acts="stage prediction, timesteps", why="every token is told the same timestep")
def timestep_per_token(pipe: Any) -> None:
    """One timestep a token where the model takes one a sample, and the other way round."""
    need(
        all(tuple(model.config.patch_size) == (1, 2, 2) for model in models(pipe)),
        "tokens are not 1 x 2 x 2",
    )
    pipe.expand_timesteps = not pipe.expand_timesteps


# Layers


@benign(acts="transformer, every linear layer", why=SUMS, subjects=ALL)
def linears_transposed(pipe: Any) -> None:
    """Every linear layer with its weight stored transposed."""

    def transposed(module: Any, original: Any, x: Tensor) -> Tensor:
        made: Tensor = x @ module.weight.t().contiguous()
        return made if module.bias is None else made + module.bias

    for model in models(pipe):
        for layer in linears(model):
            replace_forward(layer, transposed)


@benign(acts="transformer, every linear layer", why=SUMS, subjects=ALL)
def linears_by_einsum(pipe: Any) -> None:
    """Every linear layer as an einsum."""

    def summed(module: Any, original: Any, x: Tensor) -> Tensor:
        made = torch.einsum("...i,oi->...o", x, module.weight)
        return made if module.bias is None else made + module.bias

    for model in models(pipe):
        for layer in linears(model):
            replace_forward(layer, summed)


@benign(
    acts="transformer, blocks.*.ffn", why="tokens do not meet in a feed-forward", subjects=PIPELINES
)
def feed_forward_in_chunks(pipe: Any) -> None:
    """Every feed-forward in three chunks of tokens."""

    def chunked(module: Any, original: Stage, hidden: Tensor, *args: Any) -> Tensor:
        return torch.cat([original(part, *args) for part in hidden.tensor_split(3, dim=1)], dim=1)

    for block in blocks(pipe):
        replace_forward(feed_forward(block), chunked)


@benign(
    acts="transformer, blocks.*.norm1, norm2 and norm3",
    why="the definition, in float32 or more",
    subjects=PIPELINES,
)
def layer_norms_written_out(pipe: Any) -> None:
    """Layer norms from their definition, in float32 at least."""

    def written(module: Any, original: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        normed = centred * (centred.square().mean(-1, keepdim=True) + module.eps).rsqrt()
        if module.weight is not None:
            normed = normed * module.weight.to(wide) + module.bias.to(wide)
        made: Tensor = normed.to(x.dtype)
        return made

    for model in models(pipe):
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                replace_forward(module, written)


# Memory


@benign(acts="vae and transformer, 3-d convolutions", why=MOVES, subjects=PIPELINES)
def channels_last_3d(pipe: Any) -> None:
    """Weights of 3-d convolutions in channels-last order."""
    for model in (*models(pipe), pipe.vae):
        for module in model.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


@benign(acts="vae or module, 2-d convolutions", why=MOVES, subjects=ALL)
def channels_last(pipe: Any) -> None:
    """Weights of 2-d convolutions in channels-last order."""
    for model in (*models(pipe), getattr(pipe, "vae", None)):
        for module in model.modules() if model is not None else ():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@benign(acts="stage prediction, inputs", why=MOVES, subjects=PIPELINES)
def inputs_strided(pipe: Any) -> None:
    """Latent and text handed over as views that are not contiguous."""

    def strided(original: Stage, inner: Any, latent: Any, step: Any, text: Any, branch: str) -> Any:
        turned = each(lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2), latent)
        wide = each(lambda t: torch.stack([t, t], dim=-1)[..., 0], text)
        return original(inner, turned, step, wide, branch)

    around(pipe, "predict", strided)


@benign(acts="transformer, outputs of the middle block", why=MOVES, subjects=ALL)
def outputs_copied(pipe: Any) -> None:
    """The middle block's input and output copied; in a UNet, those of one residual layer."""
    for model in models(pipe):
        block = residual(model)
        on_input(block, lambda module, args: (args[0].clone(), *args[1:]) if args else None)
        on_output(block, _copied)


def _copied(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(part.clone() for part in output)
    return output.clone()


@benign(acts="stage decode", why=MOVES, subjects=PIPELINES)
def decode_of_a_copy(pipe: Any) -> None:
    """A contiguous copy of the latent decoded, and its frames copied."""

    def copied(original: Stage, inner: Any, latent: Any) -> Any:
        copy = each(lambda part: part.clone().contiguous(), latent)
        return each(torch.clone, original(inner, copy))

    around(pipe, "decode", copied)


@benign(acts="every model, weights", why="safetensors keeps every bit", subjects=ALL)
def saved_and_reloaded(pipe: Any) -> None:
    """All weights through a safetensors file and back."""
    from safetensors.torch import load, save

    others = (getattr(pipe, name, None) for name in ("text_encoder", "vae"))
    for model in (*models(pipe), *others):
        if model is not None:
            # Tied weights have one storage; a copy each lets them be saved.
            state = {name: value.clone() for name, value in model.state_dict().items()}
            model.load_state_dict(load(save(state)))
