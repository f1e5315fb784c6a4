"""Videos that a player can open."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch

from truestep.errors import WriteError
from truestep.report.video import write_video


def test_small_frames_are_enlarged(tmp_path: Path) -> None:
    frames = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    frames[0, 0, 0, 0, 0] = float("nan")
    path = tmp_path / "v.mp4"
    write_video(path, frames, fps=4)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (240, 160)
        assert sum(1 for _ in container.decode(video=0)) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="the video could not be written"):
        write_video(tmp_path / "file" / "v.mp4", torch.zeros(1, 3, 1, 16, 16), fps=4)
