# SPDX-License-Identifier: Apache-2.0
"""Two nodes for ComfyUI: record the seams of a sampling, and be given those of a reference.

Put this file into `custom_nodes`. `Truestep: record` goes between a model and its sampler and
writes one safetensors file a sampling: schedule, noise, and latent, sigma and denoised samples of
every step. `Truestep: inputs` gives noise, sigmas and conditioning of a file that
`truestep engine node --inputs` wrote. Judge what was recorded where truestep is installed:

    truestep engine check FILE --model DIFFUSERS_FOLDER --reference RECORDING
"""

from __future__ import annotations

import os
from typing import Any

import torch


class _Recorder:
    """Tensors of one sampling, written when it is over."""

    def __init__(self, path: str) -> None:
        self.path, self.step = path, -1
        self.kept: dict[str, torch.Tensor] = {}

    def keep(self, name: str, value: Any) -> None:
        if torch.is_tensor(value):
            self.kept[name] = value.detach().to("cpu", copy=True).contiguous()

    def sample(
        self,
        executor: Any,
        noise: Any,
        latent: Any,
        sampler: Any,
        sigmas: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.kept, self.step = {}, -1
        self.keep("latent/initial", noise)
        self.keep("schedule/sigmas", sigmas)
        output = executor(noise, latent, sampler, sigmas, *args, **kwargs)
        self.keep("latent_tensor", output)  # in the space of the VAE, as a .latent file holds it
        self.write()
        return output

    def predict(
        self, executor: Any, model: Any, conds: Any, x: Any, sigma: Any, options: Any
    ) -> Any:
        outputs = executor(model, conds, x, sigma, options)
        self.step += 1
        self.keep(f"step/{self.step:04d}/latent", x)
        self.keep(f"step/{self.step:04d}/sigma", sigma)
        for branch, output, cond in zip(("cond", "uncond"), outputs, conds, strict=False):
            if cond is not None:
                self.keep(f"step/{self.step:04d}/{branch}", output)
        return outputs

    def write(self) -> None:
        from safetensors.torch import save_file

        stem, suffix = os.path.splitext(self.path)
        path, number = self.path, 1
        while os.path.exists(path):  # nothing that was recorded is replaced
            number += 1
            path = f"{stem}.{number}{suffix}"
        save_file(self.kept, path + ".part", metadata={"convention": "denoised"})
        os.replace(path + ".part", path)
        print(f"truestep: recorded {path}")


class TruestepRecord:
    """A model whose next samplings are recorded."""

    CATEGORY, FUNCTION, RETURN_TYPES = "truestep", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's)
        return {
            "required": {
                "model": ("MODEL",),
                "path": ("STRING", {"default": "run.safetensors"}),
            }
        }

    def patch(self, model: Any, path: str) -> tuple[Any]:
        from comfy.patcher_extension import WrappersMP  # type: ignore[import-not-found]

        recorder, model = _Recorder(path), model.clone()
        model.add_wrapper(WrappersMP.OUTER_SAMPLE, recorder.sample)
        model.add_wrapper(WrappersMP.CALC_COND_BATCH, recorder.predict)
        return (model,)


class _Noise:
    """Noise that is given."""

    seed = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        return self.tensor.reshape(latent["samples"].shape).clone()


class TruestepInputs:
    """Noise, sigmas and conditioning of a reference."""

    CATEGORY, FUNCTION = "truestep", "load"
    RETURN_TYPES = ("NOISE", "SIGMAS", "CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("noise", "sigmas", "positive", "negative")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (ComfyUI's)
        return {"required": {"path": ("STRING", {"default": "inputs.safetensors"})}}

    def load(self, path: str) -> tuple[Any, ...]:
        import comfy.utils  # type: ignore[import-not-found]

        found = comfy.utils.load_torch_file(path, safe_load=True)
        texts = [[[found[name], {}]] for name in ("text/cond", "text/uncond") if name in found]
        return (_Noise(found["noise"]), found["sigmas"], texts[0], texts[-1])


NODE_CLASS_MAPPINGS = {"TruestepRecord": TruestepRecord, "TruestepInputs": TruestepInputs}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TruestepRecord": "Truestep: record",
    "TruestepInputs": "Truestep: inputs",
}
