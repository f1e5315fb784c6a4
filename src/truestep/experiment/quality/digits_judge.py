"""Read clips of the digits model: which digit, which way, which colour, and how clearly.

Direction and colour are measured from the frames; the digit is read by a small network that learned
real clips of the training scans (`training/digits/reader.py`, weights in `reader.safetensors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from truestep.models import digits

Array = NDArray[np.float32]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEED = 1.5
"""Pixels a frame, of the clips that the model learned."""

DIGIT_SIZE = 16
READER = digits.path().parent / "reader.safetensors"


@dataclass(frozen=True)
class Asked:
    """What a prompt of the model asks for."""

    digit: int
    colour: str
    direction: str


@dataclass(frozen=True)
class Seen:
    """How clearly a clip shows what was asked for; higher is clearer.

    Attributes:
        digit: Evidence for the digit over that for the most likely other one, in nats.
        direction: 1 less the distance of the speed from the one asked for, in true speeds: 1 moves
            as asked, 0 stands still, -1 moves the other way.
        colour: Cosine of the summed light and the colour.
        right: Whether digit, direction and colour are all as asked for.
    """

    digit: float
    direction: float
    colour: float
    right: bool


def asked(prompt: str) -> Asked | None:
    """Read a prompt `a red three moving left`; None where it is none of the model's 160."""
    words = prompt.split()
    if len(words) != 5 or (words[0], words[3]) != ("a", "moving"):
        return None
    _, colour, digit, _, direction = words
    if colour not in COLOURS or digit not in WORDS or direction not in DIRECTIONS:
        return None
    return Asked(WORDS.index(digit), colour, direction)


def prompts() -> tuple[str, ...]:
    """The 160 prompts, in an order whose every start holds digits, colours and ways evenly."""
    colours, ways = list(COLOURS), list(DIRECTIONS)
    return tuple(
        f"a {colours[(at + turn // 4) % 4]} {WORDS[at % 10]} moving {ways[(at // 2 + turn) % 4]}"
        for turn in range(16)
        for at in range(10)
    )


def see(frames: Array, prompt: Asked) -> Seen:
    """Judge a clip.

    Args:
        frames: `f h w c` in [0, 1].
        prompt: What was asked for.
    """
    ink = frames.max(axis=-1)
    logits = _read(ink)
    others = np.delete(logits, prompt.digit)
    speed = _path(ink)[1] / SPEED
    way = np.array(DIRECTIONS[prompt.direction], dtype=np.float64)
    light = frames.sum(axis=(0, 1, 2), dtype=np.float64)
    cosines = {name: _cosine(light, np.array(value)) for name, value in COLOURS.items()}
    named = max(cosines, key=cosines.__getitem__)
    along = {name: float(np.dot(speed, value)) for name, value in DIRECTIONS.items()}
    goes = max(along, key=along.__getitem__)
    return Seen(
        digit=float(logits[prompt.digit] - others.max()),
        direction=1 - float(np.linalg.norm(speed - way)),
        colour=cosines[prompt.colour],
        right=bool(
            int(logits.argmax()) == prompt.digit
            and named == prompt.colour
            and goes == prompt.direction
            and along[goes] > 0.5
            and light.sum() > 1e-3
        ),
    )


def _cosine(light: NDArray[np.float64], colour: NDArray[np.float64]) -> float:
    size = float(np.linalg.norm(light) * np.linalg.norm(colour))
    return float(np.dot(light, colour)) / size if size > 1e-6 else 0.0


def _path(ink: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre in the middle of the clip, and speed a frame, as `x, y` in pixels: a straight path at
    constant speed, fitted to the centre of the ink."""
    frames, height, width = ink.shape
    weight = ink.sum(axis=(1, 2), dtype=np.float64) + 1e-6
    x = (ink.sum(axis=1, dtype=np.float64) @ (np.arange(width) + 0.5)) / weight
    y = (ink.sum(axis=2, dtype=np.float64) @ (np.arange(height) + 0.5)) / weight
    centre = np.stack([x, y], axis=1)
    time = np.arange(frames) - (frames - 1) / 2
    return centre.mean(axis=0), time @ centre / max(float(time @ time), 1e-9)


def follow(ink: Array) -> NDArray[np.float64]:
    """The mean over the frames of `DIGIT_SIZE` pixels around the moving centre, of unit length."""
    centre, speed = _path(ink)
    frames, height, width = ink.shape
    offset = np.arange(DIGIT_SIZE) - (DIGIT_SIZE - 1) / 2
    total = np.zeros((DIGIT_SIZE, DIGIT_SIZE))
    for frame in range(frames):
        x, y = centre + speed * (frame - (frames - 1) / 2)
        rows = np.clip(1 - np.abs(y + offset[:, None] - np.arange(height) - 0.5), 0, None)
        columns = np.clip(1 - np.abs(x + offset[:, None] - np.arange(width) - 0.5), 0, None)
        total += rows @ ink[frame] @ columns.T
    flat = total.reshape(-1)
    found: NDArray[np.float64] = flat / (np.linalg.norm(flat) + 1e-6)
    return found


@cache
def _weights() -> dict[str, NDArray[np.float64]]:
    from truestep.recording.format import read_plain

    return {name: value.double().numpy() for name, value in read_plain(READER).items()}


def _read(ink: Array) -> NDArray[np.float64]:
    """Logits of the ten digits."""
    w = _weights()
    hidden = np.maximum(w["hidden.weight"] @ follow(ink) + w["hidden.bias"], 0)
    found: NDArray[np.float64] = w["digit.weight"] @ hidden + w["digit.bias"]
    return found
