"""Transformers that make pictures, and their control nets."""

from __future__ import annotations

from typing import Any

from truestep.testing.tiny.facts import Facts, Table, channels, heads, without

_Z_IMAGE_CONTROL = (
    "all_patch_size",
    "all_f_patch_size",
    "dim",
    "n_refiner_layers",
    "n_heads",
    "n_kv_heads",
)


def _flux(f: Facts) -> dict[str, Any]:
    return {
        "patch_size": 1,
        "in_channels": 4 * f.latent,
        "num_layers": 1,
        "num_single_layers": 1,
        **heads(2, 16),
        "joint_attention_dim": f.text,
        "pooled_projection_dim": f.pooled,
        "axes_dims_rope": (4, 4, 8),
    }


def _lumina(f: Facts) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": f.latent,
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
    }


def _sd3(f: Facts) -> dict[str, Any]:
    return {
        "sample_size": 32,
        "patch_size": 1,
        **channels(f),
        "num_layers": 2,
        **heads(4, 8),
        "joint_attention_dim": f.text,
        "caption_projection_dim": 32,
        "pooled_projection_dim": f.pooled,
    }


def _qwen_image(f: Facts) -> dict[str, Any]:
    return {
        "patch_size": 2,
        "in_channels": 4 * f.latent,
        "out_channels": f.latent,
        "num_layers": 2,
        **heads(2, 16),
        "joint_attention_dim": f.text,
        "axes_dims_rope": (8, 4, 4),
    }


def _pixart(f: Facts) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "num_layers": 2,
        "patch_size": 2,
        **heads(3, 8),
        "caption_channels": f.text,
        "in_channels": f.latent,
        "cross_attention_dim": 24,
        "out_channels": 2 * f.latent,
    }


def _sana(f: Facts) -> dict[str, Any]:
    return {
        "patch_size": 1,
        **channels(f),
        "num_layers": 2,
        **heads(2, 4),
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 4,
        "cross_attention_dim": 8,
        "caption_channels": f.text,
        "sample_size": 32,
    }


def _hunyuan_dit(f: Facts) -> dict[str, Any]:
    return {
        "sample_size": 16,
        "patch_size": 2,
        **heads(4, 8),
        "in_channels": f.latent,
        "cross_attention_dim": f.text,
        "cross_attention_dim_t5": f.text,
        "pooled_projection_dim": f.text,
        "hidden_size": 32,
        "text_len": 77,
        "text_len_t5": 256,
    }


def _z_image(f: Facts) -> dict[str, Any]:
    return {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": f.latent,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": f.text,
        "axes_dims": [8, 4, 4],
        "axes_lens": [512, 32, 32],
    }


PICTURES: Table = {
    "FluxTransformer2DModel": _flux,
    "FluxControlNetModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "SD3ControlNetModel": _sd3,
    "QwenImageTransformer2DModel": _qwen_image,
    "QwenImageControlNetModel": _qwen_image,
    "HunyuanImageTransformer2DModel": lambda f: {
        **channels(f),
        **heads(4, 8),
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": (1, 1),
        "guidance_embeds": False,
        "text_embed_dim": f.text,
        "text_embed_2_dim": f.text,
        "rope_axes_dim": (4, 4),
    },
    "HunyuanDiT2DModel": lambda f: {**_hunyuan_dit(f), "num_layers": 2},
    "HunyuanDiT2DControlNetModel": lambda f: {**_hunyuan_dit(f), "transformer_num_layers": 2},
    "BriaFibo2Transformer2DModel": lambda f: {
        "in_channels": f.latent,
        "patch_size": 2,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 3 * f.text,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 4,
        "gist_min_text_len": 4,
        "gist_max_text_len": 64,
        "axes_dims": (8, 4, 4),
        "axes_lens": (512, 32, 32),
    },
    "ErnieImageTransformer2DModel": lambda f: {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "in_channels": 4 * f.latent,
        "out_channels": 4 * f.latent,
        "patch_size": 1,
        "text_in_dim": f.text,
        "rope_axes_dim": (8, 4, 4),
    },
    "Ideogram4Transformer2DModel": lambda f: {
        "in_channels": 4 * f.latent,
        "num_layers": 2,
        **heads(2, 16),
        "intermediate_size": 48,
        "adaln_dim": 16,
        "llm_features_dim": 13 * f.text,
        "mrope_section": (4, 2, 2),
    },
    "QwenImage21Transformer2DModel": lambda f: {
        **channels(f),
        "num_layers": 2,
        **heads(2, 16),
        "context_in_dim": f.text,
        "axes_dims_rope": (4, 6, 6),
    },
    "ReduxImageEncoder": lambda f: {"redux_dim": f.text, "txt_in_features": f.text},
    "CogView3PlusTransformer2DModel": lambda f: {
        "patch_size": 2,
        "in_channels": f.latent,
        "num_layers": 2,
        **heads(4, 4),
        "out_channels": f.latent,
        "text_embed_dim": f.text,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "pos_embed_max_size": 16,
        "sample_size": 16,
    },
    "CogView4Transformer2DModel": lambda f: {
        "patch_size": 2,
        "in_channels": f.latent,
        "num_layers": 2,
        **heads(4, 8),
        "out_channels": f.latent,
        "text_embed_dim": f.text,
        "time_embed_dim": 8,
        "condition_dim": 4,
    },
    "ZImageTransformer2DModel": _z_image,
    "ZImageControlNetModel": lambda f: {
        **{name: _z_image(f)[name] for name in _Z_IMAGE_CONTROL},
        "control_layers_places": [0, 1],
        "control_refiner_layers_places": [0],
        "control_in_dim": f.latent,
    },
    "SanaTransformer2DModel": lambda f: {
        **_sana(f),
        **(
            {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
            if "Sprint" in f.pipeline
            else {}
        ),
    },
    "SanaControlNetModel": lambda f: {**_sana(f), "num_layers": 1},
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": lambda f: {
        "sample_size": 16,
        "num_layers": 2,
        "patch_size": 4,
        **heads(2, 8),
        "in_channels": f.latent,
        "out_channels": 2 * f.latent,
    },
    "AuraFlowTransformer2DModel": lambda f: {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": f.latent,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        **heads(4, 8),
        "caption_projection_dim": 32,
        "joint_attention_dim": f.text,
        "out_channels": f.latent,
        "pos_embed_max_size": 256,
    },
    "BriaTransformer2DModel": lambda f: {
        **_flux(f),
        "pooled_projection_dim": None,
        "attention_head_dim": 8,
        "axes_dims_rope": [0, 4, 4],
    },
    "BriaFiboTransformer2DModel": lambda f: {
        **_flux(f),
        "in_channels": f.latent,
        "joint_attention_dim": 2 * f.text,
        "text_encoder_dim": f.text,
        "pooled_projection_dim": None,
        "attention_head_dim": 8,
        "axes_dims_rope": [0, 4, 4],
    },
    "ChromaTransformer2DModel": lambda f: {
        **without(_flux(f), "pooled_projection_dim"),
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
        "approximator_num_channels": 16,
    },
    "OvisImageTransformer2DModel": lambda f: {
        **without(_flux(f), "pooled_projection_dim"),
        "out_channels": 4 * f.latent,
    },
    "LongCatImageTransformer2DModel": _flux,
    "Flux2Transformer2DModel": lambda f: {
        "patch_size": 1,
        "in_channels": 4 * f.latent,
        "num_layers": 1,
        "num_single_layers": 1,
        **heads(2, 16),
        "joint_attention_dim": 3 * f.text,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": [4, 4, 4, 4],
        **({"guidance_embeds": False} if "Klein" in f.pipeline else {}),
    },
    "HiDreamImageTransformer2DModel": lambda f: {
        "patch_size": 2,
        **channels(f),
        "num_layers": 1,
        "num_single_layers": 1,
        **heads(4, 8),
        "caption_channels": [f.text, f.text],
        "text_emb_dim": f.pooled,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (32, 32),
        "llama_layers": (0, 1),
    },
    "AnimaTextConditioner": lambda f: {
        "source_dim": f.text,
        "target_dim": f.text,
        "model_dim": f.text,
        "num_layers": 1,
        "num_attention_heads": 2,
        "target_vocab_size": len(f.built["t5_tokenizer"]),
        "min_sequence_length": 16,
    },
    "Krea2Transformer2DModel": lambda f: {
        "in_channels": 4 * f.latent,
        "num_layers": 2,
        **heads(4, 8),
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "timestep_embed_dim": 8,
        "text_hidden_dim": f.text,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 2, 2),
    },
    "Lumina2Transformer2DModel": lambda f: {
        **_lumina(f),
        "axes_dim_rope": (4, 2, 2),
        "cap_feat_dim": f.text,
    },
    "LuminaNextDiT2DModel": lambda f: {**_lumina(f), "cross_attention_dim": f.text},
    "NucleusMoEImageTransformer2DModel": lambda f: {
        "patch_size": 2,
        "in_channels": 4 * f.latent,
        "out_channels": f.latent,
        "num_layers": 2,
        **heads(4, 16),
        "joint_attention_dim": f.text,
        "axes_dims_rope": (8, 4, 4),
        "moe_enabled": False,
        "capacity_factors": [8.0, 8.0],
    },
    "OmniGenTransformer2DModel": lambda f: {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_layers": 1,
        "in_channels": f.latent,
        "time_step_dim": 4,
        "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
    },
    "PRXTransformer2DModel": lambda f: {
        "patch_size": 1,
        "in_channels": f.latent,
        "context_in_dim": f.text,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [4, 4],
    },
    **dict.fromkeys(
        ("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
        lambda f: {
            "patch_size": [1, 2, 2],
            "in_channels": f.latent,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": f.text,
            "num_layers": 1,
            "rope_dim_list": [4, 6, 6],
        },
    ),
    "LatteTransformer3DModel": lambda f: {**_pixart(f), "norm_type": "ada_norm_single"},
}
