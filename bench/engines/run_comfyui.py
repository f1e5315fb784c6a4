"""ComfyUI's own nodes on tiny weights: run_comfyui.py FOLDER FAULT OUTPUT (TRUESTEP_COMFYUI)."""

from __future__ import annotations

import os
import sys

folder, fault, output = sys.argv[1:]
sys.argv = ["main.py", "--cpu", "--force-fp32"]
sys.path.insert(0, os.environ["TRUESTEP_COMFYUI"])
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingSD3  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

given = load_file(f"{folder}/inputs.safetensors")
model = comfy.sd.load_diffusion_model(f"{folder}/official.safetensors")
(model,) = ModelSamplingSD3().patch(model, 6.0 if fault == "shift" else 5.0)
texts = {"p": given["cond"].clone(), "n": given["uncond"].clone()}
if fault == "tail":
    texts["p"][:, -3:] = 0.05
if fault == "swapped":
    texts = {"p": texts["n"], "n": texts["p"]}
comfy.sample.prepare_noise = lambda latent, seed, inds=None: given["noise"].clone()
if fault == "time":
    from comfy.ldm.wan.model import WanModel

    call = WanModel.__call__
    WanModel.__call__ = lambda self, x, t, *a, **k: call(self, x, t * 0.999, *a, **k)
if fault == "order":
    import comfy.k_diffusion.sampling as sampling

    def late(model, x, sigmas, extra_args=None, callback=None, disable=None, **_):  # type: ignore[no-untyped-def]
        """Euler from the latent of the step before."""
        before = x
        for index in range(len(sigmas) - 1):
            denoised = model(x, sigmas[index] * x.new_ones([x.shape[0]]), **(extra_args or {}))
            velocity = (x - denoised) / sigmas[index]
            x, before = before + velocity * (sigmas[index + 1] - sigmas[index]), x
        return x

    sampling.sample_euler = late
latent = {"samples": torch.zeros(1, 16, 3, 8, 8)}
scale = -5.0 if fault == "sign" else 5.0
(made,) = nodes.KSampler().sample(
    model, 0, 4, scale, "euler", "simple", [[texts["p"], {}]], [[texts["n"], {}]], latent, 1.0
)
save_file({"raw": made["samples"].contiguous()}, output)
