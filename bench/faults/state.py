"""Faults of state: what one call leaves behind for another, or for its neighbour in the batch."""

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
from bench.faults.places import MIDDLE
from bench.faults.targets import (
    around,
    block_list,
    middle,
    models,
    need,
    on_output,
    self_attention,
    shapes,
)
from truestep.joint import each, floating

Tensor = torch.Tensor
Stage = Callable[..., Tensor]


@fault(
    acts="stage text, every call but the first",
    source="https://github.com/kijai/ComfyUI-WanVideoWrapper/issues/2046",
    subjects=PIPELINES,
)
def text_cache_without_key(pipe: Any) -> None:
    """Bug: a cache of embeddings ignores the prompt, so later prompts get the first one's."""
    cached: dict[int, Any] = {}

    def cache(original: Stage, inner: Any, prompts: list[str]) -> Any:
        if len(prompts) not in cached:
            cached[len(prompts)] = original(inner, prompts)
        dtype = inner.text_encoder.dtype
        return each(floating(lambda part: part.to(dtype).clone()), cached[len(prompts)])

    need(pipe.settings.guided, "one prompt only")
    around(pipe, "encode_text", cache)


@fault(
    acts="stage text, prompt",
    source="https://github.com/ljleb/sd-webui-neutral-prompt/issues/44",
    subjects=PIPELINES,
)
def text_of_earlier_request(pipe: Any) -> None:
    """Bug: the prompt's embeddings are those of the request before, which ended differently."""

    def stale(original: Stage, inner: Any, prompts: list[str]) -> Tensor:
        own = inner.settings.prompt
        words = own.split()
        earlier = " ".join([*words[:-1], words[len(words) // 2]])
        return original(inner, [earlier if prompt == own else prompt for prompt in prompts])

    around(pipe, "encode_text", stale)


@fault(acts="stage prediction", subjects=PIPELINES)
def batch_neighbour_leaks(pipe: Any) -> None:
    """Bug: in a batch of two, 1 % of the neighbour's prediction ends up in one's own."""

    def leaking(original: Stage, inner: Any, latent: Any, step: Any, text: Any, branch: str) -> Any:
        beside = each(lambda part: torch.cat([part, part.roll(1, dims=-1)]), latent)
        twice = each(lambda part: torch.cat([part, part]), text)

        def mixed(made: Tensor) -> Tensor:
            own, neighbour = made.tensor_split(2)
            return own * 0.99 + neighbour * 0.01

        return each(mixed, original(inner, beside, step, twice, branch))

    around(pipe, "predict", leaking)


@fault(acts="every step but the first, update", subjects=PIPELINES)
def step_index_stale(pipe: Any) -> None:
    """Bug: the scheduler's counter stays one step behind, so the last sigma is never reached."""

    def stale(original: Stage, inner: Any, step: Any, guided: Tensor, latent: Tensor) -> Tensor:
        inner.scheduler._step_index = max(step.index - 1, 0)
        return original(inner, step, guided, latent)

    around(pipe, "update", stale)


@fault(
    acts="scheduler, first step",
    source="https://github.com/huggingface/diffusers/pull/5746",
    subjects=PIPELINES,
)
def scheduler_not_reset(pipe: Any) -> None:
    """Bug: the scheduler begins with the counter of an earlier run's second step."""

    def late(original: Stage, inner: Any, step: Any, guided: Tensor, latent: Tensor) -> Tensor:
        last = len(inner.scheduler.timesteps) - 1
        inner.scheduler._step_index = min(step.index + 1, last)
        return original(inner, step, guided, latent)

    around(pipe, "update", late)


def _again(inner: Any, made: Any) -> Any:
    """A copy of a prediction; of one modality, in the dtype that the model has by now."""
    if isinstance(made, tuple):
        return each(torch.clone, made)
    return made.to(inner.first_transformer.dtype).clone()


@fault(
    acts="branch uncond, every step but the first",
    source="https://github.com/sgl-project/sglang/issues/35054",
    subjects=PIPELINES,
)
def uncond_of_first_step(pipe: Any) -> None:
    """Bug: the unconditional prediction of the first step is used in all later ones."""
    first: list[Any] = []

    def reuse(original: Stage, inner: Any, latent: Any, step: Any, text: Any, branch: str) -> Any:
        if branch == "uncond" and step.index > 0 and first and shapes(first[0]) == shapes(latent):
            return _again(inner, first[0])
        made = original(inner, latent, step, text, branch)
        if branch == "uncond" and step.index == 0:
            first[:] = [_again(inner, made)]
        return made

    need(pipe.settings.guided, "the case has no guidance")
    around(pipe, "predict", reuse)


@fault(
    acts="stage prediction, every second step",
    source="https://github.com/sgl-project/sglang/pull/36767",
    subjects=PIPELINES,
)
def step_cache_left_on(pipe: Any) -> None:
    """Bug: a step cache that was meant to be off returns every second prediction from memory."""
    kept: dict[str, Any] = {}

    def cached(original: Stage, inner: Any, latent: Any, step: Any, text: Any, branch: str) -> Any:
        known = kept.get(branch)
        if step.index % 2 and known is not None and shapes(known) == shapes(latent):
            return _again(inner, known)
        kept[branch] = original(inner, latent, step, text, branch)
        return each(torch.clone, kept[branch])

    around(pipe, "predict", cached)


@fault(
    acts="stage prediction, branch uncond",
    source="https://github.com/vllm-project/vllm-omni/pull/5287",
    where=MIDDLE,
)
def branches_share_residual(pipe: Any) -> None:
    """Bug: a cache that does not know branches gives the unconditional one the other's residual.

    What the middle block adds is kept from the conditional forward and used in the next.
    """
    for model in models(pipe):
        block_list(model)
        _residual_kept(pipe, middle(model))


def _per_run(pipe: Any) -> list[Tensor]:
    """A memory that every run finds empty, so that runs repeat."""
    kept: list[Tensor] = []

    def emptied(original: Callable[..., Any], inner: Any) -> Any:
        kept.clear()
        return original(inner)

    around(pipe, "make_schedule", emptied)
    return kept


def _residual_kept(pipe: Any, block: nn.Module) -> None:
    kept = _per_run(pipe)

    def share(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if kept and kept[0].shape == output.shape:
            made: Tensor = args[0] + kept.pop().to(output.dtype)
            return made
        kept[:] = [(output - args[0]).clone()]
        return output

    on_output(block, share)


@fault(
    acts="transformer, blocks.<middle>.attn1, output buffer",
    where=("{middle}.attn1",),
    subjects=PIPELINES,
)
def attention_buffer_reused(pipe: Any) -> None:
    """Bug: one attention returns its output buffer before it is overwritten: the last call's."""
    for model in models(pipe):
        block_list(model)
        _previous_output(pipe, self_attention(middle(model)))


def _previous_output(pipe: Any, attention: nn.Module) -> None:
    earlier = _per_run(pipe)

    def late(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        known = earlier.pop() if earlier else output
        earlier[:] = [output.clone()]
        return known.to(output.dtype) if known.shape == output.shape else output

    on_output(attention, late)


@fault(
    acts="text_encoder, dropout",
    source="https://github.com/huggingface/lerobot/pull/35",
    subjects=PIPELINES,
)
def encoder_in_train_mode(pipe: Any) -> None:
    """Bug: the text encoder is left in training mode, with its dropout on."""
    parts = list(pipe.text_encoder.modules())
    dropouts = [part for part in parts if isinstance(part, nn.Dropout) and part.p > 0]
    need(dropouts, "the encoder has no dropout")

    def seeded(original: Stage, inner: Any, prompts: list[str]) -> Tensor:
        inner.text_encoder.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return original(inner, prompts)

    around(pipe, "encode_text", seeded)


@fault(acts="stage prediction, branch uncond", subjects=PIPELINES)
def latent_changed_in_place(pipe: Any) -> None:
    """Bug: the conditional forward scales its input in place, so the unconditional sees it."""

    def in_place(
        original: Stage, inner: Any, latent: Any, step: Any, text: Any, branch: str
    ) -> Any:
        seen = each(lambda part: part * 1.01, latent) if branch == "uncond" else latent
        return original(inner, seen, step, text, branch)

    need(pipe.settings.guided, "the case has no guidance")
    around(pipe, "predict", in_place)
