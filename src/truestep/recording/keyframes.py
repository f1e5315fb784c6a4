"""First, middle and last frame of what a run made, as small lossless pictures in a manifest."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from truestep.errors import FileFormatError
from truestep.measure.pictures import pixels, png, reduced
from truestep.recording.manifest import KEY_FRAMES

SMALLEST = 16
"""Longest side below which a picture shows nothing: none is kept then."""

MOST = 3


@dataclass(frozen=True)
class Frames:
    """Frames of a run, not yet made smaller.

    Attributes:
        source: What they are of: the tensor's name, or a file's.
        frames: `f h w 3` uint8: the first, the middle and the last, or the only one.
        numbers: Which of all they are.
        total: How many there are.
    """

    source: str
    frames: torch.Tensor
    numbers: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class KeyFrames:
    """Pictures of a run's output.

    Attributes:
        source: What they are of.
        total: Number of frames that there are.
        size: Height and width of these.
        factor: Each side of a picture is so many times smaller.
        pictures: Frame number to a PNG.
    """

    source: str
    total: int
    size: tuple[int, int]
    factor: int
    pictures: Mapping[int, bytes]

    def told(self) -> dict[str, Any]:
        """As a setting of a manifest."""
        return {
            "source": self.source,
            "total": self.total,
            "size": list(self.size),
            "factor": self.factor,
            "frames": {
                str(number): base64.b64encode(data).decode()
                for number, data in self.pictures.items()
            },
        }

    def text(self) -> str:
        """What they are, in words."""
        numbers = ", ".join(map(str, self.pictures))
        small = f" at 1/{self.factor} of their size" if self.factor > 1 else ""
        height, width = self.size
        which = f"frames {numbers} of {self.total}" if self.total > 1 else "a picture"
        return f"{which}, {width} x {height}{small}, of {self.source}"


def key_numbers(total: int) -> tuple[int, ...]:
    """First, middle and last of so many frames."""
    return tuple(sorted({0, total // 2, total - 1})) if total else ()


def key_frames(frames: Frames, room: int) -> KeyFrames | None:
    """Pictures of frames, as large as there is room for.

    Args:
        frames: What is to be seen.
        room: Bytes that they may take in a manifest.

    Returns:
        None where pictures that show something do not fit.
    """
    height, width = frames.frames.shape[1:3]
    factor = 1
    while True:
        small = reduced(frames.frames, factor)
        if factor > 1 and max(small.shape[1:3]) < SMALLEST:
            return None
        data = [
            png(one.numpy().tobytes(), width=small.shape[2], height=small.shape[1], level=9)
            for one in small
        ]
        size = sum(4 * (len(one) // 3 + 1) + 24 for one in data) + 200 + 6 * len(frames.source)
        if size <= room:
            pictures = dict(zip(frames.numbers, data, strict=True))
            return KeyFrames(frames.source, frames.total, (height, width), factor, pictures)
        # so many times too large: its sides are the root of that too long, rounded down a step
        factor = max(factor + 1, int(factor * min(4.0, (size / max(room, 1)) ** 0.5)))


def read_key_frames(settings: Mapping[str, Any], *, where: str) -> KeyFrames | None:
    """Key frames of a manifest's settings; None where there are none.

    Raises:
        FileFormatError: They cannot be read.
    """
    told = settings.get(KEY_FRAMES)
    if told is None:
        return None
    try:
        height, width = map(int, told["size"])
        pictures = {
            int(number): base64.b64decode(text, validate=True)
            for number, text in told["frames"].items()
        }
        if not 0 < len(pictures) <= MOST:
            raise ValueError(f"{len(pictures)} pictures")
        for data in pictures.values():
            pixels(data)
        found = KeyFrames(
            str(told["source"]), int(told["total"]), (height, width), int(told["factor"]), pictures
        )
    except (AttributeError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise FileFormatError(
            "the key frames cannot be read", where=where, measured=f"{error}"[:120]
        ) from None
    return found
