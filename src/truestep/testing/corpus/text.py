"""Faults of the text: tokens, templates, masks, which layer, which encoder, pooled or not."""

from __future__ import annotations

from typing import Any

import torch

from truestep.testing.corpus.editing import edit
from truestep.testing.corpus.entry import fault

_GIVEN = "denoiser.forward in encoder_hidden_states*"
_IDS = "text_encoder*.forward in input_ids"


@fault("flux", "kontext", "fill", "control", "hunyuan", at="denoiser.forward in pooled_projections")
def pooled_from_sequence(pipe: Any) -> None:
    """The pooled text is the first token of the sequence, not the pooled output."""
    old = "pooler_output"
    edit(pipe, "_get_clip_prompt_embeds", (old, "last_hidden_state[:, 0]"))


@fault("sdxl", at="denoiser.forward in added_cond_kwargs.text_embeds")
def pooled_by_mean(pipe: Any) -> None:
    """The pooled text is the mean of the sequence."""
    new = "add_text_embeds = prompt_embeds.mean(1)[:, : pooled_prompt_embeds.shape[-1]]"
    edit(pipe, "__call__", ("add_text_embeds = pooled_prompt_embeds", new))


@fault("sdxl", at="denoiser.forward in added_cond_kwargs.text_embeds")
def pooled_normalised(pipe: Any) -> None:
    """The pooled text is normalised, as for a similarity of CLIP."""
    new = "add_text_embeds = torch.nn.functional.normalize(pooled_prompt_embeds, dim=-1)"
    edit(pipe, "__call__", ("add_text_embeds = pooled_prompt_embeds", new))


@fault("sd3", at="denoiser.forward in pooled_projections")
def pooled_encoders_swapped(pipe: Any) -> None:
    """The pooled texts of two encoders stand in the other order."""
    old = "[pooled_prompt_embed, pooled_prompt_2_embed]"
    edit(pipe, "encode_prompt", (old, "[pooled_prompt_2_embed, pooled_prompt_embed]"))


@fault("sdxl", at=_GIVEN)
def encoders_swapped(pipe: Any) -> None:
    """The texts of two encoders stand in the other order."""
    old = "torch.concat(prompt_embeds_list, dim=-1)"
    edit(pipe, "encode_prompt", (old, "torch.concat(prompt_embeds_list[::-1], dim=-1)"))


@fault("sd3", at=_GIVEN)
def text_padded_in_front(pipe: Any) -> None:
    """The short encoders' channels are padded with zeros in front, not behind."""
    old = "(0, t5_prompt_embed.shape[-1] - clip_prompt_embeds.shape[-1])"
    new = "(t5_prompt_embed.shape[-1] - clip_prompt_embeds.shape[-1], 0)"
    edit(pipe, "encode_prompt", (old, new))


@fault("flux", "kontext", "sd3", "mochi", "ltx-i2v", at=_IDS)
def second_length(pipe: Any) -> None:
    """The long encoder's text is padded to half its length."""
    old, new = "max_length=max_sequence_length,", "max_length=max_sequence_length // 2,"
    edit(pipe, "_get_t5_prompt_embeds", (old, new))


@fault("flux", at=_IDS)
def unpadded(pipe: Any) -> None:
    """The long encoder's text is not padded to its full length."""
    edit(pipe, "_get_t5_prompt_embeds", ('padding="max_length"', 'padding="longest"'))


@fault("sdxl", "sd3", at=_GIVEN)
def last_layer(pipe: Any) -> None:
    """The last hidden layer of the short encoders, not the one before it."""
    method = "encode_prompt" if hasattr(pipe, "unet") else "_get_clip_prompt_embeds"
    edit(pipe, method, (".hidden_states[-2]", ".hidden_states[-1]"))


@fault("z-image", at="denoiser.forward in cap_feats*")
def last_layer_of_chat(pipe: Any) -> None:
    """The last hidden layer of the language model, not the one before it."""
    edit(pipe, "_encode_prompt", (".hidden_states[-2]", ".hidden_states[-1]"))


@fault("lumina2", at=_GIVEN)
def last_layer_after_norm(pipe: Any) -> None:
    """The normalised last hidden layer of the language model, not the one before it."""
    edit(pipe, "_get_gemma_prompt_embeds", (".hidden_states[-2]", ".hidden_states[-1]"))


@fault("hunyuan", at=_GIVEN)
def no_layer_skipped(pipe: Any) -> None:
    """The language model's last layer, where two are to be skipped."""
    edit(pipe, "_get_llama_prompt_embeds", ("-(num_hidden_layers_to_skip + 1)", "-1"))


@fault("qwen", "qwen-edit", at=_GIVEN)
def template_offset(pipe: Any) -> None:
    """One token of the template is left before the prompt."""
    pipe.prompt_template_encode_start_idx -= 1


@fault("hunyuan", at=_GIVEN)
def template_crop(pipe: Any) -> None:
    """The template is cropped one token too early."""
    edit(pipe, "_get_llama_prompt_embeds", ("[:, crop_start:]", "[:, crop_start - 1 : -1].clone()"))


@fault("qwen", "qwen-edit", at=_IDS)
def template_reworded(pipe: Any) -> None:
    """The template says something else."""
    pipe.prompt_template_encode = pipe.prompt_template_encode.replace("Describe", "Explain", 1)


@fault("z-image", at=_IDS)
def template_unanswered(pipe: Any) -> None:
    """The chat template does not open the answer."""
    edit(pipe, "_encode_prompt", ("add_generation_prompt=True", "add_generation_prompt=False"))


@fault("lumina2", at=_IDS)
def system_prompt_left_out(pipe: Any) -> None:
    """The prompt goes without its system prompt."""
    edit(pipe, "encode_prompt", ('[system_prompt + " <Prompt Start> " + p', "[p"))


@fault("sana", at=_IDS)
def instruction_left_out(pipe: Any) -> None:
    """The prompt goes without the instruction before it, in the same length."""
    edit(pipe, "_get_gemma_prompt_embeds", ("[chi_prompt + p for", "[p for"))


@fault("sana", "pixart", at=_IDS)
def capitals_kept(pipe: Any) -> None:
    """The prompt is not put into lower case."""
    edit(pipe, "_text_preprocessing", ("text.lower().strip()", "text.strip()"))


@fault("wan-i2v", "vace", at="text_encoder*.forward in attention_mask")
def mask_not_given_to_encoder(pipe: Any) -> None:
    """The text encoder sees padding."""
    edit(pipe, "_get_t5_prompt_embeds", (", mask.to(model_device))", ")"))


@fault("pixart", "mochi", at="text_encoder.forward in attention_mask")
def mask_of_ones(pipe: Any) -> None:
    """The text encoder's mask is one everywhere."""
    method = {
        "PixArtSigmaPipeline": "encode_prompt",
        "MochiPipeline": "_get_t5_prompt_embeds",
    }[type(pipe).__name__]
    old = "attention_mask=prompt_attention_mask"
    edit(pipe, method, (old, "attention_mask=torch.ones_like(prompt_attention_mask)"))


@fault(
    "pixart", "hunyuan", "sana", "mochi", "lumina2", "ltx-i2v",
    at="denoiser.forward in encoder_attention_mask",
)  # fmt: skip
def padding_attended(pipe: Any) -> None:
    """The denoiser attends to padding."""
    old = "encoder_attention_mask=prompt_attention_mask"
    edit(pipe, "__call__", (old, "encoder_attention_mask=torch.ones_like(prompt_attention_mask)"))


@fault("sdxl", "sd3", "pixart", "sana", "mochi", at=_GIVEN)
def negative_text_of_zeros(pipe: Any) -> None:
    """The negative prompt's embedding is zero."""
    old = "torch.cat([negative_prompt_embeds, prompt_embeds], dim=0)"
    new = "torch.cat([torch.zeros_like(prompt_embeds), prompt_embeds], dim=0)"
    edit(pipe, "__call__", (old, new))


@fault("pixart", "sana", "mochi", "cogvideox-i2v", "ltx-i2v", at=_GIVEN)
def passes_swapped(pipe: Any) -> None:
    """Prompt and negative prompt stand in the other order in the batch."""
    old = "torch.cat([negative_prompt_embeds, prompt_embeds], dim=0)"
    edit(pipe, "__call__", (old, "torch.cat([prompt_embeds, negative_prompt_embeds], dim=0)"))


@fault("klein-kv", at=_GIVEN)
def layers_reversed(pipe: Any) -> None:
    """The stacked layers of the language model stand in the other order."""
    old = "for k in hidden_states_layers"
    edit(pipe, "_get_qwen3_prompt_embeds", (old, "for k in reversed(hidden_states_layers)"))


@fault("klein-kv", at=_GIVEN)
def layers_interleaved(pipe: Any) -> None:
    """The stacked layers are interleaved by channel, not one after another."""
    old, new = "out.permute(0, 2, 1, 3)", "out.permute(0, 2, 3, 1)"
    edit(pipe, "_get_qwen3_prompt_embeds", (old, new))


@fault("audioldm2", at=_GIVEN)
def first_tokens_kept(pipe: Any) -> None:
    """The language model's first tokens are kept, not those that it went on with."""
    old, new = "inputs_embeds[:, -max_new_tokens:, :]", "inputs_embeds[:, :max_new_tokens, :]"
    edit(pipe, "generate_language_model", (old, new))


@fault("audioldm2", at="projection_model.forward in hidden_states*")
def encoders_of_audio_swapped(pipe: Any) -> None:
    """The two texts are projected with each other's layer."""
    old = "hidden_states=prompt_embeds_list[0]"
    edit(pipe, "encode_prompt", (old, "hidden_states=prompt_embeds_list[0].roll(1, -1)"))


@fault("stable-audio", at="projection_model.forward in *_seconds")
def duration_swapped(pipe: Any) -> None:
    """Start and end of the sound are swapped."""
    edit(
        pipe,
        "encode_duration",
        ("start_seconds=audio_start_in_s", "start_seconds=audio_end_in_s"),
        ("end_seconds=audio_end_in_s", "end_seconds=audio_start_in_s"),
    )


@fault("stable-audio", at=_GIVEN)
def padding_kept(pipe: Any) -> None:
    """The embeddings of padding are not set to zero."""
    old = "prompt_embeds * attention_mask.unsqueeze(-1).to(prompt_embeds.dtype)"
    edit(pipe, "encode_prompt", (old, "prompt_embeds"))


@fault("flux", "sd3", "wan-i2v", "pixart", at="text_encoder*.forward out*")
def encoder_layer_left_out(pipe: Any) -> None:
    """A layer of the text encoder is left out."""
    encoders = [getattr(pipe, f"text_encoder{n}", None) for n in ("_3", "_2", "")]
    encoder = next(part for part in encoders if part is not None)
    layers = next(
        module for module in encoder.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1
    )  # fmt: skip
    del layers[-1]
