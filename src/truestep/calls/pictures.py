"""What a recorded run made, as frames to look at: of stages, of calls, or of an engine."""

from __future__ import annotations

import torch

from truestep.calls import keys
from truestep.calls.recorder import RUN
from truestep.keys import key_of
from truestep.recording.format import Recording
from truestep.recording.keyframes import Frames, key_numbers
from truestep.recording.manifest import TensorEntry

Tensor = torch.Tensor


def decoded(recording: Recording) -> Frames | None:
    """Key frames of what a run made, at their full size; None where it holds no such thing.

    The decoder's output is taken before what the pipeline made of it: of that, it is not known
    whether black is 0 or -1.
    """
    found = [entry for entry in recording.manifest.tensors if entry.name in recording]
    for stage in ("decoding", "output"):
        for entry in reversed([e for e in found if _given_by(e.name) == stage]):
            frames = _frames(recording, entry, stage)
            if frames is not None:
                return frames
    return None


def _given_by(name: str) -> str:
    """The stage that gave a tensor; empty where it was given it."""
    if name == "video/frames":
        return "decoding"
    if key_of(name).head:
        return ""
    try:
        key = keys.key_of(name)
    except ValueError:
        return ""
    if key.side != "out" or key.precision:
        return ""
    return "output" if key.component == RUN else key.stage


def _frames(recording: Recording, entry: TensorEntry, stage: str) -> Frames | None:
    one = len(entry.shape) == 3  # a picture alone
    laid = layout((1, *entry.shape) if one else tuple(entry.shape), entry.dtype)
    if laid is None:
        return None
    axes, total = laid
    numbers = key_numbers(total)
    tensor = recording[entry.name][None] if one else recording[entry.name]
    planes = tensor.permute(axes) if len(axes) == tensor.ndim else tensor[0].permute(axes)
    chosen = planes[list(numbers)]
    return Frames(entry.name, _levels(chosen, stage), numbers, total)


def layout(shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], int] | None:
    """How frames of a shape become `f h w c`, of the first sample, and how many there are.

    Returns:
        The order of the axes, without the first where that is one of samples; None where it is no
        shape of pictures in colour.
    """
    if len(shape) not in (4, 5) or min(shape) < 1:
        return None
    if "float" not in dtype and dtype != "uint8":
        return None
    orders = {0: (1, 2, 3, 0), 1: (0, 2, 3, 1), 3: (0, 1, 2, 3)}
    own = shape[1:] if len(shape) == 5 else shape
    for channels in (0, 1, 3) if len(shape) == 5 else (3, 1, 0):
        frame, height, width, _ = order = orders[channels]
        if own[channels] == 3 and min(own[height], own[width]) > 3:
            return order, own[frame]
    return None


def _levels(frames: Tensor, stage: str) -> Tensor:
    """Frames `f h w c` as 8 bits: of a decoder in [-1, 1], of a pipeline in [0, 1]."""
    if frames.dtype == torch.uint8:
        return frames.contiguous()
    wide = frames.float().nan_to_num(0.0)
    wide = (wide + 1) / 2 if stage == "decoding" else wide
    return (wide * 255).round().clamp(0, 255).to(torch.uint8).contiguous()
