"""Text: prompts to hidden states, and through the text connector."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from truestep.joint import Context, Encoded
from truestep.runtime.ltx2.settings import of
from truestep.runtime.pipeline import Branch, Pipeline


def encode_text(pipe: Pipeline, prompts: list[str]) -> Encoded:
    """Prompts to the hidden states of all layers, side by side, padded on the left; a row a video.

    Source:
        diffusers 0.42.1, pipelines/ltx2/pipeline_ltx2.py, `_get_gemma_prompt_embeds`.
    """
    ids, mask = tokens(pipe, prompts)
    embeds = states(pipe, ids, mask)
    count = pipe.settings.videos_per_prompt or 1
    return Encoded(embeds.repeat_interleave(count, 0), mask.repeat_interleave(count, 0))


def tokens(pipe: Pipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, `b l` each, padded on the left."""
    tokenizer = pipe.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokens = tokenizer(
        [prompt.strip() for prompt in prompts],
        padding="max_length",
        max_length=pipe.settings.max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    return tokens.input_ids.to(pipe.device), tokens.attention_mask.to(pipe.device)


def states(pipe: Pipeline, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Hidden states of all layers, side by side: `b l (c layers)`."""
    encoder = pipe.text_encoder
    layers = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.stack(layers, dim=-1).flatten(2, 3).to(encoder.dtype)


def connect(pipe: Pipeline, texts: Mapping[Branch, Encoded]) -> dict[Branch, Context]:
    """The text connector on each prompt, or on both at once (`connector`).

    Raises:
        ValueError: Embeddings or mask of a prompt are missing.
    """
    for branch, text in texts.items():
        for field in Encoded._fields:
            if getattr(text, field, None) is None:
                raise ValueError(f"the connector needs {field} of the {branch} prompt: got None")
    side = getattr(pipe.tokenizer, "padding_side", "left")

    def connected(text: Encoded) -> Context:
        embeds = text.embeds.to(pipe.connectors.dtype)
        return Context(*pipe.connectors(embeds, text.mask, padding_side=side))

    if of(pipe).connector == "separate" or len(texts) == 1:
        return {branch: connected(text) for branch, text in texts.items()}
    uncond, cond = texts["uncond"], texts["cond"]
    both = connected(Encoded(*(torch.cat(pair) for pair in zip(uncond, cond, strict=True))))
    halves = [part.chunk(2) for part in both]
    return {
        "cond": Context(*(half[1] for half in halves)),
        "uncond": Context(*(half[0] for half in halves)),
    }
