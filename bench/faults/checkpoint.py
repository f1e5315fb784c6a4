"""Faults of checkpoints: tensors that are wrong, exchanged, missing or of another model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import ALL, fault
from bench.faults.places import MIDDLE
from bench.faults.targets import (
    attentions,
    block_list,
    linears,
    middle,
    middles,
    models,
    need,
    self_attention,
)

Tensor = torch.Tensor


def _normal_like(tensor: Tensor, seed: int) -> Tensor:
    """Standard normal numbers of a tensor's shape, the same on every device and in every dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def _exchange(first: Tensor, second: Tensor) -> None:
    kept = first.data.clone()
    first.data.copy_(second.data)
    second.data.copy_(kept)


@fault(
    acts="transformer, middle block, its largest linear layer",
    subjects=ALL,
    where=("{middle}.ffn.net.0.proj",),
)
def tensor_of_another_checkpoint(pipe: Any) -> None:
    """Bug: one weight is of another checkpoint: the same mean and deviation, other numbers."""
    for block in middles(pipe):
        weight = max(linears(block), key=lambda layer: layer.weight.numel()).weight.data
        weight.copy_(_normal_like(weight, 0) * weight.std() + weight.mean())


@fault(
    acts="transformer, middle block, its largest linear layer",
    subjects=ALL,
    where=("{middle}.ffn.net.0.proj",),
)
def tensor_slightly_older(pipe: Any) -> None:
    """Bug: one weight is of an earlier checkpoint of the same training, 2 % away."""
    for block in middles(pipe):
        weight = max(linears(block), key=lambda layer: layer.weight.numel()).weight.data
        weight.add_(_normal_like(weight, 1) * weight.std() * 0.02)


@fault(
    acts="transformer, middle block, to_q of the first attention",
    source="https://github.com/NVIDIA/TensorRT-LLM/issues/1477",
    subjects=ALL,
    where=("{middle}.attn1.to_q",),
)
def lora_scale_lost(pipe: Any) -> None:
    """Bug: a LoRA of rank 4 is merged with twice its scale, 5 % of the weight too much."""
    for block in middles(pipe):
        weight = self_attention(block).to_q.weight.data
        rank = min(4, *weight.shape)
        delta = _normal_like(weight[:, :rank], 2) @ _normal_like(weight[:rank], 3)
        weight.add_(delta * (0.05 * weight.norm() / delta.norm()))


@fault(
    acts="transformer, every to_q, to_k and to_v", subjects=ALL, where=("{block}.attn?.to_[qkv]",)
)
def lora_left_merged(pipe: Any) -> None:
    """Bug: a LoRA of rank 4 from an earlier request, 1 % of the weights, was not unmerged."""
    for model in models(pipe):
        for seed, attention in enumerate(attentions(model)):
            for layer in (attention.to_q, attention.to_k, attention.to_v):
                weight = layer.weight.data
                rank = min(4, *weight.shape)
                delta = _normal_like(weight[:, :rank], seed) @ _normal_like(weight[:rank], seed + 1)
                weight.add_(delta * (0.01 * weight.norm() / delta.norm()))


@fault(
    acts="transformer, middle block, to_v of the first attention",
    subjects=ALL,
    where=("{middle}.attn1.to_v",),
)
def square_weight_transposed(pipe: Any) -> None:
    """Bug: a square weight is transposed, which no shape check can see."""
    for block in middles(pipe):
        weight = self_attention(block).to_v.weight.data
        need(weight.shape[0] == weight.shape[1], "the weight is not square")
        weight.copy_(weight.t().clone())


@fault(
    acts="transformer, middle block, first attention",
    source="https://github.com/MiniMax-AI/MiniMax-H3/issues/48",
    subjects=ALL,
    where=("{middle}.attn1.to_[kv]",),
)
def keys_values_exchanged(pipe: Any) -> None:
    """Bug: a fused projection was split as query, value, key."""
    for block in middles(pipe):
        attention = self_attention(block)
        _exchange(attention.to_k.weight, attention.to_v.weight)
        if attention.to_k.bias is not None:
            _exchange(attention.to_k.bias, attention.to_v.bias)


@fault(
    acts="transformer, middle block, first attention, biases of query and value",
    subjects=ALL,
    where=("{middle}.attn1.to_[qv]",),
)
def biases_exchanged(pipe: Any) -> None:
    """Bug: two biases of the same shape are loaded in each other's place."""
    for block in middles(pipe):
        attention = self_attention(block)
        need(attention.to_q.bias is not None, "no bias")
        _exchange(attention.to_q.bias, attention.to_v.bias)


@fault(
    acts="transformer, middle block, last bias of a linear layer",
    source="https://github.com/huggingface/optimum/pull/1827",
    subjects=ALL,
    where=("{middle}.ffn.net.2",),
)
def bias_at_random(pipe: Any) -> None:
    """Bug: a bias that was missing from the file keeps its random initialisation."""
    for block in middles(pipe):
        layers = [layer for layer in linears(block) if layer.bias is not None]
        need(layers, "no bias")
        bound = layers[-1].in_features ** -0.5  # as torch.nn.Linear.reset_parameters
        bias = layers[-1].bias.data
        bias.copy_(_normal_like(bias, 4).clamp(-1, 1) * bound)


@fault(
    acts="transformer, middle block, its first norm or table",
    source="https://github.com/ecmwf/WeatherGenerator/issues/838",
    subjects=ALL,
    where=MIDDLE,
)
def tensor_left_at_initialisation(pipe: Any) -> None:
    """Bug: one tensor was missing from the file and is zero (a table) or one (a norm's scale)."""
    for block in middles(pipe):
        table = getattr(block, "scale_shift_table", None)
        if table is not None:
            table.data.zero_()
            continue
        norms = [module for module in block.modules() if isinstance(module, nn.GroupNorm)]
        need(norms, "no norm")
        norms[0].weight.data.fill_(1)


@fault(
    acts="transformer, two blocks' feed-forward or residual layers",
    subjects=ALL,
    where=("{before}.attn1.to_q", "{middle}.attn1.to_q"),
)
def layers_of_two_blocks_exchanged(pipe: Any) -> None:
    """Bug: a layer of one block is loaded into the next, and the other way round."""
    for model in models(pipe):
        block = middle(model)
        found: Any = block.resnets if hasattr(block, "resnets") else block_list(model)
        need(found is not None and len(found) > 1, "fewer than two blocks")
        later = len(found) // 2
        first, second = (
            next(part for part in found[i].modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
            for i in (later - 1, later)
        )
        need(first.weight.shape == second.weight.shape, "the layers have different shapes")
        _exchange(first.weight, second.weight)


@fault(
    acts="transformer, patch_embedding or first convolution",
    subjects=ALL,
    where=("patch_embedding",),
)
def input_kernel_transposed(pipe: Any) -> None:
    """Bug: the first convolution's kernel has its rows and columns exchanged."""
    for model in models(pipe):
        kinds = (nn.Conv2d, nn.Conv3d)
        found = [module for module in model.modules() if isinstance(module, kinds)]
        need(found, "no convolution")
        weight = found[0].weight.data
        weight.copy_(weight.transpose(-1, -2).clone())
