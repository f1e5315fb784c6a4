"""Configurations of text, image and sound encoders: every size that has a known name, made tiny."""

from __future__ import annotations

import inspect
from typing import Any

TEXT = 32
"""Hidden size of every encoder and width of every projection: whatever reads one fits any."""

SIZES: dict[str, Any] = {
    "hidden_size": TEXT,
    "d_model": TEXT,
    "n_embd": TEXT,
    "projection_dim": TEXT,
    "out_hidden_size": TEXT,
    "embed_dim": TEXT,
    "intermediate_size": 48,
    "d_ff": 48,
    "d_kv": 8,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "num_patches": 16,
    "dropout_rate": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "mm_tokens_per_image": 4,
    "sliding_window": 64,
    "num_position_embeddings": 64,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 32,
}

POSITIONS = 2048
"""What prompt templates need, as bytes where a tokenizer knows no word of them."""

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

CHANGES: dict[str, dict[str, Any]] = {
    "CLIPTextConfig": {"max_position_embeddings": 77},
    "ClapTextConfig": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "ClapAudioConfig": {
        "spec_size": 64,
        "num_mel_bins": 8,
        "hidden_size": TEXT,
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "window_size": 4,
        "patch_size": 4,
        "patch_stride": (4, 4),
    },
    "T5GemmaConfig": {"is_encoder_decoder": False},
    "T5GemmaModuleConfig": {"query_pre_attn_scalar": 8},
    "MCLIPConfig": {"imageDimSize": TEXT, "transformerDimSize": TEXT},
    "GPT2Config": {"n_positions": 512, "vocab_size": 64, "max_new_tokens": 8},
    "SpeechT5HifiGanConfig": {
        "model_in_dim": 8,
        "sampling_rate": 800,
        "upsample_initial_channel": 16,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "normalize_before": False,
    },
    "Qwen2VLTextConfig": {"rope_parameters": _MROPE},
    "Qwen2VLVisionConfig": {"hidden_size": TEXT, "embed_dim": TEXT, "patch_size": 14},
    "Qwen2_5_VLTextConfig": {"rope_parameters": _MROPE},
    "Qwen2_5_VLVisionConfig": {
        "patch_size": 14,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    },
    "Qwen3VLTextConfig": {"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
    "Qwen3VLVisionConfig": {"patch_size": 16, "deepstack_visual_indexes": [0, 1]},
    "Gemma2Config": {"query_pre_attn_scalar": 8},
    "Gemma3TextConfig": {"query_pre_attn_scalar": 8},
    "SmolLM3Config": {"sliding_window": None, "use_sliding_window": False},
    "MistralConfig": {"sliding_window": None},
    "Ministral3Config": {"sliding_window": None},
    "T5Gemma2TextConfig": {"dropout_rate": 0.0, "query_pre_attn_scalar": 8},
    "LlavaConfig": {"vision_feature_layer": -2, "image_seq_length": 16},
    "Mistral3Config": {"vision_feature_layer": -1},
    "PixtralVisionConfig": {"patch_size": 8},
}
"""What a class needs beside the common sizes."""

PARTS = {
    "Gemma3Config": {"text_config": "gemma3_text", "vision_config": "siglip_vision_model"},
    "T5Gemma2EncoderConfig": {
        "text_config": "t5gemma2_text",
        "vision_config": "siglip_vision_model",
    },
    "LlavaConfig": {"text_config": "llama", "vision_config": "clip_vision_model"},
    "Mistral3Config": {"text_config": "mistral", "vision_config": "pixtral"},
}
"""Model types of the parts of configurations that take any."""

TOKEN_IDS = {
    "image_token_id": ("<|image_pad|>", "<image_soft_token>", "<image>", "[IMG]"),
    "image_token_index": ("<|image_pad|>", "<image_soft_token>", "<image>", "[IMG]"),
    "video_token_id": ("<|video_pad|>",),
    "vision_start_token_id": ("<|vision_start|>",),
    "vision_end_token_id": ("<|vision_end|>",),
    "boi_token_index": ("<start_of_image>",),
    "eoi_token_index": ("<end_of_image>",),
}
"""Arguments that hold the id of a token, and the names that tokenizers give it."""


def configuration(
    config_class: Any, tokenizer: Any = None, changes: dict[str, Any] | None = None
) -> Any:
    """A tiny configuration of a transformers class, its parts too.

    Args:
        config_class: The configuration's class.
        tokenizer: The tokenizer whose ids it will be given, which sets the vocabulary.
        changes: Arguments to set beside what the tables say; of a part, those of the part.
    """
    changes = dict(changes or {})
    names: set[str] = set()
    for base in config_class.__mro__:
        names |= set(inspect.signature(base.__init__).parameters)
    values: dict[str, Any] = {name: SIZES[name] for name in names & set(SIZES)}
    if "max_position_embeddings" in names:
        values["max_position_embeddings"] = POSITIONS
    if tokenizer is not None:
        values |= _of_tokenizer(names, tokenizer)
    parts = PARTS.get(config_class.__name__, {})
    for part, part_class in getattr(config_class, "sub_configs", {}).items():
        if part not in names:
            continue
        if part in parts:
            from transformers import CONFIG_MAPPING

            part_class = CONFIG_MAPPING[parts[part]]
        elif part_class.__name__ == "AutoConfig":
            continue
        values[part] = configuration(part_class, tokenizer, changes.pop(part, None))
    for base in reversed(config_class.__mro__):
        values |= CHANGES.get(base.__name__, {})
    return config_class(**(values | changes))


def _of_tokenizer(names: set[str], tokenizer: Any) -> dict[str, Any]:
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    values: dict[str, Any] = {}
    if "vocab_size" in names:
        values["vocab_size"] = len(tokenizer)
    for token in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{token}_token_id", None)
        if f"{token}_token_id" in names:
            values[f"{token}_token_id"] = number
    known = tokenizer.get_vocab()
    for name in names & set(TOKEN_IDS):
        values.update((name, known[token]) for token in TOKEN_IDS[name] if token in known)
    return values
