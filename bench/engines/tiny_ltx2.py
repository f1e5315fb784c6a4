"""Tiny random LTX-2 weights as a folder of diffusers and under the official names, and inputs.

python tiny_ltx2.py FOLDER     makes `trusted`, `ltx2.safetensors`, `inputs.safetensors` in it
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

STEPS, SCALE, LENGTH = 4, 4.0, 16
HEIGHT, WIDTH, FRAMES, RATE = 96, 128, 17, 24.0
LATENT = (1, 4, 3, 3, 4)

OFFICIAL = (
    ("av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
    ("av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
    ("av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
    ("av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
    ("video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video"),
    ("audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio"),
    ("audio_proj_in", "audio_patchify_proj"),
    ("proj_in", "patchify_proj"),
    ("time_embed", "adaln_single"),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
)
"""Part of a weight's name by diffusers, and its official one; the first that fits counts."""


def official(name: str) -> str:
    """The official name of a weight of diffusers' transformer."""
    for ours, theirs in OFFICIAL:
        if ours in name:
            return name.replace(ours, theirs)
    return name


def make(folder: Path) -> None:
    """Write everything."""
    import torch
    from diffusers import LTX2VideoTransformer3DModel
    from safetensors.torch import save_file

    from truestep.testing import tiny

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trusted = folder / "trusted"
    tiny.save("LTX2Pipeline", trusted)
    torch.manual_seed(0)
    config = json.loads((trusted / "transformer" / "config.json").read_text())
    config |= {"attention_head_dim": 16, "audio_attention_head_dim": 8, "cross_attention_dim": 32}
    config |= {"audio_cross_attention_dim": 16}
    model = LTX2VideoTransformer3DModel.from_config(config)
    for name, weight in model.named_parameters():
        if "bias" in name or "table" in name:
            torch.nn.init.normal_(weight, std=0.1)
        elif weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(weight, mean=1.0, std=0.1)
    shutil.rmtree(trusted / "transformer")
    model.save_pretrained(trusted / "transformer")
    for name, values in (
        ("vae", {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}),
        ("scheduler", {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
                       "shift_terminal": 0.1}),
    ):  # fmt: skip
        file = next((trusted / name).glob("*config.json"))
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    weights = {official(name): t.contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "ltx2.safetensors")
    save_file(_inputs(trusted), folder / "inputs.safetensors")


def _inputs(trusted: Path) -> dict[str, Any]:
    """Noise, and what the pipeline's connectors make of texts, as the model is given them."""
    import torch
    from diffusers import LTX2Pipeline

    pipe = LTX2Pipeline.from_pretrained(str(trusted))
    dice = torch.Generator().manual_seed(1)
    texts = {}
    for name in ("cond", "uncond"):
        texts[f"prompt-{name}"] = torch.randn(1, LENGTH, 96, generator=dice)
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    pipe(**_call(texts), generator=dice, num_inference_steps=STEPS, output_type="latent")
    given = calls[0]
    tokens = given["hidden_states"][:1].reshape(1, *LATENT[2:], LATENT[1])
    sound = given["audio_hidden_states"][:1]
    found = {"noise": tokens.permute(0, 4, 1, 2, 3), "audio-noise": sound, **texts}
    for prefix, name in (("", "encoder_hidden_states"), ("audio-", "audio_encoder_hidden_states")):
        found[f"{prefix}uncond"], found[f"{prefix}cond"] = given[name].chunk(2)
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def _call(texts: dict[str, Any]) -> dict[str, Any]:
    import torch

    masks = torch.ones(1, LENGTH, dtype=torch.long)
    alone = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    return {
        "prompt_embeds": texts["prompt-cond"],
        "negative_prompt_embeds": texts["prompt-uncond"],
        "prompt_attention_mask": masks,
        "negative_prompt_attention_mask": masks,
        "guidance_scale": SCALE,
        "audio_guidance_scale": SCALE,
        **alone,
        **{f"audio_{name}": value for name, value in alone.items()},
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "frame_rate": RATE,
    }


def pipeline(folder: Path) -> Any:
    """The trusted pipeline."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(folder / "trusted"))


def call(folder: Path) -> dict[str, Any]:
    """What the trusted pipeline is called with for the same generation."""
    from diffusers import LTX2Pipeline
    from safetensors.torch import load_file

    given = load_file(folder / "inputs.safetensors")
    return {
        **_call(given),
        "latents": LTX2Pipeline._pack_latents(given["noise"]),
        "audio_latents": given["audio-noise"],
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]))
