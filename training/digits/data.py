"""Render clips of real handwritten digits that drift across a black canvas.

The digits are the 1,797 scans of 8x8 pixels that ship with scikit-learn (UCI optical recognition of
handwritten digits). Everything is a pure function of a seed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits

FRAMES = 9
SIZE = 32
DIGIT_SIZE = 16
SPEED = 1.5
MARGIN = 1.0
CROSS_RANGE = (6.0, 10.0)
TRAIN_COUNT = 1500

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
}
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}


@dataclass(frozen=True)
class Caption:
    """What a clip shows; `prompt` is its only text form."""

    digit: int
    colour: str
    direction: str

    @property
    def prompt(self) -> str:
        """Return the caption in words, such as `a red three moving left`."""
        return f"a {self.colour} {WORDS[self.digit]} moving {self.direction}"


def all_captions() -> list[Caption]:
    """List the 160 captions, digit first, then colour, then direction."""
    return [
        Caption(digit, colour, direction)
        for digit in range(10)
        for colour in COLOURS
        for direction in DIRECTIONS
    ]


def judged_captions() -> list[Caption]:
    """List 80 of the 160 captions: each digit 8 times, each colour and direction 20 times."""
    colours, directions = list(COLOURS), list(DIRECTIONS)
    return [
        caption
        for caption in all_captions()
        if (caption.digit + colours.index(caption.colour) + directions.index(caption.direction)) % 2
        == 0
    ]


@functools.cache
def load_scans(*, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Load the digit scans of one split.

    Args:
        held_out: Take scans 1500 to 1796 instead of 0 to 1499.

    Returns:
        Images `n 8 8` in [0, 1], float32, and labels `n`.
    """
    bunch = load_digits()
    part = slice(TRAIN_COUNT, None) if held_out else slice(0, TRAIN_COUNT)
    return (bunch.images[part] / 16.0).astype(np.float32), bunch.target[part].astype(np.int64)


@dataclass(frozen=True)
class Clips:
    """A batch of clips with their captions.

    Attributes:
        video: `b c f h w`, float32 in [-1, 1].
        captions: One per clip.
        scans: Index of the scan in its split, one per clip.
    """

    video: torch.Tensor
    captions: list[Caption]
    scans: list[int]


def _tent(position: torch.Tensor) -> torch.Tensor:
    """Return bilinear weights `b f SIZE 8` of the scan rows for a box that starts at `position`."""
    scale = DIGIT_SIZE / 8
    pixel = torch.arange(SIZE, dtype=torch.float32) + 0.5
    row = torch.arange(8, dtype=torch.float32)
    coordinate = (pixel - position[..., None]) / scale - 0.5
    return (1 - (coordinate[..., None] - row).abs()).clamp_min(0)


def render(
    images: torch.Tensor,
    captions: Sequence[Caption],
    *,
    start: torch.Tensor,
    intensity: torch.Tensor,
) -> torch.Tensor:
    """Render clips of scans that drift at a constant speed.

    Args:
        images: Scans `b 8 8` in [0, 1].
        captions: Colour and direction of each clip.
        start: Left and top edge `b 2` of the 16-pixel box in the first frame, in pixels.
        intensity: Brightness `b` of the ink.

    Returns:
        Video `b c f h w`, float32 in [-1, 1].
    """
    motion = torch.tensor([DIRECTIONS[c.direction] for c in captions], dtype=torch.float32)
    colour = torch.tensor([COLOURS[c.colour] for c in captions], dtype=torch.float32)
    time = torch.arange(FRAMES, dtype=torch.float32)
    box = start[:, None] + SPEED * motion[:, None] * time[None, :, None]
    ink = torch.einsum("bfyr,brc,bfxc->bfyx", _tent(box[..., 1]), images, _tent(box[..., 0]))
    ink = ink * intensity[:, None, None, None]
    return torch.einsum("bfyx,bc->bcfyx", ink, colour) * 2 - 1


def draw_starts(captions: Sequence[Caption], rng: np.random.Generator) -> torch.Tensor:
    """Draw sub-pixel starts `b 2` from which the whole drift stays on the canvas."""
    travel = SPEED * (FRAMES - 1)
    near, far = MARGIN, SIZE - DIGIT_SIZE - MARGIN
    starts = np.empty((len(captions), 2), dtype=np.float32)
    for row, caption in enumerate(captions):
        for axis, sign in enumerate(DIRECTIONS[caption.direction]):
            low, high = {
                0: CROSS_RANGE,
                1: (near, far - travel),
                -1: (near + travel, far),
            }[sign]
            starts[row, axis] = rng.uniform(low, high)
    return torch.from_numpy(starts)


def sample_clips(count: int, *, seed: int, held_out: bool = False) -> Clips:
    """Draw clips at random: scan, colour, direction, sub-pixel start and brightness.

    Args:
        count: Number of clips.
        seed: Clips are a pure function of this seed and of the other arguments.
        held_out: Draw from the held-out scans, without repeats while they last.

    Returns:
        The clips.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    images, labels = load_scans(held_out=held_out)
    scans = np.concatenate([rng.permutation(len(labels)) for _ in range(count // len(labels) + 1)])
    scans = scans[:count]
    colours, directions = list(COLOURS), list(DIRECTIONS)
    captions = [
        Caption(int(labels[scan]), colours[rng.integers(4)], directions[rng.integers(4)])
        for scan in scans
    ]
    start = draw_starts(captions, rng)
    intensity = torch.from_numpy(rng.uniform(0.9, 1.0, size=count).astype(np.float32))
    picked = torch.from_numpy(images[scans])
    video = render(picked, captions, start=start, intensity=intensity)
    return Clips(video=video, captions=captions, scans=[int(scan) for scan in scans])
