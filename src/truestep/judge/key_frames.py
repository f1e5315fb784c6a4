"""Key frames of two bundles beside each other, to look at. They are judged by nobody."""

from __future__ import annotations

import torch

from truestep.judge.media import frame_media
from truestep.measure.pictures import pixels
from truestep.recording.keyframes import KeyFrames, read_key_frames
from truestep.recording.manifest import Manifest
from truestep.verdict import Media


def key_frame_media(
    actual: Manifest | None, reference: Manifest | None
) -> tuple[tuple[Media, ...], tuple[str, ...]]:
    """Frames that both sides hold, and what is to be said of them.

    Raises:
        FileFormatError: A side's cannot be read.
    """
    sides = [
        read_key_frames(manifest.settings, where=label) if manifest is not None else None
        for manifest, label in ((actual, "actual"), (reference, "reference"))
    ]
    ours, theirs = sides
    if ours is None or theirs is None:
        only = next((name for name, side in zip(_NAMES, sides, strict=True) if side), "")
        return (), (f"key frames are in the {only} side alone: truestep show",) if only else ()
    numbers = [number for number in ours.pictures if number in theirs.pictures]
    if not numbers or ours.size != theirs.size:
        text = f"key frames cannot be set beside each other: {ours.text()}; {theirs.text()}"
        return (), (text,)
    own, other = (_video(side, numbers) for side in (ours, theirs))
    size = min(own.shape[-2:], other.shape[-2:])
    own, other = (_sized(video, tuple(size)) for video in (own, other))
    factor = max(ours.factor, theirs.factor)
    name = "Key frames" + (f" at 1/{factor} of their size" if factor > 1 else "")
    media = frame_media(own, other, name=name, limit=len(numbers))
    frames = tuple(
        triple.model_copy(update={"index": numbers[triple.index]}) for triple in media.frames
    )
    return (media.model_copy(update={"frames": frames}),), ()


_NAMES = ("actual", "reference")


def _video(side: KeyFrames, numbers: list[int]) -> torch.Tensor:
    """Pictures as `1 c f h w` in [-1, 1]."""
    frames = torch.stack([pixels(side.pictures[number]) for number in numbers])
    return (frames.permute(3, 0, 1, 2).float() / 127.5 - 1)[None]


def _sized(video: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    if tuple(video.shape[-2:]) == size:
        return video
    planes = torch.nn.functional.interpolate(video[0].transpose(0, 1), size, mode="area")
    return planes.transpose(0, 1)[None]
