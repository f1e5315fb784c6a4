"""Frames as PNG: lossless, amplified, magenta where there is no number."""

from __future__ import annotations

import base64
import io

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


def test_what_is_not_finite_is_magenta() -> None:
    frames = torch.zeros(1, 3, 1, 4, 4)
    bad = frames.clone()
    bad[0, 1, 0, 0, 0] = float("nan")
    media = frame_media(bad, frames, name="v")
    assert tuple(pixels(media.frames[0].actual)[0, 0]) == MAGENTA
    assert tuple(pixels(media.frames[0].difference)[0, 0]) == MAGENTA


def test_long_videos_show_first_last_and_even_steps() -> None:
    frames = torch.zeros(1, 3, 81, 2, 2)
    shown = [f.index for f in frame_media(frames + 0.1, frames, name="v").frames]
    assert shown == [0, 10, 20, 30, 40, 50, 60, 70, 80]


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="not two videos"):
        frame_media(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 3, 4, 4), name="v")
