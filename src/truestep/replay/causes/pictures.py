"""Hypotheses about pictures on their way to a model: their normalisation, size and colours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from truestep.replay.causes.guesses import Guess, apart
from truestep.replay.causes.material import Handed

Tensor = torch.Tensor

_NORMS: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {
    "CLIP's mean and deviation": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "ImageNet's mean and deviation": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mean 0.5 and deviation 0.5": ((0.5,) * 3, (0.5,) * 3),
    "no mean and deviation": ((0.0,) * 3, (1.0,) * 3),
}
"""Source: openai/CLIP clip.py (`_transform`), torchvision's classification presets."""

_RANGES = {"mean 0.5 and deviation 0.5", "no mean and deviation"}

_FILTERS = ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")


def pictures(scene: Handed) -> Iterator[Guess]:
    """A picture that is normalised or resized otherwise; no number is left open."""
    first = scene.failing[0].reference
    if scene.keys[0].side != "in" or not scene.same_sizes or _axis(first) is None:
        return
    yield from _normalised(scene)
    if len(scene.failing) == 1:
        yield from _resized(scene)


def _axis(tensor: Tensor) -> int | None:
    """The axis of red, green and blue."""
    if tensor.dim() < 4:
        return None
    axes = [axis for axis in range(1, tensor.dim()) if tensor.shape[axis] == 3]
    return axes[0] if len(axes) == 1 else None


def _normalised(scene: Handed) -> Iterator[Guess]:
    first = scene.failing[0].reference
    axis = _axis(first)
    assert axis is not None
    for (theirs, known), (mine, other) in itertools.permutations(_NORMS.items(), 2):
        if {theirs, mine} == _RANGES:
            continue  # one range for another: see `relations.casts`
        made = []
        for one in scene.failing:
            plain = one.reference * _along(known[1], axis, one.reference) + _along(
                known[0], axis, one.reference
            )
            if float(plain.min()) < -1e-3 or float(plain.max()) > 1 + 1e-3:
                break
            moved = plain - _along(other[0], axis, plain)
            made.append(moved / _along(other[1], axis, plain))
        if len(made) == len(scene.failing):
            text = f"{scene.argument} is normalised with {mine}, the reference's with {theirs}"
            yield Guess("image normalisation", text, made)


def _along(values: Sequence[float], axis: int, like: Tensor) -> Tensor:
    shape = [1] * like.dim()
    shape[axis] = 3
    return torch.tensor(values, dtype=torch.float64).view(shape)


def _resized(scene: Handed) -> Iterator[Guess]:
    """By another filter than the reference's, from a picture that the call was given."""
    one = scene.failing[0]
    for picture in _given(scene.material.arguments):
        made = dict(_each_way(picture, one.reference))
        fitting = {
            name: change
            for name, (change, value) in made.items()
            if apart(value, one.reference) <= 1e-5
        }
        if not fitting:
            continue
        known, own = next(iter(fitting.items()))
        for name, (change, value) in made.items():
            if name not in fitting and change == own:
                text = f"{scene.argument} is resized {name}, the reference's {known}"
                yield Guess("resize", text, [value])


def _given(arguments: Mapping[str, Any]) -> Iterator[Any]:
    for value in arguments.values():
        for each in value if isinstance(value, list | tuple) else [value]:
            if hasattr(each, "resize") and hasattr(each, "mode"):
                yield each


def _each_way(picture: Any, like: Tensor) -> Iterator[tuple[str, tuple[str, Tensor]]]:
    """A picture resized in every way to the sizes of a tensor: by which filter, in which range."""
    import numpy as np
    from PIL.Image import Resampling

    height, width = like.shape[-2:]
    source = torch.from_numpy(np.array(picture.convert("RGB"))).double().permute(2, 0, 1)[None]
    ways: list[tuple[str, Tensor]] = []
    for name in _FILTERS:
        small = picture.convert("RGB").resize((width, height), getattr(Resampling, name))
        pixels = torch.from_numpy(np.array(small)).double().permute(2, 0, 1)[None]
        ways.append((f"by PIL's {name.lower()}", pixels))
    for mode, smooth in itertools.product(("bilinear", "bicubic"), (False, True)):
        made = torch.nn.functional.interpolate(
            source, (height, width), mode=mode, align_corners=False, antialias=smooth
        )
        ways.append((f"by torch's {mode}, {'' if smooth else 'not '}antialiased", made))
    ways.append(("by torch's nearest", torch.nn.functional.interpolate(source, (height, width))))
    for name, pixels in ways:
        if pixels.numel() != like.numel():
            continue
        shaped = pixels.reshape(like.shape)
        yield name, ("-1 to 1", shaped / 127.5 - 1)
        if float(like.min()) >= 0:
            yield name, ("0 to 1", shaped / 255)
