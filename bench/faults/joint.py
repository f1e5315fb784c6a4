"""Faults and harmless twins of models of video and sound (LTX-2): what one modality has of the
other's, and choices in which engines disagree. Each says where a check must see it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

# `--apply FILE.py:FUNCTION` imports this file alone.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.faults.entry import benign, fault
from bench.faults.targets import around, middles, need
from truestep.joint import Context, Encoded, Joint, each

Tensor = torch.Tensor
Stage = Callable[..., Any]
LTX2 = ("ltx2",)


def _controls(pipe: Any) -> Any:
    """The controls of an LTX-2 pipeline, resolved from its case."""
    from truestep.controls import resolve

    _need_joint(pipe)
    return resolve(pipe.settings)


def _need_joint(pipe: Any) -> None:
    need(getattr(pipe, "audio_video", False), "the model makes no sound")


def _keywords_through(pipe: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Pass the keywords of the transformer's forward through `change`."""
    _need_joint(pipe)
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, keywords: (args, change(keywords)), with_kwargs=True
    )


# Text and its connector


@fault(acts="stage text, negative prompt", subjects=LTX2, stage="text", branch="uncond")
def negative_prompt_lost(pipe: Any) -> None:
    """Bug: the prompt is encoded once more in the place of the negative prompt."""
    _need_joint(pipe)
    need(pipe.settings.negative_prompt != pipe.settings.prompt, "both prompts are the same")
    pipe.settings.negative_prompt = pipe.settings.prompt


@fault(acts="stage connector, mask", subjects=LTX2, stage="connector")
def connector_mask_ignored(pipe: Any) -> None:
    """Bug: the connector is given no mask, so padding is not replaced by its registers."""

    def unmasked(original: Stage, inner: Any, texts: Any) -> Any:
        seen = {b: Encoded(t.embeds, torch.ones_like(t.mask)) for b, t in texts.items()}
        return original(inner, seen)

    _need_joint(pipe)
    around(pipe, "connect", unmasked)


@fault(acts="stage connector, padding", subjects=LTX2, stage="connector")
def connector_padding_on_the_right(pipe: Any) -> None:
    """Bug: the text is padded on the left, and its mask made as if it were on the right."""

    def flipped(original: Stage, inner: Any, texts: Any) -> Any:
        return original(inner, {b: Encoded(t.embeds, t.mask.flip(1)) for b, t in texts.items()})

    _need_joint(pipe)
    around(pipe, "connect", flipped)


@fault(acts="stage connector, both contexts", subjects=LTX2, stage="connector")
def contexts_swapped(pipe: Any) -> None:
    """Bug: video is given the context of sound, and sound that of video (LTX-2.0: equal widths)."""

    def swapped(original: Stage, inner: Any, texts: Any) -> Any:
        made = original(inner, texts)
        return {b: Context(c.audio, c.video, c.mask) for b, c in made.items()}

    _need_joint(pipe)
    widths = {
        (part.num_attention_heads, part.inner_dim)
        for part in (pipe.connectors.video_connector, pipe.connectors.audio_connector)
    }
    need(len(widths) == 1, "the contexts of video and sound have different widths")
    around(pipe, "connect", swapped)


@fault(acts="stage prediction, text of uncond", subjects=LTX2, stage="prediction", branch="uncond")
def uncond_given_the_prompt(pipe: Any) -> None:
    """Bug: a batch of passes is given one text, so the unconditional one has the prompt's."""

    def one_text(
        original: Stage, inner: Any, latent: Any, step: Any, texts: Any, wanted: Any
    ) -> Any:
        return original(inner, latent, step, dict.fromkeys(texts, texts["cond"]), wanted)

    _need_joint(pipe)
    need(_controls(pipe).audio_guidance_scale != 1, "the case has no guidance")
    around(pipe, "predict_passes", one_text)


# Schedule and noise


@fault(acts="stage schedule, mu", subjects=LTX2, stage="schedule")
def mu_from_tokens(pipe: Any) -> None:
    """Bug: the shift is taken from the number of tokens where the reference has a constant."""
    need(_controls(pipe).mu == "constant", "mu is no constant")
    pipe.settings.mu = "tokens"


@fault(acts="stage latent, order", subjects=LTX2, stage="latent")
def sound_noise_drawn_first(pipe: Any) -> None:
    """Bug: the noise of the sound is drawn before that of the video, from the same generator."""

    def drawn(original: Stage, inner: Any) -> Any:
        made = original(inner)
        generator = torch.Generator("cpu").manual_seed(inner.settings.seed)
        audio, video = (
            torch.randn(part.shape, generator=generator).to(part)
            for part in (made.audio, made.video)
        )
        return Joint(video, audio)

    _need_joint(pipe)
    need(pipe.settings.image is None, "the first frame is an image's")
    around(pipe, "make_latent", drawn)


# Passes


@fault(acts="transformer, every block", subjects=LTX2, stage="prediction", modality="audio")
def v2a_skipped(pipe: Any) -> None:
    """Bug: sound does not attend to video: video-to-audio cross-attention is left out."""
    need(not _controls(pipe).skip_v2a_cross_attn, "it is left out already")
    pipe.settings.skip_v2a_cross_attn = True


@fault(acts="transformer, every block", subjects=LTX2, stage="prediction", modality="video")
def a2v_skipped(pipe: Any) -> None:
    """Bug: video does not attend to sound: audio-to-video cross-attention is left out."""
    need(not _controls(pipe).skip_a2v_cross_attn, "it is left out already")
    pipe.settings.skip_a2v_cross_attn = True


@fault(acts="stage prediction, order", subjects=LTX2, stage="prediction")
def predictions_swapped(pipe: Any) -> None:
    """Bug: the model's two outputs are unpacked as sound, video, where they have one shape."""

    def swapped(original: Stage, inner: Any, latent: Any, *rest: Any) -> Any:
        made = original(inner, latent, *rest)
        return Joint(made.audio, made.video)

    _need_joint(pipe)
    pipe.controls = _controls(pipe)
    made = pipe.make_latent(pipe)
    need(made.video.shape == made.audio.shape, "video and sound have different shapes")
    around(pipe, "predict", swapped)


@fault(
    acts="stage prediction, branch perturbed",
    subjects=LTX2,
    stage="prediction",
    branch="perturbed",
    modality="video",
)
def stg_block_off_by_one(pipe: Any) -> None:
    """Bug: the blocks whose self-attention is perturbed are counted from 1, in video."""
    controls = _controls(pipe)
    need(controls.stg_scale, "nothing is perturbed")
    count = len(pipe.transformer.transformer_blocks)
    pipe.settings.stg_blocks = tuple((block + 1) % count for block in controls.stg_blocks)


@fault(
    acts="stage prediction, branch perturbed",
    subjects=LTX2,
    stage="prediction",
    branch="perturbed",
    modality="audio",
)
def stg_blocks_shared(pipe: Any) -> None:
    """Bug: the list of perturbed blocks of the video is used for the sound too."""
    controls = _controls(pipe)
    need(controls.pass_gating == "per_modality", "the list is shared already")
    need(controls.stg_blocks != controls.audio_stg_blocks, "both lists are the same")
    pipe.settings.pass_gating = "shared_blocks"


@fault(
    acts="stage prediction, branch modality",
    subjects=LTX2,
    stage="prediction",
    branch="modality",
    modality="audio",
)
def modality_pass_one_way(pipe: Any) -> None:
    """Bug: the pass without attention between the modalities leaves out audio-to-video only."""

    def one_way(original: Stage, inner: Any, latent: Any, step: Any, text: Any, branch: str) -> Any:
        if branch != "modality":
            return original(inner, latent, step, text, branch)
        with _without(inner.transformer, "use_a2v_cross_attention"):
            return original(inner, latent, step, text, "cond")

    _need_joint(pipe)
    around(pipe, "predict", one_way)


@contextmanager
def _without(model: Any, keyword: str) -> Iterator[None]:
    handles = [
        block.register_forward_pre_hook(
            lambda module, args, keywords: (args, {**keywords, keyword: False}), with_kwargs=True
        )
        for block in model.transformer_blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Given tokens have a sigma of 0, which hides in x0 what is wrong in them: both modalities drift.


@fault(acts="stage prediction, image, timestep", subjects=LTX2, stage="prediction")
def token_sigma_lost(pipe: Any) -> None:
    """Bug: tokens of the given image are told the step's timestep instead of 0."""
    _need_joint(pipe)
    need(pipe.settings.image is not None, "no image is given")
    _keywords_through(pipe, lambda keywords: {**keywords, "timestep": keywords["sigma"]})


@fault(acts="stage prediction, image, x0", subjects=LTX2, stage="prediction", modality="video")
def token_sigma_lost_in_x0(pipe: Any) -> None:
    """Bug: tokens of the given image are denoised with the step's sigma instead of 0."""
    need(_controls(pipe).conditioned_sigma == "token", "the reference does so too")
    need(pipe.settings.image is not None, "no image is given")
    pipe.settings.conditioned_sigma = "scalar"


@fault(acts="stage prediction, image, AdaLN", subjects=LTX2, stage="prediction")
def cross_sigma_of_tokens(pipe: Any) -> None:
    """Bug: gates of video's attention to sound follow its tokens' sigmas, not the sound's."""
    need(_controls(pipe).av_adaln == "own_cross_gate", "another variant")
    need(pipe.settings.image is not None, "both sides have one sigma")
    pipe.settings.av_adaln = "own"


@fault(acts="transformer, rope, frames a second", subjects=LTX2, stage="prediction")
def fps_not_told(pipe: Any) -> None:
    """Bug: the model is not told the frame rate, and places frames as for its default of 24."""
    _need_joint(pipe)
    need(pipe.settings.fps not in (None, 24), "the frame rate is the default")
    _keywords_through(pipe, lambda keywords: {**keywords, "fps": 24.0})


@fault(acts="transformer, audio_rope", subjects=LTX2, stage="prediction", modality="audio")
def sound_positions_as_of_video(pipe: Any) -> None:
    """Bug: tokens of sound are placed with the video's factor in time, 8 for 4."""
    _need_joint(pipe)
    rope, factor = pipe.transformer.audio_rope, pipe.transformer.rope.scale_factors[0]
    need(rope.scale_factors[0] != factor, "both have one factor")
    rope.scale_factors = (factor,)


@fault(
    acts="transformer, blocks.<middle>.audio_attn1, bias of the output",
    subjects=LTX2,
    where=("{middle}.audio_attn1.to_out.0",),
    stage="prediction",
    modality="audio",
)
def sound_attention_bias_dropped(pipe: Any) -> None:
    """Bug: the output projection of one self-attention of the sound has no bias."""
    _need_joint(pipe)
    for block in middles(pipe):
        block.audio_attn1.to_out[0].bias.data.zero_()


@fault(
    acts="transformer, blocks.<middle>, modulation of the sound",
    subjects=LTX2,
    where=("{middle}",),
    stage="prediction",
    modality="audio",
)
def sound_shift_scale_swapped(pipe: Any) -> None:
    """Bug: one block unpacks the sound's modulation as scale, shift instead of shift, scale."""

    def reorder(module: Any, args: Any, keywords: dict[str, Any]) -> Any:
        given = keywords["temb_audio"]
        split = given.unflatten(-1, (module.audio_scale_shift_table.shape[0], -1))
        order = [1, 0, *range(2, split.shape[-2])]
        return args, {**keywords, "temb_audio": split[..., order, :].flatten(-2)}

    _need_joint(pipe)
    for block in middles(pipe):
        table = block.audio_scale_shift_table.data
        table.copy_(torch.cat([table[[1, 0]], table[2:]]))
        block.register_forward_pre_hook(reorder, with_kwargs=True)


@fault(
    acts="transformer, blocks.*.audio_ff",
    subjects=LTX2,
    where=("{block}.audio_ff.net.0",),
    stage="prediction",
    modality="audio",
)
def sound_gelu_exact(pipe: Any) -> None:
    """Bug: the GELU of the sound's feed-forward is exact instead of in its tanh form."""
    _need_joint(pipe)
    for block in pipe.transformer.transformer_blocks:
        block.audio_ff.net[0].approximate = "none"


# Guidance and update


@fault(acts="stage guidance, std scope", subjects=LTX2, stage="guidance")
def std_scope_changed(pipe: Any) -> None:
    """Bug: the rescale takes deviations of each clip where the reference has the whole batch's."""
    need((pipe.settings.videos_per_prompt or 1) > 1, "one clip is the whole batch")
    other = {"whole": "sample", "sample": "whole"}
    pipe.settings.std_scope = other[_controls(pipe).std_scope]


@fault(acts="stage guidance, rescale", subjects=LTX2, stage="guidance", modality="audio")
def sound_rescaled_as_video(pipe: Any) -> None:
    """Bug: the guided sound is rescaled with the video's share."""
    controls = _controls(pipe)
    need(controls.guidance_rescale != controls.audio_guidance_rescale, "both have one share")
    pipe.settings.audio_guidance_rescale = controls.guidance_rescale


@fault(acts="stage guidance, scale", subjects=LTX2, stage="guidance", modality="video")
def video_guided_as_sound(pipe: Any) -> None:
    """Bug: the video is guided with the scale of the sound."""
    scale = _controls(pipe).audio_guidance_scale
    need(pipe.settings.guidance_scale != scale, "both have one scale")
    pipe.settings.guidance_scale = scale


@fault(acts="stage guidance, scales", subjects=LTX2, stage="guidance", modality="audio")
def sound_modality_scale_lost(pipe: Any) -> None:
    """Bug: the sound is not guided away from its prediction without the video."""
    controls = _controls(pipe)
    need(controls.modality_scale != 1 and controls.audio_modality_scale != 1, "no such guidance")
    pipe.settings.audio_modality_scale = 1.0


@fault(acts="stage update, sound", subjects=LTX2, stage="update", modality="audio")
def sound_step_after_video(pipe: Any) -> None:
    """Bug: one scheduler steps both, so that the sound is taken with the following sigmas."""

    def late(original: Stage, inner: Any, step: Any, guided: Any, latent: Any) -> Any:
        made = original(inner, step, guided, latent)
        sigmas = inner.scheduler.sigmas
        at = min(step.index + 1, len(sigmas) - 2)
        velocity = (latent.audio - guided.audio) / step.sigma
        length = (sigmas[at + 1] - sigmas[at]).to(velocity)
        return Joint(made.video, latent.audio + length * velocity)

    _need_joint(pipe)
    around(pipe, "update", late)


# Decoding


def _sound_latent_through(pipe: Any, change: Callable[[Any, Tensor], Tensor]) -> None:
    """Pass what the audio VAE is given, `b l (c m)`, through `change(pipe, denormalised)`."""

    def decode(original: Stage, inner: Any, latent: Any) -> Any:
        mean, std = (
            value.to(latent.audio)
            for value in (inner.audio_vae.latents_mean, inner.audio_vae.latents_std)
        )
        changed = change(inner, latent.audio * std + mean)
        return original(inner, Joint(latent.video, (changed - mean) / std))

    _need_joint(pipe)
    around(pipe, "decode", decode)


@fault(acts="stage decode, sound", subjects=LTX2, stage="decoding", modality="audio")
def sound_latents_normalised(pipe: Any) -> None:
    """Bug: latents of the sound are decoded without undoing their normalisation."""

    def normalised(inner: Any, sound: Tensor) -> Tensor:
        mean, std = inner.audio_vae.latents_mean, inner.audio_vae.latents_std
        return (sound - mean.to(sound)) / std.to(sound)

    _sound_latent_through(pipe, normalised)


@fault(acts="stage decode, sound", subjects=LTX2, stage="decoding", modality="audio")
def sound_bins_before_channels(pipe: Any) -> None:
    """Bug: tokens of the sound are unpacked as mel bins of channels, not channels of mel bins."""

    def reordered(inner: Any, sound: Tensor) -> Tensor:
        bins = inner.audio_vae.config.mel_bins // inner.audio_vae.mel_compression_ratio
        split = sound.unflatten(2, (bins, -1))
        need(1 < bins < sound.shape[2], "one channel or one bin")
        return split.transpose(2, 3).flatten(2)

    _sound_latent_through(pipe, reordered)


@fault(acts="stage decode, sound", subjects=LTX2, stage="decoding", modality="audio")
def sound_louder(pipe: Any) -> None:
    """Bug: the sound is 1 dB too loud."""

    def louder(original: Stage, inner: Any, latent: Any) -> Any:
        made = original(inner, latent)
        return Joint(made.video, made.audio * 10 ** (1 / 20))

    _need_joint(pipe)
    around(pipe, "decode", louder)


@fault(
    acts="vocoder, last convolution",
    subjects=LTX2,
    stage="decoding",
    modality="audio",
    model="vocoder",
)
def vocoder_bias_dropped(pipe: Any) -> None:
    """Bug: the first convolution of the vocoder has no bias."""
    _need_joint(pipe)
    found = [m for m in pipe.vocoder.modules() if isinstance(m, nn.Conv1d) and m.bias is not None]
    need(found, "no convolution with a bias")
    found[0].bias.data.zero_()


# Harmless twins


@benign(acts="stage connector", why="rows of a batch do not meet", subjects=LTX2)
def connector_joint(pipe: Any) -> None:
    """Both prompts through the text connector in one call; in 16 bits it may round otherwise."""
    need(_controls(pipe).connector == "separate", "it sees both at once already")
    pipe.settings.connector = "joint"


@benign(
    acts="transformer, cross_attn_rope and cross_attn_audio_rope",
    why="`scale_factors` (and `audio_latents_per_second`, made of them) are read by "
    "`prepare_video_coords` and `prepare_audio_coords` only, which the forward calls on `rope` and "
    "`audio_rope`; those of the cross-attention are given coordinates",
    subjects=LTX2,
    bits=True,
)
def cross_rope_scale_factors(pipe: Any) -> None:
    """Other `scale_factors` in the rotary positions of attention between sound and video."""
    _need_joint(pipe)
    model = pipe.transformer
    model.cross_attn_audio_rope.scale_factors = model.audio_rope.scale_factors
    model.cross_attn_audio_rope.audio_latents_per_second = 25.0
    model.cross_attn_rope.scale_factors = (4, 16, 16)


@benign(acts="stage prediction", why="rows of a batch do not meet", subjects=LTX2)
def passes_all_in_one(pipe: Any) -> None:
    """All guidance passes in one forward."""
    need(_controls(pipe).pass_batching != "all", "they are already")
    pipe.settings.pass_batching = "all"


@benign(acts="stage prediction", why="rows of a batch do not meet", subjects=LTX2)
def passes_in_pairs(pipe: Any) -> None:
    """Both text branches in one forward, the other passes alone."""
    need(_controls(pipe).pass_batching != "cond_uncond", "they are already")
    pipe.settings.pass_batching = "cond_uncond"


@benign(acts="stage guidance", why="one clip is the whole batch", subjects=LTX2)
def std_scope_of_one_clip(pipe: Any) -> None:
    """Deviations of each clip instead of the whole batch, with one clip."""
    need((pipe.settings.videos_per_prompt or 1) == 1, "several clips")
    other = {"whole": "sample", "sample": "whole"}
    pipe.settings.std_scope = other[_controls(pipe).std_scope]


@benign(acts="transformer, AdaLN", why="without an image both sides have one sigma", subjects=LTX2)
def av_adaln_without_image(pipe: Any) -> None:
    """Attention between sound and video modulated with the other side's sigma, or its own."""
    need(pipe.settings.image is None, "with an image the sigmas differ")
    pipe.settings.av_adaln = "own" if _controls(pipe).av_adaln == "cross" else "cross"


@benign(acts="stage schedule", why="the constant's own value", subjects=LTX2, bits=True)
def mu_written_out(pipe: Any) -> None:
    """The shift as a number instead of by its name."""
    need(_controls(pipe).mu == "constant", "mu is no constant")
    pipe.settings.mu = 2.05


@benign(acts="stage prediction", why="autocast to float32 is none", subjects=LTX2, bits=True)
def autocast_in_float32(pipe: Any) -> None:
    """The transformer under an autocast to float32."""
    need(_controls(pipe).disable_autocast and pipe.settings.dtype == "float32", "another dtype")
    pipe.settings.disable_autocast = False


@benign(acts="stage guidance", why="the same formula, in float64", subjects=LTX2)
def joint_guidance_in_float64(pipe: Any) -> None:
    """Guidance of both modalities computed in float64."""

    def wide(original: Stage, inner: Any, step: Any, *made: Any) -> Any:
        guided = original(inner, step, *(each(torch.Tensor.double, part) for part in made))
        return each(lambda own, cond: own.to(cond.dtype), guided, made[0])

    _need_joint(pipe)
    around(pipe, "combine", wide)
