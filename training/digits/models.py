"""Build the four parts of the model: tokenizer, text encoder, transformer and autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from training.digits.data import COLOURS, DIRECTIONS, WORDS

TEXT_LENGTH = 8
"""Rows of text that the transformer sees: five words, the end token and two rows of zeros."""

LATENT_CHANNELS = 8
LATENT_SHAPE = (LATENT_CHANNELS, 5, 8, 8)
"""Latent of one clip, `c f h w`: half of the frames, a quarter of the height and width."""

TEXT_WIDTH = 64
SHIFT = 2.0
"""Timestep shift of training and sampling: sigma = s u / (1 + (s - 1) u), see `FlowMatchEuler`."""


def build_vae() -> AutoencoderKLWan:
    """Build the autoencoder: Wan 2.2 layout (2x2 patches, residual resampling), 4x space, 2x time.

    `scale_factor_spatial` and `scale_factor_temporal` are not derived from the other options by
    diffusers, and `WanPipeline` reads them, so they are given here.
    """
    return AutoencoderKLWan(
        base_dim=24,
        decoder_base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=4,
        scale_factor_temporal=2,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_transformer() -> WanTransformer3DModel:
    """Build the denoiser; one clip is 80 tokens."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=576,
        num_layers=5,
        rope_max_seq_len=32,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: padding is 0, and every text ends with the end token."""
    words = ["<pad>", "</s>", "<unk>", "a", "moving", *COLOURS, *WORDS, *DIRECTIONS]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
        padding_side="right",
    )


def build_text_encoder(vocabulary_size: int) -> UMT5EncoderModel:
    """Build the text encoder.

    Args:
        vocabulary_size: Number of tokens.
    """
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def decode_unclamped(vae: AutoencoderKLWan, latent: torch.Tensor) -> torch.Tensor:
    """Decode without the final clamp to [-1, 1], whose gradient is zero outside.

    Args:
        vae: The autoencoder.
        latent: `b c f h w`, as the encoder gives it (not normalised).

    Returns:
        Video `b c f h w`.

    Source:
        diffusers 0.42.1, `AutoencoderKLWan._decode`: one latent frame at a time with cached
        features, `first_chunk` for the first.
    """
    vae.clear_cache()
    hidden = vae.post_quant_conv(latent)
    frames = []
    for index in range(hidden.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(
                hidden[:, :, index : index + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=index == 0,
            )
        )
    vae.clear_cache()
    video: torch.Tensor = unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)
    return video


def encode_text(
    encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> torch.Tensor:
    """Encode prompts exactly as `WanPipeline` does.

    Args:
        encoder: The text encoder.
        tokenizer: Its tokenizer.
        prompts: One text per clip; empty for the unconditional branch.

    Returns:
        Embeddings `b TEXT_LENGTH TEXT_WIDTH`, exact zeros after the end token.

    Source:
        diffusers 0.42.1, `WanPipeline._get_t5_prompt_embeds`.
    """
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask
    hidden: torch.Tensor = encoder(tokens.input_ids, mask).last_hidden_state
    text: torch.Tensor = hidden * mask[..., None].to(hidden.dtype)
    return text


def count_parameters(*modules: torch.nn.Module) -> int:
    """Count the parameters of modules."""
    return sum(value.numel() for module in modules for value in module.parameters())
