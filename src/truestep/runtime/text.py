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
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=max_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask
    home = next(text_encoder.parameters()).device
    hidden = text_encoder(tokens.input_ids.to(home), mask.to(home)).last_hidden_state
    hidden = hidden.to(dtype=text_encoder.dtype, device=device)
    lengths = mask.gt(0).sum(dim=1).tolist()
    padded: torch.Tensor = hidden.new_zeros(hidden.shape[0], max_length, hidden.shape[2])
    for row, length in enumerate(lengths):
        padded[row, :length] = hidden[row, :length]
    return padded


RECIPES = {"pad_trim_zero": pad_trim_zero}
