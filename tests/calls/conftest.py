"""Tiny random diffusers pipelines of several kinds, built without a hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from truestep.calls.subject import Subject, subject_of


class Words:
    """A tokenizer of letters, as far as pipelines ask for one."""

    added_tokens_encoder: ClassVar[dict[str, int]] = {}

    model_input_names = ("input_ids", "attention_mask")
    pad_token = "<pad>"

    def __init__(self, length: int = 8, words: int = 100, pad: int = 0) -> None:
        self.model_max_length, self.words, self.pad = length, words, pad

    def __call__(self, text: Any, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else list(text)
        length = min(options.get("max_length") or self.model_max_length, 24)
        rows = [[1 + ord(c) % (self.words - 1) for c in t][:length] for t in texts]
        longest = length if options.get("padding") == "max_length" else max(map(len, rows))
        ids = [row + [self.pad] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return Batch(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def batch_decode(self, ids: Any) -> list[str]:
        return ["" for _ in ids]


class Batch(dict[str, Any]):
    """What a tokenizer returns: a mapping whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> Batch:
        return Batch({k: v.to(device) for k, v in self.items()})


@dataclass
class Tiny:
    """How to build a pipeline, anew each time, and call it."""

    build: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)

    def subject(self, change: Callable[[Any], Any] | None = None, **call: Any) -> Subject:
        pipeline = self.build()
        if change is not None:
            change(pipeline)
        return subject_of(pipeline, **{**self.call, **call})


def _clip(**config: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4}
    return CLIPTextModel(
        CLIPTextConfig(
            **sizes, num_hidden_layers=2, vocab_size=100, bos_token_id=0, eos_token_id=2, **config
        )
    ).eval()


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    return T5EncoderModel(
        T5Config(vocab_size=100, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    ).eval()


def stable_diffusion() -> Any:
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=[8, 16],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=_clip(),
        tokenizer=Words(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux() -> Any:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()
    vae = AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=_clip(),
        tokenizer=Words(),
        text_encoder_2=_t5(),
        tokenizer_2=Words(),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan() -> Any:
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    pipe = WanPipeline(
        tokenizer=Words(),
        text_encoder=_t5(),
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


_IMAGE = {"height": 16, "width": 16, "output_type": "np"}

TINY = {
    "sd": Tiny(
        stable_diffusion,
        {**_IMAGE, "prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 6.0},
    ),
    "flux": Tiny(
        flux,
        {**_IMAGE, "prompt": "a cat", "num_inference_steps": 3, "max_sequence_length": 16},
    ),
    "wan": Tiny(
        wan,
        {
            **_IMAGE,
            "prompt": "a cat",
            "negative_prompt": "bad",
            "num_inference_steps": 3,
            "guidance_scale": 4.0,
            "num_frames": 9,
            "max_sequence_length": 16,
        },
    ),
}
"""Name to pipeline."""


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each of the tiny pipelines."""
    return TINY[request.param]
