"""A second set of held-out faults: those inside models, and those that no cause is true of.

Each is declared with what is true of it before it was first run, and without a look at the causes.
What names a cause rightly is written down with the fault:

- inside a model, one of `kinds`, as in `heldout`;
- around a model, where names of kinds are not known, the printed text of the first cause: each of
  the regular expressions `says` must be found in it, in any case of letters; the first of several,
  of what is at fault, may be found in the place that is printed with it instead. A text in which
  one is not found is wrong, and nothing named is an abstention;
- without a cause, nothing may be named.

`heldout2_stages` has those around models, and puts all together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.faults.entry import Change
from bench.faults.heldout import (
    NO_CAUSE,
    ORDER,
    RESIDUAL,
    STAGED,
    TABLE,
    _blocks,
    _exchange,
    _low_rank,
    _normal,
    _rounds,
    _rows,
)
from bench.faults.targets import narrowed, on_input, on_output, with_attention
from truestep.testing.corpus.editing import denoiser, edit

__all__ = ["HELD2", "NO_CAUSE", "PLAIN2", "STAGED", "Held2", "held2", "judged"]

Tensor = torch.Tensor

PLAIN2 = (
    "flux",
    "sd3",
    "sdxl",
    "pixart",
    "ltx-i2v",
    "kontext",
    "img2img",
    "inpaint",
    "cogvideox-i2v",
    "sana",
)
"""Subjects of `truestep.testing.corpus`: plain pipelines of diffusers."""

RIGHT, WRONG, ABSTAINS = "right", "wrong", "abstains"


@dataclass(frozen=True)
class Held2:
    """One fault.

    Attributes:
        subject: What it is planted in.
        group: Class of faults; `NO_CAUSE` where nothing may be named.
        kinds: Kinds of cause that say what it is; of faults around models a guess, not judged by.
        says: Regular expressions that a right text holds; empty inside models.
        truth: What is wrong: the first line of the docstring.
    """

    name: str
    subject: str
    group: str
    kinds: frozenset[str]
    says: tuple[str, ...]
    truth: str
    apply: Change


HELD2: dict[str, Held2] = {}


def held2(subject: str, group: str, kinds: str = "", *says: str) -> Callable[[Change], Change]:
    """Register a function as a fault; its name begins with what it is planted in."""

    def mark(function: Change) -> Change:
        name = function.__name__.replace("_", "-")
        truth = (function.__doc__ or "").strip().partition("\n")[0]
        known = frozenset(kind for kind in kinds.split(", ") if kind)
        assert name not in HELD2
        assert bool(known) == (group != NO_CAUSE)
        for pattern in says:
            re.compile(pattern)
        HELD2[name] = Held2(name, subject, group, known, says, truth, function)
        return function

    return mark


def judged(entry: Held2, kind: str | None, text: str, place: str) -> str:
    """Whether what was named first is right, by what was frozen with the fault.

    Args:
        kind: Of the cause; none where nothing was named.
        text: Of the cause, and of its mend.
        place: The stage or call that is printed with it.
    """
    if kind is None:
        return ABSTAINS
    if not entry.says:
        return RIGHT if kind in entry.kinds else WRONG
    texts = [f"{place} {text}" if len(entry.says) > 1 else text, *[text] * (len(entry.says) - 1)]
    found = [
        re.search(pattern, where, re.IGNORECASE | re.DOTALL)
        for pattern, where in zip(entry.says, texts, strict=True)
    ]
    return RIGHT if all(found) else WRONG


# Epsilon, activation


@held2("pixart", "epsilon", "epsilon")
def pixart_feed_forward_epsilon(pipe: Any) -> None:
    """The norm before one feed-forward has an epsilon of 1e-3, not 1e-6."""
    _blocks(pipe)[1].norm2.eps = 1e-3


@held2("sdxl", "epsilon", "epsilon")
def sdxl_group_norm_epsilon(pipe: Any) -> None:
    """One group norm of a residual layer has an epsilon of 1e-2, not 1e-5."""
    denoiser(pipe).up_blocks[0].resnets[0].norm2.eps = 1e-2


@held2("cogvideox-i2v", "activation", "activation")
def cogvideox_gelu_exact(pipe: Any) -> None:
    """The GELU of one feed-forward is exact, not in its tanh form."""
    _blocks(pipe)[0].ff.net[0].approximate = "none"


@held2("sana", "activation", "activation")
def sana_gate_relu(pipe: Any) -> None:
    """The convolutional feed-forward of one block has a ReLU, not a SiLU."""
    _blocks(pipe)[0].ff.nonlinearity = nn.ReLU()


@held2("flux", "activation", "activation")
def flux_pooled_mish(pipe: Any) -> None:
    """The embedding of the pooled text has a Mish, not a SiLU."""
    denoiser(pipe).time_text_embed.text_embedder.act_1 = nn.Mish()


# Norms


@held2("flux", "norm", "norm without weights, weights, not loaded")
def flux_text_keys_norm_plain(pipe: Any) -> None:
    """The norm of the text's keys is without its learned scale."""
    _blocks(pipe)[0].attn.norm_added_k.weight.data.fill_(1)


@held2("cogvideox-i2v", "norm", "bias missing, not loaded")
def cogvideox_query_norm_shift_lost(pipe: Any) -> None:
    """The norm of one attention's queries has its scale, and not its shift."""
    _blocks(pipe)[0].attn1.norm_q.bias.data.zero_()


@held2("sdxl", "norm", "precision")
def sdxl_layer_norm_float16(pipe: Any) -> None:
    """The norm before one cross-attention hands on float16."""
    block = denoiser(pipe).up_blocks[0].attentions[1].transformer_blocks[0]
    on_output(block.norm2, _rounds(torch.float16))


@held2("cosmos", "norm", "one plus")
def cosmos_keys_norm_one_plus(pipe: Any) -> None:
    """The norm of one cross-attention's keys multiplies by one plus its weight."""
    norm = _blocks(pipe)[1].attn2.norm_k
    norm.forward = lambda x: functional.rms_norm(x, x.shape[-1:], eps=norm.eps) * (1 + norm.weight)


# Rotary positions


@held2("kontext", "rope", TABLE)
def kontext_rope_base(pipe: Any) -> None:
    """The rotary base is 2,000, not 10,000."""
    denoiser(pipe).pos_embed.theta = 2000


@held2("cosmos", "rope", TABLE)
def cosmos_rope_frame_rate(pipe: Any) -> None:
    """Positions in time are those of 16 frames a second as the base, not of 24."""
    denoiser(pipe).rope.base_fps = 16


@held2("ltx-i2v", "rope", TABLE)
def ltx_rope_height(pipe: Any) -> None:
    """Positions along the height are divided by 1024 pixels, not by 2048."""
    denoiser(pipe).rope.base_height = 1024


@held2("wan", "rope", "computed table, positions")
def wan_rope_every_second_frame(pipe: Any) -> None:
    """Latent frames stand two positions apart, not one."""
    rope = denoiser(pipe).rope
    for table in (rope.freqs_cos, rope.freqs_sin):
        held = table.clone()
        count = len(held) // 2
        table[:count, : rope.t_dim] = held[: 2 * count : 2, : rope.t_dim]


# Attention


@held2("pixart", "attention", "attention scale, scaled")
def pixart_scores_softer(pipe: Any) -> None:
    """Scores of one self-attention are 0.8 times what they should be."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return functional.scaled_dot_product_attention(query * 0.8, key, value, *args, **kwargs)

    with_attention(_blocks(pipe)[0].attn1, attend)


@held2("cogvideox-i2v", "attention", "mask, causal")
def cogvideox_causal(pipe: Any) -> None:
    """One attention, over text and video, is causal."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    with_attention(_blocks(pipe)[0].attn1, attend)


@held2("sdxl", "attention", "attribute, heads, number of heads")
def sdxl_heads_halved(pipe: Any) -> None:
    """One cross-attention has half as many heads, twice as wide."""
    denoiser(pipe).mid_block.attentions[0].transformer_blocks[0].attn2.heads //= 2


# Weights in another order


@held2("pixart", "weights", f"{ORDER}, transposed, flipped, turned, rotated")
def pixart_patch_quarter_turn(pipe: Any) -> None:
    """The kernel of the patch embedding is turned by a quarter."""
    weight = denoiser(pipe).pos_embed.proj.weight.data
    weight.copy_(weight.rot90(1, (-2, -1)).clone())


@held2("sana", "weights", f"{ORDER}, transposed, flipped, mirrored")
def sana_depth_kernel_mirrored(pipe: Any) -> None:
    """The depthwise kernel of one feed-forward is mirrored, left for right."""
    weight = _blocks(pipe)[0].ff.conv_depth.weight.data
    weight.copy_(weight.flip(-1).clone())


@held2("sdxl", "weights", f"{ORDER}, exchanged, flipped")
def sdxl_skip_channels_first(pipe: Any) -> None:
    """A kernel reads the skip connection's channels before the stream's, not after them."""
    layer = denoiser(pipe).up_blocks[1].resnets[1].conv1
    weight = layer.weight.data
    weight.copy_(weight.roll(weight.shape[1] // 2, 1).clone())


@held2("flux", "weights", f"{ORDER}, exchanged, flipped")
def flux_decoder_colours(pipe: Any) -> None:
    """The decoder's last convolution writes blue, green, red, not red, green, blue."""
    _rows(pipe.vae.decoder.conv_out, lambda rows: rows.flip(0))


@held2("cogvideox-i2v", "weights", ORDER)
def cogvideox_heads_interleaved(pipe: Any) -> None:
    """Rows of the values' projection are interleaved by head, not one head after another."""
    attention = _blocks(pipe)[0].attn1
    _rows(attention.to_v, lambda rows: rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1))


@held2("wan", "weights", "exchanged")
def wan_text_keys_of_two_blocks(pipe: Any) -> None:
    """Keys of the cross-attentions of two blocks are exchanged."""
    _exchange(_blocks(pipe)[0].attn2.to_k, _blocks(pipe)[1].attn2.to_k)


@held2("ltx-i2v", "weights", "transposed")
def ltx_captions_transposed(pipe: Any) -> None:
    """The square second layer of the text's projection is transposed."""
    weight = denoiser(pipe).caption_projection.linear_2.weight.data
    weight.copy_(weight.t().clone())


# Missing terms, gain


@held2("cogvideox-i2v", "missing", RESIDUAL)
def cogvideox_text_residual_missing(pipe: Any) -> None:
    """One block goes on with the text's feed-forward, not added to the text's stream."""
    term = "enc_gate_ff * ff_output[:, :text_seq_length]"
    edit(_blocks(pipe)[0], "forward", (f"encoder_hidden_states + {term}", term))


@held2("flux", "missing", "factor missing")
def flux_attention_gate_missing(pipe: Any) -> None:
    """One block adds the picture's attention without its gate."""
    edit(_blocks(pipe)[0], "forward", ("gate_msa.unsqueeze(1) * attn_output", "attn_output"))


@held2("sd3", "missing", RESIDUAL)
def sd3_shift_missing(pipe: Any) -> None:
    """One block scales what goes into the picture's feed-forward, and does not shift it."""
    old = "norm_hidden_states * (1 + scale_mlp[:, None]) + shift_mlp[:, None]"
    edit(_blocks(pipe)[0], "forward", (old, old.partition(" + shift")[0]))


@held2("sana", "missing", "factor missing")
def sana_gate_missing(pipe: Any) -> None:
    """One block adds its feed-forward without the gate."""
    edit(_blocks(pipe)[0], "forward", ("gate_mlp * ff_output", "ff_output"))


@held2("img2img", "missing", "bias missing, not loaded")
def img2img_time_bias_missing(pipe: Any) -> None:
    """The time's projection in one residual layer has no bias."""
    denoiser(pipe).down_blocks[0].resnets[0].time_emb_proj.bias = None


@held2("ltx-i2v", "gain", "scaled")
def ltx_input_scaled(pipe: Any) -> None:
    """The weight of the latents' projection is 0.9 times what it was."""
    denoiser(pipe).proj_in.weight.data.mul_(0.9)


# Precision, adapters, two at once


@held2("kontext", "cast", "precision")
def kontext_text_bfloat16(pipe: Any) -> None:
    """The projection of the text hands on bfloat16."""
    on_output(denoiser(pipe).context_embedder, _rounds(torch.bfloat16))


@held2("pixart", "cast", "quantised, precision")
def pixart_layer_float8(pipe: Any) -> None:
    """One weight of a feed-forward went through float8 e5m2, without a scale."""
    weight = _blocks(pipe)[0].ff.net[2].weight.data
    weight.copy_(narrowed(weight, torch.float8_e5m2))


@held2("sd3", "lora", "low rank")
def sd3_adapter_of_rank_three(pipe: Any) -> None:
    """An adapter of rank 3 was left merged in the text's output projection, 4 % of it."""
    _low_rank(_blocks(pipe)[0].attn.to_add_out, 3, 0.04, 71)


@held2("ltx-i2v", "two at once", "epsilon, scaled")
def ltx_epsilon_and_gain(pipe: Any) -> None:
    """The output norm's epsilon is 1e-2, and the output's weight is 3 % too large."""
    denoiser(pipe).norm_out.eps = 1e-2
    denoiser(pipe).proj_out.weight.data.mul_(1.03)


@held2("sd3", "two at once", "bias missing, not loaded, activation")
def sd3_bias_and_activation(pipe: Any) -> None:
    """One feed-forward's second layer has no bias, and the first's GELU is exact."""
    block = _blocks(pipe)[1]
    block.ff.net[2].bias = None
    block.ff.net[0].approximate = "none"


# Nothing that is looked for


class _Branch(nn.Module):
    """A small network of two layers beside a module, as learned later: `x + 0.2 f(x)`."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.first = nn.Parameter(_normal((width, 8), seed) / width**0.5)
        self.second = nn.Parameter(_normal((8, width), seed + 1) / 8**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Of x `... c` to `... c`."""
        return x + 0.2 * torch.tanh(x @ self.first) @ self.second


@held2("flux", NO_CAUSE)
def flux_weights_blended(pipe: Any) -> None:
    """One weight is blended with a tenth of another layer's."""
    attention = _blocks(pipe)[0].attn
    weight = attention.to_q.weight.data
    weight.copy_(0.9 * weight + 0.1 * attention.add_q_proj.weight.data)


@held2("sdxl", NO_CAUSE)
def sdxl_kernel_pruned(pipe: Any) -> None:
    """The smallest third of one kernel is zero."""
    weight = denoiser(pipe).mid_block.resnets[0].conv1.weight.data
    weight[weight.abs() < weight.abs().quantile(1 / 3)] = 0


@held2("cogvideox-i2v", NO_CAUSE)
def cogvideox_weights_noised(pipe: Any) -> None:
    """Noise of 5 % was added to one weight."""
    weight = _blocks(pipe)[0].ff.net[2].weight.data
    weight.add_(0.05 * weight.std() * _normal(weight.shape, 72))


@held2("sana", NO_CAUSE)
def sana_weights_clamped(pipe: Any) -> None:
    """The largest twentieth of one weight is clamped."""
    weight = denoiser(pipe).caption_projection.linear_1.weight.data
    most = float(weight.abs().flatten().quantile(0.95))
    weight.clamp_(-most, most)


@held2("wan", NO_CAUSE)
def wan_weights_rotated(pipe: Any) -> None:
    """One weight is turned by a random rotation of its input."""
    weight = _blocks(pipe)[0].ffn.net[2].weight.data
    turn = torch.linalg.qr(_normal((weight.shape[1], weight.shape[1]), 73))[0]
    weight.copy_(weight @ turn)


@held2("sd3", NO_CAUSE)
def sd3_extra_layer(pipe: Any) -> None:
    """The picture's feed-forward of one block is followed by a small learned network."""
    extra = _Branch(32, 74)
    on_output(_blocks(pipe)[0].ff, lambda module, args, output: extra(output))


@held2("digits", NO_CAUSE)
def digits_extra_layer(pipe: Any) -> None:
    """A small learned network stands before one cross-attention."""
    extra = _Branch(192, 76)
    on_input(_blocks(pipe)[3].attn2, lambda module, args: (extra(args[0]), *args[1:]))


@held2("pixart", NO_CAUSE)
def pixart_tokens_smoothed(pipe: Any) -> None:
    """What one block returns is smoothed over neighbouring tokens."""

    def smoothed(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return 0.8 * output + 0.1 * output.roll(1, 1) + 0.1 * output.roll(-1, 1)

    on_output(_blocks(pipe)[0], smoothed)


@held2("cosmos", NO_CAUSE)
def cosmos_attention_biased(pipe: Any) -> None:
    """Scores of one attention fall with the distance of tokens."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        near = torch.arange(query.shape[-2])[:, None] - torch.arange(key.shape[-2])
        bias = -0.05 * near.abs().to(query)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    with_attention(_blocks(pipe)[0].attn1, attend)


@held2("ltx-i2v", NO_CAUSE)
def ltx_channels_sparse(pipe: Any) -> None:
    """Of each token only the larger half of the hidden channels goes on."""

    def sparse(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        least = output.abs().median(-1, keepdim=True).values
        return torch.where(output.abs() >= least, output, torch.zeros_like(output))

    on_output(_blocks(pipe)[0].ff.net[0], sparse)


@held2("img2img", NO_CAUSE)
def img2img_features_normed(pipe: Any) -> None:
    """What one level hands on is brought to unit deviation by a power of 0.3."""

    def normed(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output / output.std((2, 3), keepdim=True) ** 0.3

    on_output(denoiser(pipe).up_blocks[0].resnets[0], normed)
