"""Tiny random Wan pipelines in diffusers layout, shared by the tests. No network, one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

WAN_KINDS = ("wan21", "wan22", "wan22-ti2v")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Restore torch's thread count, which tests of the noise floor change."""
    yield
    import sys

    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


def build_tiny_wan(folder: Path, kind: str) -> Path:
    """Save a tiny random Wan pipeline (`wan21`, two-expert `wan22`, `wan22-ti2v`) to a folder."""
    import torch
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    from truestep.models import digits

    tokenizer = PreTrainedTokenizerFast.from_pretrained(digits.path() / "tokenizer")
    generator_state = torch.get_rng_state()
    torch.manual_seed(WAN_KINDS.index(kind))
    channels = 8

    def transformer() -> WanTransformer3DModel:
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=channels,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        )
        for parameter in model.parameters():  # no zero biases: a dropped one must be seen
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
        return model

    components = {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
            )
        ),
        "vae": AutoencoderKLWan(
            base_dim=8,
            z_dim=channels,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1 * i for i in range(channels)],
            latents_std=[1.0 + 0.1 * i for i in range(channels)],
            scale_factor_spatial=2,
            scale_factor_temporal=2,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": transformer(),
        "transformer_2": transformer() if kind == "wan22" else None,
    }
    torch.set_rng_state(generator_state)
    pipe = WanPipeline(
        **components,
        boundary_ratio=0.7 if kind == "wan22" else None,
        expand_timesteps=kind == "wan22-ti2v",
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random Wan pipelines by kind."""
    root = tmp_path_factory.mktemp("wan")
    return {kind: build_tiny_wan(root / kind, kind) for kind in WAN_KINDS}


@pytest.fixture(scope="session")
def tiny_case(tiny_wan: dict[str, Path]) -> dict[str, object]:
    """Keyword arguments of a `Case` that suits the tiny pipelines, without the model."""
    return {
        "prompt": "a red three moving left",
        "steps": 4,
        "guidance_scale": 4.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "max_sequence_length": 8,
        "settings": {"device": "cpu"},
    }
