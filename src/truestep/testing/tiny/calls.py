"""Small arguments for a pipeline's call, chosen by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from truestep.testing.tiny.encoders import TEXT
from truestep.testing.tiny.inputs import FRAMES, SIDE, frames, generator, mask, picture, tensor
from truestep.testing.tiny.unets import LATENT_CASCADE

Maker = Callable[[int], Any]

ARGUMENTS: dict[str, Maker] = {
    "prompt": lambda _: "a small red cube on a wooden table",
    "negative_prompt": lambda _: "blurry, low quality",
    "source_prompt": lambda _: "a small blue cube on a wooden table",
    "lyrics": lambda _: "la la la",
    "class_labels": lambda _: [1],
    "height": lambda _: SIDE,
    "width": lambda _: SIDE,
    "num_frames": lambda _: FRAMES,
    "num_inference_steps": lambda _: 3,
    "strength": lambda _: 0.8,
    "max_sequence_length": lambda _: 16,
    "use_resolution_binning": lambda _: False,
    "_auto_resize": lambda _: False,
    "output_type": lambda _: "pt",
    "generator": generator,
    "image": picture,
    "mask_image": mask,
    "control_image": lambda seed: picture(seed + 1),
    "control_mask": mask,
    "control_mode": lambda _: [0],
    "example_image": lambda seed: picture(seed + 2),
    "original_image": lambda seed: picture(seed + 3),
    "video": frames,
    "control_video": lambda seed: frames(seed + 1),
    "conditioning_frames": lambda seed: frames(seed + 1),
    "image_embeds": lambda seed: tensor(seed, 1, TEXT),
    "negative_image_embeds": lambda seed: tensor(seed + 1, 1, TEXT),
    "hint": lambda seed: tensor(seed, 1, 3, 4 * SIDE, 4 * SIDE),
    "image_embeddings": lambda seed: tensor(seed, 1, LATENT_CASCADE, 4, 4),
    "text_encoder_out_layers": lambda _: (0, 1, 2),
    "audio_length_in_s": lambda _: 0.5,
    "audio_end_in_s": lambda _: 0.5,
    "audio_duration": lambda _: 0.5,
    "audio_duration_s": lambda _: 0.01,
    "processing_resolution": lambda _: 0,
}
"""Arguments given wherever a call has a parameter of the name, whether it has a default or not."""

_EDIT = {"height": 64, "width": 64}
_TWO_FRAMES = {"video_length": 2, "t0": 1, "t1": 2, "output_type": "np"}
_SPRINT = {"num_inference_steps": 2, "negative_prompt": None}

CALLS: dict[str, dict[str, Any]] = {
    "AllegroPipeline": {"output_type": "latent"},
    "AnimateDiffSparseControlNetPipeline": {
        "conditioning_frames": lambda seed: frames(seed, 1),
        "controlnet_frame_indices": [0],
    },
    "AnyFlowFARPipeline": {"video": None},
    "BlipDiffusionPipeline": {
        "prompt": ["a red cube"],
        "reference_image": picture,
        "source_subject_category": ["dog"],
        "target_subject_category": ["dog"],
    },
    "BriaFiboEditPipeline": {
        "prompt": '{"short_description": "a cube", "edit_instruction": "make it red"}',
        "max_sequence_length": 128,
    },
    "EasyAnimateInpaintPipeline": {"video": lambda seed: tensor(seed, 1, 3, 5, SIDE, SIDE)},
    "Flux2KleinPipeline": {"image": lambda seed: picture(seed, 64)},
    "Flux2KleinKVPipeline": {"image": lambda seed: picture(seed, 64)},
    "Flux2Pipeline": {"image": lambda seed: picture(seed, 64)},
    "HeliosPyramidPipeline": _EDIT,
    "FluxKontextPipeline": {"max_area": SIDE * SIDE},
    "FluxKontextInpaintPipeline": {"max_area": SIDE * SIDE},
    "Kandinsky5I2IPipeline": {"max_sequence_length": 256},
    "KandinskyCombinedPipeline": {"prior_num_inference_steps": 2},
    "LatentConsistencyModelPipeline": {"original_inference_steps": 50},
    "LatentConsistencyModelImg2ImgPipeline": {"original_inference_steps": 50},
    "NucleusMoEImagePipeline": {"return_index": -1},
    "QwenImageEditPipeline": _EDIT,
    "QwenImageEditInpaintPipeline": _EDIT,
    "QwenImageEditPlusPipeline": _EDIT,
    "SanaSprintPipeline": _SPRINT,
    "SanaSprintImg2ImgPipeline": {**_SPRINT, "strength": 1.0},
    "StableDiffusionAttendAndExcitePipeline": {
        "token_indices": [2, 3],
        "max_iter_to_alter": 1,
        "attn_res": (8, 8),
    },
    "StableDiffusionLDM3DPipeline": {"output_type": "np"},
    "StableDiffusionGLIGENPipeline": {
        "gligen_phrases": ["a cube"],
        "gligen_boxes": [[0.2, 0.2, 0.8, 0.8]],
    },
    "TextToVideoZeroPipeline": _TWO_FRAMES,
    "TextToVideoZeroSDXLPipeline": _TWO_FRAMES,
    "VersatileDiffusionImageVariationPipeline": {"negative_prompt": None},
}
"""Arguments beside those that the names choose; None takes one away."""


def example_call(cls: type[Any], *, seed: int) -> dict[str, Any]:
    """Arguments for one quick call of a tiny pipeline of this class, with a new generator."""
    signature = inspect.signature(cls.__call__).parameters
    call = {name: make(seed) for name, make in ARGUMENTS.items() if name in signature}
    if {"image", "video"} <= set(call) and signature["video"].default is None:
        del call["video"]  # either is taken, not both
    for name, value in CALLS.get(cls.__name__, {}).items():
        if value is None:
            call.pop(name, None)
        else:
            call[name] = value(seed) if isinstance(value, FunctionType) else value
    return call
