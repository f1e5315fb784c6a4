"""xDiT's Wan in diffusers' pipeline on ranks: torchrun ... run_xdit.py FOLDER FAULT OUTPUT.

Needs TRUESTEP_XDIT, a checkout of github.com/xdit-project/xDiT. Ulysses over all ranks, on gloo. It
does not start on a CPU by itself: no version of an accelerator is asked for, kernels of triton that
it only names are put beside it, and its attention is given the groups that it takes on a GPU.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch
import torch._inductor.runtime.hints  # asks for triton, too
from diffusers import FluxPipeline, WanPipeline  # noqa: F401 (before what is put in triton's place)
from safetensors.torch import load_file, save_file

folder, fault, output = sys.argv[1:]
torch.set_num_threads(1)
sys.path.insert(0, os.environ["TRUESTEP_XDIT"])


class Absent(types.ModuleType):
    """A module that is not here, with all that is in it; its decorators leave functions alone."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return arguments[0] if arguments and callable(arguments[0]) else self


try:
    import triton  # noqa: F401
except ImportError:
    for name in ("triton", "triton.language"):
        sys.modules[name] = Absent(name)
package = types.ModuleType("xfuser")
package.__path__ = [os.path.join(os.environ["TRUESTEP_XDIT"], "xfuser")]
sys.modules["xfuser"] = package
import xfuser.envs as envs  # noqa: E402

envs.get_device_version = lambda: "0.0"
envs.get_torch_distributed_backend = lambda: "gloo"
envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
del sys.modules["xfuser"]
import xfuser.model_executor.layers.usp as usp  # noqa: E402
from xfuser import xFuserArgs  # noqa: E402
from xfuser.core.distributed import (  # noqa: E402
    init_distributed_environment,
    initialize_runtime_state,
)
from xfuser.model_executor.models.transformers.transformer_wan import (  # noqa: E402
    xFuserWanTransformer3DWrapper,
)
from yunchang.globals import PROCESS_GROUP  # noqa: E402

trusted = f"{folder}/trusted"
init_distributed_environment(
    rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), backend="gloo"
)
config, _ = xFuserArgs(
    model=trusted, ulysses_degree=int(os.environ["WORLD_SIZE"]), attention_backend="sdpa"
).create_config()
usp.PROCESS_GROUP = PROCESS_GROUP
transformer = xFuserWanTransformer3DWrapper.from_pretrained(trusted, subfolder="transformer")
pipe = WanPipeline.from_pretrained(trusted, transformer=transformer)
initialize_runtime_state(pipe, config)
given = load_file(f"{folder}/inputs.safetensors")
even = torch.linspace(1.0, 0.0, 5)[:-1].tolist()  # what all engines are given
own = pipe.scheduler.set_timesteps
pipe.scheduler.set_timesteps = lambda steps, device=None: own(sigmas=even, device=device)
if fault == "shift":
    pipe.scheduler.set_shift(6.0)
if fault == "tail":
    given["cond"][:, -3:] = 0.05
if fault == "swapped":
    given["cond"], given["uncond"] = given["uncond"], given["cond"]
if fault == "sign":
    WanPipeline.do_classifier_free_guidance = property(lambda self: True)
if fault == "time":
    call = type(transformer).__call__
    type(transformer).__call__ = lambda self, *, timestep, **k: call(
        self, timestep=timestep * 0.999, **k
    )
if fault == "order":
    step, latents = type(pipe.scheduler).step, []

    def late(self: Any, velocity: Any, time: Any, latent: Any, **options: Any) -> Any:
        """Step from the latent of the step before."""
        latents.append(latent)
        return step(self, velocity, time, latents[max(len(latents) - 2, 0)], **options)

    type(pipe.scheduler).step = late
if fault == "exchange":
    exchanged = usp._ft_c_output_all_to_all
    usp._ft_c_output_all_to_all = lambda x: exchanged(x).flip(1)
made = pipe(
    prompt_embeds=given["cond"], negative_prompt_embeds=given["uncond"], latents=given["noise"],
    num_inference_steps=4, guidance_scale=-5.0 if fault == "sign" else 5.0,
    height=64, width=64, num_frames=9,
    output_type="latent",
).frames  # fmt: skip
if os.environ["RANK"] == "0":
    save_file({"raw": made.contiguous()}, output)
torch.distributed.barrier()
