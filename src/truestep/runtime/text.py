"""Text recipes: how a prompt becomes the embeddings a transformer is given, and their audit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
    ids, mask = _tokens(tokenizer, prompts, max_length)
    hidden = _encoded(text_encoder, ids, mask, device)
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
    ids, mask = _tokens(tokenizer, prompts, max_length)
    return _encoded(text_encoder, ids, mask, device)


def _tokens(
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


def _encoded(
    text_encoder: Any, ids: torch.Tensor, mask: torch.Tensor | None, device: str
) -> torch.Tensor:
    home = next(text_encoder.parameters()).device
    given = mask.to(home) if mask is not None else None
    hidden = text_encoder(ids.to(home), given).last_hidden_state
    return hidden.to(dtype=text_encoder.dtype, device=device)  # type: ignore[no-any-return]


RECIPES = {"pad_trim_zero": pad_trim_zero, "keep_padding": keep_padding}
"""Recipes that a stage of ours runs."""

FAMILY_RECIPES: Mapping[str, str] = {
    "WanTransformer3DModel": "pad_trim_zero",
    "CosmosTransformer3DModel": "pad_trim_zero",
    "HunyuanVideoTransformer3DModel": "keep_padding",
    "LTX2VideoTransformer3DModel": "per_branch_connector",
}
"""The recipe that each of diffusers' transformers was trained with."""


@dataclass(frozen=True)
class Finding:
    """One property of the embeddings that a pipeline really made.

    Attributes:
        branch: `cond` or `uncond`.
        what: `recipe`, `length`, `tail`, `dtype`, `mask`, `rows` or `finite`; of a model with a
            text connector also `padding` and `connector`.
        found, expected: In words.
        right: Whether the two agree.
    """

    branch: str
    what: str
    found: str
    expected: str
    right: bool


def audit(pipe: Any) -> list[Finding]:
    """Compare the embeddings that a pipeline makes of its prompts with its recipe.

    Args:
        pipe: A truestep pipeline; its `encode_text` may be anyone's.

    Returns:
        Findings for the prompt and, with guidance, the negative prompt, in a fixed order.
    """
    settings = pipe.settings
    if pipe.audio_video:
        from truestep.runtime.ltx2.text import audited

        pipe.prepare(pipe)
        with torch.no_grad():
            return audited(pipe)
    prompts = {"cond": settings.prompt}
    if settings.guided:
        prompts["uncond"] = settings.negative_prompt
    with torch.no_grad():
        return [
            finding
            for branch, prompt in prompts.items()
            for finding in _audited(pipe, branch, prompt)
        ]


def _audited(pipe: Any, branch: str, prompt: str) -> list[Finding]:
    settings, full = pipe.settings, pipe.settings.max_sequence_length
    made = pipe.encode_text(pipe, [prompt]).to("cpu")
    family = type(pipe.first_transformer).__name__
    if family.startswith("Wan"):
        from truestep.runtime.wan import clean

        prompt = clean(prompt)
    recipe = FAMILY_RECIPES.get(family, settings.text_recipe)
    ids, mask = _tokens(pipe.tokenizer, [prompt], full)
    count = int(mask.gt(0).sum())
    encoder, keeps = pipe.text_encoder, recipe == "keep_padding"
    masked, unmasked = (_encoded(encoder, ids, given, "cpu") for given in (mask, None))
    real = made[:, :count].double()
    wanted = masked[:, : real.shape[1]].double()
    unseen = unmasked[:, : real.shape[1]].double()
    tail = made[:, count:]
    zeros = not bool(tail.any())
    tail_found = "exact zeros" if zeros else f"up to {float(tail.abs().max()):.2g}"
    finite = bool(torch.isfinite(made).all())
    return [
        *encoder_findings(
            pipe,
            branch,
            made,
            recipe=(recipe, family),
            distances=(apart(real, wanted), apart(real, unseen)),
            padding=Finding(
                branch,
                "tail",
                f"{max(made.shape[1] - count, 0)} rows after {count} tokens: {tail_found}",
                "what the encoder makes of padding" if keeps else "exact zeros",
                zeros is not keeps or not tail.numel(),
            ),
        ),
        Finding(branch, "finite", "finite" if finite else "not finite", "finite", finite),
    ]


def encoder_findings(
    pipe: Any,
    branch: str,
    made: torch.Tensor,
    *,
    recipe: tuple[str, str],
    distances: tuple[float, float],
    padding: Finding,
) -> list[Finding]:
    """What every recipe asks of embeddings.

    Args:
        made: `b l c`, as the pipeline made them.
        recipe: The recipe to follow, and what was trained with it.
        distances: rel_l2 of the rows of real tokens from what the encoder makes of them with its
            mask, and without.
        padding: What was found of the other rows.
    """
    encoder, full = pipe.text_encoder, pipe.settings.max_sequence_length
    distance, without = distances
    limit = 64 * torch.finfo(encoder.dtype).eps
    ignores = without < distance and without <= limit
    dtypes = [str(thing.dtype).removeprefix("torch.") for thing in (made, encoder)]
    own, rows = pipe.settings.text_recipe, made.shape[1]
    wanted, family = recipe
    return [
        Finding(branch, "recipe", own, f"{wanted}, as {family} was trained", own == wanted),
        Finding(branch, "length", f"{rows} rows", f"{full} rows", rows == full),
        padding,
        Finding(branch, "dtype", dtypes[0], dtypes[1], dtypes[0] == dtypes[1]),
        Finding(
            branch,
            "mask",
            "the encoder ran without its mask" if ignores else "the encoder was given its mask",
            "the encoder is given its mask",
            not ignores,
        ),
        Finding(
            branch,
            "rows",
            f"rel_l2 {distance:.1e} from the encoder's",
            f"at most {limit:.1e}",
            distance <= limit,
        ),
    ]


def apart(made: torch.Tensor, wanted: torch.Tensor) -> float:
    """rel_l2; infinite where shapes differ or nothing is there."""
    if made.shape != wanted.shape or not wanted.numel():
        return math.inf
    return float((made - wanted).norm() / wanted.norm())
