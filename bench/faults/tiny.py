"""Tiny random pipelines in diffusers layout: real classes, no degenerate weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "WAN_KINDS",
    "build_tiny_cosmos",
    "build_tiny_ltx2",
    "build_tiny_upsampler",
    "build_tiny_wan",
]

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


def build_tiny_ltx2(folder: Path, version: str = "2.3") -> Path:
    """Save a tiny random LTX-2 pipeline to a folder: video and audio, with sound at 16 or 48 kHz.

    Args:
        folder: Where to.
        version: `2.3` (gated attention, text modulated by the timestep, one text projection a
            modality, a vocoder with bandwidth extension) or `2.0` (none of these).

    Source:
        Switches of either version: diffusers 0.42.1, scripts/convert_ltx2_to_diffusers.py.
    """
    import torch
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

    from truestep.models import digits

    tokenizer = PreTrainedTokenizerFast.from_pretrained(digits.path() / "tokenizer")
    newer = version == "2.3"
    generator_state = torch.get_rng_state()
    torch.manual_seed(23 if newer else 20)
    video, audio, hidden, layers = 32, 16, 32, 2
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 14,
        "patch_size": 14,
    }
    parts: dict[str, Any] = {
        "text_encoder": Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
        ),
        "connectors": LTX2TextConnectors(
            caption_channels=hidden,
            text_proj_in_factor=layers + 1,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=video // 2,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=8,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=(audio if newer else video) // 2,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=8,
            connector_rope_base_seq_len=32,
            rope_type="split",
            video_gated_attn=newer,
            audio_gated_attn=newer,
            per_modality_projections=newer,
            video_hidden_dim=video,
            audio_hidden_dim=audio,
            proj_bias=newer,
        ),
        "transformer": LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=video // 2,
            cross_attention_dim=video,
            gated_attn=newer,
            cross_attn_mod=newer,
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=audio // 2,
            audio_cross_attention_dim=audio,
            audio_gated_attn=newer,
            audio_cross_attn_mod=newer,
            num_layers=3,
            caption_channels=hidden,
            rope_type="split",
            use_prompt_embeddings=not newer,
            perturbed_attn=newer,
        ),
        "vae": AutoencoderKLLTX2Video(
            latent_channels=8,
            block_out_channels=(8, 16, 32, 64),
            decoder_block_out_channels=(8, 16, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
            decoder_spatial_padding_mode="zeros",  # a latent of one pixel cannot be reflected
        ),
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=8,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            latent_channels=2,
            mel_bins=16,
            resolution=32,
        ),
        "vocoder": LTX2VocoderWithBWE(
            in_channels=32,
            hidden_channels=64,
            bwe_in_channels=32,
            bwe_hidden_channels=32,
            num_mel_channels=16,
        )
        if newer
        else LTX2Vocoder(in_channels=32, hidden_channels=32),
    }
    for name in ("connectors", "transformer", "vae", "audio_vae"):
        for _key, parameter in parts[name].named_parameters():  # a dropped bias must be seen
            if parameter.ndim == 1:
                mean = parameter.detach().mean().item()
                torch.nn.init.normal_(parameter, mean=mean, std=0.1)
    for vae, channels in ((parts["vae"], 8), (parts["audio_vae"], 8)):
        vae.latents_mean.copy_(0.05 * torch.arange(channels))
        vae.latents_std.copy_(1.0 + 0.1 * torch.arange(channels))
    torch.set_rng_state(generator_state)
    pipe = LTX2Pipeline(
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        **parts,
    )
    pipe.save_pretrained(folder)
    return folder


def build_tiny_upsampler(folder: Path, **config: Any) -> Path:
    """Save a tiny random latent upsampler for `build_tiny_ltx2` to a folder: twice as large.

    Args:
        folder: Where to.
        config: Values of its configuration that differ.
    """
    import torch
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    generator_state = torch.get_rng_state()
    torch.manual_seed(2)
    own: dict[str, Any] = {"in_channels": 8, "mid_channels": 32, "num_blocks_per_stage": 1}
    model = LTX2LatentUpsamplerModel(**{**own, **config})
    for parameter in model.parameters():  # a dropped bias must be seen
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    return folder
