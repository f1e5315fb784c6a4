"""Audit of the text stage: what a pipeline makes of its prompts, beside its recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from truestep.joint import Context, Encoded
from truestep.runtime import text
from truestep.runtime.ltx2 import text as ltx2_text
from truestep.runtime.ltx2.settings import of
from truestep.runtime.pipeline import Branch, Pipeline, text_branches
from truestep.runtime.wan import clean

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
        pipe.prepare(pipe)
        with torch.no_grad():
            return _audited_connected(pipe)
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
        prompt = clean(prompt)
    recipe = FAMILY_RECIPES.get(family, settings.text_recipe)
    ids, mask = text.tokens(pipe.tokenizer, [prompt], full)
    count = int(mask.gt(0).sum())
    encoder, keeps = pipe.text_encoder, recipe == "keep_padding"
    masked, unmasked = (text.encoded(encoder, ids, given, "cpu") for given in (mask, None))
    real = made[:, :count].double()
    wanted = masked[:, : real.shape[1]].double()
    unseen = unmasked[:, : real.shape[1]].double()
    tail = made[:, count:]
    zeros = not bool(tail.any())
    tail_found = "exact zeros" if zeros else f"up to {float(tail.abs().max()):.2g}"
    finite = bool(torch.isfinite(made).all())
    return [
        *_encoder_findings(
            pipe,
            branch,
            made,
            recipe=(recipe, family),
            distances=(_apart(real, wanted), _apart(real, unseen)),
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


def _encoder_findings(
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


def _apart(made: torch.Tensor, wanted: torch.Tensor) -> float:
    """rel_l2; infinite where shapes differ or nothing is there."""
    if made.shape != wanted.shape or not wanted.numel():
        return math.inf
    return float((made - wanted).norm() / wanted.norm())


def _audited_connected(pipe: Pipeline) -> list[Finding]:
    """What the pipeline makes of its prompts, beside the recipe `per_branch_connector`."""
    prompts = {"cond": pipe.settings.prompt, "uncond": pipe.settings.negative_prompt}
    made = {branch: pipe.encode_text(pipe, [prompts[branch]]) for branch in text_branches(pipe)}
    assert pipe.connect is not None
    connected = pipe.connect(pipe, made)
    side = getattr(pipe.tokenizer, "padding_side", "left")
    findings = []
    for branch, encoded in made.items():
        alone = Context(*pipe.connectors(encoded.embeds, encoded.mask, padding_side=side))
        findings += _of_encoder(pipe, branch, prompts[branch], encoded)
        findings += _of_connector(pipe, branch, connected[branch], alone)
    return findings


def _of_encoder(pipe: Pipeline, branch: Branch, prompt: str, encoded: Encoded) -> list[Finding]:
    ids, mask = ltx2_text.tokens(pipe, [prompt])
    count = int(mask.sum())
    words = encoded.embeds[:1, -count:].double()
    masked, unmasked = (
        _apart(words, ltx2_text.states(pipe, ids, given)[:, -count:].double())
        for given in (mask, None)
    )
    left = torch.equal(encoded.mask[:1].long(), mask.long())
    return _encoder_findings(
        pipe,
        branch,
        encoded.embeds,
        recipe=("per_branch_connector", "LTX-2"),
        distances=(masked, unmasked),
        padding=Finding(
            branch,
            "padding",
            f"the mask has {int(encoded.mask[:1].sum())} tokens"
            + ("" if left else ", elsewhere or other ones"),
            f"{count} tokens after the padding",
            left,
        ),
    )


def _of_connector(pipe: Pipeline, branch: Branch, made: Context, alone: Context) -> list[Finding]:
    distances = [
        _apart(own.double(), other.double()) for own, other in zip(made, alone, strict=True)
    ]
    limit = 64 * torch.finfo(alone.video.dtype).eps
    finite = all(bool(torch.isfinite(part).all()) for part in made)
    kind = of(pipe).connector
    return [
        Finding(
            branch,
            "connector",
            f"{kind}: rel_l2 {max(distances[:2]):.1e} from that of this prompt alone",
            f"a call for each prompt, or at most {limit:.1e} apart",
            max(distances) <= limit,
        ),
        Finding(branch, "finite", "finite" if finite else "not finite", "finite", finite),
    ]
