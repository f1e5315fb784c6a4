"""U-Nets, the control nets and adapters beside them, priors and cascades."""

from __future__ import annotations

from typing import Any

from truestep.testing.tiny.encoders import TEXT
from truestep.testing.tiny.facts import Facts, Table, channels, heads

_CROSS = ("DownBlock2D", "CrossAttnDownBlock2D")

_CROSS_UP = ("CrossAttnUpBlock2D", "UpBlock2D")

LATENT_CASCADE = 16
"""Channels of the image embedding that Stable Cascade's prior hands to its decoder."""


def _sdxl(f: Facts) -> bool:
    return f.slots.get("text_encoder_2") == "CLIPTextModelWithProjection" and f.has("unet")


def _time_ids(f: Facts) -> dict[str, Any]:
    """SDXL's second conditioning: pooled text and six sizes of 8 sinusoids each."""
    if not (_sdxl(f) or "XL" in f.pipeline):
        return {"cross_attention_dim": f.text}
    both = f.text * (2 if f.has("text_encoder") else 1)
    return {
        "cross_attention_dim": both,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": f.text + 6 * 8,
        "use_linear_projection": True,
    }


def _unet_3d(f: Facts) -> dict[str, Any]:
    return {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        **channels(f),
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": f.text,
        "norm_num_groups": 4,
    }


def _unet(f: Facts) -> dict[str, Any]:
    return {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        **channels(f),
        "down_block_types": _CROSS,
        "up_block_types": _CROSS_UP,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        **_time_ids(f),
    }


def _controlnet(f: Facts) -> dict[str, Any]:
    return {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "in_channels": f.latent,
        "down_block_types": _CROSS,
        "conditioning_embedding_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        **_time_ids(f),
    }


def _motion(f: Facts) -> dict[str, Any]:
    return {
        "block_out_channels": (8, 16),
        "motion_layers_per_block": 1,
        "motion_norm_num_groups": 2,
        "motion_num_attention_heads": 2,
        "use_motion_mid_block": not _sdxl(f),
    }


def _prior(f: Facts) -> dict[str, Any]:
    return {
        **heads(2, 12),
        "embedding_dim": f.text,
        "num_layers": 1,
    }


def _unet_2d(f: Facts) -> dict[str, Any]:
    return {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }


def _cascade(f: Facts) -> dict[str, Any]:
    prior = "prior" in f.slot
    return {
        "in_channels": LATENT_CASCADE if prior else f.latent,
        "out_channels": LATENT_CASCADE if prior else f.latent,
        "timestep_ratio_embedding_dim": 8,
        "patch_size": 1 if prior else 2,
        "conditioning_dim": f.text,
        "block_out_channels": (16, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "down_blocks_repeat_mappers": (1, 1),
        "up_blocks_repeat_mappers": (1, 1),
        "block_types_per_layer": (
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        )
        * 2,
        "clip_text_in_channels": f.text,
        "clip_text_pooled_in_channels": f.text,
        "clip_image_in_channels": f.text if prior else None,
        "clip_seq": 4,
        "effnet_in_channels": None if prior else LATENT_CASCADE,
        "switch_level": (False,) if prior else None,
    }


CROSS_FIRST: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""The order of blocks that an adapter's features fit."""

_SIMPLE: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_dim": 16,
}

IF_UNET: dict[str, Any] = {
    **_SIMPLE,
    "in_channels": 3,
    "out_channels": 6,
    "encoder_hid_dim": TEXT,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "act_fn": "gelu",
}
"""A U-Net of DeepFloyd IF: pixels, and a variance beside the noise."""

KANDINSKY2_UNET: dict[str, Any] = {
    **_SIMPLE,
    "out_channels": 8,
    "encoder_hid_dim": TEXT,
    "cross_attention_dim": TEXT,
    "encoder_hid_dim_type": "text_image_proj",
    "addition_embed_type": "text_image",
}
"""A U-Net of Kandinsky 2.1: text and an image embedding."""

KANDINSKY22_UNET: dict[str, Any] = {
    **KANDINSKY2_UNET,
    "encoder_hid_dim_type": "image_proj",
    "addition_embed_type": "image",
}
"""A U-Net of Kandinsky 2.2: an image embedding only."""


UNETS: Table = {
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _unet_2d,
    "ControlNetModel": _controlnet,
    "ControlNetUnionModel": lambda f: {
        **_controlnet(f),
        "num_control_type": 6,
        "num_trans_channel": 8,
        "num_trans_head": 2,
        "num_trans_layer": 1,
        "num_proj_channel": 8,
        "transformer_layers_per_block": (1, 1),
    },
    "MotionAdapter": _motion,
    "UNetMotionModel": _unet,
    "Kandinsky3UNet": lambda f: {
        "in_channels": f.latent,
        "time_embedding_dim": 8,
        "groups": 4,
        "attention_head_dim": 4,
        "layers_per_block": 3,
        "block_out_channels": (16, 32),
        "cross_attention_dim": 8,
        "encoder_hid_dim": f.text,
    },
    "DreamLiteUNetModel": lambda f: {
        "sample_size": 8,
        **channels(f),
        "down_block_types": (
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        "block_out_channels": (16, 32),
        "cross_attention_dim": f.text,
        "attention_head_dim": 8,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "transformer_layers_per_block": 1,
    },
    "UNetSpatioTemporalConditionModel": lambda f: {
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "sample_size": 16,
        "in_channels": 2 * f.latent,
        "out_channels": f.latent,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "cross_attention_dim": f.text,
        "num_attention_heads": 4,
        "projection_class_embeddings_input_dim": 24,
        "addition_time_embed_dim": 8,
    },
    "UNet3DConditionModel": lambda f: {**_unet_3d(f), "attention_head_dim": 4},
    "I2VGenXLUNet": lambda f: {
        **_unet_3d(f),
        "block_out_channels": (16, 32),
        "num_attention_heads": 4,
    },
    "SparseControlNetModel": lambda f: {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "in_channels": f.latent,
        "conditioning_channels": 3,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "cross_attention_dim": f.text,
        "conditioning_embedding_out_channels": (8, 8),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "use_simplified_condition_embedding": False,
    },
    "T2IAdapter": lambda f: {
        "in_channels": 3,
        "channels": [8, 16],
        "num_res_blocks": 1,
        "downscale_factor": 4 if "XL" in f.pipeline else 2,
        "adapter_type": "full_adapter_xl" if "XL" in f.pipeline else "full_adapter",
    },
    "StableCascadeUNet": _cascade,
    "UnCLIPTextProjModel": lambda f: {
        "clip_extra_context_tokens": 2,
        "clip_embeddings_dim": f.text,
        "time_embed_dim": 32,
        "cross_attention_dim": 16,
    },
    "ControlNetXSAdapter": lambda f: {
        "conditioning_embedding_out_channels": (8, 16),
        "num_attention_heads": 2,
        "block_out_channels": (4, 8),
        "base_block_out_channels": (8, 16),
        "cross_attention_dim": f.text * (2 if _sdxl(f) else 1),
        "down_block_types": _CROSS,
        "sample_size": 16,
        "max_norm_num_groups": 2,
        "use_linear_projection": _sdxl(f),
        "learn_time_embedding": True,
    },
    "StableUnCLIPImageNormalizer": lambda f: {"embedding_dim": f.text},
    "UVit2DModel": lambda f: {
        "hidden_size": 16,
        "use_bias": False,
        "hidden_dropout": 0.0,
        "cond_embed_dim": f.text,
        "micro_cond_encode_dim": 2,
        "micro_cond_embed_dim": 10,
        "encoder_hidden_size": f.text,
        "vocab_size": 32,
        "codebook_size": 32,
        "in_channels": 16,
        "block_out_channels": 16,
        "num_res_blocks": 1,
        "downsample": True,
        "upsample": True,
        "block_num_heads": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "attention_dropout": 0.0,
        "intermediate_size": 16,
        "layer_norm_eps": 1e-06,
        "ln_elementwise_affine": True,
    },
    "WuerstchenPrior": lambda f: {
        "c_in": LATENT_CASCADE,
        "c": 8,
        "c_cond": f.text,
        "c_r": 8,
        "depth": 1,
        "nhead": 2,
    },
    "WuerstchenDiffNeXt": lambda f: {
        "c_cond": f.text,
        "c_hidden": [16, 16],
        "nhead": [-1, 2],
        "blocks": [1, 1],
        "level_config": ["CT", "CTA"],
        "clip_embd": f.text,
        "inject_effnet": [False, True],
        "c_in": f.latent,
        "c_out": f.latent,
        "effnet_embd": LATENT_CASCADE,
        "patch_size": 2,
    },
    "PriorTransformer": _prior,
}
