"""Faults of precision: a narrower dtype than the reference's, in one place or everywhere.

Rounding to bfloat16 changes nothing where a pipeline runs in bfloat16 already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import ALL, PIPELINES, fault
from bench.faults.places import ATTENTIONS, BLOCK_LINEARS, BLOCKS, LINEARS, MIDDLE
from bench.faults.targets import (
    around,
    blocks,
    linears,
    middle,
    models,
    narrowed,
    need,
    on_input,
    on_output,
    replace_forward,
    residual,
    sinusoids,
    with_attention,
)
from truestep.joint import each

Tensor = torch.Tensor


def _rounds_output_to(dtype: torch.dtype) -> Any:
    return lambda module, args, output: narrowed(output, dtype)


@fault(acts="transformer, every linear layer", subjects=ALL, where=LINEARS)
def linears_in_bfloat16(pipe: Any) -> None:
    """Bug: an autocast runs every linear layer in bfloat16."""

    def low(module: Any, original: Any, x: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.bfloat16()
        return functional.linear(x.bfloat16(), module.weight.bfloat16(), bias).to(x.dtype)

    for model in models(pipe):
        for layer in linears(model):
            replace_forward(layer, low)


def _block_weights(pipe: Any) -> list[Tensor]:
    """Weights that quantisers take: linear layers of the blocks, or of the whole module."""
    parts: list[Any] = [getattr(model, "blocks", model) for model in models(pipe)]
    return [layer.weight for part in parts for layer in linears(part)]


@fault(
    acts="transformer, linear weights of the blocks",
    source="https://github.com/kijai/ComfyUI-WanVideoWrapper/issues/283",
    subjects=ALL,
    where=BLOCK_LINEARS,
)
def weights_in_float8(pipe: Any) -> None:
    """Bug: linear weights went through float8 e4m3 with one scale a tensor."""
    for weight in _block_weights(pipe):
        scale = weight.data.float().abs().max().clamp(min=1e-12) / 448  # the largest e4m3 number
        narrow = (weight.data.float() / scale).to(torch.float8_e4m3fn)
        weight.data.copy_(narrow.float() * scale)


@fault(
    acts="transformer, linear weights of the blocks",
    source="https://github.com/Lightricks/LTX-2/pull/172",
    subjects=ALL,
    where=BLOCK_LINEARS,
)
def weights_in_float8_unscaled(pipe: Any) -> None:
    """Bug: linear weights were cast to float8 e4m3 without a scale, so small ones vanish."""
    for weight in _block_weights(pipe):
        weight.data.copy_(weight.data.float().to(torch.float8_e4m3fn).float())


@fault(acts="transformer, linear weights of the blocks", subjects=ALL, where=BLOCK_LINEARS)
def weights_in_int8(pipe: Any) -> None:
    """Bug: linear weights went through int8 with one scale a tensor."""
    for weight in _block_weights(pipe):
        scale = weight.data.float().abs().max().clamp(min=1e-12) / 127
        weight.data.copy_((weight.data.float() / scale).round() * scale)


@fault(acts="transformer, output of the middle block", where=MIDDLE, subjects=PIPELINES)
def block_output_in_float16(pipe: Any) -> None:
    """Bug: one block hands on float16."""
    for model in models(pipe):
        on_output(residual(model), _rounds_output_to(torch.float16))


@fault(acts="transformer, output of the middle block", subjects=ALL, where=MIDDLE)
def block_output_in_bfloat16(pipe: Any) -> None:
    """Bug: one block hands on bfloat16; in a UNet, one residual layer."""
    for model in models(pipe):
        on_output(residual(model), _rounds_output_to(torch.bfloat16))


@fault(acts="transformer, every attention", subjects=ALL, where=ATTENTIONS)
def softmax_in_bfloat16(pipe: Any) -> None:
    """Bug: attention weights are computed in bfloat16."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        scores = (query * scale) @ key.transpose(-1, -2)
        made: Tensor = scores.bfloat16().softmax(dim=-1).to(value.dtype) @ value
        return made

    for model in models(pipe):
        with_attention(model, attend)


@fault(
    acts="transformer, every attention",
    source="https://github.com/thu-ml/SageAttention/issues/221",
    subjects=ALL,
    where=ATTENTIONS,
)
def attention_in_int8(pipe: Any) -> None:
    """Bug: queries and keys are quantised to int8, one scale a head."""

    def rounded(tensor: Tensor) -> Tensor:
        scale = tensor.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-12) / 127
        return (tensor / scale).round() * scale

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return functional.scaled_dot_product_attention(
            rounded(query), rounded(key), value, *args, **kwargs
        )

    for model in models(pipe):
        with_attention(model, attend)


@fault(
    acts="transformer, sinusoidal timestep embedding",
    source="https://github.com/modelscope/DiffSynth-Studio/pull/1025",
    subjects=ALL,
    where=("condition_embedder.timesteps_proj",),
)
def sinusoids_in_bfloat16(pipe: Any) -> None:
    """Bug: the sinusoidal timestep embedding is rounded to bfloat16."""
    for model in models(pipe):
        for module in sinusoids(model):
            on_output(module, _rounds_output_to(torch.bfloat16))


@fault(
    acts="transformer, condition_embedder.time_embedder",
    source="https://github.com/modelscope/DiffSynth-Studio/issues/562",
    where=("condition_embedder.time_embedder.linear_?",),
)
def time_embedding_in_bfloat16(pipe: Any) -> None:
    """Bug: the time embedding is computed in bfloat16 where the reference uses float32."""

    def low(module: Any, original: Any, x: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.bfloat16()
        return functional.linear(x.bfloat16(), module.weight.bfloat16(), bias).to(x.dtype)

    for model in models(pipe):
        need(hasattr(model, "condition_embedder"), "the time embedding is not kept in float32")
        for layer in linears(model.condition_embedder.time_embedder):
            replace_forward(layer, low)


@fault(
    acts="transformer, modulation of every block",
    source="https://github.com/modelscope/DiffSynth-Studio/issues/562",
    where=BLOCKS,
)
def modulation_in_bfloat16(pipe: Any) -> None:
    """Bug: shifts, scales and gates are added up in bfloat16 where the reference uses float32."""

    def low(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, text, modulation, *rest = args
        table = module.scale_shift_table
        total = narrowed(table + modulation.to(table.dtype), torch.bfloat16)
        return (hidden, text, total - table, *rest)  # the block adds its table again

    for block in blocks(pipe):
        need(hasattr(block, "scale_shift_table"), "the block has no table of modulations")
        on_input(block, low)


@fault(acts="transformer, norms of every block", subjects=ALL, where=("{block}.norm?", "norm_out"))
def norms_in_bfloat16(pipe: Any) -> None:
    """Bug: norms hand on bfloat16 before they are modulated."""
    for model in models(pipe):
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                on_output(module, _rounds_output_to(torch.bfloat16))


@fault(
    acts="transformer, rope, tables",
    source="https://github.com/KellerJordan/modded-nanogpt/issues/39",
    where=("rope",),
    subjects=PIPELINES,
)
def rope_in_bfloat16(pipe: Any) -> None:
    """Bug: the rotary sines and cosines are kept in bfloat16."""
    for model in models(pipe):
        need(hasattr(model, "rope"), "the model has no rotary positions")
        if not hasattr(model.rope, "freqs_cos"):  # Cosmos makes them in every forward
            on_output(model.rope, lambda _, args, out: [narrowed(t, torch.bfloat16) for t in out])
            continue
        for table in (model.rope.freqs_cos, model.rope.freqs_sin):
            table.copy_(narrowed(table, torch.bfloat16))


@fault(acts="transformer, residual stream of the middle block", where=MIDDLE)
def residual_in_bfloat16(pipe: Any) -> None:
    """Bug: one block receives and returns its residual stream in bfloat16."""

    def low(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (narrowed(args[0], torch.bfloat16), *args[1:])

    for model in models(pipe):
        on_input(middle(model), low)
        on_output(middle(model), _rounds_output_to(torch.bfloat16))


@fault(acts="stage text, output", subjects=PIPELINES)
def text_in_bfloat16(pipe: Any) -> None:
    """Bug: the text encoder's output is rounded to bfloat16."""

    def low(original: Callable[..., Tensor], inner: Any, prompts: list[str]) -> Tensor:
        return narrowed(original(inner, prompts), torch.bfloat16)

    around(pipe, "encode_text", low)


@fault(acts="stage guidance", subjects=PIPELINES)
def guidance_in_bfloat16(pipe: Any) -> None:
    """Bug: guidance is computed in bfloat16."""

    def low(original: Callable[..., Any], inner: Any, step: Any, *predictions: Any) -> Any:
        rounded = [each(torch.Tensor.bfloat16, made) for made in predictions]
        guided = original(inner, step, *rounded)
        return each(lambda own, cond: own.to(cond.dtype), guided, predictions[0])

    need(pipe.settings.guided, "the case has no guidance")
    around(pipe, "combine", low)
