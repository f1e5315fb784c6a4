"""Faults inside the denoiser: norms, activations, positions, modulation, attention, blocks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import ALL, PIPELINES, fault
from bench.faults.places import MIDDLE, NORMS, QK_NORMS
from bench.faults.targets import (
    attentions,
    block_list,
    blocks,
    linears,
    middle,
    middles,
    models,
    need,
    on_call,
    on_input,
    on_output,
    residual,
    self_attention,
    sinusoids,
    streams,
)

Tensor = torch.Tensor


# Norms


@fault(
    acts="transformer, every norm",
    source="https://github.com/paiml/aprender/pull/1606",
    subjects=ALL,
    where=NORMS,
)
def norm_epsilon(pipe: Any) -> None:
    """Bug: the norms' epsilon is ten times the reference's (1e-5 for 1e-6)."""
    for model in models(pipe):
        for module in model.modules():
            if isinstance(vars(module).get("eps"), float):
                module.eps *= 10


@fault(
    acts="transformer, first norm with weights in the middle block",
    subjects=ALL,
    where=("{middle}.norm2",),
)
def norm_affine_lost(pipe: Any) -> None:
    """Bug: one norm is built without its learned scale and shift."""
    for block in middles(pipe):
        weighted = [
            module
            for name, module in block.named_modules()
            if "norm" in name.rpartition(".")[2] and getattr(module, "weight", None) is not None
        ]
        need(weighted, "no norm has weights")
        # In Wan, the norm before cross-attention; the others are those of queries and keys.
        shifted = [norm for norm in weighted if getattr(norm, "bias", None) is not None]
        chosen: Any = (shifted or weighted)[0]
        chosen.weight.data.fill_(1)
        if shifted:
            chosen.bias.data.zero_()


def _returns_input(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    return args[0]


@fault(
    acts="transformer, blocks.<middle>.attn1.norm_q and norm_k",
    where=("{middle}.attn1.norm_[qk]",),
    subjects=PIPELINES,
)
def qk_norm_missing(pipe: Any) -> None:
    """Bug: one block's self-attention does not normalise its queries and keys."""
    for block in middles(pipe):
        on_output(self_attention(block).norm_q, _returns_input)
        on_output(self_attention(block).norm_k, _returns_input)


@fault(
    acts="transformer, blocks.<middle>.attn1.norm_k",
    where=("{middle}.attn1.norm_k",),
    subjects=PIPELINES,
)
def k_norm_missing(pipe: Any) -> None:
    """Bug: one block's self-attention normalises its queries only."""
    for block in middles(pipe):
        on_output(self_attention(block).norm_k, _returns_input)


@fault(
    acts="transformer, blocks.*.attn1.norm_q and norm_k",
    source="https://github.com/vllm-project/vllm/pull/16311",
    where=QK_NORMS,
    subjects=PIPELINES,
)
def qk_norm_per_head(pipe: Any) -> None:
    """Bug: queries and keys are normalised head by head instead of across all heads."""
    for block in blocks(pipe):
        attention = self_attention(block)
        _need_norm_across_heads(attention)
        for norm in (attention.norm_q, attention.norm_k):
            on_output(norm, _normalises_per(attention.heads))


def _need_norm_across_heads(attention: Any) -> None:
    across = attention.norm_q.weight.numel() == attention.to_q.out_features
    need(across, "queries and keys are normalised head by head")


def _normalises_per(heads: int) -> Any:
    def change(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        split = args[0].unflatten(-1, (heads, -1))
        normed = functional.rms_norm(split, split.shape[-1:], eps=module.eps)
        made: Tensor = normed.flatten(-2) * module.weight
        return made

    return change


# Activations


@fault(
    acts="transformer, blocks.*.ffn",
    source="https://github.com/kyutai-labs/pocket-tts/pull/278",
    where=("{block}.ffn.net.0",),
    subjects=PIPELINES,
)
def gelu_exact(pipe: Any) -> None:
    """Bug: the feed-forward's GELU is exact where the model was trained with the tanh form."""
    found = [
        module
        for block in blocks(pipe)
        for module in block.modules()
        if getattr(module, "approximate", None) == "tanh"
    ]
    need(found, "no GELU in its tanh form")
    for module in found:
        module.approximate = "none"


@fault(
    acts="transformer, condition_embedder.text_embedder",
    source="https://github.com/tenstorrent/tt-metal/pull/46674",
    where=("condition_embedder.text_embedder.act_1",),
)
def text_projection_gelu_exact(pipe: Any) -> None:
    """Bug: the projection of the text uses another GELU than the model was trained with."""
    for model in models(pipe):
        need(hasattr(model, "condition_embedder"), "the model does not project its text")
        model.condition_embedder.text_embedder.act_1.approximate = "none"


# Positions


def _rope_at(pipe: Any, place: Any) -> None:
    """Take the rotary tables at other positions: `place(axis, positions)` for t, h and w."""

    def change(rope: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Any:
        sizes = [n // p for n, p in zip(args[0].shape[2:], rope.patch_size, strict=True)]
        widths = [rope.t_dim, rope.h_dim, rope.w_dim]
        tables = []
        for table in (rope.freqs_cos, rope.freqs_sin):
            parts = []
            for axis, part in enumerate(table.split(widths, dim=1)):
                shape = [1, 1, 1, widths[axis]]
                shape[axis] = sizes[axis]
                rows = place(axis, torch.arange(sizes[axis], device=table.device))
                picked = part[rows.clamp(max=len(part) - 1)].view(shape)
                parts.append(picked.expand(*sizes, widths[axis]))
            tables.append(torch.cat(parts, dim=-1).flatten(0, 2)[None, :, None])
        return tuple(tables)

    for model in models(pipe):
        need(hasattr(model, "rope"), "the model has no rotary positions")
        if hasattr(model.rope, "freqs_cos"):
            on_output(model.rope, change)
        else:
            model.rope.register_forward_hook(_made_at(place), with_kwargs=True)


def _made_at(place: Any) -> Any:
    """Likewise for a model that makes its tables in every forward, as Cosmos does."""

    def change(
        rope: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor]
    ) -> Any:
        patches = rope.patch_size
        sizes = [n // p for n, p in zip(args[0].shape[2:], patches, strict=True)]
        wider = [n + p for n, p in zip(args[0].shape[2:], patches, strict=True)]
        tables = []
        for table in rope.forward(args[0].new_empty(1, 1, *wider), *args[1:], **kwargs):
            grid = table.unflatten(0, [n + 1 for n in sizes])
            parts = []
            for axis, part in enumerate(grid.split(_widths(rope), dim=-1)):
                rows = [torch.arange(n, device=table.device) for n in sizes]
                rows[axis % 3] = place(axis % 3, rows[axis % 3]).clamp(max=sizes[axis % 3])
                for dim, picked in enumerate(rows):
                    part = part.index_select(dim, picked)
                parts.append(part)
            tables.append(torch.cat(parts, dim=-1).flatten(0, 2))
        return tuple(tables)

    return change


def _widths(rope: Any) -> list[int]:
    """Channels of t, h and w in a rotary table; in Cosmos once for each half of a pair."""
    if hasattr(rope, "freqs_cos"):
        return [rope.t_dim, rope.h_dim, rope.w_dim]
    return [rope.dim_t // 2, rope.dim_h // 2, rope.dim_w // 2] * 2


def _need_tables(model: Any) -> None:
    need(hasattr(model, "rope"), "the model has no rotary positions")
    need(hasattr(model.rope, "freqs_cos"), "rotary positions are not kept in tables")


@fault(acts="transformer, rope, axis t", where=("rope",))
def rope_first_frame_apart(pipe: Any) -> None:
    """Bug: latent frames after the first are one temporal position too far."""
    _rope_at(pipe, lambda axis, rows: rows + (rows > 0) if axis == 0 else rows)


@fault(acts="transformer, rope, axis w", where=("rope",))
def rope_reversed(pipe: Any) -> None:
    """Bug: positions along the width count from the right."""
    _rope_at(pipe, lambda axis, rows: rows.flip(0) if axis == 2 else rows)


@fault(acts="transformer, rope, tables", where=("rope",))
def rope_theta(pipe: Any) -> None:
    """Bug: the rotary base is 9000 instead of 10000."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    for model in models(pipe):
        _need_tables(model)
        rope: Any = model.rope
        made = [
            get_1d_rotary_pos_embed(
                width,
                rope.max_seq_len,
                9000.0,
                use_real=True,
                repeat_interleave_real=True,
                freqs_dtype=torch.float64,
            )
            for width in (rope.t_dim, rope.h_dim, rope.w_dim)
        ]
        rope.freqs_cos.copy_(torch.cat([cos for cos, _ in made], dim=1))
        rope.freqs_sin.copy_(torch.cat([sin for _, sin in made], dim=1))


@fault(acts="transformer, rope, axes h and w", where=("rope",))
def rope_axes_swapped(pipe: Any) -> None:
    """Bug: the channels for height and for width are exchanged."""

    def change(rope: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> Any:
        swapped = []
        for table in output:
            parts = table.split(_widths(rope), dim=-1)
            order = [(t, w, h) for t, h, w in zip(*[iter(parts)] * 3, strict=True)]
            swapped.append(torch.cat([part for three in order for part in three], dim=-1))
        return tuple(swapped)

    for model in models(pipe):
        need(hasattr(model, "rope"), "the model has no rotary positions")
        on_output(model.rope, change)


@fault(
    acts="transformer, blocks.*.attn1, rotary pairs",
    source="https://github.com/huggingface/transformers/issues/47328",
    where=QK_NORMS,
)
def rope_pairs_half_apart(pipe: Any) -> None:
    """Bug: rotary pairs are channels half a head apart instead of neighbours."""

    # Scores do not notice a permutation of the channels that queries and keys share, so pairing
    # channels half apart is the same as bringing them together first.
    def change_for(heads: int) -> Any:
        def change(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            made: Tensor = output.unflatten(-1, (heads, 2, -1)).transpose(-1, -2).flatten(-3)
            return made

        return change

    for block in blocks(pipe):
        attention = self_attention(block)
        _need_norm_across_heads(attention)  # those head by head come with pairs half apart
        for norm in (attention.norm_q, attention.norm_k):
            on_output(norm, change_for(attention.heads))


@fault(acts="transformer, blocks.<middle>.attn1, queries", where=("{middle}.attn1.norm_q",))
def rope_missing_on_queries(pipe: Any) -> None:
    """Bug: one block's queries are not rotated, its keys are."""

    def break_one(attention: Any) -> None:
        tables: list[Tensor] = []

        def keep(module: Any, args: tuple[Any, ...]) -> None:
            tables[:] = args[3]

        def undo(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Turned back here, the rotation that follows brings them to where they were.
            cos, sin = tables[0][..., 0::2], tables[1][..., 1::2]
            x, y = output.unflatten(-1, (attention.heads, -1, 2)).unbind(-1)
            turned = torch.stack([x * cos + y * sin, y * cos - x * sin], dim=-1)
            return turned.flatten(-3).to(output.dtype)

        on_input(attention, keep)
        on_output(attention.norm_q, undo)

    for model in models(pipe):
        _need_tables(model)
        break_one(self_attention(middle(model)))


# Modulation


def _modulation_reordered(pipe: Any, order: Sequence[int]) -> None:
    """Hand the middle block its six modulations in another order."""
    wanted = list(order)

    def reorder(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, text, modulation, *rest = args
        axis = modulation.ndim - 2
        index = torch.tensor(wanted, device=modulation.device)
        return (hidden, text, modulation.index_select(axis, index), *rest)

    for block in middles(pipe):
        need(hasattr(block, "scale_shift_table"), "the block is not modulated")
        table: Any = block.scale_shift_table
        table.data.copy_(table.data[:, wanted].clone())
        on_input(block, reorder)


@fault(acts="transformer, blocks.<middle>, self-attention modulation", where=MIDDLE)
def shift_scale_swapped(pipe: Any) -> None:
    """Bug: one block unpacks its modulation as scale, shift instead of shift, scale."""
    _modulation_reordered(pipe, (1, 0, 2, 3, 4, 5))


@fault(acts="transformer, blocks.<middle>, gates", where=MIDDLE)
def gates_exchanged(pipe: Any) -> None:
    """Bug: one block exchanges the gates of its self-attention and its feed-forward."""
    _modulation_reordered(pipe, (0, 1, 5, 3, 4, 2))


@fault(acts="transformer, blocks.<middle>, feed-forward modulation", where=MIDDLE)
def modulation_reused(pipe: Any) -> None:
    """Bug: one block's feed-forward is given the modulation of its self-attention."""
    _modulation_reordered(pipe, (0, 1, 2, 0, 1, 2))


@fault(acts="transformer, blocks.<middle>, self-attention gate", where=MIDDLE)
def gate_missing(pipe: Any) -> None:
    """Bug: one block adds its self-attention without the gate."""

    def opened(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, text, modulation, *rest = args
        modulation = modulation.clone()
        modulation.select(modulation.ndim - 2, 2).zero_()
        return (hidden, text, modulation, *rest)

    for block in middles(pipe):
        need(hasattr(block, "scale_shift_table"), "the block is not modulated")
        block.scale_shift_table.data[:, 2] = 1
        on_input(block, opened)


@fault(acts="transformer, blocks.<middle>, self-attention modulation", where=MIDDLE)
def modulation_without_one(pipe: Any) -> None:
    """Bug: one block multiplies by the scale instead of by one plus the scale."""
    for block in middles(pipe):
        need(hasattr(block, "scale_shift_table"), "the block is not modulated")
        block.scale_shift_table.data[:, 1] -= 1


@fault(
    acts="transformer, scale_shift_table before proj_out",
    source="https://github.com/invoke-ai/InvokeAI/pull/7708",
    where=("(root)",),
    subjects=PIPELINES,
)
def output_shift_scale_swapped(pipe: Any) -> None:
    """Bug: the output norm's shift and scale are unpacked in the wrong order."""
    for model in models(pipe):
        need(hasattr(model, "scale_shift_table"), "the output is not modulated")
        table: Any = model.scale_shift_table
        table.data.copy_(table.data.flip(-2))


@fault(
    acts="transformer, sinusoidal timestep embedding",
    source="https://github.com/flashinfer-ai/flashinfer/pull/3819",
    subjects=ALL,
    where=("condition_embedder.timesteps_proj",),
)
def time_sin_cos_flipped(pipe: Any) -> None:
    """Bug: the sine and cosine halves of the timestep embedding are swapped."""
    for model in models(pipe):
        for module in sinusoids(model):
            module.flip_sin_to_cos = not module.flip_sin_to_cos


# Attention


@fault(
    acts="transformer, self-attention scale of every block",
    source="https://github.com/google/hackable_diffusion/pull/29",
    subjects=ALL,
    where=("{block}.attn1.norm_q",),
)
def attention_scale_head_size(pipe: Any) -> None:
    """Bug: scores are divided by the root of one more than the head size."""
    _scores_scaled(pipe, lambda size: (size / (size + 1)) ** 0.5)


@fault(
    acts="transformer, self-attention scale of every block",
    subjects=ALL,
    where=("{block}.attn1.norm_q",),
)
def attention_scale_larger(pipe: Any) -> None:
    """Bug: attention scores are 2 % too large."""
    _scores_scaled(pipe, lambda size: 1.02)


def _scores_scaled(pipe: Any, factor_for: Any) -> None:
    """Multiply the queries of self-attention, after their norm where they have one."""

    def scaled_by(factor: float) -> Any:
        return lambda module, args, output: output * factor

    for model in models(pipe):
        for name, module in model.named_modules():
            if not hasattr(module, "to_q") or name.endswith("attn2"):
                continue
            queries: Any = getattr(module, "norm_q", None) or module.to_q
            heads: Any = module.heads
            on_output(queries, scaled_by(factor_for(module.to_q.out_features // heads)))


@fault(
    acts="transformer, blocks.*.attn2",
    source="https://github.com/huggingface/diffusers/issues/10194",
    where=("{block}.attn2",),
)
def text_padding_masked(pipe: Any) -> None:
    """Bug: cross-attention masks the padding that the model was trained to attend to."""
    for model in models(pipe):
        seen: list[Tensor] = []
        model.register_forward_pre_hook(_padding_into(seen), with_kwargs=True)
        for block in block_list(model):
            block.attn2.register_forward_pre_hook(_masked_by(seen), with_kwargs=True)


def _padding_into(seen: list[Tensor]) -> Any:
    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        real = kwargs["encoder_hidden_states"].ne(0).any(dim=-1)
        # A prompt without a token keeps its first row: nothing to attend to would give NaN.
        first = torch.arange(real.shape[1], device=real.device) == 0
        seen[:] = [(real | first)[:, None, None]]

    return note


def _masked_by(seen: list[Tensor]) -> Any:
    def mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "encoder_hidden_states" in kwargs:  # Cosmos
            return args, {**kwargs, "attention_mask": seen[0]}
        return (args[0], args[1], seen[0], None), kwargs

    return mask


@fault(
    acts="transformer, middle block, values of the first attention",
    subjects=ALL,
    where=("{middle}.attn1.to_v",),
)
def heads_exchanged(pipe: Any) -> None:
    """Bug: two heads of one attention have each other's values."""
    for block in middles(pipe):
        attention = self_attention(block)
        need(attention.heads > 1, "the attention has one head")
        for parameter in (attention.to_v.weight, attention.to_v.bias):
            if parameter is not None:
                rows = parameter.data.unflatten(0, (attention.heads, -1))
                rows[[0, 1]] = rows[[1, 0]]


# Single layers


@fault(
    acts="transformer, middle block, output bias of the last attention",
    subjects=ALL,
    where=("{middle}.attn2.to_out.0",),
)
def attention_bias_dropped(pipe: Any) -> None:
    """Bug: the output projection of one attention (in Wan, cross-attention) has no bias."""
    for block in middles(pipe):
        bias = attentions(block)[-1].to_out[0].bias
        need(bias is not None, "no bias")
        bias.data.zero_()


@fault(
    acts="transformer, middle block, bias of its last linear layer",
    source="https://github.com/vllm-project/vllm/issues/39663",
    subjects=ALL,
    where=("{middle}.ffn.net.2",),
)
def feed_forward_bias_dropped(pipe: Any) -> None:
    """Bug: the last linear layer of one block (in Wan, of its feed-forward) has no bias."""
    for block in middles(pipe):
        biased = [layer for layer in linears(block) if layer.bias is not None]
        need(biased, "no bias")
        biased[-1].bias.data.zero_()


@fault(
    acts="transformer, middle block, its largest linear layer",
    subjects=ALL,
    where=("{middle}.ffn.net.0.proj",),
)
def weight_scaled(pipe: Any) -> None:
    """Bug: the weight of one linear layer is 1 % too large."""
    for block in middles(pipe):
        largest = max(linears(block), key=lambda layer: layer.weight.numel())
        largest.weight.data.mul_(1.01)


# Blocks


@fault(acts="transformer, the middle block", subjects=ALL, where=MIDDLE)
def block_dropped(pipe: Any) -> None:
    """Bug: one block is skipped; in a UNet, one residual layer."""
    for model in models(pipe):
        on_call(residual(model), lambda _, args, keywords, output: streams(args, keywords))


@fault(acts="transformer, the middle block", where=MIDDLE, subjects=PIPELINES)
def block_repeated(pipe: Any) -> None:
    """Bug: one block runs twice."""

    def again(module: Any, args: tuple[Any, ...], keywords: Any, output: Any) -> Any:
        if args:
            return module.forward(output, *args[1:], **keywords)
        names = ("hidden_states", "audio_hidden_states")
        return module.forward(**{**keywords, **dict(zip(names, output, strict=True))})

    for model in models(pipe):
        block_list(model)
        on_call(middle(model), again)


@fault(
    acts="transformer, the middle block and the one before",
    where=("{before}", "{middle}"),
    subjects=PIPELINES,
)
def blocks_exchanged(pipe: Any) -> None:
    """Bug: two neighbouring blocks run in the wrong order."""
    for model in models(pipe):
        found = block_list(model)
        need(len(found) > 1, "fewer than two blocks")
        later = len(found) // 2
        found[later - 1], found[later] = found[later], found[later - 1]
