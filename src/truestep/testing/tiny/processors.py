"""Processors of images and sound, at the sizes that tiny encoders read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from truestep.testing.tiny.encoders import SIZES

_SIDE = SIZES["image_size"]

_PART = "_without_video"


def _image(cls: Any) -> Any:
    return cls(size={"height": _SIDE, "width": _SIDE})


def _clip_image(cls: Any) -> Any:
    return cls(size=_SIDE, crop_size=_SIDE)


def without_video(cls: Any) -> Any:
    """The processor's class, less its part for videos where torchvision is not installed.

    transformers builds that part in each processor of a vision-language model, though pipelines
    of pictures never call it.
    """
    if transformers.utils.is_torchvision_available():
        return cls

    def parts(_: Any) -> list[str]:
        return ["image_processor", "tokenizer"]

    members = {"get_attributes": classmethod(parts), "__module__": cls.__module__, _PART: True}
    return type(cls.__name__, (cls,), members)


def lacks_video(processor: Any) -> bool:
    """Whether it is one of `without_video`: transformers loads none of these from a folder."""
    return hasattr(processor, _PART)


def _qwen_vl(cls: Any, tokenizer: Any) -> Any:
    patch = 16 if "Qwen3" in cls.__name__ else 14
    pictures = transformers.Qwen2VLImageProcessorPil(
        min_pixels=(2 * patch) ** 2, max_pixels=(4 * patch) ** 2, patch_size=patch
    )
    return without_video(cls)(pictures, tokenizer, chat_template=tokenizer.chat_template)


IMAGES: dict[str, Callable[[Any], Any]] = {
    "CLIPImageProcessor": _clip_image,
    "CLIPImageProcessorPil": _clip_image,
    "SiglipImageProcessor": _image,
    "SiglipImageProcessorPil": _image,
    "DPTImageProcessor": _image,
    "DPTImageProcessorPil": _image,
    "ClapFeatureExtractor": lambda cls: cls(feature_size=8, hop_length=7900),
}
"""How each processor without a tokenizer is made."""

WITH_TOKENIZER: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "Qwen2VLProcessor": ("Qwen2Tokenizer", _qwen_vl),
    "Qwen2_5_VLProcessor": ("Qwen2Tokenizer", _qwen_vl),
    "Qwen3VLProcessor": ("Qwen2Tokenizer", _qwen_vl),
    "CLIPProcessor": (
        "CLIPTokenizer",
        lambda cls, tokenizer: cls(
            _clip_image(transformers.CLIPImageProcessorPil), tokenizer=tokenizer
        ),
    ),
}
"""How each processor with a tokenizer is made, and its tokenizer's class."""
