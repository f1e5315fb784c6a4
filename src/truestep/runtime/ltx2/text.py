"""Text: prompts to hidden states, and through the text connector."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from truestep.runtime.joint import Context, Encoded
from truestep.runtime.ltx2.settings import of
from truestep.runtime.pipeline import Branch, Pipeline, text_branches
from truestep.runtime.text import Finding, apart, encoder_findings


def encode_text(pipe: Pipeline, prompts: list[str]) -> Encoded:
    """Prompts to the hidden states of all layers, side by side, padded on the left; a row a video.

    Source:
        diffusers 0.42.1, pipelines/ltx2/pipeline_ltx2.py, `_get_gemma_prompt_embeds`.
    """
    ids, mask = _tokens(pipe, prompts)
    embeds = _states(pipe, ids, mask)
    count = pipe.settings.videos_per_prompt or 1
    return Encoded(embeds.repeat_interleave(count, 0), mask.repeat_interleave(count, 0))


def _tokens(pipe: Pipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
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


def _states(pipe: Pipeline, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Hidden states of all layers, side by side: `b l (c layers)`."""
    encoder = pipe.text_encoder
    states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.stack(states, dim=-1).flatten(2, 3).to(encoder.dtype)


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


# --- audit -------------------------------------------------------------------------------------


def audited(pipe: Pipeline) -> list[Finding]:
    """What the pipeline makes of its prompts, beside the recipe `per_branch_connector`."""
    prompts = {"cond": pipe.settings.prompt, "uncond": pipe.settings.negative_prompt}
    made = {branch: pipe.encode_text(pipe, [prompts[branch]]) for branch in text_branches(pipe)}
    assert pipe.connect is not None
    connected = pipe.connect(pipe, made)
    side = getattr(pipe.tokenizer, "padding_side", "left")
    findings = []
    for branch, text in made.items():
        alone = Context(*pipe.connectors(text.embeds, text.mask, padding_side=side))
        findings += _of_encoder(pipe, branch, prompts[branch], text)
        findings += _of_connector(pipe, branch, connected[branch], alone)
    return findings


def _of_encoder(pipe: Pipeline, branch: Branch, prompt: str, text: Encoded) -> list[Finding]:
    ids, mask = _tokens(pipe, [prompt])
    count = int(mask.sum())
    words = text.embeds[:1, -count:].double()
    masked, unmasked = (
        apart(words, _states(pipe, ids, given)[:, -count:].double()) for given in (mask, None)
    )
    left = torch.equal(text.mask[:1].long(), mask.long())
    return encoder_findings(
        pipe,
        branch,
        text.embeds,
        recipe=("per_branch_connector", "LTX-2"),
        distances=(masked, unmasked),
        padding=Finding(
            branch,
            "padding",
            f"the mask has {int(text.mask[:1].sum())} tokens"
            + ("" if left else ", elsewhere or other ones"),
            f"{count} tokens after the padding",
            left,
        ),
    )


def _of_connector(pipe: Pipeline, branch: Branch, made: Context, alone: Context) -> list[Finding]:
    distances = [
        apart(own.double(), other.double()) for own, other in zip(made, alone, strict=True)
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
