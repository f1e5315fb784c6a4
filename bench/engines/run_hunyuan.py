"""Official `HunyuanVideoSampler.predict` on tiny weights: run_hunyuan.py FOLDER FAULT OUTPUT.

Needs TRUESTEP_HUNYUAN, a checkout of github.com/Tencent-Hunyuan/HunyuanVideo. Patched for a machine
without a GPU: `flash_attn_varlen_func` is plain attention by parts, and one tensor that is made on
"cuda" is made on the CPU.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

sys.path.insert(0, os.environ["TRUESTEP_HUNYUAN"])
import hyvideo.diffusion.pipelines.pipeline_hunyuan_video as pipelines
import hyvideo.modules.attenion as attention
import hyvideo.modules.models as models
from hyvideo.diffusion.schedulers import FlowMatchDiscreteScheduler
from hyvideo.inference import HunyuanVideoSampler
from hyvideo.text_encoder import TextEncoderModelOutput
from hyvideo.vae.autoencoder_kl_causal_3d import AutoencoderKLCausal3D

folder, fault, output = sys.argv[1:]
torch.set_num_threads(1)
given = load_file(f"{folder}/inputs.safetensors")


def varlen(q: Any, k: Any, v: Any, starts: Any, _: Any, *lengths: int) -> Any:
    """Attention of parts of one row, each by itself."""
    parts = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        one = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(functional.scaled_dot_product_attention(*one)[0].transpose(0, 1))
    return torch.cat(parts)


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what is asked of a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{k: "cpu" if k == "device" else v for k, v in (kwargs or {}).items()})


cu_seqlens = models.get_cu_seqlens


def starts_on_cpu(mask: Any, length: int) -> Any:
    """The official function, its tensor on the CPU."""
    with OnCpu():
        return cu_seqlens(mask, length)


attention.flash_attn_varlen_func = varlen
models.get_cu_seqlens = starts_on_cpu


class Text:
    """Gives the embeddings of the inputs, where an encoder would need its weights."""

    dtype = torch.float32

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def text2tokens(self, prompt: Any, data_type: str) -> Any:
        return {"p": "cond", "n": "uncond"}[prompt[0]]

    def encode(self, branch: str, data_type: str, device: Any) -> Any:
        if fault == "swapped":
            branch = {"cond": "uncond", "uncond": "cond"}[branch]
        if self.kind == "pooled":
            return TextEncoderModelOutput(given[f"{branch}_pooled"])
        state = given[branch].clone()
        if fault == "tail" and branch == "cond":
            state[:, 16:20] = state[:, 16:20].flip(1)
        return TextEncoderModelOutput(state, given[f"{branch}_mask"])


model = models.HYVideoDiffusionTransformer(
    SimpleNamespace(text_states_dim=48, text_states_dim_2=32), in_channels=4, out_channels=4,
    hidden_size=64, heads_num=2, mm_double_blocks_depth=2, mm_single_blocks_depth=2,
    rope_dim_list=[8, 12, 12], guidance_embed=True,
)  # fmt: skip
model.load_state_dict(load_file(f"{folder}/official.safetensors"), strict=True)
model.eval().requires_grad_(False)
vae = AutoencoderKLCausal3D(
    down_block_types=("DownEncoderBlockCausal3D",) * 4,
    up_block_types=("UpDecoderBlockCausal3D",) * 4, block_out_channels=(8, 8, 8, 8),
    layers_per_block=1, latent_channels=4, norm_num_groups=2, scaling_factor=0.476986,
)  # fmt: skip
weights = load_file(f"{folder}/trusted/vae/diffusion_pytorch_model.safetensors")
vae.load_state_dict(weights, strict=True)
vae.eval().requires_grad_(False)
args = SimpleNamespace(
    precision="fp32", vae_precision="fp32", disable_autocast=True, vae="884-16c-hy", rope_theta=256,
    vae_tiling=False, flow_reverse=True, flow_solver="euler", denoise_type="flow",
)  # fmt: skip
sampler = HunyuanVideoSampler.__new__(HunyuanVideoSampler)
sampler.args, sampler.model, sampler.device = args, model, torch.device("cpu")
sampler.use_cpu_offload, sampler.default_negative_prompt = False, "n"
scheduler = FlowMatchDiscreteScheduler(shift=7.0)
sampler.pipeline = sampler.load_diffusion_pipeline(
    args, vae, Text("states"), Text("pooled"), model, scheduler, "cpu"
)
pipelines.randn_tensor = lambda shape, **_: given["noise"].clone()
if fault == "time":
    forward = models.HYVideoDiffusionTransformer.__call__
    models.HYVideoDiffusionTransformer.__call__ = lambda self, x, t, **k: forward(
        self, x, t * 0.999, **k
    )
if fault == "order":
    step, latents = FlowMatchDiscreteScheduler.step, []

    def late(self: Any, velocity: Any, time: Any, latent: Any, **options: Any) -> Any:
        """Step from the latent of the step before."""
        latents.append(latent)
        return step(self, velocity, time, latents[max(len(latents) - 2, 0)], **options)

    FlowMatchDiscreteScheduler.step = late
if fault == "norm":
    model.double_blocks[1].img_attn_q_norm.eps = 1e-1
if fault == "pooled":
    given["cond_pooled"] = given["uncond_pooled"]
if fault == "sign":
    type(sampler.pipeline).guidance_scale = property(lambda self: -self._guidance_scale)
made = sampler.predict(
    "p", height=64, width=64, video_length=9, seed=0, negative_prompt="n", infer_steps=4,
    guidance_scale=5.0, flow_shift=6.0 if fault == "shift" else 7.0, embedded_guidance_scale=6.0,
)  # fmt: skip
save_file({"video": made["samples"].contiguous()}, output)
