"""Tiny random Flux weights as a folder of diffusers and under the official names, and inputs.

python tiny_flux.py FOLDER     makes `trusted`, `flux.safetensors`, `ae.safetensors` ... in it
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

STEPS, GUIDANCE, LENGTH, SIZE, SEED = 4, 3.5, 24, 64, 3
AXES = (8, 12, 12)
WIDTH, HEADS, DEPTH, SINGLE, TEXT, POOLED = 64, 2, 2, 2, 48, 40

EMBEDDERS = {
    "time_text_embed.timestep_embedder": "time_in",
    "time_text_embed.text_embedder": "vector_in",
    "time_text_embed.guidance_embedder": "guidance_in",
}
WHOLE = {"context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear"}
STREAMS = (
    ("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "norm_{}", "ff"),
    ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out",
     "norm_added_{}", "ff_context"),
)  # fmt: skip
"""Of a double block: the official stream, and what it is called by diffusers."""

Weights = dict[str, Any]


def official(weights: Weights) -> Weights:
    """Weights of diffusers' transformer under the official names, projections fused."""
    import torch

    found: Weights = {}

    def put(name: str, *sources: str) -> None:
        for kind in ("weight", "bias"):
            parts = [weights[f"{source}.{kind}"] for source in sources]
            found[f"{name}.{kind}"] = torch.cat(parts)

    for source, name in EMBEDDERS.items():
        put(f"{name}.in_layer", f"{source}.linear_1")
        put(f"{name}.out_layer", f"{source}.linear_2")
    for source, name in WHOLE.items():
        put(name, source)
    put("final_layer.adaLN_modulation.1", "norm_out.linear")
    for kind in ("weight", "bias"):  # scale before shift, and here the other way
        name = f"final_layer.adaLN_modulation.1.{kind}"
        found[name] = torch.cat(list(reversed(found[name].chunk(2))))
    for index in range(DEPTH):
        block, own = f"transformer_blocks.{index}", f"double_blocks.{index}"
        for stream, norm, projections, out, scales, ff in STREAMS:
            put(f"{own}.{stream}_mod.lin", f"{block}.{norm}.linear")
            put(f"{own}.{stream}_attn.qkv", *(f"{block}.attn.{name}" for name in projections))
            put(f"{own}.{stream}_attn.proj", f"{block}.attn.{out}")
            put(f"{own}.{stream}_mlp.0", f"{block}.{ff}.net.0.proj")
            put(f"{own}.{stream}_mlp.2", f"{block}.{ff}.net.2")
            for which, letter in (("query", "q"), ("key", "k")):
                scale = weights[f"{block}.attn.{scales.format(letter)}.weight"]
                found[f"{own}.{stream}_attn.norm.{which}_norm.scale"] = scale
    for index in range(SINGLE):
        block, own = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        put(f"{own}.modulation.lin", f"{block}.norm.linear")
        projections = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        put(f"{own}.linear1", *(f"{block}.{name}" for name in projections))
        put(f"{own}.linear2", f"{block}.proj_out")
        for which, letter in (("query", "q"), ("key", "k")):
            found[f"{own}.norm.{which}_norm.scale"] = weights[f"{block}.attn.norm_{letter}.weight"]
    return found


def official_ae(weights: Weights, levels: int) -> Weights:
    """Weights of diffusers' VAE under the official names."""
    pairs = [
        ("conv_norm_out", "norm_out"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        *((f"mid_block.attentions.0.to_{x}", f"mid.attn_1.{x}") for x in "qkv"),
        *((f"down_blocks.{i}.resnets", f"down.{i}.block") for i in range(levels)),
        *((f"down_blocks.{i}", f"down.{i}") for i in range(levels)),
        *((f"up_blocks.{i}.resnets", f"up.{levels - 1 - i}.block") for i in range(levels)),
        *((f"up_blocks.{i}", f"up.{levels - 1 - i}") for i in range(levels)),
    ]
    found = {}
    for name, weight in weights.items():
        for source, other in pairs:
            name = name.replace(source, other)
        projection = ".attn_1." in name and name.endswith("weight") and ".norm." not in name
        found[name] = weight[:, :, None, None] if projection else weight
    return found


def make(folder: Path) -> None:
    """Write everything."""
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from safetensors.torch import save_file

    from truestep.testing import tiny

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=DEPTH, num_single_layers=SINGLE, num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS, joint_attention_dim=TEXT, pooled_projection_dim=POOLED,
        guidance_embeds=True, axes_dims_rope=AXES,
    )  # fmt: skip
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.02)
        else:  # norms that all scale by 1 would hide an exchange
            torch.nn.init.normal_(weight, mean=1.0, std=0.1)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[32, 32, 32, 64], layers_per_block=1, latent_channels=16,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    trusted = folder / "trusted"
    tiny.save("FluxPipeline", trusted)
    for name, part in (("transformer", model), ("vae", vae)):
        shutil.rmtree(trusted / name)
        part.save_pretrained(trusted / name)
    weights = {name: t.contiguous() for name, t in official(model.state_dict()).items()}
    save_file(weights, folder / "flux.safetensors")
    weights = official_ae(vae.state_dict(), levels=4)
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "ae.safetensors")
    dice = torch.Generator().manual_seed(SEED)  # as the engine draws it, and the pipeline
    noise = torch.randn(1, 16, SIZE // 8, SIZE // 8, generator=dice)
    texts = {}
    for name in ("cond", "other"):
        texts[name] = torch.randn(1, LENGTH, TEXT, generator=dice)
        texts[f"{name}-pooled"] = torch.randn(1, POOLED, generator=dice)
    save_file({"noise": noise, **texts}, folder / "inputs.safetensors")


def pipeline(folder: Path) -> Any:
    """The trusted pipeline."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(folder / "trusted"))


def call(folder: Path) -> dict[str, Any]:
    """What the trusted pipeline is called with for the same generation."""
    from diffusers import FluxPipeline
    from safetensors.torch import load_file

    given = load_file(folder / "inputs.safetensors")
    side = SIZE // 8
    return {
        "prompt_embeds": given["cond"],
        "pooled_prompt_embeds": given["cond-pooled"],
        "latents": FluxPipeline._pack_latents(given["noise"], 1, 16, side, side),
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "height": SIZE,
        "width": SIZE,
        "output_type": "pt",
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]))
