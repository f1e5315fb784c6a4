"""Standard damages of a finished clip: what a metric of quality must notice before it may vote.

Frames are `f h w c`, float32 in [0, 1]; a picture is one frame. Pure: no I/O, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.float32]

WRONG_PROMPT = "wrong prompt"
"""The clip as it is, judged by the prompt of another."""


@dataclass(frozen=True)
class Mutation:
    """A damage.

    Attributes:
        apply: Damages frames.
        needs_frames: The least that it does anything to.
    """

    apply: Callable[[Frames], Frames]
    needs_frames: int = 1


def _noise(frames: Frames) -> Frames:
    return np.random.default_rng(20_240_229).random(frames.shape, dtype=np.float32)


def blurred(frames: Frames) -> Frames:
    """A box of an eighth of the height, three times over: close to a Gaussian."""
    radius = max(1, frames.shape[1] // 16)
    found = frames.astype(np.float64)
    for _ in range(3):
        for axis in (1, 2):
            found = _box(found, radius, axis)
    return found.astype(np.float32)


def _box(values: NDArray[np.float64], radius: int, axis: int) -> NDArray[np.float64]:
    pads = [(0, 0)] * values.ndim
    pads[axis] = (radius + 1, radius)
    total = np.pad(values, pads, mode="edge").cumsum(axis=axis)
    size, width = values.shape[axis], 2 * radius + 1
    high = np.take(total, np.arange(width, width + size), axis=axis)
    low = np.take(total, np.arange(size), axis=axis)
    found: NDArray[np.float64] = (high - low) / width
    return found


def _frozen(frames: Frames) -> Frames:
    return np.repeat(frames[:1], len(frames), axis=0)


def _swapped(frames: Frames) -> Frames:
    """The second half before the first."""
    half = len(frames) // 2
    return np.concatenate([frames[half:], frames[:half]])


MUTATIONS: Mapping[str, Mutation] = {
    "black": Mutation(np.zeros_like),
    "noise": Mutation(_noise),
    "blur": Mutation(blurred),
    "frozen frames": Mutation(_frozen, needs_frames=2),
    "swapped frames": Mutation(_swapped, needs_frames=2),
}
"""By name, without the wrong prompt, which leaves the frames as they are."""

ALWAYS = ("black", "noise")
"""What every metric must notice, whatever it looks at: a clip that shows nothing."""


def expected(frames: int) -> tuple[str, ...]:
    """The mutations that clips of so many frames are put to, the wrong prompt among them."""
    return (*(name for name, m in MUTATIONS.items() if frames >= m.needs_frames), WRONG_PROMPT)


def other_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """For every prompt another of the same list, with as few words in common as there is one.

    Prompts that all share a word are told apart by the rest; a list of one prompt has no other.
    """
    words = [set(prompt.lower().split()) for prompt in prompts]
    found = []
    for at, own in enumerate(words):
        others = [(at + step) % len(prompts) for step in range(1, len(prompts))]
        others = [other for other in others if prompts[other] != prompts[at]]
        best = min(others, key=lambda other: len(own & words[other]), default=at)
        found.append(prompts[best])
    return tuple(found)
