"""Pipelines whose transformers have the width of real models, and few blocks; or are tiny.

Weights are random and drawn on the device; text encoders and decoders are tiny, of truestep's own
corpus, so that its faults can be planted in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.accelerator.place import Here
from truestep.testing.corpus import SUBJECTS, Subject
from truestep.testing.tiny.building import cast
from truestep.testing.tiny.weights import randomise

DTYPES = ("bfloat16", "float16", "float32")
LARGER = 4
"""Heights and widths of the corpus's calls are so many times larger at real width."""


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        subject: How its tiny pipeline is built and called.
        width: What its transformer's configuration has of the real one; fewer blocks.
        source: Where that is from.
        blocks: How many of how many.
        call: Arguments of a call of usual size, at real width.
    """

    subject: Subject
    width: Mapping[str, Any]
    source: str
    blocks: str
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its subject."""
        return self.subject.name


_WAN = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "num_layers": 4,
    "rope_max_seq_len": 1024,
}
_WAN_SOURCE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json"
_TWO_STREAMS = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
}

WAN = Family(
    Subject(
        "wan",
        "WanPipeline",
        "video: text attended to, two passes one after the other",
        {"max_sequence_length": 64, "guidance_scale": 5.0},
    ),
    _WAN,
    _WAN_SOURCE,
    "4 of 30 blocks",
    {"height": 480, "width": 832, "num_frames": 17, "max_sequence_length": 512},
)
FLUX = Family(
    SUBJECTS["flux"],
    {**_TWO_STREAMS, "num_layers": 1, "num_single_layers": 2},
    "black-forest-labs/FLUX.1-dev, transformer/config.json",
    "1 of 19 double and 2 of 38 single blocks",
    {"height": 256, "width": 256, "max_sequence_length": 512},
)
QWEN = Family(
    SUBJECTS["qwen"],
    {**_TWO_STREAMS, "num_layers": 2},
    "Qwen/Qwen-Image, transformer/config.json",
    "2 of 60 blocks",
    {"height": 512, "width": 512},
)
WAN_OF_PICTURES = Family(SUBJECTS["wan-i2v"], _WAN, _WAN_SOURCE, "4 of 30 blocks")

FAMILIES = (WAN, FLUX, QWEN)
FAULTY = (FLUX, QWEN, WAN_OF_PICTURES)
"""Those that the corpus has faults for."""


def build(family: Family, here: Here, dtype: str) -> Any:
    """A family's pipeline on the device; the same bits each time."""
    pipe = family.subject.build(0, dtype)
    if here.real:
        pipe.transformer = _widened(pipe.transformer, family.width, here, getattr(torch, dtype))
    return pipe if here.device == "cpu" else pipe.to(here.device)


def _widened(model: Any, width: Mapping[str, Any], here: Here, dtype: torch.dtype) -> Any:
    """A transformer of a class, at the width of a real one, on the device."""
    from diffusers.models.modeling_utils import no_init_weights

    kept = {key: value for key, value in model.config.items() if not key.startswith("_")}
    with no_init_weights():  # all are drawn below
        wide = type(model)(**{**kept, **width}).to(here.device)
    randomise(wide, seed=0, name="transformer")
    cast(wide.eval(), dtype)
    return wide


def usual_call(family: Family, here: Here, *, steps: int) -> dict[str, Any]:
    """Arguments of a call of usual size; tiny where the model is."""
    call = family.subject.inputs(0)
    call |= dict(family.call) if here.real else {}
    return {**call, "num_inference_steps": steps}


def small_call(family: Family, here: Here) -> dict[str, Any]:
    """Arguments of a call of the corpus; larger at real width."""
    call = family.subject.inputs(0)
    sides = {name: call[name] * LARGER for name in ("height", "width") if name in call}
    return {**call, **sides} if here.real else call


def prediction_of(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline gives its transformer first."""
    given: dict[str, Any] = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args, "a pipeline of diffusers names what it gives its transformer"
        if not given:
            copies = {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
            given.update({**kwargs, **copies})

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            generator = torch.Generator("cpu").manual_seed(0)
            pipe(**{**call, "output_type": "latent"}, generator=generator)
    finally:
        handle.remove()
    return given
