"""Pictures, masks, moving pictures and tensors to call a pipeline with, drawn from a seed."""

from __future__ import annotations

import numpy
import PIL.Image
import torch

SIDE = 32
FRAMES = 9


def picture(seed: int, side: int = SIDE) -> PIL.Image.Image:
    """A picture of smooth colours and a bright square."""
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


def tensor(seed: int, *shape: int) -> torch.Tensor:
    """Normal values."""
    return torch.randn(shape, generator=generator(seed))


def generator(seed: int) -> torch.Generator:
    """A new generator on the CPU."""
    return torch.Generator("cpu").manual_seed(seed)
