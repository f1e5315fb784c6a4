"""Tiny random Wan weights as a folder of diffusers and under the official names, and inputs.

python tiny_wan.py FOLDER     makes `trusted`, `trusted-two`, `official.safetensors` ... in it
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

SHIFT, STEPS, SCALE, LENGTH = 5.0, 4, 5.0, 32
SIZES = {"dim": 256, "ffn_dim": 512, "freq_dim": 256, "text_dim": 4096, "num_heads": 2}
SIZES |= {"num_layers": 2, "in_dim": 16, "out_dim": 16}
LATENT = (1, 16, 3, 8, 8)

OFFICIAL = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".norm2.", ".norm3."),
)


def official(name: str) -> str:
    """The official name of a weight of diffusers."""
    if name == "scale_shift_table":
        return "head.modulation"
    if name.endswith(".scale_shift_table"):
        return name.replace("scale_shift_table", "modulation")
    for ours, theirs in OFFICIAL:
        name = name.replace(ours, theirs)
    return name


def make(folder: Path) -> None:
    """Write everything."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from safetensors.torch import save_file

    from truestep.testing import tiny

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=SIZES["text_dim"],
        freq_dim=256,
        ffn_dim=512,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
    )
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "scale_shift" not in name:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.02)
    for scheduler, settings in (
        ("FlowMatchEulerDiscreteScheduler", {"shift": SHIFT}),
        ("UniPCMultistepScheduler", {"flow_shift": SHIFT, "use_flow_sigmas": True}),
    ):
        trusted = folder / ("trusted" if "Euler" in scheduler else "trusted-unipc")
        tiny.save("WanPipeline", trusted)
        shutil.rmtree(trusted / "transformer")
        model.save_pretrained(trusted / "transformer")
        index = json.loads((trusted / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", scheduler]
        (trusted / "model_index.json").write_text(json.dumps(index))
        config = {"_class_name": scheduler, **settings}
        config |= {"prediction_type": "flow_prediction"} if "UniPC" in scheduler else {}
        (trusted / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        vae = trusted / "vae" / "config.json"
        own = AutoencoderKLWan().config  # ComfyUI has these numbers built in
        means = {key: list(own[key]) for key in ("latents_mean", "latents_std")}
        vae.write_text(json.dumps({**json.loads(vae.read_text()), **means}))
    weights = {official(name): t.contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "official.safetensors")
    dice = torch.Generator().manual_seed(1)
    noise = torch.randn(LATENT, generator=dice)
    texts = {}
    for name, used in (("cond", 20), ("uncond", 12)):
        texts[name] = torch.randn(1, LENGTH, SIZES["text_dim"], generator=dice)
        texts[name][:, used:] = 0.0  # as the pipeline pads
    save_file({"noise": noise, **texts}, folder / "inputs.safetensors")


def make_two(folder: Path) -> None:
    """Add `trusted-two`, with a second expert for low noise, to what `make` wrote."""
    import torch
    from diffusers import WanTransformer3DModel
    from safetensors.torch import save_file

    trusted = folder / "trusted-two"
    shutil.copytree(folder / "trusted-unipc", trusted)
    model = WanTransformer3DModel.from_pretrained(trusted / "transformer")
    dice = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=dice)
    model.save_pretrained(trusted / "transformer_2")
    index = json.loads((trusted / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    (trusted / "model_index.json").write_text(json.dumps(index))
    weights = {official(name): t.contiguous() for name, t in model.state_dict().items()}
    save_file(weights, folder / "official-low.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    make_two(Path(sys.argv[1]))
