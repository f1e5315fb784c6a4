"""LTX-2.0 and 2.3: video and sound in one model. The stages, each choice a control.

With the profile `diffusers-0.42.1` they are bit-equal to `diffusers.LTX2Pipeline` and, given an
image, to `diffusers.LTX2ImageToVideoPipeline`. A prediction is the denoised sample x0 of both
modalities, because that is what guidance combines.

Values are a `Joint` of tokens: video `b (f h w) c`, audio `b l (c m)`, float32.

Source:
    diffusers 0.42.1, pipelines/ltx2; github.com/Lightricks/LTX-2 (profiles.toml names commits).
"""

from __future__ import annotations

from truestep.runtime.ltx2.guidance import combine, update
from truestep.runtime.ltx2.latents import decode, make_latent
from truestep.runtime.ltx2.passes import predict, predict_passes
from truestep.runtime.ltx2.schedule import make_schedule
from truestep.runtime.ltx2.settings import passes, prepare, skips
from truestep.runtime.ltx2.text import connect, encode_text
from truestep.runtime.pipeline import Stages

STAGES = Stages(
    prepare=prepare,
    encode_text=encode_text,
    connect=connect,
    make_schedule=make_schedule,
    make_latent=make_latent,
    passes=passes,
    predict=predict,
    predict_passes=predict_passes,
    combine=combine,
    skips=skips,
    update=update,
    decode=decode,
)
