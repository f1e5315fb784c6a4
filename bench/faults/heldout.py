"""Faults that no cause was developed on: other values, other places, other families of models.

Each is declared with what is true of it and the kinds of cause that say so, before it was first
run; without a kind, no cause that is looked for is true, and nothing may be named. Here are faults
inside models; `heldout_stages` has those around them, and puts all together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.faults.entry import Change
from bench.faults.targets import narrowed, on_input, on_output, replace_forward, with_attention
from truestep.testing.corpus.editing import denoiser, edit
from truestep.testing.corpus.subjects import LowRank

__all__ = ["HELD", "NO_CAUSE", "PLAIN", "STAGED", "Held", "held"]

Tensor = torch.Tensor

STAGED = {"digits": "digits", "wan": "tiny-wan2.1", "cosmos": "tiny-cosmos"}
"""Subjects that truestep's own runtime runs, by their names in `subjects`."""

PLAIN = ("flux", "sd3", "sdxl", "pixart", "ltx-i2v", "kontext")
"""Subjects of `truestep.testing.corpus`: plain pipelines of diffusers."""

NO_CAUSE = "no cause is true"

RESIDUAL = "residual, residual missing, term missing, left out, addend missing"
ORDER = "order, permuted"
TABLE = "computed table, positions, attribute"


@dataclass(frozen=True)
class Held:
    """One fault.

    Attributes:
        subject: What it is planted in.
        group: Class of faults; `NO_CAUSE` where nothing may be named.
        kinds: Kinds of cause that say what it is; any is right.
        truth: What is wrong: the first line of the docstring.
    """

    name: str
    subject: str
    group: str
    kinds: frozenset[str]
    truth: str
    apply: Change


HELD: dict[str, Held] = {}


def held(subject: str, group: str, kinds: str = "") -> Callable[[Change], Change]:
    """Register a function as a fault; its name begins with what it is planted in."""

    def mark(function: Change) -> Change:
        name = function.__name__.replace("_", "-")
        truth = (function.__doc__ or "").strip().partition("\n")[0]
        said = frozenset(kind for kind in kinds.split(", ") if kind)
        assert name not in HELD
        assert bool(said) == (group != NO_CAUSE)
        HELD[name] = Held(name, subject, group, said, truth, function)
        return function

    return mark


def _blocks(pipe: Any) -> Any:
    model = denoiser(pipe)
    return model.blocks if hasattr(model, "blocks") else model.transformer_blocks


def _normal(shape: Any, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _exchange(*layers: Any, names: tuple[str, ...] = ("weight", "bias")) -> None:
    """Give each layer the tensors of the next, and the last those of the first."""
    for name in names:
        if getattr(layers[0], name, None) is None:
            continue
        held_now = [getattr(layer, name).data.clone() for layer in layers]
        for layer, value in zip(layers, [*held_now[1:], held_now[0]], strict=True):
            getattr(layer, name).data.copy_(value)


def _rows(layer: Any, order: Callable[[Tensor], Tensor]) -> None:
    for tensor in (layer.weight, layer.bias):
        if tensor is not None:
            tensor.data.copy_(order(tensor.data.clone()))


def _rounds(dtype: torch.dtype) -> Any:
    return lambda module, args, output: narrowed(output, dtype)


def _low_rank(layer: Any, rank: int, share: float, seed: int) -> None:
    """Add a merged adapter of so large a share of the weight's norm."""
    weight = layer.weight.data
    delta = _normal((weight.shape[0], rank), seed) @ _normal((rank, weight.shape[1]), seed + 1)
    weight.add_(delta * (share * weight.norm() / delta.norm()))


# Epsilon


@held("flux", "epsilon", "epsilon")
def flux_output_epsilon(pipe: Any) -> None:
    """The output norm's epsilon is 1e-5, not 1e-6."""
    denoiser(pipe).norm_out.norm.eps = 1e-5


@held("sdxl", "epsilon", "epsilon")
def sdxl_decoder_epsilon(pipe: Any) -> None:
    """The decoder's last group norm has an epsilon of 1e-3, not 1e-6."""
    pipe.vae.decoder.conv_norm_out.eps = 1e-3


@held("sd3", "epsilon", "epsilon")
def sd3_text_epsilon(pipe: Any) -> None:
    """One layer norm of the first text encoder has an epsilon of 1e-6, not 1e-5."""
    pipe.text_encoder.text_model.encoder.layers[0].layer_norm2.eps = 1e-6


@held("digits", "epsilon", "epsilon")
def digits_text_epsilon(pipe: Any) -> None:
    """One norm of the text encoder has an epsilon of 1e-5, not 1e-6."""
    pipe.text_encoder.encoder.block[1].layer[1].layer_norm.variance_epsilon = 1e-5


@held("ltx-i2v", "epsilon", "epsilon")
def ltx_keys_epsilon(pipe: Any) -> None:
    """The norm of one attention's keys has the blocks' epsilon, 1e-6, not its own 1e-5."""
    _blocks(pipe)[1].attn1.norm_k.eps = 1e-6


# Activation


@held("flux", "activation", "activation")
def flux_single_gelu_exact(pipe: Any) -> None:
    """The GELU of the single block is exact, not in its tanh form."""
    denoiser(pipe).single_transformer_blocks[0].act_mlp.approximate = "none"


@held("sdxl", "activation", "activation")
def sdxl_gate_gelu_tanh(pipe: Any) -> None:
    """The gate of the middle block's GEGLU is in the tanh form, not exact."""
    gate = denoiser(pipe).mid_block.attentions[0].transformer_blocks[0].ff.net[0]
    edit(gate, "gelu", ("F.gelu(gate)", 'F.gelu(gate, approximate="tanh")'))


@held("cosmos", "activation", "activation")
def cosmos_gelu_tanh(pipe: Any) -> None:
    """The GELU of one block is in its tanh form, not exact."""
    _blocks(pipe)[2].ff.net[0].approximate = "tanh"


@held("sdxl", "activation", "activation")
def sdxl_text_gelu_exact(pipe: Any) -> None:
    """One layer of the first text encoder has the exact GELU, not x sigmoid(1.702 x)."""
    pipe.text_encoder.encoder.layers[0].mlp.activation_fn = nn.GELU()


@held("pixart", "activation", "activation")
def pixart_caption_silu(pipe: Any) -> None:
    """The projection of the text has a SiLU, not a GELU."""
    denoiser(pipe).caption_projection.act_1 = nn.SiLU()


@held("sd3", "activation", "activation")
def sd3_time_gelu(pipe: Any) -> None:
    """The embedding of the time has a GELU, not a SiLU."""
    denoiser(pipe).time_text_embed.timestep_embedder.act = nn.GELU(approximate="tanh")


@held("wan", "activation", "activation")
def wan_text_relu(pipe: Any) -> None:
    """One gated feed-forward of the text encoder has a ReLU, not a GELU."""
    pipe.text_encoder.encoder.block[0].layer[1].DenseReluDense.act = nn.ReLU()


# Norms: affine part, cast


@held("sdxl", "norm", "norm without weights, weights, not loaded")
def sdxl_group_norm_plain(pipe: Any) -> None:
    """The group norm before the middle attention is without its learned scale and shift."""
    norm = denoiser(pipe).mid_block.attentions[0].norm
    norm.weight.data.fill_(1)
    norm.bias.data.zero_()


@held("sd3", "norm", "precision")
def sd3_norm_bfloat16(pipe: Any) -> None:
    """One norm before a feed-forward hands on bfloat16."""
    on_output(_blocks(pipe)[1].norm2, _rounds(torch.bfloat16))


@held("ltx-i2v", "norm", "one plus")
def ltx_query_norm_one_plus(pipe: Any) -> None:
    """The norm of one attention's queries multiplies by one plus its weight."""
    norm = _blocks(pipe)[0].attn1.norm_q
    norm.forward = lambda x: functional.rms_norm(x, x.shape[-1:], eps=norm.eps) * (1 + norm.weight)


@held("wan", "norm", "bias missing, not loaded")
def wan_norm_shift_lost(pipe: Any) -> None:
    """The norm before one cross-attention has its scale, and not its shift."""
    _blocks(pipe)[0].norm2.bias.data.zero_()


@held("digits", "norm", "precision")
def digits_norm_weight_float16(pipe: Any) -> None:
    """The norm of one cross-attention's keys returns float16."""
    on_output(_blocks(pipe)[1].attn2.norm_k, _rounds(torch.float16))


# Rotary positions


@held("flux", "rope", TABLE)
def flux_rope_base(pipe: Any) -> None:
    """The rotary base is 1,000,000, not 10,000."""
    denoiser(pipe).pos_embed.theta = 1_000_000


@held("ltx-i2v", "rope", TABLE)
def ltx_rope_base(pipe: Any) -> None:
    """The rotary base is 500, not 10,000."""
    denoiser(pipe).rope.theta = 500.0


@held("wan", "rope", "computed table, positions")
def wan_rope_rates_of_head(pipe: Any) -> None:
    """Rates of each axis are powers over the head's width, not over the axis's own."""
    rope = denoiser(pipe).rope
    parts = []
    for width in (rope.t_dim, rope.h_dim, rope.w_dim):
        rates = 10_000.0 ** (-torch.arange(0, width, 2).double() / 16)
        parts.append(
            (torch.arange(rope.max_seq_len).double()[:, None] * rates).repeat_interleave(2, 1)
        )
    angles = torch.cat(parts, dim=1)
    rope.freqs_cos.copy_(angles.cos())
    rope.freqs_sin.copy_(angles.sin())


@held("flux", "rope", f"{TABLE}, order")
def flux_rope_axes_widths(pipe: Any) -> None:
    """Widths of the axes are 8, 4, 4, not 4, 4, 8."""
    denoiser(pipe).pos_embed.axes_dim = (8, 4, 4)


@held("ltx-i2v", "rope", TABLE)
def ltx_rope_scale(pipe: Any) -> None:
    """Positions in time are divided by 25 frames, not by 20."""
    denoiser(pipe).rope.base_num_frames = 25


@held("flux", "rope", "pairs")
def flux_rope_half_apart(pipe: Any) -> None:
    """In the single block rotary pairs are channels half a head apart, not neighbours."""
    attention = denoiser(pipe).single_transformer_blocks[0].attn
    plain = "image_rotary_emb, sequence_dim=1)"
    half = "[t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for t in image_rotary_emb]"
    edit(
        attention.processor,
        "__call__",
        (plain, f"{half}, sequence_dim=1, use_real_unbind_dim=-2)"),
    )


@held("wan", "rope", "left out")
def wan_rope_missing_on_keys(pipe: Any) -> None:
    """One block's keys are not rotated, its queries are."""
    attention = _blocks(pipe)[0].attn1
    edit(attention.processor, "__call__", ("key = apply_rotary_emb(key, *rotary_emb)", "key = key"))


@held("digits", "rope", "precision")
def digits_rope_float16(pipe: Any) -> None:
    """Rotary sines and cosines are kept in float16."""
    rope = denoiser(pipe).rope
    for table in (rope.freqs_cos, rope.freqs_sin):
        table.copy_(narrowed(table, torch.float16))


@held("cosmos", "rope", "positions, order, computed table")
def cosmos_rope_height_from_below(pipe: Any) -> None:
    """Positions along the height count from below."""

    def turned(rope: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> Any:
        sizes = [n // p for n, p in zip(args[0].shape[2:], rope.patch_size, strict=True)]
        here = slice(rope.dim_t // 2, rope.dim_t // 2 + rope.dim_h // 2)
        made = []
        for table in output:
            grid = table.unflatten(0, sizes).clone()
            half = grid.shape[-1] // 2
            for start in (0, half):
                part = slice(start + here.start, start + here.stop)
                grid[..., part] = grid[..., part].flip(1)
            made.append(grid.flatten(0, 2))
        return tuple(made)

    on_output(denoiser(pipe).rope, turned)


# Attention


@held("sd3", "attention", "attention scale, scaled")
def sd3_scale_of_width(pipe: Any) -> None:
    """Scores of one attention are divided by the root of the width, not of the head's."""
    attention = _blocks(pipe)[1].attn
    plain = "dropout_p=0.0, is_causal=False)"
    edit(attention.processor, "__call__", (plain, f"{plain[:-1]}, scale=32**-0.5)"))


@held("sdxl", "attention", "attention scale, scaled")
def sdxl_cross_scale_twice(pipe: Any) -> None:
    """Queries of one cross-attention are scaled before the attention, which scales again."""
    attention = denoiser(pipe).mid_block.attentions[0].transformer_blocks[0].attn2
    on_output(attention.to_q, lambda module, args, output: output * attention.scale)


@held("wan", "attention", "attention scale, scaled")
def wan_scale_left_out(pipe: Any) -> None:
    """Scores of one cross-attention are not scaled at all."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, scale=1.0)

    with_attention(_blocks(pipe)[1].attn2, attend)


@held("ltx-i2v", "attention", "mask, mask missing")
def ltx_text_mask_lost(pipe: Any) -> None:
    """One block's cross-attention is not given the text's mask."""
    given = "attention_mask=encoder_attention_mask"
    edit(_blocks(pipe)[1], "forward", (given, "attention_mask=None"))


def _causal(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=kwargs.get("scale")
    )


@held("flux", "attention", "mask, causal")
def flux_single_causal(pipe: Any) -> None:
    """The single block's attention is causal."""
    with_attention(denoiser(pipe).single_transformer_blocks[0].attn, _causal)


@held("wan", "attention", "mask, causal")
def wan_self_causal(pipe: Any) -> None:
    """One self-attention is causal."""
    with_attention(_blocks(pipe)[1].attn1, _causal)


@held("sdxl", "attention", "mask, causal, mask missing")
def sdxl_text_not_causal(pipe: Any) -> None:
    """One layer of the first text encoder attends to later tokens."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, scale=kwargs.get("scale"))

    with_attention(pipe.text_encoder.encoder.layers[0].self_attn, attend)


@held("pixart", "attention", "mask, mask missing")
def pixart_text_mask_lost(pipe: Any) -> None:
    """One block's cross-attention is not given the text's mask."""
    attention = _blocks(pipe)[0].attn2
    replace_forward(
        attention, lambda module, original, *a, **k: original(*a, **{**k, "attention_mask": None})
    )


# Weights in another order


@held("flux", "weights", "transposed")
def flux_output_transposed(pipe: Any) -> None:
    """The square output projection of one attention is transposed."""
    weight = _blocks(pipe)[0].attn.to_out[0].weight.data
    weight.copy_(weight.t().clone())


@held("sdxl", "weights", "transposed")
def sdxl_projection_transposed(pipe: Any) -> None:
    """The square projection into the middle transformer is transposed."""
    weight = denoiser(pipe).mid_block.attentions[0].proj_in.weight.data
    weight.copy_(weight.t().clone())


@held("sd3", "weights", "exchanged")
def sd3_text_queries_keys_exchanged(pipe: Any) -> None:
    """The text's queries and keys of one attention are exchanged."""
    _exchange(_blocks(pipe)[0].attn.add_q_proj, _blocks(pipe)[0].attn.add_k_proj)


@held("flux", "weights", "exchanged, order")
def flux_fused_split_kvq(pipe: Any) -> None:
    """A fused projection of the single block was split as key, value, query."""
    attention = denoiser(pipe).single_transformer_blocks[0].attn
    _exchange(attention.to_q, attention.to_k, attention.to_v)


@held("pixart", "weights", ORDER)
def pixart_heads_out_of_order(pipe: Any) -> None:
    """The output projection of one attention reads the heads in reverse."""
    weight = _blocks(pipe)[1].attn1.to_out[0].weight.data
    weight.copy_(weight.unflatten(1, (3, -1)).flip(1).flatten(1).clone())


@held("sdxl", "weights", f"{ORDER}, exchanged")
def sdxl_gate_before_value(pipe: Any) -> None:
    """Gate and value of one GEGLU stand in the other order in its projection."""
    block = denoiser(pipe).mid_block.attentions[0].transformer_blocks[0]
    _rows(block.ff.net[0].proj, lambda rows: rows.roll(len(rows) // 2, 0))


@held("sd3", "weights", f"{ORDER}, exchanged")
def sd3_output_scale_shift(pipe: Any) -> None:
    """The output norm's scale and shift keep the original's order, shift first."""
    _rows(denoiser(pipe).norm_out.linear, lambda rows: rows.roll(len(rows) // 2, 0))


@held("flux", "weights", ORDER)
def flux_single_joined_in_reverse(pipe: Any) -> None:
    """The single block joins its feed-forward and attention, not attention and feed-forward."""
    block = denoiser(pipe).single_transformer_blocks[0]
    edit(block, "forward", ("[attn_output, mlp_hidden_states]", "[mlp_hidden_states, attn_output]"))


@held("cosmos", "weights", ORDER)
def cosmos_patch_channels_last(pipe: Any) -> None:
    """Columns of the patch projection are in the order of rows, columns, channels."""
    weight = denoiser(pipe).patch_embed.proj.weight.data
    weight.copy_(weight.unflatten(1, (8, -1)).transpose(1, 2).flatten(1).clone())


@held("sdxl", "weights", f"{ORDER}, transposed, flipped")
def sdxl_kernel_turned(pipe: Any) -> None:
    """The first convolution's kernel is turned by half a turn."""
    weight = denoiser(pipe).conv_in.weight.data
    weight.copy_(weight.flip(-1, -2).clone())


@held("cosmos", "weights", "exchanged, order")
def cosmos_feed_forwards_exchanged(pipe: Any) -> None:
    """The first and the last block have each other's second layer of the feed-forward."""
    _exchange(_blocks(pipe)[0].ff.net[2], _blocks(pipe)[2].ff.net[2])


@held("digits", "weights", "exchanged")
def digits_cross_biases_exchanged(pipe: Any) -> None:
    """Biases of values and queries of one cross-attention are exchanged."""
    attention = _blocks(pipe)[2].attn2
    _exchange(attention.to_v, attention.to_q, names=("bias",))


@held("wan", "weights", "exchanged")
def wan_text_values_outputs_exchanged(pipe: Any) -> None:
    """Values and outputs of one attention of the text encoder are exchanged."""
    attention = pipe.text_encoder.encoder.block[1].layer[0].SelfAttention
    _exchange(attention.v, attention.o)


@held("wan", "weights", ORDER)
def wan_modulation_interleaved(pipe: Any) -> None:
    """Rows of the projection to the modulation are six a channel, not a channel of six."""
    layer = denoiser(pipe).condition_embedder.time_proj
    _rows(layer, lambda rows: rows.unflatten(0, (6, -1)).transpose(0, 1).flatten(0, 1))


@held("digits", "weights", f"{ORDER}, transposed, flipped")
def digits_kernel_backwards(pipe: Any) -> None:
    """The decoder's first kernel runs backwards in time."""
    weight = pipe.vae.decoder.conv_in.weight.data
    weight.copy_(weight.flip(2).clone())


@held("flux", "off by one", ORDER)
def flux_token_table_off_by_one(pipe: Any) -> None:
    """Rows of the long encoder's token table are one too far."""
    weight = pipe.text_encoder_2.shared.weight.data
    weight.copy_(weight.roll(1, 0).clone())


# Missing bias, gate, residual


@held("flux", "missing", "bias missing")
def flux_text_bias_missing(pipe: Any) -> None:
    """The text's output projection of one attention has no bias."""
    _blocks(pipe)[0].attn.to_add_out.bias = None


@held("sd3", "missing", "factor missing")
def sd3_text_gate_missing(pipe: Any) -> None:
    """One block adds the text's feed-forward without its gate."""
    gated = "c_gate_mlp.unsqueeze(1) * context_ff_output"
    edit(_blocks(pipe)[0], "forward", (gated, "context_ff_output"))


@held("flux", "missing", "factor missing")
def flux_single_gate_missing(pipe: Any) -> None:
    """The single block adds what it makes without its gate."""
    block = denoiser(pipe).single_transformer_blocks[0]
    edit(block, "forward", ("gate * self.proj_out(hidden_states)", "self.proj_out(hidden_states)"))


@held("cosmos", "missing", "factor missing")
def cosmos_feed_forward_gate_missing(pipe: Any) -> None:
    """One block adds its feed-forward without the gate."""
    edit(_blocks(pipe)[0], "forward", ("gate * ff_output", "ff_output"))


@held("flux", "missing", RESIDUAL)
def flux_single_residual_missing(pipe: Any) -> None:
    """The single block returns what it makes without what it was given."""
    block = denoiser(pipe).single_transformer_blocks[0]
    edit(block, "forward", ("residual + hidden_states", "hidden_states"))


@held("ltx-i2v", "missing", RESIDUAL)
def ltx_cross_residual_missing(pipe: Any) -> None:
    """One block goes on with its cross-attention, not added to the stream."""
    old = "hidden_states = hidden_states + attn_hidden_states\n"
    edit(_blocks(pipe)[0], "forward", (old, "hidden_states = attn_hidden_states\n"))


@held("ltx-i2v", "missing", "one plus missing, one plus")
def ltx_without_one(pipe: Any) -> None:
    """One block multiplies by the feed-forward's scale, not by one plus it."""
    edit(_blocks(pipe)[1], "forward", ("(1 + scale_mlp)", "scale_mlp"))


@held("sdxl", "missing", RESIDUAL)
def sdxl_time_missing(pipe: Any) -> None:
    """One residual layer does not add the time."""
    layer = denoiser(pipe).mid_block.resnets[0]
    edit(
        layer, "forward", ("hidden_states = hidden_states + temb", "hidden_states = hidden_states")
    )


@held("sdxl", "missing", "bias missing")
def sdxl_convolution_bias_missing(pipe: Any) -> None:
    """The second convolution of one residual layer has no bias."""
    denoiser(pipe).mid_block.resnets[1].conv2.bias = None


@held("pixart", "missing", "bias missing")
def pixart_values_bias_missing(pipe: Any) -> None:
    """Values of one cross-attention are without their bias."""
    _blocks(pipe)[0].attn2.to_v.bias.data.zero_()


@held("sd3", "missing", RESIDUAL)
def sd3_pooled_missing(pipe: Any) -> None:
    """The pooled text is not added to the time."""
    embedding = denoiser(pipe).time_text_embed
    edit(embedding, "forward", ("timesteps_emb + pooled_projections", "timesteps_emb"))


@held("flux", "missing", RESIDUAL)
def flux_guidance_missing(pipe: Any) -> None:
    """The embedded guidance is not added to the time."""
    embedding = denoiser(pipe).time_text_embed
    edit(embedding, "forward", ("timesteps_emb + guidance_emb", "timesteps_emb"))


# Gain


@held("flux", "gain", "scaled")
def flux_input_scaled(pipe: Any) -> None:
    """The projection of the latents is 5 % too large, weight and bias."""
    layer = denoiser(pipe).x_embedder
    layer.weight.data.mul_(1.05)
    layer.bias.data.mul_(1.05)


@held("digits", "gain", "scaled")
def digits_tokens_scaled(pipe: Any) -> None:
    """The encoder's tokens are multiplied by the root of the width, as in other encoders."""
    on_output(pipe.text_encoder.encoder.embed_tokens, lambda module, args, output: output * 8.0)


@held("sdxl", "gain", "scaled, attribute")
def sdxl_residual_scale(pipe: Any) -> None:
    """One residual layer divides by the root of two."""
    denoiser(pipe).mid_block.resnets[1].output_scale_factor = math.sqrt(2)


@held("pixart", "gain", "scaled")
def pixart_modulation_halved(pipe: Any) -> None:
    """The weight that makes the modulation is half of what it was."""
    denoiser(pipe).adaln_single.linear.weight.data.mul_(0.5)


# Precision


@held("flux", "cast", "precision")
def flux_output_modulation_bfloat16(pipe: Any) -> None:
    """The output norm's modulation is computed in bfloat16."""

    def low(module: Any, original: Any, x: Tensor) -> Tensor:
        made = functional.linear(x.bfloat16(), module.weight.bfloat16(), module.bias.bfloat16())
        return made.to(x.dtype)

    replace_forward(denoiser(pipe).norm_out.linear, low)


@held("sd3", "cast", "precision")
def sd3_patches_float16(pipe: Any) -> None:
    """Embedded patches are handed on as float16."""
    on_output(denoiser(pipe).pos_embed.proj, _rounds(torch.float16))


@held("sdxl", "cast", "precision")
def sdxl_sinusoids_float16(pipe: Any) -> None:
    """Sinusoids of the time are float16."""
    on_output(denoiser(pipe).time_proj, _rounds(torch.float16))


@held("sdxl", "cast", "precision")
def sdxl_decoder_attention_bfloat16(pipe: Any) -> None:
    """The decoder's attention is computed on queries, keys and values in bfloat16."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = functional.scaled_dot_product_attention(
            query.bfloat16(), key.bfloat16(), value.bfloat16(), *args, **kwargs
        )
        return made.to(query.dtype)

    with_attention(pipe.vae.decoder.mid_block.attentions[0], attend)


@held("ltx-i2v", "cast", "precision")
def ltx_stream_float16(pipe: Any) -> None:
    """The first block hands on float16."""
    on_output(_blocks(pipe)[0], _rounds(torch.float16))


@held("cosmos", "cast", "precision")
def cosmos_positions_bfloat16(pipe: Any) -> None:
    """Learned positions are handed on as bfloat16."""
    on_output(denoiser(pipe).learnable_pos_embed, _rounds(torch.bfloat16))


@held("ltx-i2v", "cast", "quantised, precision")
def ltx_captions_int8(pipe: Any) -> None:
    """Weights of the text's projection went through int8, one scale a row."""
    for layer in (
        denoiser(pipe).caption_projection.linear_1,
        denoiser(pipe).caption_projection.linear_2,
    ):
        weight = layer.weight.data
        scale = weight.abs().amax(1, keepdim=True) / 127
        weight.copy_((weight / scale).round() * scale)


# Adapters of low rank


@held("sdxl", "lora", "low rank, attribute, scaled")
def sdxl_adapter_scale_half(pipe: Any) -> None:
    """Every adapter's scale is half of what it should be."""
    for module in denoiser(pipe).modules():
        if isinstance(module, LowRank):
            module.scale *= 0.5


@held("sdxl", "lora", "low rank, not loaded, another tensor, left out")
def sdxl_adapter_keys_missing(pipe: Any) -> None:
    """The second half of one adapter was not in the file, and is zero."""
    denoiser(pipe).up_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q.up.data.zero_()


@held("flux", "lora", "low rank")
def flux_adapter_of_rank_one(pipe: Any) -> None:
    """An adapter of rank 1 was left merged in the output projection, 3 % of it."""
    _low_rank(denoiser(pipe).proj_out, 1, 0.03, 31)


@held("ltx-i2v", "lora", "low rank")
def ltx_adapter_scaled_twice(pipe: Any) -> None:
    """Adapters of rank 6 are merged too strongly in the cross-attentions' values."""
    for index, block in enumerate(_blocks(pipe)):
        _low_rank(block.attn2.to_v, 6, 0.1, 40 + 2 * index)


@held("wan", "lora", "low rank")
def wan_adapter_in_text(pipe: Any) -> None:
    """An adapter of rank 2 was left merged in one feed-forward of the text encoder."""
    _low_rank(pipe.text_encoder.encoder.block[0].layer[1].DenseReluDense.wo, 2, 0.05, 50)


# Two at once


@held("flux", "two at once", "bias missing, activation")
def flux_bias_and_gelu(pipe: Any) -> None:
    """The feed-forward's first layer has no bias, and its GELU is exact."""
    gelu = _blocks(pipe)[0].ff.net[0]
    gelu.proj.bias = None
    gelu.approximate = "none"


@held("wan", "two at once", "epsilon, transposed")
def wan_epsilon_and_transposed(pipe: Any) -> None:
    """Every norm's epsilon is 1e-5, and one output projection is transposed."""
    for module in denoiser(pipe).modules():
        if isinstance(vars(module).get("eps"), float):
            module.eps = 1e-5
    weight = _blocks(pipe)[1].attn1.to_out[0].weight.data
    weight.copy_(weight.t().clone())


@held("sd3", "two at once", "attention scale, scaled, precision")
def sd3_scale_and_cast(pipe: Any) -> None:
    """One attention's scores are 10 % too large, and its softmax is given bfloat16."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query, key = (narrowed(part, torch.bfloat16) for part in (query * 1.1, key))
        return functional.scaled_dot_product_attention(query, key, value)

    with_attention(_blocks(pipe)[0].attn, attend)


@held("sd3", "off by one", "attribute, computed table")
def sd3_time_rates_off_by_one(pipe: Any) -> None:
    """Rates of the time's sinusoids are divided by one less than their number."""
    denoiser(pipe).time_text_embed.time_proj.downscale_freq_shift = 1


# Nothing that is looked for


@held("sdxl", NO_CAUSE)
def sdxl_groups_halved(pipe: Any) -> None:
    """One group norm has half as many groups."""
    norm = denoiser(pipe).mid_block.resnets[0].norm1
    halved = norm.num_groups // 2
    norm.forward = lambda x: functional.group_norm(x, halved, norm.weight, norm.bias, norm.eps)


@held("flux", NO_CAUSE)
def flux_mean_kept(pipe: Any) -> None:
    """One layer norm does not take off the mean."""
    norm = _blocks(pipe)[0].norm2
    norm.forward = lambda x: functional.rms_norm(x, x.shape[-1:], eps=norm.eps)


@held("wan", NO_CAUSE)
def wan_softmax_plus_one(pipe: Any) -> None:
    """Weights of one attention are divided by one more than their sum."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        weights = scores.exp()
        made: Tensor = weights @ value / (1 + weights.sum(-1, keepdim=True))
        return made

    with_attention(_blocks(pipe)[0].attn1, attend)


@held("digits", NO_CAUSE)
def digits_activations_clamped(pipe: Any) -> None:
    """The feed-forward of one block is clamped to half of its largest value."""

    def clamped(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        most = float(output.abs().max()) / 2
        return output.clamp(-most, most)

    on_output(_blocks(pipe)[1].ffn, clamped)


@held("sd3", NO_CAUSE)
def sd3_tokens_merged(pipe: Any) -> None:
    """Neighbouring tokens of the image are averaged before one feed-forward."""

    def merged(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        pairs = args[0].unflatten(1, (-1, 2)).mean(2, keepdim=True)
        return (pairs.expand(-1, -1, 2, -1).flatten(1, 2), *args[1:])

    on_input(_blocks(pipe)[0].ff, merged)


@held("ltx-i2v", NO_CAUSE)
def ltx_noise_in_stream(pipe: Any) -> None:
    """One block adds a hundredth of noise to what it returns."""

    def noisy(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + 0.01 * output.std() * _normal(output.shape, 60)

    on_output(_blocks(pipe)[1], noisy)


@held("pixart", NO_CAUSE)
def pixart_weights_pruned(pipe: Any) -> None:
    """The smallest tenth of one weight is zero."""
    weight = _blocks(pipe)[1].ff.net[2].weight.data
    weight[weight.abs() < weight.abs().quantile(0.1)] = 0


@held("sd3", NO_CAUSE)
def sd3_weights_of_two_blocks_averaged(pipe: Any) -> None:
    """One weight is the mean of those of two blocks."""
    first, second = (block.attn.to_v.weight.data for block in _blocks(pipe))
    first.copy_((first + second) / 2)


@held("cosmos", NO_CAUSE)
def cosmos_tokens_drop_out(pipe: Any) -> None:
    """One feed-forward loses each fifth of its hidden channels, and scales the rest up."""

    def dropped(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        kept = (torch.arange(output.shape[-1]) % 5 != 0).to(output)
        return output * kept * 1.25

    on_output(_blocks(pipe)[1].ff.net[0], dropped)


@held("sdxl", NO_CAUSE)
def sdxl_high_frequencies_boosted(pipe: Any) -> None:
    """What one level returns is sharpened by a tenth of its Laplacian."""

    def sharpened(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + 0.1 * (output - functional.avg_pool2d(output, 3, 1, 1))

    on_output(denoiser(pipe).up_blocks[0].resnets[1], sharpened)
