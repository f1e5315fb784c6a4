"""What single pipelines need beside the rules: one table, as small as the rules allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from truestep.testing.tiny.facts import Facts

Settings = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """A component of another class than the annotation says.

    Args:
        cls: The class's name in diffusers or transformers.
        settings: Arguments of its configuration beside the table's.
    """

    cls: str
    settings: Settings | None = None


Change = Use | Settings | Callable[[Facts], Settings] | None | bool | float | str
"""A component of another class; arguments of its configuration; none; or a plain argument."""

EXCEPTIONS: dict[str, dict[str, Change]] = {
    "Cosmos2TextToImagePipeline": {"scheduler": {"use_karras_sigmas": True}},
    "Cosmos2VideoToWorldPipeline": {"scheduler": {"use_karras_sigmas": True}},
    "FluxFillPipeline": {
        "transformer": lambda f: {
            "in_channels": 4 * (2 * f.latent + 4),
            "out_channels": 4 * f.latent,
        }
    },
    "WanImageToVideoPipeline": {
        "transformer": lambda f: {"in_channels": 2 * f.latent + 4, "image_dim": f.text},
        "image_encoder": Use("CLIPVisionModel"),
        "image_processor": Use("CLIPImageProcessorPil"),
    },
    "CogVideoXImageToVideoPipeline": {
        "transformer": lambda f: {
            "in_channels": 2 * f.latent,
            "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
        }
    },
}
for _name in ("FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"):
    EXCEPTIONS[_name] = {
        "transformer": lambda f: {"in_channels": 8 * f.latent, "out_channels": 4 * f.latent}
    }
for _name in ("AudioLDMPipeline", "AudioLDM2Pipeline", "MusicLDMPipeline"):
    EXCEPTIONS[_name] = {"vae": {"in_channels": 1, "out_channels": 1}}
_DEEP_VAE = {"dim_mult": [1] * 6, "temperal_downsample": [False] * 5, "base_dim": 4}
"""Edits are computed at a fixed area of a megapixel: an autoencoder that reduces 32-fold."""
for _name in (
    "QwenImageEditPipeline",
    "QwenImageEditInpaintPipeline",
    "QwenImageEditPlusPipeline",
):
    EXCEPTIONS[_name] = {"vae": _DEEP_VAE}

CALLS: dict[str, dict[str, Any]] = {
    "FluxKontextPipeline": {"max_area": 32 * 32},
    "FluxKontextInpaintPipeline": {"max_area": 32 * 32},
    "QwenImageEditPipeline": {"height": 64, "width": 64},
    "QwenImageEditInpaintPipeline": {"height": 64, "width": 64},
    "QwenImageEditPlusPipeline": {"height": 64, "width": 64},
}
"""Arguments of a call beside those that its parameters' names choose; None takes one away."""
