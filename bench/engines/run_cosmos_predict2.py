"""Official Cosmos-Predict2 `Text2ImagePipeline.__call__` on tiny weights:
run_cosmos_predict2.py FOLDER FAULT OUTPUT.

Needs TRUESTEP_COSMOS_PREDICT2, a checkout of github.com/nvidia-cosmos/cosmos-predict2. What needs a
GPU is put beside it: transformer_engine's norm and rotary embedding by their formulas, megatron's
state of a single process; a text encoder that asks for flash-attn is left out. Its attention, which
rounds to 16 bits, is the same in 32.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file

folder, fault, output = sys.argv[1:]
torch.set_num_threads(1)
sys.path.insert(0, os.environ["TRUESTEP_COSMOS_PREDICT2"])


class Absent(types.ModuleType):
    """A module that is not here; what is only imported of it is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Norm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps), times a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(size)), eps

    def reset_parameters(self) -> None:
        """It begins with ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotated(t: Any, freqs: Any, tensor_format: str, fused: bool) -> Any:
    """Halves of a head turned by angles of each token, `b s h d`."""
    angles = freqs.transpose(0, 1)
    first, second = t.chunk(2, dim=-1)
    return t * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


for name in (
    "megatron", "megatron.core", "transformer_engine", "transformer_engine.pytorch",
    "transformer_engine.pytorch.attention", "transformer_engine.pytorch.distributed",
    "transformer_engine.pytorch.module", "transformer_engine.pytorch.module.base",
    "imaginaire.models.vlm_qwen", "imaginaire.models.vlm_qwen_omni",
):  # fmt: skip
    sys.modules[name] = Absent(name)
sys.modules["megatron.core"].parallel_state = types.SimpleNamespace(  # type: ignore[attr-defined]
    is_initialized=lambda: False
)
sys.modules["transformer_engine"].pytorch = types.SimpleNamespace(  # type: ignore[attr-defined]
    RMSNorm=Norm
)
sys.modules["transformer_engine.pytorch.attention"].apply_rotary_pos_emb = (  # type: ignore[attr-defined]
    rotated
)
torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]
torch.cuda.Stream = type("Stream", (), {})  # type: ignore[misc]
import cosmos_predict2.module.a2a_cp as a2a_cp  # noqa: E402
import cosmos_predict2.pipelines.text2image as text2image  # noqa: E402
from cosmos_predict2.conditioner import ReMapkey, TextAttr, TextConditioner  # noqa: E402
from cosmos_predict2.models.text2image_dit import MiniTrainDIT  # noqa: E402
from cosmos_predict2.module.denoiser_scaling import RectifiedFlowScaling  # noqa: E402
from cosmos_predict2.schedulers.rectified_flow_scheduler import (  # noqa: E402
    RectifiedFlowAB2Scheduler,
)


def attention(q: Any, k: Any, v: Any, **_: Any) -> Any:
    """Attention `b s h d` of a machine without a GPU."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


a2a_cp.attention = attention
given = load_file(f"{folder}/inputs.safetensors")
kept = {}


class Tokenizer:
    """Keeps the latent, and decodes nothing."""

    spatial_compression_factor = 8

    def get_latent_num_frames(self, frames: int) -> int:
        return 1

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 16, 1, 8, 8)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        kept["raw"] = latent.clone()
        return latent


class Text:
    """Gives the embeddings of the inputs, where an encoder would need its weights."""

    def encode_prompts(self, prompt: str, **_: Any) -> torch.Tensor:
        branch = {"p": "cond", "n": "uncond"}[prompt]
        if fault == "swapped":
            branch = {"cond": "uncond", "uncond": "cond"}[branch]
        text = given[branch].clone()
        if fault == "tail" and branch == "cond":
            text[:, -3:] = 0.05
        return text


pipe = text2image.Text2ImagePipeline(device="cpu", torch_dtype=torch.float32)
pipe.config = types.SimpleNamespace(resolution="tiny", state_ch=16)
pipe.precision, pipe.tensor_kwargs = torch.float32, {"device": "cpu", "dtype": torch.float32}
pipe.sigma_data, pipe.distill_steps = 1.0, 0
pipe.scheduler = RectifiedFlowAB2Scheduler(
    sigma_min=0.002, sigma_max=80.0, order=6.0 if fault == "shift" else 7.0
)
pipe.scaling = RectifiedFlowScaling(1.0, 1.0, True)
pipe.tokenizer, pipe.text_encoder = Tokenizer(), Text()
pipe.conditioner = TextConditioner(
    fps=ReMapkey(dropout_rate=0.0, dtype=None, input_key="fps", output_key="fps"),
    padding_mask=ReMapkey(
        dropout_rate=0.0, dtype=None, input_key="padding_mask", output_key="padding_mask"
    ),
    text=TextAttr(dropout_rate=0.2, input_key=["t5_text_embeddings"]),
)
pipe.dit = MiniTrainDIT(
    max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
    patch_temporal=1, concat_padding_mask=False, model_channels=48, num_blocks=2, num_heads=2,
    atten_backend="minimal_a2a", crossattn_emb_channels=32, crossattn_proj_in_channels=32,
    pos_emb_cls="rope3d", pos_emb_learnable=True, use_adaln_lora=True, adaln_lora_dim=8,
    rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0,
    rope_enable_fps_modulation=False,
)  # fmt: skip
missing = pipe.dit.load_state_dict(load_file(f"{folder}/official.safetensors"), strict=False)
assert not missing.unexpected_keys, missing
assert all("accum" in name or "pos_embedder" in name for name in missing.missing_keys), missing
pipe.dit.eval().requires_grad_(False)
text2image.IMAGE_RES_SIZE_INFO["tiny"] = {"1:1": (64, 64)}
text2image.misc.arch_invariant_rand = lambda *a: given["noise"].clone()
if fault != "eps":  # the official norms of queries and keys have 1e-6, diffusers' have 1e-5
    for module in pipe.dit.modules():
        if hasattr(module, "q_norm"):
            module.q_norm.eps = module.k_norm.eps = 1e-5
if fault == "norm":
    pipe.dit.blocks[1].self_attn.q_norm.eps = 1e-1
if fault == "time":
    call = MiniTrainDIT.__call__
    MiniTrainDIT.__call__ = lambda self, **k: call(
        self, **{**k, "timesteps_B_T": k["timesteps_B_T"] * 0.999}
    )
step = RectifiedFlowAB2Scheduler.step
if fault not in ("order", "solver"):  # diffusers' solver is of the first order, this one's Euler
    RectifiedFlowAB2Scheduler.step = lambda self, x0_prev, **k: step(self, x0_prev=None, **k)
if fault == "order":
    latents: list[torch.Tensor] = []

    def late(self: Any, sample: torch.Tensor, x0_prev: Any, **options: Any) -> Any:
        """Step from the latent of the step before."""
        latents.append(sample)
        before = latents[max(len(latents) - 2, 0)]
        return step(self, sample=before, x0_prev=None, **options)

    RectifiedFlowAB2Scheduler.step = late
pipe(
    "p", "n", aspect_ratio="1:1", seed=0, guidance=-3.0 if fault == "sign" else 3.0,
    num_sampling_step=4,
)  # fmt: skip
save_file({"raw": kept["raw"].contiguous()}, output)
