"""Small arguments for a pipeline's call, chosen by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy
import PIL.Image
import torch

from truestep.testing.tiny.exceptions import CALLS

SIDE = 32
STEPS = 3
FRAMES = 9


def picture(seed: int, side: int = SIDE) -> PIL.Image.Image:
    """A picture of smooth colours and a bright square, drawn from a seed."""
    random = numpy.random.default_rng(seed)
    x, y = numpy.meshgrid(numpy.linspace(0, 1, side), numpy.linspace(0, 1, side))
    waves = [numpy.sin(6 * (a * x + b * y) + c) for a, b, c in random.uniform(0, 1, (3, 3))]
    values = 110 + 60 * numpy.stack(waves, axis=-1)
    corner = int(random.integers(0, side // 2))
    values[corner : corner + side // 4, corner : corner + side // 4] += 70
    return PIL.Image.fromarray(values.clip(0, 255).astype("uint8"))


def mask(seed: int, side: int = SIDE) -> PIL.Image.Image:
    """A white square on black: what is to be painted anew."""
    values = numpy.zeros((side, side), dtype="uint8")
    start = side // 4 + seed % 3
    values[start : start + side // 2, start : start + side // 2] = 255
    return PIL.Image.fromarray(values)


def frames(seed: int, count: int = FRAMES, side: int = SIDE) -> list[PIL.Image.Image]:
    """A moving picture: one picture, rolled sideways by a pixel a frame."""
    first = numpy.asarray(picture(seed, side))
    return [PIL.Image.fromarray(numpy.roll(first, shift, axis=1)) for shift in range(count)]


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator("cpu").manual_seed(seed)


ARGUMENTS: dict[str, Callable[[int], Any]] = {
    "prompt": lambda _: "a small red cube on a wooden table",
    "negative_prompt": lambda _: "blurry, low quality",
    "height": lambda _: SIDE,
    "width": lambda _: SIDE,
    "num_frames": lambda _: FRAMES,
    "num_inference_steps": lambda _: STEPS,
    "strength": lambda _: 0.8,
    "max_sequence_length": lambda _: 16,
    "output_type": lambda _: "pt",
    "generator": generator,
    "image": picture,
    "mask_image": mask,
    "control_image": lambda seed: picture(seed + 1),
    "video": frames,
    "use_resolution_binning": lambda _: False,
    "_auto_resize": lambda _: False,
    "audio_length_in_s": lambda _: 0.5,
}
"""Arguments given wherever a call has a parameter of the name, whether it has a default or not."""


def example_call(cls: type[Any], *, seed: int) -> dict[str, Any]:
    """Arguments for one quick call of a tiny pipeline of this class, with a new generator."""
    signature = inspect.signature(cls.__call__).parameters
    call = {name: make(seed) for name, make in ARGUMENTS.items() if name in signature}
    for name, value in CALLS.get(cls.__name__, {}).items():
        if value is None:
            call.pop(name, None)
        else:
            call[name] = value(seed) if callable(value) else value
    return call
