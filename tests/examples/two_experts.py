"""An engine with two experts and a scale of the guidance for each, as official Wan 2.2 has them.

    python two_experts.py FOLDER INPUTS FAULT [FAULT ...]

The loop is that of `wan/text2video.py` at 42bf4cfa: the expert of high noise predicts where the
timestep is not below the boundary. `late` and `early` move that by one step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from engine_port import Euler
from module_port import Config, Model, convert

STEPS, SHIFT, BOUNDARY, SCALES = 4, 5.0, 0.875, (3.0, 4.0)
"""Scales of low and of high noise."""


class Pipeline:
    """Two experts."""

    def __init__(self, low: Any, high: Any, fault: str) -> None:
        self.low_noise_model, self.high_noise_model, self.fault = low, high, fault

    def _prepare_model_for_timestep(self, t: torch.Tensor, boundary: float) -> Any:
        late = t.item() >= boundary
        if self.fault == "exchanged":
            late = not late
        return self.high_noise_model if late else self.low_noise_model

    def generate(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """One generation."""
        scheduler = Euler()
        scheduler.set_timesteps(STEPS, shift=SHIFT)
        boundary = BOUNDARY * 1000
        times = scheduler.timesteps.tolist()
        switch = next(number for number, time in enumerate(times) if time < boundary)
        moved = {"late": times[switch] - 1, "early": times[switch - 1] + 1}
        latent = given["noise"]
        for number, t in enumerate(scheduler.timesteps):
            model = self._prepare_model_for_timestep(t, moved.get(self.fault, boundary))
            scales = SCALES[::-1] if self.fault == "scales" else SCALES
            scale = scales[1] if t.item() >= boundary else scales[0]
            timestep = torch.stack([t])
            cond = model(latent, t=timestep, context=given["cond"])[0]
            uncond = model(latent, t=timestep, context=given["uncond"])[0]
            velocity = uncond + scale * (cond - uncond)
            latent = scheduler.step(velocity, number, latent, late=False)
        return latent


def expert(folder: Path) -> Model:
    from safetensors.torch import load_file

    model = Model(Config.of(json.loads((folder / "config.json").read_text()))).eval()
    model.load_state_dict(convert(load_file(folder / "diffusion_pytorch_model.safetensors")))
    return model


def main(folder: str, path: str, *faults: str) -> None:
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    high, low = (expert(Path(folder) / name) for name in ("transformer", "transformer_2"))
    with torch.no_grad():
        for fault in faults:
            Pipeline(low, high, fault).generate(load_file(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
