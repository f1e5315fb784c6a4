"""Tiny random HunyuanVideo weights as a folder of diffusers and under the official names; inputs.

python tiny_hunyuan.py FOLDER     makes `trusted`, `official.safetensors` ... in it

Official names and fused projections: hyvideo/modules/models.py of Tencent-Hunyuan/HunyuanVideo at
fa14b001.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SHIFT, STEPS, SCALE, EMBEDDED, LENGTH = 7.0, 4, 5.0, 6.0, 24
LATENT = (1, 4, 3, 8, 8)
HIDDEN, HEADS, TEXT, POOLED = 64, 2, 48, 32

FAULTS: dict[str, tuple[str, ...]] = {"pooled": ("text",), "norm": ("prediction", "module")}
"""Beside those of all engines: the other branch's pooled text, and another `eps` in one norm."""

NAMES = (
    ("context_embedder.time_text_embed.timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0"),
    ("context_embedder.time_text_embed.timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2"),
    ("context_embedder.time_text_embed.text_embedder", "txt_in.c_embedder"),
    ("context_embedder.token_refiner.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
    ("context_embedder.proj_in", "txt_in.input_embedder"),
    ("time_text_embed.timestep_embedder.linear_1", "time_in.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "time_in.mlp.2"),
    ("time_text_embed.guidance_embedder.linear_1", "guidance_in.mlp.0"),
    ("time_text_embed.guidance_embedder.linear_2", "guidance_in.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    ("x_embedder", "img_in"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
)
REFINER = (
    ("norm_out.linear", "adaLN_modulation.1"),
    ("attn.to_out.0", "self_attn_proj"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
)
DOUBLE = (
    ("attn.norm_q", "img_attn_q_norm"),
    ("attn.norm_k", "img_attn_k_norm"),
    ("attn.norm_added_q", "txt_attn_q_norm"),
    ("attn.norm_added_k", "txt_attn_k_norm"),
    ("attn.to_out.0", "img_attn_proj"),
    ("attn.to_add_out", "txt_attn_proj"),
    ("norm1.linear", "img_mod.linear"),
    ("norm1_context.linear", "txt_mod.linear"),
    ("ff_context.net.0.proj", "txt_mlp.fc1"),
    ("ff_context.net.2", "txt_mlp.fc2"),
    ("ff.net.0.proj", "img_mlp.fc1"),
    ("ff.net.2", "img_mlp.fc2"),
)
SINGLE = (
    ("attn.norm_q", "q_norm"),
    ("attn.norm_k", "k_norm"),
    ("norm.linear", "modulation.linear"),
    ("proj_out", "linear2"),
)
FUSED = {
    "context_embedder.token_refiner.refiner_blocks": {
        "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v")
    },
    "transformer_blocks": {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single_transformer_blocks": {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}
"""By list of blocks the official layers that are several of diffusers' in one."""

BLOCKS = {
    "context_embedder.token_refiner.refiner_blocks": (
        "txt_in.individual_token_refiner.blocks",
        REFINER,
    ),
    "transformer_blocks": ("double_blocks", DOUBLE),
    "single_transformer_blocks": ("single_blocks", SINGLE),
}


def official(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of diffusers' transformer as the official one has them."""
    left, made = dict(weights), {}
    for blocks, layers in FUSED.items():
        theirs = BLOCKS[blocks][0]
        numbers = {name[len(blocks) + 1 :].split(".")[0] for name in left if _of(name, blocks)}
        for number in numbers:
            for layer, parts in layers.items():
                for kind in ("weight", "bias"):
                    one = [left.pop(f"{blocks}.{number}.{part}.{kind}") for part in parts]
                    made[f"{theirs}.{number}.{layer}.{kind}"] = torch.cat(one)
    for name, value in left.items():
        if name.startswith("norm_out.linear"):  # the official layer gives the shift first
            value = torch.cat([*reversed(value.chunk(2))])
        made[_renamed(name)] = value
    return {name: value.contiguous() for name, value in made.items()}


def _of(name: str, blocks: str) -> bool:
    return name.startswith(f"{blocks}.")


def _renamed(name: str) -> str:
    for blocks, (theirs, layers) in BLOCKS.items():
        if _of(name, blocks):
            number, _, rest = name[len(blocks) + 1 :].partition(".")
            return f"{theirs}.{number}.{_first(rest, layers)}"
    if name.startswith("proj_out."):
        return f"final_layer.linear.{name.rpartition('.')[2]}"
    return _first(name, NAMES)


def _first(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in pairs:
        if name.startswith(f"{ours}."):
            return f"{theirs}{name[len(ours) :]}"
    return name


def make(folder: Path) -> None:
    """Write everything."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
    from safetensors.torch import save_file

    from truestep.testing import tiny

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=LATENT[1],
        out_channels=LATENT[1],
        num_attention_heads=HEADS,
        attention_head_dim=HIDDEN // HEADS,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=TEXT,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(8, 12, 12),
    )
    for name, weight in model.named_parameters():
        if "timestep_embedder" in name or "guidance_embedder" in name:
            torch.nn.init.normal_(weight, std=0.02)  # as the official layers begin
        elif weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.02)
        else:
            torch.nn.init.normal_(weight, mean=1.0, std=0.1)
    pipe = tiny.pipeline("HunyuanVideoPipeline")
    pipe.register_modules(
        transformer=model.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    )
    pipe.save_pretrained(str(folder / "trusted"))
    save_file(official(model.state_dict()), folder / "official.safetensors")
    dice = torch.Generator().manual_seed(1)
    given = {"noise": torch.randn(LATENT, generator=dice)}
    for name, used in (("cond", 20), ("uncond", 12)):
        given[name] = torch.randn(1, LENGTH, TEXT, generator=dice)
        given[f"{name}_mask"] = (torch.arange(LENGTH) < used)[None].long()
        given[f"{name}_pooled"] = torch.randn(1, POOLED, generator=dice)
    save_file(given, folder / "inputs.safetensors")


def pipeline(folder: Path) -> Any:
    """The trusted pipeline."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(folder / "trusted"))


def call(folder: Path) -> dict[str, Any]:
    """The same generation as a call of diffusers' pipeline."""
    from safetensors.torch import load_file

    given = load_file(folder / "inputs.safetensors")
    return {
        "prompt_embeds": given["cond"],
        "prompt_attention_mask": given["cond_mask"],
        "pooled_prompt_embeds": given["cond_pooled"],
        "negative_prompt_embeds": given["uncond"],
        "negative_prompt_attention_mask": given["uncond_mask"],
        "negative_pooled_prompt_embeds": given["uncond_pooled"],
        "latents": given["noise"],
        "num_inference_steps": STEPS,
        "true_cfg_scale": SCALE,
        "guidance_scale": EMBEDDED,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "output_type": "pt",
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]))
