"""The pinned prompts of an experiment on a bare model: five, the same for everyone."""

from __future__ import annotations

DIGITS = (
    "a red three moving left",
    "a green seven moving up",
    "a blue zero moving right",
    "a yellow eight moving down",
    "a red five moving up",
)
"""In the vocabulary of `builtin:digits`: every colour, every direction, five digits."""

GENERAL = (
    "A red fox trots through fresh snow at the edge of a pine forest, its breath visible in the "
    "cold morning light, camera tracking from the side.",
    "Close-up of a potter's wet hands shaping a clay bowl on a spinning wheel, warm workshop "
    "light, shallow depth of field.",
    "An old steam train crosses a stone viaduct over a misty valley, smoke drifting behind it, "
    "wide aerial shot.",
    "Rain falls on a neon-lit street at night while people with umbrellas pass a small noodle "
    "shop, reflections rippling in the puddles.",
    "A hummingbird hovers in front of an orange flower, drinks, and darts away, slow motion, "
    "green garden out of focus.",
)
"""For any other text-to-video model: an animal, hands, rigid motion with smoke, many small moving
things at night, and very fast motion."""


def pinned(model: str) -> tuple[str, ...]:
    """The prompts for a model; prompt i goes with seed i."""
    return DIGITS if model == "builtin:digits" else GENERAL
