"""Tiny random pipelines in diffusers layout: real classes, no degenerate weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["WAN_KINDS", "build_tiny_cosmos", "build_tiny_wan"]

WAN_KINDS = ("wan21", "wan22", "wan22-ti2v")


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


def build_tiny_cosmos(folder: Path, **transformer: Any) -> Path:
    """Save a tiny random Cosmos text-to-world pipeline to a folder, without a safety checker.

    Args:
        folder: Where to.
        transformer: Values of the transformer's configuration that differ. Without
            `concat_padding_mask`, as here by default, it needs no torchvision.

    Source:
        Scheduler: diffusers, scripts/convert_cosmos_to_diffusers.py, Cosmos 1.0.
    """
    import diffusers
    import torch
    from diffusers import AutoencoderKLCosmos, CosmosTransformer3DModel, EDMEulerScheduler
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from truestep.models import digits

    tokenizer = PreTrainedTokenizerFast.from_pretrained(digits.path() / "tokenizer")
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    channels, frames = 8, 8
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 3,
        "mlp_ratio": 2.0,
        "text_embed_dim": 32,
        "adaln_lora_dim": 8,
        "max_size": (frames, 16, 16),
        "concat_padding_mask": False,
    }
    model = CosmosTransformer3DModel(**{**config, **transformer})
    for name, parameter in model.named_parameters():  # neither zero positions nor plain norms
        if parameter.ndim == 1 or "pos_emb" in name:
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
            )
        ),
        "vae": AutoencoderKLCosmos(
            latent_channels=channels,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            num_layers=1,
            patch_size=2,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
            latents_mean=[0.01 * (i % 37) for i in range(channels * frames)],
            latents_std=[1.0 + 0.02 * (i % 23) for i in range(channels * frames)],
        ),
        "scheduler": EDMEulerScheduler(final_sigmas_type="sigma_min"),
        "transformer": model,
    }
    torch.set_rng_state(generator_state)
    index: dict[str, Any] = {
        "_class_name": "CosmosTextToWorldPipeline",
        "_diffusers_version": diffusers.__version__,
        "safety_checker": [None, None],
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = type(part).__module__.partition(".")[0]
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), "utf-8")
    return folder
