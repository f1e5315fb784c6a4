"""An engine of its own on Wan's weights: lists of `c f h w`, float timesteps, an Euler scheduler.

    python engine_port.py FOLDER INPUTS STYLE FAULT [FAULT ...]

Each FAULT is one generation; `none` is the right one. STYLE says how predictions are made:

========  =================================================================================
call      one call of the model for each branch
batch     both branches in one call, the negative prompt first
function  a function goes through the model's own parts: the model itself is never called
worker    as `call`, in a process that is started anew and killed when it is done
========  =================================================================================
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from typing import Any

import torch

STEPS, SCALE, SHIFT = 3, 5.0, 3.0


class Euler:
    """Flow matching, stepped by Euler; sigmas without the closing zero, as some engines do."""

    def set_timesteps(self, steps: int, shift: float) -> None:
        least = shifted(torch.tensor(1.0 / 1000), shift)
        self.sigmas = shifted(torch.linspace(1.0, float(least), steps), shift)
        self.timesteps = self.sigmas * 1000

    def step(self, velocity: torch.Tensor, number: int, latent: torch.Tensor, late: bool) -> Any:
        after = [*self.sigmas[1:], torch.tensor(0.0)]
        if late:  # the sigma of the step after this one
            number = min(number + 1, len(after) - 1)
        return latent + (after[number] - self.sigmas[number]) * velocity


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * sigma / (1 + (shift - 1) * sigma)


class Port(torch.nn.Module):
    """The engine's model: takes and gives lists of samples without a batch dimension."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.added = 0.0

    def forward(self, x: list[torch.Tensor], t: torch.Tensor, context: list[torch.Tensor]) -> Any:
        latents, texts = torch.stack(x), torch.stack(context)
        made = self.inner(latents, t.expand(len(x)), texts, return_dict=False)[0]
        return list(made + self.added)


def predict(
    model: Any, latent: torch.Tensor, t: torch.Tensor, text: torch.Tensor, added: float
) -> Any:
    """The model's own arithmetic, from its parts."""
    inner = model
    b, _, f, h, w = latent.shape
    pf, ph, pw = inner.config.patch_size
    rope = inner.rope(latent)
    hidden = inner.patch_embedding(latent).flatten(2).transpose(1, 2)
    temb, modulation, context, _ = inner.condition_embedder(t, text, None)
    modulation = modulation.unflatten(1, (6, -1))
    for block in inner.blocks:
        hidden = block(hidden, context, modulation, rope)
    shift, scale = (inner.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
    hidden = inner.norm_out(hidden.float()) * (1 + scale) + shift
    out = inner.proj_out(hidden.type_as(latent))
    out = out.reshape(b, f // pf, h // ph, w // pw, pf, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return out.flatten(6, 7).flatten(4, 5).flatten(2, 3) + added


def generate(model: Any, inputs: dict[str, torch.Tensor], style: str, fault: str) -> torch.Tensor:
    """One generation."""
    scheduler = Euler()
    scheduler.set_timesteps(STEPS, shift=SHIFT + (fault == "shift"))
    latent, texts = inputs["noise"], [inputs["cond"], inputs["uncond"]]
    if fault == "noise":
        latent = latent * 1.01
    if fault == "tail":
        texts = [text.clone() for text in texts]
        texts[0][:, -3:] = 0.05
    port = Port(model)
    port.added = 0.01 if fault == "bias" else 0.0
    for number, t in enumerate(scheduler.timesteps):
        given = t[None] * (0.999 if fault == "time" else 1.0)
        if style == "function":
            cond, uncond = (predict(model, latent, given, text, port.added) for text in texts)
        elif style == "batch":
            both = [texts[1][0], texts[0][0]]
            made = port([latent[0], latent[0]], given, both)
            cond, uncond = made[1][None], made[0][None]
        else:
            cond, uncond = (port([latent[0]], given, [text[0]])[0][None] for text in texts)
        if fault == "swapped":
            cond, uncond = uncond, cond
        scale = {"sign": -SCALE, "scale": SCALE + 0.1}.get(fault, SCALE)
        velocity = uncond + scale * (cond - uncond)
        latent = scheduler.step(velocity, number, latent, late=fault == "order")
        if fault == "clamped":
            latent = latent.clamp(-2.0, 2.0)
    return latent


def main(folder: str, path: str, style: str, *faults: str) -> None:
    from diffusers import WanTransformer3DModel
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    model = WanTransformer3DModel.from_pretrained(f"{folder}/transformer").eval()
    inputs = load_file(path)
    with torch.no_grad():
        made = {fault: generate(model, inputs, style, fault) for fault in faults}
    save_file(made, f"{path}.{style}.made")


def worker(*arguments: str) -> None:
    main(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[3] == "worker":
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=worker, args=sys.argv[1:])
        process.start()
        process.join()
    else:
        main(*sys.argv[1:])
