"""Official LTX-2 on tiny weights: run_ltx2.py FOLDER FAULT OUTPUT; needs TRUESTEP_LTX2.

TRUESTEP_LTX2 is a checkout of github.com/Lightricks/LTX-2. Its scheduler, guided denoiser, stepper
and `euler_denoising_loop` from noise to the last latents of video and sound, as its pipelines call
them; text is what the trusted connectors make of it, and nothing is decoded.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

folder, fault, output = sys.argv[1:]
for package in ("ltx-core", "ltx-pipelines"):
    sys.path.insert(0, os.path.join(os.environ["TRUESTEP_LTX2"], "packages", package, "src"))
import torch  # noqa: E402
from transformers.utils import is_torchaudio_available  # noqa: E402

if not is_torchaudio_available():  # what is asked once is kept
    for name in ("torchaudio", "OpenImageIO"):  # imported for files of sound and film alone
        sys.modules.setdefault(name, types.ModuleType(name))
from ltx_core.components import diffusion_steps  # noqa: E402
from ltx_core.components.guiders import MultiModalGuider, MultiModalGuiderParams  # noqa: E402
from ltx_core.components.patchifiers import AudioPatchifier, VideoLatentPatchifier  # noqa: E402
from ltx_core.components.schedulers import LTX2Scheduler  # noqa: E402
from ltx_core.model.transformer.model import LTXModel, X0Model  # noqa: E402
from ltx_core.model.transformer.text_projection import PixArtAlphaTextProjection  # noqa: E402
from ltx_core.tools import AudioLatentTools, VideoLatentTools  # noqa: E402
from ltx_core.types import AudioLatentShape, VideoLatentShape  # noqa: E402
from ltx_pipelines.utils import samplers  # noqa: E402
from ltx_pipelines.utils.denoisers import GuidedDenoiser  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

given = load_file(f"{folder}/inputs.safetensors")
velocity = LTXModel(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
    cross_attention_dim=32, audio_num_attention_heads=2, audio_attention_head_dim=8,
    audio_in_channels=4, audio_out_channels=4, audio_cross_attention_dim=16,
    av_ca_timestep_scale_multiplier=1000, caption_projection=PixArtAlphaTextProjection(32, 32),
    audio_caption_projection=PixArtAlphaTextProjection(32, 16),
)  # fmt: skip
velocity.load_state_dict(load_file(f"{folder}/ltx2.safetensors"), strict=True)
model = X0Model(velocity.eval().requires_grad_(False))
if fault == "tail":
    given["cond"][:, -3:] = 0.05
if fault == "swapped":
    for name in ("cond", "audio-cond"):
        other = name.replace("cond", "uncond")
        given[name], given[other] = given[other], given[name]
if fault == "sound":
    given["audio-noise"] = given["audio-noise"].flip(1)
if fault == "time":
    import dataclasses

    call = X0Model.__call__
    X0Model.__call__ = lambda self, *, video, audio, **k: call(
        self,
        video=dataclasses.replace(video, timesteps=video.timesteps * 0.999),
        audio=audio,
        **k,
    )
if fault == "bias":
    velocity.transformer_blocks[1].attn2.to_out[0].bias.zero_()
if fault == "order":
    step, latents = diffusion_steps.EulerDiffusionStep.step, {}

    def late(self: Any, sample: Any, denoised_sample: Any, sigmas: Any, step_index: Any) -> Any:
        """Step from the latent of the step before."""
        key = sample.shape
        before = latents.get(key, sample)
        latents[key] = sample
        return step(self, before, denoised_sample, sigmas, step_index)

    diffusion_steps.EulerDiffusionStep.step = late

shape = VideoLatentShape(*given["noise"].shape)
frames = given["audio-noise"].shape[1]
sound = AudioLatentShape(1, 2, frames, 2)
with torch.inference_mode():
    video = VideoLatentTools(VideoLatentPatchifier(1), shape, fps=24.0).create_initial_state(
        "cpu", torch.float32, given["noise"]
    )
    packed = given["audio-noise"].reshape(1, frames, 2, 2).transpose(1, 2)
    audio = AudioLatentTools(AudioPatchifier(1), sound).create_initial_state(
        "cpu", torch.float32, packed
    )
    # `ti2vid_two_stages_hq` gives its latent, others nothing: 4,096 tokens are taken then.
    tokens = {} if fault == "tokens" else {"latent": given["noise"]}
    shift = {"max_shift": 3.0} if fault == "shift" else {}
    sigmas = LTX2Scheduler().execute(steps=4, **tokens, **shift)
    scale = -4.0 if fault == "sign" else 4.0
    params = MultiModalGuiderParams(cfg_scale=scale)
    denoiser = GuidedDenoiser(
        given["cond"],
        given["audio-cond"],
        MultiModalGuider(params, given["uncond"]),
        MultiModalGuider(params, given["audio-uncond"]),
    )
    video, audio = samplers.euler_denoising_loop(
        sigmas, video, audio, diffusion_steps.EulerDiffusionStep(), model, denoiser
    )
save_file({"raw": video.latent.contiguous(), "sound": audio.latent.contiguous()}, output)
