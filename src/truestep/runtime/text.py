"""Text recipes: how a prompt becomes the embeddings a transformer is given."""

from __future__ import annotations

from typing import Any

import torch


def pad_trim_zero(
    tokenizer: Any,
    text_encoder: Any,
    prompts: list[str],
    *,
    max_length: int,
    device: str,
) -> torch.Tensor:
    """Pad to `max_length`, encode with mask, cut to the real length, pad with exact zeros.

    The zero rows are attended to: a model trained so treats them as part of the text.

    Args:
        prompts: `b` prompts, already cleaned.
        max_length: Text length `l` in tokens; longer prompts are truncated.
        device: Where the embeddings are wanted.

    Returns:
        Embeddings `b l c` in the encoder's dtype.

    Source:
        diffusers 0.42.1, pipelines/wan/pipeline_wan.py, `_get_t5_prompt_embeds`.
    """
    ids, mask = tokens(tokenizer, prompts, max_length)
    hidden = encoded(text_encoder, ids, mask, device)
    lengths = mask.gt(0).sum(dim=1).tolist()
    padded: torch.Tensor = hidden.new_zeros(hidden.shape[0], max_length, hidden.shape[2])
    for row, length in enumerate(lengths):
        padded[row, :length] = hidden[row, :length]
    return padded


def keep_padding(
    tokenizer: Any,
    text_encoder: Any,
    prompts: list[str],
    *,
    max_length: int,
    device: str,
) -> torch.Tensor:
    """Pad to `max_length`, encode with mask, keep what the encoder makes of the padding.

    Args and result as for `pad_trim_zero`.

    Source:
        diffusers 0.42.1, pipelines/hunyuan_video/pipeline_hunyuan_video.py: the padded rows stay,
        and the transformer is given the mask.
    """
    ids, mask = tokens(tokenizer, prompts, max_length)
    return encoded(text_encoder, ids, mask, device)


def tokens(
    tokenizer: Any, prompts: list[str], max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, `b l` each."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=max_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def encoded(
    text_encoder: Any, ids: torch.Tensor, mask: torch.Tensor | None, device: str
) -> torch.Tensor:
    home = next(text_encoder.parameters()).device
    given = mask.to(home) if mask is not None else None
    hidden = text_encoder(ids.to(home), given).last_hidden_state
    return hidden.to(dtype=text_encoder.dtype, device=device)  # type: ignore[no-any-return]


RECIPES = {"pad_trim_zero": pad_trim_zero, "keep_padding": keep_padding}
"""Recipes that a stage of ours runs."""
