"""Tiny random Cosmos-Predict2 weights (text to image) of diffusers and by official names; inputs.

python tiny_cosmos_predict2.py FOLDER     makes `trusted`, `official.safetensors` ... in it

Official names: cosmos_predict2/models/text2image_dit.py of nvidia-cosmos/cosmos-predict2 at
661da477. Its loop has a prediction more than it has steps: the trusted pipeline is given as many
steps as the official one predicts.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

PREDICTIONS, SCALE, LENGTH = 5, 3.0, 24
LATENT = (1, 16, 1, 8, 8)
HEADS, WIDTH, TEXT = 2, 24, 32
FAULTS: dict[str, tuple[str, ...]] = {
    "solver": ("update",),
    "eps": ("prediction",),
    "norm": ("prediction", "module"),
}
"""Beside those of all engines what the official code has otherwise than diffusers (its solver, of
the second order, and `eps` of the norms of queries and keys), and another `eps` in one norm."""

NAMES = (
    ("transformer_blocks.", "blocks."),
    ("norm1.linear_", "adaln_modulation_self_attn."),
    ("norm2.linear_", "adaln_modulation_cross_attn."),
    ("norm3.linear_", "adaln_modulation_mlp."),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("to_q.", "q_proj."),
    ("to_k.", "k_proj."),
    ("to_v.", "v_proj."),
    ("to_out.0.", "output_proj."),
    ("norm_q.", "q_norm."),
    ("norm_k.", "k_norm."),
    ("ff.net.0.proj.", "mlp.layer1."),
    ("ff.net.2.", "mlp.layer2."),
    ("patch_embed.proj.", "x_embedder.proj.1."),
    ("time_embed.t_embedder.", "t_embedder.1."),
    ("time_embed.norm.", "t_embedding_norm."),
    ("norm_out.linear_", "final_layer.adaln_modulation."),
)


def official(name: str) -> str:
    """The official name of a weight of diffusers."""
    if name.startswith("proj_out."):
        return name.replace("proj_out", "final_layer.linear")
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name


def make(folder: Path) -> None:
    """Write everything."""
    from diffusers import CosmosTransformer3DModel
    from safetensors.torch import save_file

    from truestep.testing import tiny

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = CosmosTransformer3DModel(
        in_channels=LATENT[1],
        out_channels=LATENT[1],
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH,
        num_layers=2,
        text_embed_dim=TEXT,
        adaln_lora_dim=8,
        max_size=(128, 240, 240),
        rope_scale=(1.0, 4.0, 4.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(weight, mean=1.0, std=0.1)
    tiny.save("Cosmos2TextToImagePipeline", folder / "trusted")
    shutil.rmtree(folder / "trusted" / "transformer")
    model.save_pretrained(folder / "trusted" / "transformer")
    weights = {official(name): t.contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "official.safetensors")
    dice = torch.Generator().manual_seed(1)
    given = {"noise": torch.randn(LATENT, generator=dice)}
    for name, used in (("cond", 20), ("uncond", 12)):
        given[name] = torch.randn(1, LENGTH, TEXT, generator=dice)
        given[name][:, used:] = 0.0  # as the encoder pads
    save_file(given, folder / "inputs.safetensors")


def pipeline(folder: Path) -> Any:
    """The trusted pipeline, with a checker that needs no other package."""
    from diffusers import CosmosTransformer3DModel

    from truestep.testing import tiny

    pipe = tiny.pipeline("Cosmos2TextToImagePipeline")
    model = CosmosTransformer3DModel.from_pretrained(str(folder / "trusted" / "transformer"))
    pipe.register_modules(transformer=model.eval())
    return pipe


def call(folder: Path) -> dict[str, Any]:
    """The same generation as a call of it."""
    from safetensors.torch import load_file

    given = load_file(folder / "inputs.safetensors")
    return {
        "prompt_embeds": given["cond"],
        "negative_prompt_embeds": given["uncond"],
        "latents": given["noise"],
        "num_inference_steps": PREDICTIONS,
        "guidance_scale": SCALE,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]))
