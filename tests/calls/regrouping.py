"""Pipelines that group their guidance passes otherwise, and faults in such pipelines."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import torch

from truestep.calls.subject import Subject, subject_of
from truestep.testing import tiny
from truestep.testing.corpus.editing import edit, source_of

Change = Callable[[Any], None]

_BATCHED = """
both = current_model(
    hidden_states=torch.cat([latent_model_input] * 2),
    timestep=torch.cat([timestep] * 2),
    encoder_hidden_states=torch.cat([{texts}]),
    attention_kwargs=attention_kwargs,
    return_dict=False,
)[0]
{names} = both.chunk(2)
noise_pred = noise_uncond + current_guidance_scale * (noise_pred - noise_uncond)
"""

_ALONE = """
{name} = current_model(
    hidden_states=latent_model_input,
    timestep=timestep,
    encoder_hidden_states={text},
    attention_kwargs=attention_kwargs,
    return_dict=False,
)[0]
"""

_UNET = """
def _unet(rows):
    return self.unet(
        latent_model_input[rows],
        t_unet,
        encoder_hidden_states={texts}[rows],
        timestep_cond=timestep_cond,
        cross_attention_kwargs=self.cross_attention_kwargs,
        added_cond_kwargs={{name: value[rows] for name, value in added_cond_kwargs.items()}},
        return_dict=False,
    )[0]
{calls}
"""


def subject(
    name: str,
    change: Change | None = None,
    *,
    dtype: str = "float32",
    steps: int = 3,
    images: int = 0,
) -> Subject:
    """A tiny pipeline with guidance."""
    pipeline = tiny.pipeline(name, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if change is not None:
        change(pipeline)
    call = {k: v for k, v in tiny.example_call(name).items() if k != "generator"}
    call |= {"num_inference_steps": steps}
    call |= {"num_images_per_prompt": images} if images else {}
    return subject_of(pipeline, **call)


def wan_batched(
    texts: str = "prompt_embeds, negative_prompt_embeds", names: str = "noise_pred, noise_uncond"
) -> Change:
    """Both passes of Wan in one batch; recorded are two calls, `cond` first."""
    return lambda pipe: _wan(pipe, _BATCHED.format(texts=texts, names=names))


def wan_calls(*passes: tuple[str, str]) -> Change:
    """Passes of Wan one after another, each a name and a text, which do not say which they are."""
    calls = "".join(_ALONE.format(name=name, text=text) for name, text in passes)
    guided = "noise_pred = noise_uncond + current_guidance_scale * (noise_pred - noise_uncond)\n"
    return lambda pipe: _wan(pipe, calls + guided)


def wan_cond_only(pipe: Any) -> None:
    """Wan without its second pass, weighed as if that were nothing."""
    alone = _ALONE.format(name="noise_pred", text="prompt_embeds")
    _wan(pipe, alone + "noise_pred = current_guidance_scale * noise_pred\n")


UNCOND = ("noise_uncond", "negative_prompt_embeds")
COND = ("noise_pred", "prompt_embeds")


def _wan(pipe: Any, code: str) -> None:
    source = source_of(pipe, "__call__")
    begin = source.index('            with current_model.cache_context("cond"')
    end = source.index("            # compute the previous noisy sample")
    edit(pipe, "__call__", (source[begin:end], textwrap.indent(code, " " * 12)))


def sdxl(calls: str, texts: str = "prompt_embeds") -> Change:
    """The U-Net of SDXL called by `_unet(rows)`; recorded is one batch, `uncond` first."""

    def change(pipe: Any) -> None:
        source = source_of(pipe, "__call__")
        begin = source.index("            noise_pred = self.unet(")
        end = source.index("            # perform guidance")
        code = _UNET.format(calls=calls, texts=texts)
        edit(pipe, "__call__", (source[begin:end], textwrap.indent(code, " " * 12)))

    return change


IN_ORDER = "noise_pred = torch.cat([_unet([0]), _unet([1])])"
REVERSED_CALLS = "last = _unet([1])\nnoise_pred = torch.cat([_unet([0]), last])"
REVERSED_BATCH = "noise_pred = _unet([1, 0])[[1, 0]]"
SWAPPED = "noise_pred = torch.cat([_unet([1]), _unet([0])])"
NO_UNCOND = "noise_pred = torch.cat([_unet([1])] * 2)"


def row_scaled(name: str, row: int, *, of: int = 2) -> Change:
    """One row of a denoiser's batch comes out 1 % larger."""

    def change(pipe: Any) -> None:
        module = getattr(pipe, name)
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)[0].clone()
            if output.shape[0] == of:
                output[row] *= 1.01
            return (output,)

        module.forward = wrapped

    return change


def scaled(name: str) -> Change:
    """The first normalisation of a denoiser lets through 1 % more."""

    def change(pipe: Any) -> None:
        module = getattr(pipe, name)
        layer = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
        layer.weight.data.mul_(1.01)

    return change


def both(*changes: Change) -> Change:
    """One change after another."""

    def change(pipe: Any) -> None:
        for part in changes:
            part(pipe)

    return change
