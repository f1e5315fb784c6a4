"""Official Wan 2.2 `WanT2V.generate` on tiny experts: run_wan22.py FOLDER FAULT OUTPUT.

Needs TRUESTEP_WAN22, a checkout of github.com/Wan-Video/Wan2.2. Its package is entered without its
own start, which imports what only speech and animation need.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from typing import Any

import torch
import torch.nn.functional as functional

place = os.path.join(os.environ["TRUESTEP_WAN22"], "wan")
package = types.ModuleType("wan")
package.__path__ = [place]
package.__spec__ = importlib.machinery.ModuleSpec("wan", None, is_package=True)
sys.modules["wan"] = package
torch.cuda.current_device = lambda: "cpu"  # a default argument of its text encoder asks at import
import wan.modules.model as official  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from wan.text2video import WanT2V  # noqa: E402

folder, fault, output = sys.argv[1:]


def attention(q: Any, k: Any, v: Any, q_lens: Any = None, k_lens: Any = None, **_: Any) -> Any:
    """Attention of a machine without a GPU; the official one asserts on half precision."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


official.flash_attention = attention
given = load_file(f"{folder}/inputs.safetensors")


def expert(name: str) -> Any:
    """One of the two models."""
    model = official.WanModel(
        model_type="t2v", patch_size=(1, 2, 2), text_len=32, in_dim=16, dim=256, ffn_dim=512,
        freq_dim=256, text_dim=4096, out_dim=16, num_heads=2, num_layers=2, qk_norm=True,
        cross_attn_norm=True, eps=1e-6,
    )  # fmt: skip
    model.load_state_dict(load_file(f"{folder}/{name}.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


pipe = WanT2V.__new__(WanT2V)
pipe.device, pipe.rank, pipe.t5_cpu, pipe.config = torch.device("cpu"), 0, True, None
pipe.num_train_timesteps, pipe.param_dtype, pipe.sp_size = 1000, torch.float32, 1
pipe.vae_stride, pipe.patch_size, pipe.sample_neg_prompt = (4, 8, 8), (1, 2, 2), "n"
pipe.boundary, pipe.init_on_cpu = {"late": 0.7, "early": 0.95}.get(fault, 0.875), False
pipe.high_noise_model, pipe.low_noise_model = expert("official"), expert("official-low")
if fault == "experts":
    pipe.high_noise_model, pipe.low_noise_model = pipe.low_noise_model, pipe.high_noise_model
if fault == "eps":
    pipe.low_noise_model.blocks[1].self_attn.norm_q.eps = 1e-2
if fault == "bias":
    pipe.high_noise_model.blocks[0].cross_attn.o.bias.zero_()
texts = {"p": given["cond"][0].clone(), "n": given["uncond"][0].clone()}
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
scales = (4.0, 3.0) if fault == "scales" else (3.0, 4.0)
with torch.autocast("cuda", enabled=False):
    pipe.generate(
        "p", size=(64, 64), frame_num=9, shift=5.0, sample_solver="unipc", sampling_steps=4,
        guide_scale=scales, seed=0, offload_model=False,
    )  # fmt: skip
save_file({"raw": kept["raw"].contiguous()}, output)
