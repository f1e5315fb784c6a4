"""Faults of the text stage: from prompts to embeddings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import PIPELINES, fault
from bench.faults.targets import around, need, on_output

Tensor = torch.Tensor


def _encode_with(
    pipe: Any,
    *,
    hidden: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
    zero_from: Callable[[int], int] | None = None,
    special: bool = True,
) -> None:
    """Encode with one part of the recipe replaced.

    Args:
        pipe: The pipeline to change.
        hidden: (encoder, ids, mask) to hidden states `b l c`.
        zero_from: Real length to the first row that is zeroed.
        special: Whether special tokens are added.
    """
    from truestep.runtime.wan import clean

    def last(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = encoder(ids, mask).last_hidden_state
        return states

    def encode_text(inner: Any, prompts: list[str]) -> Tensor:
        encoder = inner.text_encoder
        tokens = inner.tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=inner.settings.max_sequence_length,
            truncation=True,
            add_special_tokens=special,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(next(encoder.parameters()).device)
        mask = tokens.attention_mask
        states = (hidden or last)(encoder, tokens.input_ids, mask)
        states = states.to(device=inner.device, dtype=encoder.dtype).clone()
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            states[row, zero_from(length) if zero_from else length :] = 0
        return states

    pipe.encode_text = encode_text


@fault(
    acts="stage text, padding",
    source="https://github.com/vllm-project/vllm-omni/pull/2877",
)
def text_padded_longer(pipe: Any) -> None:
    """Bug: text is padded to another length than the model was trained with."""
    pipe.settings.max_sequence_length += max(1, pipe.settings.max_sequence_length // 8)


@fault(acts="stage text, padding", source="https://github.com/starVLA/starVLA/pull/433")
def pad_rows_not_zeroed(pipe: Any) -> None:
    """Bug: the encoder's outputs at padded positions are kept instead of being zeroed."""
    _encode_with(pipe, zero_from=lambda length: pipe.settings.max_sequence_length)


@fault(acts="stage text, last real token")
def text_cut_short(pipe: Any) -> None:
    """Bug: the cut to the real length is one token short, so the end token is zeroed."""
    _encode_with(pipe, zero_from=lambda length: length - 1)


@fault(acts="stage text, tokenizer")
def end_token_missing(pipe: Any) -> None:
    """Bug: the tokenizer adds no special tokens, so no prompt has its end token."""
    plain, special = (
        pipe.tokenizer(pipe.settings.prompt, add_special_tokens=flag).input_ids
        for flag in (False, True)
    )
    need(plain != special, "the tokenizer has no special tokens")
    _encode_with(pipe, special=False)


@fault(acts="text_encoder, second last layer")
def encoder_layer_before_last(pipe: Any) -> None:
    """Bug: hidden states of the layer before the last are taken, as for CLIP encoders."""

    def before_last(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = encoder(ids, mask, output_hidden_states=True).hidden_states[-2]
        return states

    _encode_with(pipe, hidden=before_last)


@fault(
    acts="text_encoder, every attention",
    source="https://github.com/black-forest-labs/flux/pull/507",
)
def encoder_mask_lost(pipe: Any) -> None:
    """Bug: the encoder runs without its attention mask, so real tokens attend to padding."""

    def unmasked(encoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = encoder(ids, torch.ones_like(mask)).last_hidden_state
        return states

    _encode_with(pipe, hidden=unmasked)


@fault(
    acts="text_encoder, encoder.final_layer_norm",
    where=("encoder.final_layer_norm",),
    model="text_encoder",
)
def encoder_final_norm_skipped(pipe: Any) -> None:
    """Bug: the encoder's last layer norm is left out."""
    on_output(pipe.text_encoder.encoder.final_layer_norm, lambda _, args, output: args[0])


@fault(
    acts="text_encoder, relative position bias",
    source="https://github.com/OpenNMT/CTranslate2/issues/2102",
    where=("encoder.block.[1-9]*.layer.0.SelfAttention.relative_attention_bias",),
    model="text_encoder",
)
def encoder_bias_shared(pipe: Any) -> None:
    """Bug: UMT5 is run as T5: all layers use the first layer's relative position bias."""
    tables = [
        module.relative_attention_bias.weight
        for module in pipe.text_encoder.modules()
        if isinstance(getattr(module, "relative_attention_bias", None), nn.Embedding)
    ]
    need(len(tables) > 1, "the encoder has one table of position biases")
    for table in tables[1:]:
        table.data.copy_(tables[0].data)


@fault(
    acts="text_encoder, every attention",
    where=("encoder.block.*.layer.0.SelfAttention.q",),
    model="text_encoder",
)
def encoder_attention_scaled(pipe: Any) -> None:
    """Bug: attention scores are divided by the root of the head size, which T5 does not do."""
    size = pipe.text_encoder.config.d_kv
    for name, module in pipe.text_encoder.named_modules():
        if name.endswith("SelfAttention.q"):
            on_output(module, lambda _, args, output: output * size**-0.5)


@fault(
    acts="text_encoder, feed-forward activation",
    source="https://github.com/m87-labs/kestrel/pull/162",
    where=("encoder.block.*.layer.1.DenseReluDense.act",),
    model="text_encoder",
)
def encoder_gelu_exact(pipe: Any) -> None:
    """Bug: the encoder's GELU is computed exactly where it was trained with the tanh form."""
    gated = [
        module
        for module in pipe.text_encoder.modules()
        if hasattr(module, "wi_0") and hasattr(module, "act")
    ]
    need(gated, "the encoder has no gated feed-forward")
    for module in gated:
        module.act = nn.GELU()


@fault(
    acts="stage text, both prompts",
    source="https://github.com/huggingface/diffusers/pull/8947",
    subjects=PIPELINES,
)
def prompts_swapped(pipe: Any) -> None:
    """Bug: prompt and negative prompt are exchanged before they are encoded."""
    need(pipe.settings.guided, "one prompt only")

    def swapped(original: Callable[..., Tensor], inner: Any, prompts: list[str]) -> Tensor:
        cond, uncond = inner.settings.prompt, inner.settings.negative_prompt
        other = {cond: uncond, uncond: cond}
        return original(inner, [other.get(prompt, prompt) for prompt in prompts])

    around(pipe, "encode_text", swapped)


@fault(acts="stage text, tokenizer", subjects=PIPELINES)
def prompt_truncated(pipe: Any) -> None:
    """Bug: the last word of the prompt is lost to a length limit that is one too small."""

    def truncated(original: Callable[..., Tensor], inner: Any, prompts: list[str]) -> Tensor:
        return original(inner, [" ".join(prompt.split()[:-1]) for prompt in prompts])

    around(pipe, "encode_text", truncated)
