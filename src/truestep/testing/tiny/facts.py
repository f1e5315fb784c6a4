"""What the components of one pipeline must agree on, read off those that were built before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from truestep.testing.tiny.autoencoders import LATENT
from truestep.testing.tiny.encoders import TEXT

_VAES = ("vae", "vqvae", "movq", "vqgan")
_LATENT_NAMES = ("latent_channels", "z_dim", "latent_dim", "decoder_input_channels")


@dataclass(frozen=True)
class Facts:
    """Sizes that cross a component's border.

    Args:
        pipeline: The pipeline's class name.
        slots: Class names of its components, by the name of the component.
        built: Components built so far.
        slot: The component that is being built.
        shifts: Whether the pipeline computes a shift of the schedule from the resolution.
    """

    pipeline: str
    slots: Mapping[str, str]
    built: dict[str, Any] = field(default_factory=dict)
    slot: str = ""
    shifts: bool = False

    @property
    def text(self) -> int:
        """Width of what text encoders return."""
        return TEXT

    @property
    def latent(self) -> int:
        """Channels of the latent."""
        for vae in (self.built[name] for name in _VAES if name in self.built):
            for name in _LATENT_NAMES:
                value = getattr(vae.config, name, None)
                if value is not None:
                    return int(value)
        return LATENT

    @property
    def pooled(self) -> int:
        """Width of the pooled text: one projection, or those of two CLIP encoders side by side."""
        count = sum(
            name.startswith("text_encoder") and cls == "CLIPTextModelWithProjection"
            for name, cls in self.slots.items()
        )
        return TEXT * max(1, count)

    @property
    def levels(self) -> int:
        """Hidden states that a language model returns: its layers and its embedding."""
        config = self.built["text_encoder"].config
        return int(getattr(config, "text_config", config).num_hidden_layers) + 1

    def has(self, slot: str) -> bool:
        """Whether the pipeline has this component."""
        return slot in self.slots


def channels(f: Facts) -> dict[str, Any]:
    """Of a model that takes a latent and gives one."""
    return {"in_channels": f.latent, "out_channels": f.latent}


def heads(count: int, size: int) -> dict[str, Any]:
    """Of attention."""
    return {"num_attention_heads": count, "attention_head_dim": size}


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Arguments less those that a class does not take."""
    return {name: value for name, value in values.items() if name not in names}


Table = dict[str, Callable[[Facts], dict[str, Any]]]
"""Arguments of each class, as functions of what is known of the pipeline."""
