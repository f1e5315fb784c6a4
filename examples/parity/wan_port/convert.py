"""Weights of diffusers' `WanTransformer3DModel`, laid out as `model.py` wants them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

Tensor = torch.Tensor

_FUSED = {
    "self_attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross.kv": ("attn2.to_k", "attn2.to_v"),
}
"""Layers of a block that are one in the port: their rows one after the other."""

_RENAMED = {
    "self_attn.q_norm.scale": "attn1.norm_q.weight",
    "self_attn.k_norm.scale": "attn1.norm_k.weight",
    "self_attn.out.weight": "attn1.to_out.0.weight",
    "self_attn.out.bias": "attn1.to_out.0.bias",
    "cross.q.weight": "attn2.to_q.weight",
    "cross.q.bias": "attn2.to_q.bias",
    "cross.q_norm.scale": "attn2.norm_q.weight",
    "cross.k_norm.scale": "attn2.norm_k.weight",
    "cross.out.weight": "attn2.to_out.0.weight",
    "cross.out.bias": "attn2.to_out.0.bias",
    "mlp.up.weight": "ffn.net.0.proj.weight",
    "mlp.up.bias": "ffn.net.0.proj.bias",
    "mlp.down.weight": "ffn.net.2.weight",
    "mlp.down.bias": "ffn.net.2.bias",
}
"""Parameters of a block that are the same under another name."""

_OPTIONAL = {"cross_norm.gain": "norm2.weight", "cross_norm.shift": "norm2.bias"}
"""Parameters of a block that a model with `cross_attn_norm` has."""

_LAYERS = {
    "text_mlp.up": "condition_embedder.text_embedder.linear_1",
    "text_mlp.down": "condition_embedder.text_embedder.linear_2",
    "time_mlp.up": "condition_embedder.time_embedder.linear_1",
    "time_mlp.down": "condition_embedder.time_embedder.linear_2",
    "time_modulation": "condition_embedder.time_proj",
    "head.proj": "proj_out",
}
"""Linear layers outside the blocks."""


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict, strictly: every tensor is used once, in its own dtype.

    Raises:
        KeyError: A tensor is missing.
        ValueError: Tensors are left over.
    """
    left = dict(state)
    made = {"patch_in.weight": left.pop("patch_embedding.weight").flatten(1)}
    made["patch_in.bias"] = left.pop("patch_embedding.bias")
    for new, old in _LAYERS.items():
        for kind in ("weight", "bias"):
            made[f"{new}.{kind}"] = left.pop(f"{old}.{kind}")
    made["head.modulation"] = left.pop("scale_shift_table").squeeze(0)
    blocks = {int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))}
    for index in sorted(blocks):
        made.update(_block(left, f"blocks.{index}.", f"layers.{index}."))
    if left:
        raise ValueError(f"{len(left)} tensors are not of this architecture: {', '.join(left)}")
    return made


def _block(left: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """One block's tensors, taken out of `left`."""
    made = {f"{new}modulation": left.pop(f"{old}scale_shift_table").squeeze(0)}
    for name, parts in _FUSED.items():
        for kind in ("weight", "bias"):
            rows = [left.pop(f"{old}{part}.{kind}") for part in parts]
            made[f"{new}{name}.{kind}"] = torch.cat(rows)
    for name, source in _RENAMED.items():
        made[f"{new}{name}"] = left.pop(f"{old}{source}")
    for name, source in _OPTIONAL.items():
        if f"{old}{source}" in left:
            made[f"{new}{name}"] = left.pop(f"{old}{source}")
    return made
