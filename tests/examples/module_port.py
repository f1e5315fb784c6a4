"""An engine whose denoiser is another implementation, with other names and fused projections.

    python module_port.py FOLDER INPUTS STYLE FAULT [FAULT ...]

The transformer is that of `examples/parity/wan_port`. Each FAULT is one generation; `none` is the
right one. STYLE: `call`, one call a branch; `batch`, both branches in one call, in reversed order.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / "parity"), str(Path(__file__).parent)]

from engine_port import SCALE, SHIFT, STEPS, Euler  # noqa: E402
from wan_port import model as architecture  # noqa: E402
from wan_port.convert import convert  # noqa: E402
from wan_port.model import Config, Layer, WanPort, _wide  # noqa: E402

Tensor = torch.Tensor


class WithoutBias(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)


class Exchanged(Layer):
    """Shift and scale of the second network are taken for each other."""

    def forward(self, x: Tensor, text: Tensor, time: Tensor, angles: Tensor) -> Tensor:
        shift, scale, gate, mlp_scale, mlp_shift, mlp_gate = (self.modulation + time).unbind(-2)
        attended = self.self_attn(self.norm_in(x) * (1 + scale) + shift, angles)
        x = x + attended * gate
        x = x + self.cross(self.cross_norm(x), text)
        made = self.mlp(self.norm_mlp(x) * (1 + mlp_scale) + mlp_shift)
        return _wide(x) + made * mlp_gate


class WithoutResidual(Layer):
    """What attends to the text takes the place of the tokens."""

    def forward(self, x: Tensor, text: Tensor, time: Tensor, angles: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.modulation + time).unbind(-2)
        x = x + self.self_attn(self.norm_in(x) * (1 + scale) + shift, angles) * gate
        x = self.cross(self.cross_norm(x), text)
        made = self.mlp(self.norm_mlp(x) * (1 + mlp_scale) + mlp_shift)
        return _wide(x) + made * mlp_gate


def planted(model: WanPort, fault: str) -> None:
    """Plant one fault in a model."""
    last, first = model.layers[-1], model.layers[0]
    if fault == "bias":
        last.cross.out.__class__ = WithoutBias
    elif fault == "gelu":
        first.mlp.act = torch.nn.GELU()
    elif fault == "modulation":
        last.__class__ = Exchanged
    elif fault == "eps":
        first.self_attn.q_norm.eps = 1e-2
    elif fault == "residual":
        last.__class__ = WithoutResidual
    elif fault == "weight":
        with torch.no_grad():
            rows = len(first.self_attn.qkv.weight) // 3
            first.self_attn.qkv.weight[rows : 2 * rows] *= 1.02
    elif fault == "head":
        with torch.no_grad():
            model.head.modulation.copy_(model.head.modulation.flip(0))
    elif fault == "text":
        model.text_mlp.act = torch.nn.GELU(approximate="none")


def generate(model: Any, inputs: dict[str, Tensor], style: str) -> Tensor:
    """One generation."""
    scheduler = Euler()
    scheduler.set_timesteps(STEPS, shift=SHIFT)
    latent, texts = inputs["noise"], [inputs["cond"], inputs["uncond"]]
    for number, t in enumerate(scheduler.timesteps):
        if style == "batch":
            both = torch.cat([texts[1], texts[0]])
            uncond, cond = model(torch.cat([latent] * 2), t.expand(2), both)[0].chunk(2)
        else:
            cond, uncond = (model(latent, t[None], text, return_dict=False)[0] for text in texts)
        velocity = uncond + SCALE * (cond - uncond)
        latent = scheduler.step(velocity, number, latent, late=False)
    return latent


class Model(WanPort):
    """The same, under arguments of its own."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor, return_dict: bool = False) -> Any:
        return super().forward(x, t, context, return_dict=return_dict)


def main(folder: str, path: str, style: str, *faults: str) -> None:
    import json

    from safetensors.torch import load_file

    torch.set_num_threads(1)
    inputs = load_file(path)
    place = Path(folder) / "transformer"
    config = Config.of(json.loads((place / "config.json").read_text()))
    weights = convert(load_file(place / "diffusion_pytorch_model.safetensors"))
    angles = architecture.rotary_angles
    with torch.no_grad():
        for fault in faults:
            model = Model(config).eval()
            model.load_state_dict(weights)
            planted(model, fault)
            if fault == "rope":
                architecture.rotary_angles = lambda *sizes: angles(*sizes) * 1.1
            generate(model, inputs, style)
            architecture.rotary_angles = angles


if __name__ == "__main__":
    main(*sys.argv[1:])
