"""What a broken clip is: black, noise, frozen or saturated, whatever it should have shown.

A detector votes only if it finds its own damage in every clip of the baseline that is damaged so,
and hardly anything in the baseline as it is: `voting.py`. Pure: no I/O, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from truestep.experiment.quality.mutations import MUTATIONS, Frames

_LEVEL = 1 / 255
"""One level of eight bits: less than this cannot be seen in a file."""


@dataclass(frozen=True)
class Detector:
    """A kind of broken clip.

    Attributes:
        finds: Whether frames `f h w c` in [0, 1] are broken like that.
        planted: The damage that it must find.
        needs_frames: The least that it can tell from.
    """

    finds: Callable[[Frames], bool]
    planted: Callable[[Frames], Frames]
    needs_frames: int = 1


def _black(frames: Frames) -> bool:
    """No pixel of the clip brighter than four levels, but for one in a thousand."""
    return bool(np.quantile(frames.max(axis=-1), 0.999) < 4 * _LEVEL)


def _noise(frames: Frames) -> bool:
    """Neighbouring pixels that have nothing to do with each other, in frames that vary."""
    light = frames.mean(axis=-1, dtype=np.float64)
    centred = light - light.mean(axis=(1, 2), keepdims=True)
    power = float((centred**2).mean())
    if power < (8 * _LEVEL) ** 2 or min(light.shape[1:]) < 4:
        return False
    beside = float((centred[:, :, 1:] * centred[:, :, :-1]).mean())
    below = float((centred[:, 1:] * centred[:, :-1]).mean())
    return max(beside, below) < 0.25 * power


def _frozen(frames: Frames) -> bool:
    """No frame differs from the one before by a level, but for one pixel in a thousand."""
    moved = np.abs(np.diff(frames, axis=0)).max(axis=-1)
    return bool(np.quantile(moved, 0.999) < _LEVEL)


def _saturated(frames: Frames) -> bool:
    """Nine pixels of ten at white in all channels."""
    return bool((frames.min(axis=-1) > 1 - 4 * _LEVEL).mean() > 0.9)


DETECTORS: Mapping[str, Detector] = {
    "black": Detector(_black, MUTATIONS["black"].apply),
    "noise": Detector(_noise, MUTATIONS["noise"].apply),
    "frozen": Detector(_frozen, MUTATIONS["frozen frames"].apply, needs_frames=2),
    "saturated": Detector(_saturated, np.ones_like),
}


def found_in(frames: Frames) -> tuple[str, ...]:
    """Names of the detectors that find something."""
    return tuple(
        name
        for name, detector in DETECTORS.items()
        if len(frames) >= detector.needs_frames and detector.finds(frames)
    )


def planted(frames: Frames) -> dict[str, bool]:
    """Whether each detector finds its own damage in frames that have it."""
    return {
        name: detector.finds(detector.planted(frames))
        for name, detector in DETECTORS.items()
        if len(frames) >= detector.needs_frames
    }
