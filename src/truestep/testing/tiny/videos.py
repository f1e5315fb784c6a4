"""Transformers that make moving pictures, with or without sound."""

from __future__ import annotations

from typing import Any

from truestep.testing.tiny.autoencoders import LATENT
from truestep.testing.tiny.facts import Facts, Table, channels, heads, without


def _wan(f: Facts) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2),
        **heads(2, 12),
        **channels(f),
        "text_dim": f.text,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
        "qk_norm": "rms_norm_across_heads",
    }


def _hunyuan(f: Facts) -> dict[str, Any]:
    return {
        **channels(f),
        **heads(2, 10),
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": f.text,
        "pooled_projection_dim": f.pooled,
        "rope_axes_dim": (2, 4, 4),
    }


def _cosmos(f: Facts) -> dict[str, Any]:
    return {
        **channels(f),
        **heads(2, 16),
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": f.text,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": False,
        "extra_pos_embed_type": "learnable",
    }


def _cogvideo(f: Facts) -> dict[str, Any]:
    return {
        **heads(2, 16),
        **channels(f),
        "time_embed_dim": 8,
        "text_embed_dim": f.text,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 16,
    }


def _kandinsky5(f: Facts) -> dict[str, Any]:
    return {
        "in_visual_dim": f.latent,
        "in_text_dim": f.text,
        "in_text_dim2": f.text,
        "time_dim": 16,
        "out_visual_dim": f.latent,
        "patch_size": (1, 2, 2),
        "model_dim": 16,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (1, 1, 2),
        "visual_cond": "5I2" in f.pipeline,
        "attention_type": "regular",
    }


def _kandinsky6(f: Facts) -> dict[str, Any]:
    return {
        **without(_kandinsky5(f), "attention_type"),
        "visual_cond": True,
        "in_audio_dim": LATENT,
        "out_audio_dim": LATENT,
        "model_dim_a": 8,
        "time_dim_a": 16,
        "ff_dim_a": 16,
        "axes_dims_a": (1, 1, 2),
        "visual_token_type_num_embeddings": 2,
    }


def _easyanimate(f: Facts) -> dict[str, Any]:
    return {
        **heads(2, 16),
        **channels(f),
        "time_embed_dim": 8,
        "text_embed_dim": f.text,
        "num_layers": 1,
        "sample_width": 16,
        "sample_height": 16,
        "patch_size": 2,
    }


VIDEOS: Table = {
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": lambda f: {
        **_wan(f),
        "num_layers": 3,
        "vace_layers": [0, 2],
        "vace_in_channels": 6 * f.latent,
    },
    "WanAnimateTransformer3DModel": lambda f: {
        **_wan(f),
        "in_channels": 2 * f.latent + 4,
        "latent_channels": f.latent,
        "image_dim": f.text,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    },
    "ChronoEditTransformer3DModel": lambda f: {
        **_wan(f),
        "in_channels": 2 * f.latent + 4,
        "image_dim": f.text,
    },
    "SkyReelsV2Transformer3DModel": _wan,
    "AnyFlowTransformer3DModel": lambda f: {
        **without(_wan(f), "qk_norm"),
        "gate_value": 0.25,
        "deltatime_type": "r",
    },
    "AnyFlowFARTransformer3DModel": lambda f: {
        **without(_wan(f), "qk_norm"),
        "compressed_patch_size": (1, 4, 4),
        "full_chunk_limit": 3,
        "gate_value": 0.25,
        "deltatime_type": "r",
        "chunk_partition": (1, 1, 1),
    },
    "HeliosTransformer3DModel": lambda f: {
        **without(_wan(f), "rope_max_seq_len"),
        "rope_dim": (4, 4, 4),
        "has_multi_term_memory_patch": True,
        "guidance_cross_attn": True,
        "zero_history_timestep": True,
        "is_amplify_history": False,
    },
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "HunyuanVideoFramepackTransformer3DModel": lambda f: {
        **_hunyuan(f),
        "patch_size": 2,
        "image_condition_type": None,
        "has_image_proj": True,
        "image_proj_dim": f.text,
        "has_clean_x_embedder": True,
    },
    "HunyuanVideo15Transformer3DModel": lambda f: {
        "in_channels": 2 * f.latent + 1,
        "out_channels": f.latent,
        **heads(2, 8),
        "num_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": f.text,
        "text_embed_2_dim": f.text,
        "image_embed_dim": f.text,
        "rope_axes_dim": (2, 2, 4),
        "target_size": 16,
        "task_type": "i2v" if "ImageToVideo" in f.pipeline else "t2v",
    },
    "LTXVideoTransformer3DModel": lambda f: {
        **channels(f),
        "patch_size": 1,
        "patch_size_t": 1,
        **heads(4, 8),
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": f.text,
    },
    "LTX2VideoTransformer3DModel": lambda f: {
        **channels(f),
        "patch_size": 1,
        "patch_size_t": 1,
        **heads(2, 8),
        "cross_attention_dim": 16,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 8,
        "num_layers": 2,
        "caption_channels": f.text,
        "rope_double_precision": False,
        "rope_type": "split",
    },
    "LTX2TextConnectors": lambda f: {
        "caption_channels": f.text,
        "text_proj_in_factor": f.levels,
        "video_connector_num_attention_heads": 4,
        "video_connector_attention_head_dim": 8,
        "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": None,
        "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 8,
        "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": None,
        "connector_rope_base_seq_len": 32,
        "rope_theta": 10000.0,
        "rope_double_precision": False,
        "causal_temporal_positioning": False,
        "rope_type": "split",
    },
    "LTX2DurationHead": lambda _: {
        "video_cross_attention_dim": 32,
        "audio_cross_attention_dim": 32,
        "pooler_hidden_dim": 8,
        "num_pooler_heads": 2,
        "mlp_hidden_dim": 8,
    },
    "LTXLatentUpsamplerModel": lambda f: {
        "in_channels": f.latent,
        "mid_channels": 32,
        "num_blocks_per_stage": 1,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
    },
    "LTX2LatentUpsamplerModel": lambda f: {
        "in_channels": f.latent,
        "mid_channels": 32,
        "num_blocks_per_stage": 1,
    },
    "CogVideoXTransformer3DModel": _cogvideo,
    "MochiTransformer3DModel": lambda f: {
        "patch_size": 2,
        **heads(2, 8),
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": f.latent,
        "text_embed_dim": f.text,
        "time_embed_dim": 8,
        "max_sequence_length": 16,
    },
    "SanaVideoTransformer3DModel": lambda f: {
        **channels(f),
        **heads(2, 12),
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": f.text,
        "sample_size": 8,
        "patch_size": (1, 2, 2),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    },
    "CosmosTransformer3DModel": _cosmos,
    "Cosmos3OmniTransformer": lambda f: {
        "hidden_size": 32,
        "head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "latent_channel": f.latent,
        "patch_latent_dim": 4 * f.latent,
        "rope_axes_dim": (4, 2, 2),
        "vocab_size": len(f.built["text_tokenizer"]),
        "sound_gen": f.has("sound_tokenizer"),
        "sound_dim": LATENT,
    },
    "AllegroTransformer3DModel": lambda f: {
        **heads(2, 12),
        **channels(f),
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 8,
        "caption_channels": f.text,
    },
    "Kandinsky5Transformer3DModel": _kandinsky5,
    "Kandinsky6Transformer3DModel": _kandinsky6,
    "MotifVideoTransformer3DModel": lambda f: {
        "in_channels": 2 * f.latent + 1,
        "out_channels": f.latent,
        **heads(2, 12),
        "num_layers": 1,
        "num_single_layers": 1,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": f.text,
        "rope_axes_dim": (4, 4, 4),
        **({"image_embed_dim": f.text} if "Image2Video" in f.pipeline else {}),
    },
    "EasyAnimateTransformer3DModel": _easyanimate,
}
