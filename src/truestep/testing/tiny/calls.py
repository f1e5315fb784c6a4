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
    "text_encoder_out_layers": lambda _: (0, 1, 2),
    "guidance_schedule": lambda _: [7.0, 5.0, 3.0],
    "audio_length_in_s": lambda _: 0.5,
    "audio_end_in_s": lambda _: 0.5,
    "audio_duration": lambda _: 0.5,
    "audio_duration_s": lambda _: 0.01,
    "processing_resolution": lambda _: 0,
}
"""Arguments given wherever a call has a parameter of the name, whether it has a default or not."""

REQUIRED: dict[str, Maker] = {
    "image_embeds": lambda seed: tensor(seed, 1, TEXT),
    "negative_image_embeds": lambda seed: tensor(seed + 1, 1, TEXT),
    "hint": lambda seed: tensor(seed, 1, 3, 4 * SIDE, 4 * SIDE),
    "image_embeddings": lambda seed: tensor(seed, 1, LATENT_CASCADE, 4, 4),
    "last_image": lambda seed: picture(seed + 4),
    "pose_video": lambda seed: frames(seed + 1),
    "face_video": lambda seed: frames(seed + 2),
}
"""Arguments given where a call has no default for them."""

_EDIT = {"height": 64, "width": 64}
_HELIOS = {"video": lambda seed: frames(seed, 33)}
_CLOZE = {
    "task_prompt": "a drawing becomes a photograph",
    "content_prompt": "a small red cube",
    "image": lambda seed: [[picture(seed), picture(seed + 1)], [picture(seed + 2), None]],
}
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
    "Cosmos3OmniPipeline": {"enable_sound": True},
    "Flux2KleinPipeline": {"image": lambda seed: picture(seed, 64)},
    "Flux2KleinKVPipeline": {"image": lambda seed: picture(seed, 64)},
    "Flux2Pipeline": {"image": lambda seed: picture(seed, 64)},
    "HeliosPyramidPipeline": _EDIT,
    "HeliosPyramidAutoBlocks": _EDIT,
    "HeliosPyramidDistilledAutoBlocks": _EDIT,
    "helios/HeliosAutoBlocks/video2video": _HELIOS,
    "helios/HeliosPyramidAutoBlocks/video2video": _HELIOS,
    "helios/HeliosPyramidDistilledAutoBlocks/video2video": _HELIOS,
    "FluxControlNetPipeline": {"control_mode": None},
    "FluxControlNetImg2ImgPipeline": {"control_mode": None},
    "FluxControlNetInpaintPipeline": {"control_mode": None},
    "flux/FluxKontextAutoBlocks/image_conditioned": _EDIT,
    "flux2/Flux2KleinAutoBlocks/image_conditioned": {"image": lambda seed: picture(seed, 64)},
    "flux2/Flux2KleinBaseAutoBlocks/image_conditioned": {"image": lambda seed: picture(seed, 64)},
    "qwenimage/QwenImageAutoBlocks/inpainting": {"output_type": "pil"},
    "qwenimage/QwenImageAutoBlocks/controlnet_inpainting": {"output_type": "pil"},
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": {"overlap_history": 1},
    "ZImageOmniPipeline": {"image": lambda seed: picture(seed, 64)},
    "QwenImageEditAutoBlocks": _EDIT,
    "QwenImageEditPlusAutoBlocks": _EDIT,
    "FluxKontextPipeline": {"max_area": SIDE * SIDE},
    "FluxKontextInpaintPipeline": {"max_area": SIDE * SIDE},
    "Kandinsky5I2IPipeline": {"max_sequence_length": 256},
    "Ideogram4Pipeline": {"max_sequence_length": 64},
    "Ideogram4AutoBlocks": {"max_sequence_length": 64},
    "KandinskyCombinedPipeline": {"prior_num_inference_steps": 2},
    "LatentConsistencyModelPipeline": {"original_inference_steps": 50},
    "LatentConsistencyModelImg2ImgPipeline": {"original_inference_steps": 50},
    "LongCatImagePipeline": {"enable_prompt_rewrite": False},
    "NucleusMoEImagePipeline": {"return_index": -1},
    "QwenImage21Pipeline": {**_EDIT, "output_resolution": 64, "true_cfg_scale": 4.0},
    "qwenimage21/QwenImage21AutoBlocks/image_conditioned": {**_EDIT, "output_resolution": 64},
    "qwenimage21/QwenImage21TurboAutoBlocks/image_conditioned": {**_EDIT, "output_resolution": 64},
    "QwenImageEditPipeline": _EDIT,
    "QwenImageEditInpaintPipeline": _EDIT,
    "QwenImageEditPlusPipeline": _EDIT,
    "SanaSprintPipeline": _SPRINT,
    "SanaSprintImg2ImgPipeline": {**_SPRINT, "strength": 1.0},
    "StableAudio3AudioToAudioPipeline": {"audio": lambda seed: tensor(seed, 1, 2, 64)},
    "StableAudio3InpaintPipeline": {
        "audio": lambda seed: tensor(seed, 1, 2, 64),
        "mask_start_seconds": 0.1,
        "mask_end_seconds": 0.3,
    },
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
    "VisualClozeGenerationPipeline": _CLOZE,
    "VisualClozePipeline": _CLOZE,
    "VersatileDiffusionImageVariationPipeline": {"negative_prompt": None},
}
"""Arguments beside those that the names choose; None takes one away."""


def example_call(cls: type[Any], *, seed: int) -> dict[str, Any]:
    """Arguments for one quick call of a tiny pipeline of this class, with a new generator."""
    signature = inspect.signature(cls.__call__).parameters
    call = {name: make(seed) for name, make in ARGUMENTS.items() if name in signature}
    call |= {
        name: make(seed)
        for name, make in REQUIRED.items()
        if name in signature and signature[name].default is inspect.Parameter.empty
    }
    if {"image", "video"} <= set(call) and signature["video"].default is None:
        del call["video"]  # either is taken, not both
    return changed(call, cls.__name__, seed)


def changed(call: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """A call with what the table says of a pipeline put in or taken away."""
    for argument, value in CALLS.get(name, {}).items():
        if value is None:
            call.pop(argument, None)
        else:
            call[argument] = value(seed) if isinstance(value, FunctionType) else value
    return call
