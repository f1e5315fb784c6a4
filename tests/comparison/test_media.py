"""Frames as PNG: lossless, amplified, magenta where there is no number."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from truestep.comparison.media import MAGENTA, frame_media


def pixels(uri: str) -> np.ndarray:  # type: ignore[type-arg]
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def test_frames_are_lossless() -> None:
    frames = torch.rand(1, 3, 5, 6, 7) * 2 - 1
    media = frame_media(frames, frames, name="v")
    assert (media.gain, media.width, media.height) == (1, 7, 6)
    assert [frame.index for frame in media.frames] == [0, 2, 4]
    expected = ((frames[0, :, 2] + 1) / 2 * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels(media.frames[1].actual), expected)
    assert not pixels(media.frames[1].difference).any()


def test_small_differences_are_made_visible() -> None:
    frames = torch.zeros(1, 3, 2, 4, 4)
    other = frames.clone()
    other[0, 0, 1, 2, 3] = 1e-3
    media = frame_media(other, frames, name="v")
    assert media.gain == 1024
    shown = pixels(media.frames[1].difference)
    assert shown[2, 3].tolist() == [round(1e-3 / 2 * 1024 * 255), 0, 0]


def test_one_rounding_step_is_visible() -> None:
    frames = torch.full((1, 3, 1, 2, 2), 0.5)
    other = torch.nextafter(frames, torch.ones(()))
    media = frame_media(other, frames, name="v")
    assert media.gain == 2**24
    assert pixels(media.frames[0].difference).min() == 128
    assert media.frames[0].actual == media.frames[0].reference


@pytest.mark.parametrize("size", [2.0, 1.0, 0.3, 1e-4, 1e-30])
def test_gains_are_powers_of_two_that_clip_nothing(size: float) -> None:
    frames = torch.zeros(1, 3, 1, 2, 2)
    media = frame_media(frames + size, frames, name="v")
    assert math.log2(media.gain).is_integer()
    assert size / 2 * media.gain <= 1
    assert size / 2 * media.gain > 0.5 or media.gain in {1, 2**24}


def test_dtypes_may_differ() -> None:
    frames = torch.rand(1, 3, 2, 4, 4) * 2 - 1
    media = frame_media(frames.bfloat16(), frames, name="v")
    assert media.gain >= 128
    assert pixels(media.frames[0].difference).any()


def test_only_the_first_sample_is_shown() -> None:
    frames = torch.zeros(2, 3, 1, 4, 4)
    other = frames.clone()
    other[1] = 1
    assert not pixels(frame_media(other, frames, name="v").frames[0].difference).any()


def test_what_is_not_finite_is_magenta() -> None:
    frames = torch.zeros(1, 3, 1, 4, 4)
    bad = frames.clone()
    bad[0, 1, 0, 0, 0] = float("nan")
    media = frame_media(bad, frames, name="v")
    assert tuple(pixels(media.frames[0].actual)[0, 0]) == MAGENTA
    assert tuple(pixels(media.frames[0].difference)[0, 0]) == MAGENTA
    assert tuple(pixels(media.frames[0].reference)[0, 0]) != MAGENTA
    assert tuple(pixels(media.frames[0].actual)[0, 1]) != MAGENTA
    assert frame_media(bad, bad, name="v").gain == 1


def test_long_videos_show_first_last_and_even_steps() -> None:
    frames = torch.zeros(1, 3, 81, 2, 2)
    shown = [f.index for f in frame_media(frames + 0.1, frames, name="v").frames]
    assert shown == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    few = frame_media(frames + 0.1, frames, name="v", limit=2).frames
    assert [f.index for f in few] == [0, 80]
    assert len(frame_media(frames, frames, name="v", limit=1).frames) == 1
    with pytest.raises(ValueError, match="at least one frame"):
        frame_media(frames, frames, name="v", limit=0)


@pytest.mark.parametrize(
    ("own", "theirs"),
    [((1, 3, 2, 4, 4), (1, 3, 3, 4, 4)), ((1, 4, 2, 4, 4),) * 2, ((1, 3, 0, 4, 4),) * 2],
)
def test_what_is_not_two_videos_is_refused(own: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not two videos"):
        frame_media(torch.zeros(own), torch.zeros(theirs), name="v")
