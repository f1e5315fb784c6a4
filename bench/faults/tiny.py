"""Tiny random Wan pipelines in diffusers layout: real classes, no degenerate weights."""

from __future__ import annotations

from pathlib import Path

__all__ = ["WAN_KINDS", "build_tiny_wan"]

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
