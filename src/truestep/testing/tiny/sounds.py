"""What makes sound, and the projections before it."""

from __future__ import annotations

from truestep.testing.tiny.facts import Table, channels, heads

_CROSS = ("DownBlock2D", "CrossAttnDownBlock2D")

_CROSS_UP = ("CrossAttnUpBlock2D", "UpBlock2D")


SOUNDS: Table = {
    "AudioLDM2UNet2DConditionModel": lambda f: {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 32,
        **channels(f),
        "down_block_types": _CROSS,
        "up_block_types": _CROSS_UP,
        "cross_attention_dim": (f.text, f.text),
    },
    "AudioLDM2ProjectionModel": lambda f: {
        "text_encoder_dim": f.text,
        "text_encoder_1_dim": f.text,
        "langauge_model_dim": f.text,
    },
    "StableAudioDiTModel": lambda f: {
        "sample_size": 8,
        "in_channels": f.latent,
        "num_layers": 2,
        **heads(4, 8),
        "num_key_value_attention_heads": 2,
        "out_channels": f.latent,
        "cross_attention_dim": 16,
        "time_proj_dim": 8,
        "global_states_input_dim": 2 * f.text,
        "cross_attention_input_dim": f.text,
    },
    "StableAudioProjectionModel": lambda f: {
        "text_encoder_dim": f.text,
        "conditioning_dim": f.text,
        "min_value": 0,
        "max_value": 32,
    },
    "StableAudio3DiTModel": lambda f: {
        "io_channels": f.latent,
        "patch_size": 1,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "cond_token_dim": f.text,
        "global_cond_dim": f.text,
        "local_add_cond_dim": f.latent + 1,
        "timestep_features_dim": 16,
        "ff_mult": 2,
        "num_memory_tokens": 3,
        "use_differential_attention": False,
    },
    "StableAudio3DurationEmbedder": lambda f: {"output_dim": f.text, "fourier_dim": 16},
    "AceStepTransformer1DModel": lambda f: {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "in_channels": 3 * f.latent,
        "audio_acoustic_hidden_dim": f.latent,
        "patch_size": 2,
        "sliding_window": 16,
    },
    "AceStepConditionEncoder": lambda f: {
        "hidden_size": 32,
        "intermediate_size": 64,
        "text_hidden_dim": f.text,
        "timbre_hidden_dim": f.latent,
        "num_lyric_encoder_hidden_layers": 2,
        "num_timbre_encoder_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
    },
    "LongCatAudioDiTTransformer": lambda f: {
        "dit_dim": 64,
        "dit_depth": 2,
        "dit_heads": 4,
        "dit_text_dim": f.text,
        "latent_dim": f.latent,
        "text_conv": False,
    },
    "UNet1DModel": lambda f: {
        "block_out_channels": (32, 32, 64),
        "extra_in_channels": 16,
        "sample_size": 512,
        "sample_rate": 16000,
        "in_channels": 2,
        "out_channels": 2,
        "flip_sin_to_cos": True,
        "use_timestep_embedding": False,
        "time_embedding_type": "fourier",
        "mid_block_type": "UNetMidBlock1D",
        "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        "up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    },
}
