"""Run a stand-in of an engine: generate.py ENGINE MODEL INPUTS FAULT ..., a generation a fault."""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import load_file

torch.set_num_threads(1)
engine, model, inputs, *faults = sys.argv[1:]


def hunyuan(given: dict[str, Any], fault: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
    from hyvideo.inference import HunyuanVideoSampler

    if fault == "pooled":
        given["cond_pooled"] = given["uncond_pooled"]
    if fault == "mask":
        given["cond_mask"][:, -3:] = 1
    trusted = HunyuanVideoTransformer3DModel.from_pretrained(f"{model}/transformer").eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    HunyuanVideoSampler(trusted, scheduler, given).predict(steps=3, scale=5.0, embedded=6.0)


def cosmos_predict2(given: dict[str, Any], fault: str) -> None:
    from cosmos_predict2.pipelines.text2image import Text2ImagePipeline
    from diffusers import CosmosTransformer3DModel

    trusted = CosmosTransformer3DModel.from_pretrained(f"{model}/transformer").eval()
    order, late = 2 if fault == "solver" else 1, 0.999 if fault == "time" else 1.0
    pipe = Text2ImagePipeline(trusted, given, order, late)
    pipe(3, guidance=-3.0 if fault == "sign" else 3.0)


def xdit(given: dict[str, Any], fault: str) -> None:
    from diffusers import WanPipeline
    from xfuser.model_executor.models.runner_models.base_model import xFuserModel

    pipe = WanPipeline.from_pretrained(model)
    if fault == "shift":
        pipe.scheduler.set_shift(4.0)
    arguments = {"prompt_embeds": given["cond"], "negative_prompt_embeds": given["uncond"]}
    arguments |= {"latents": given["noise"], "num_inference_steps": 3, "guidance_scale": 5.0}
    arguments |= {"height": 64, "width": 64, "num_frames": 9, "output_type": "latent"}
    xFuserModel(pipe)._run_pipe(arguments)


for each in faults:
    globals()[engine](load_file(inputs), each)
