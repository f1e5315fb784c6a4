"""Passes: forwards of the transformer, whole or without parts of its attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from truestep.controls import Controls
from truestep.joint import Context, Joint
from truestep.runtime.ltx2.plan import ORDER, perturbed_blocks
from truestep.runtime.ltx2.settings import frame_rate, given_tokens, latent_shape, of
from truestep.runtime.pipeline import Branch, Pipeline, Step, text_branch


def predict(pipe: Pipeline, latent: Joint, step: Step, context: Context, branch: Branch) -> Joint:
    """One pass: tokens to the denoised samples x0 of the same shapes, float32."""
    return _forward(pipe, latent, step, {branch: context})[branch]


def predict_passes(
    pipe: Pipeline,
    latent: Joint,
    step: Step,
    texts: Mapping[Branch, Context],
    wanted: Sequence[Branch],
) -> dict[Branch, Joint]:
    """A step's passes, as separate forwards or together (`pass_batching`), in the order asked."""
    plan = of(pipe).pass_batching
    together: list[Branch] = []
    if plan == "all":
        together = list(wanted)
    elif plan == "cond_uncond" and "uncond" in wanted:
        together = ["uncond", "cond"]
    made: dict[Branch, Joint] = {}
    if len(together) > 1:
        contexts = {branch: texts[text_branch(branch)] for branch in together}
        made = _forward(pipe, latent, step, contexts)
    for branch in wanted:
        if branch not in made:
            made[branch] = pipe.predict(pipe, latent, step, texts[text_branch(branch)], branch)
    return {branch: made[branch] for branch in wanted}


def _forward(
    pipe: Pipeline, latent: Joint, step: Step, contexts: Mapping[Branch, Context]
) -> dict[Branch, Joint]:
    """One forward of some passes, beside each other on the batch axis."""
    model, controls = pipe.transformer, of(pipe)
    branches, count = tuple(contexts), len(contexts)
    pipe.forwards += count * latent.video.shape[0]
    context = Context(*(torch.cat(part) for part in zip(*contexts.values(), strict=True)))
    both = Joint(*(torch.cat([part] * count) if count > 1 else part for part in latent))
    batch = both.video.shape[0]
    timestep = step.timestep.expand(batch)
    given = given_tokens(pipe, both.video)
    frames, height, width = latent_shape(pipe)
    with ExitStack() as stack:
        rows = {name: [branch == name for branch in branches] for name in ORDER}
        perturbation = stack.enter_context(_perturbed(model, rows["perturbed"], latent, controls))
        isolated = stack.enter_context(_isolated(model, rows["modality"], latent))
        stack.enter_context(_cross_attention(model, controls))
        stack.enter_context(_gates(model, timestep, controls))
        stack.enter_context(_autocast(pipe, controls))
        video, audio = model(
            hidden_states=both.video.to(model.dtype),
            audio_hidden_states=both.audio.to(model.dtype),
            encoder_hidden_states=context.video.to(model.dtype),
            audio_encoder_hidden_states=context.audio.to(model.dtype),
            timestep=timestep if given is None else timestep.unsqueeze(-1) * (1 - given),
            audio_timestep=timestep,
            sigma=timestep,
            encoder_attention_mask=context.mask,
            audio_encoder_attention_mask=context.mask,
            num_frames=frames,
            height=height,
            width=width,
            fps=frame_rate(pipe),
            audio_num_frames=both.audio.shape[1],
            isolate_modalities=isolated,
            use_cross_timestep=controls.av_adaln == "cross",
            return_dict=False,
            **perturbation,
        )
    estimates = zip(
        _denoised(both.video, video, _token_sigma(pipe, step, given)).chunk(count),
        _denoised(both.audio, audio, step.sigma).chunk(count),
        strict=True,
    )
    return {branch: Joint(*pair) for branch, pair in zip(branches, estimates, strict=True)}


def _denoised(
    latent: torch.Tensor, velocity: torch.Tensor, sigma: float | torch.Tensor
) -> torch.Tensor:
    """x0 = x - sigma v, in float32 or wider."""
    return latent - velocity.to(torch.promote_types(velocity.dtype, torch.float32)) * sigma


def _token_sigma(pipe: Pipeline, step: Step, given: torch.Tensor | None) -> float | torch.Tensor:
    if given is None or of(pipe).conditioned_sigma == "scalar":
        return step.sigma
    return (step.sigma * (1 - given)).unsqueeze(-1)


@contextmanager
def _perturbed(
    model: Any, rows: Sequence[bool], latent: Joint, controls: Controls
) -> Iterator[dict[str, Any]]:
    """Keywords with which self-attention of some rows passes its values through.

    The model perturbs both modalities of a block; where one is to be left alone, it is not told.
    """
    if not any(rows):
        yield {}
        return
    video, audio = (set(blocks) for blocks in perturbed_blocks(controls))
    keywords: dict[str, Any] = {"spatio_temporal_guidance_blocks": sorted(video | audio)}
    if not all(rows):
        mask = torch.tensor([0.0 if row else 1.0 for row in rows], device=latent.video.device)
        mask = mask.repeat_interleave(latent.video.shape[0])
        keywords["perturbation_mask"] = mask.to(model.dtype)
    blocks = model.transformer_blocks
    alone = [blocks[index].attn1 for index in audio - video]
    alone += [blocks[index].audio_attn1 for index in video - audio]

    def unperturbed(module: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, {**given, "perturbation_mask": None, "all_perturbed": False}

    with _hooks(
        module.register_forward_pre_hook(unperturbed, with_kwargs=True) for module in alone
    ):
        yield keywords


@contextmanager
def _isolated(model: Any, rows: Sequence[bool], latent: Joint) -> Iterator[bool]:
    """Whether the model is to leave out attention between sound and video; of some rows only, what
    that attention gives is set to zero."""
    if all(rows) or not any(rows):
        yield all(rows)
        return
    keep = torch.tensor([0.0 if row else 1.0 for row in rows], device=latent.video.device)
    keep = keep.repeat_interleave(latent.video.shape[0])[:, None, None]

    def without(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * keep.to(output.dtype)

    attention = [
        module
        for block in model.transformer_blocks
        for module in (block.audio_to_video_attn, block.video_to_audio_attn)
    ]
    with _hooks(module.register_forward_hook(without) for module in attention):
        yield False


@contextmanager
def _cross_attention(model: Any, controls: Controls) -> Iterator[None]:
    """Leave out attention from one modality to the other, in every block and pass."""
    off = {
        "use_a2v_cross_attention": controls.skip_a2v_cross_attn,
        "use_v2a_cross_attention": controls.skip_v2a_cross_attn,
    }
    changed = {key: False for key, skipped in off.items() if skipped}

    def without(module: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, {**given, **changed}

    blocks = model.transformer_blocks if changed else ()
    with _hooks(block.register_forward_pre_hook(without, with_kwargs=True) for block in blocks):
        yield


@contextmanager
def _gates(model: Any, timestep: torch.Tensor, controls: Controls) -> Iterator[None]:
    """Modulate the gates between sound and video with the other side's sigma (`own_cross_gate`)."""
    if controls.av_adaln != "own_cross_gate":
        yield
        return
    config = model.config
    factor = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier

    def other(module: Any, args: tuple[Any, ...]) -> Any:
        return (timestep.flatten() * factor, *args[1:])

    gates = (model.av_cross_attn_video_a2v_gate, model.av_cross_attn_audio_v2a_gate)
    with _hooks(gate.register_forward_pre_hook(other) for gate in gates):
        yield


def _autocast(pipe: Pipeline, controls: Controls) -> AbstractContextManager[Any]:
    """Autocast in the transformer's own 16-bit dtype; raised to more bits, it runs without."""
    dtype = pipe.transformer.dtype
    if controls.disable_autocast or dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(torch.device(pipe.device).type, dtype=dtype)


@contextmanager
def _hooks(handles: Iterator[Any]) -> Iterator[None]:
    """Remove hooks again, whatever happens."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
