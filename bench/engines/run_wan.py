"""Official WanT2V.generate on tiny weights: run_wan.py FOLDER FAULT OUTPUT; needs TRUESTEP_WAN."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.nn.functional as functional

sys.path.insert(0, os.environ["TRUESTEP_WAN"])
torch.cuda.current_device = lambda: "cpu"  # a default argument of its text encoder asks at import
import wan  # noqa: E402
import wan.modules.model as official  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

folder, fault, output = sys.argv[1:]


def attention(q: Any, k: Any, v: Any, q_lens: Any = None, k_lens: Any = None, **_: Any) -> Any:
    """Attention of a machine without a GPU; the official one asserts on half precision."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


official.flash_attention = attention
given = load_file(f"{folder}/inputs.safetensors")
model = official.WanModel(
    model_type="t2v", patch_size=(1, 2, 2), text_len=32, in_dim=16, dim=256, ffn_dim=512,
    freq_dim=256, text_dim=4096, out_dim=16, num_heads=2, num_layers=2, qk_norm=True,
    cross_attn_norm=True, eps=1e-6,
)  # fmt: skip
model.load_state_dict(load_file(f"{folder}/official.safetensors"), strict=True)
pipe = wan.WanT2V.__new__(wan.WanT2V)
pipe.device, pipe.rank, pipe.t5_cpu, pipe.config = torch.device("cpu"), 0, True, None
pipe.num_train_timesteps, pipe.param_dtype, pipe.sp_size = 1000, torch.float32, 1
pipe.vae_stride, pipe.patch_size, pipe.sample_neg_prompt = (4, 8, 8), (1, 2, 2), "n"
pipe.model = model.eval().requires_grad_(False)
texts = {"p": given["cond"][0].clone(), "n": given["uncond"][0].clone()}
if fault == "tail":
    texts["p"][-3:] = 0.05
if fault == "swapped":
    texts = {"p": texts["n"], "n": texts["p"]}
pipe.text_encoder = lambda prompts, device: [texts[prompts[0]]]
kept = {}


class Vae:
    """Keeps the latent, and decodes nothing."""

    class model:  # noqa: N801 (the engine's name)
        z_dim = 16

    def decode(self, latents: list[torch.Tensor]) -> list[torch.Tensor]:
        kept["raw"] = latents[0][None].clone()
        return latents


pipe.vae = Vae()
randn = torch.randn
torch.randn = lambda *s, **k: given["noise"][0].clone() if s == (16, 3, 8, 8) else randn(*s, **k)
if fault == "time":
    forward = official.WanModel.forward
    official.WanModel.forward = lambda self, x, t, **k: forward(self, x, t=t * 0.999, **k)
    call = official.WanModel.__call__
    official.WanModel.__call__ = lambda self, x, t, **k: call(self, x, t=t * 0.999, **k)
    official.WanModel.forward = forward
if fault == "order":
    scheduler = wan.text2video.FlowUniPCMultistepScheduler
    step, latents = scheduler.step, []

    def late(self: Any, velocity: Any, time: Any, latent: Any, **options: Any) -> Any:
        """Step from the latent of the step before."""
        latents.append(latent)
        return step(self, velocity, time, latents[max(len(latents) - 2, 0)], **options)

    scheduler.step = late
with torch.autocast("cuda", enabled=False):
    pipe.generate(
        "p", size=(64, 64), frame_num=9, shift=6.0 if fault == "shift" else 5.0,
        sample_solver="unipc", sampling_steps=4, guide_scale=-5.0 if fault == "sign" else 5.0,
        seed=0, offload_model=False,
    )  # fmt: skip
save_file({"raw": kept["raw"].contiguous()}, output)
