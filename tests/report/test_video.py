"""Videos that a player can open, with their sound."""

from __future__ import annotations

import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from truestep.errors import UsageError, WriteError
from truestep.report.video import write_clip, write_video


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


def tone(seconds: float, *, rate: int, channels: int) -> torch.Tensor:
    """A different tone in each channel, at half of full scale."""
    times = torch.arange(round(seconds * rate)) / rate
    return (
        torch.stack([torch.sin(2 * math.pi * 440 * (c + 1) * times) for c in range(channels)])[None]
        * 0.5
    )


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (24_000, 2), (48_000, 2)])
def test_a_clip_has_its_sound(rate: int, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    waveform = tone(1.5, rate=rate, channels=channels)
    frames = torch.rand(1, 3, 12, 32, 48) * 2 - 1
    write_clip(path, frames, fps=8, waveform=waveform, sample_rate=rate)
    with av.open(str(path)) as container:
        assert [len(container.streams.video), len(container.streams.audio)] == [1, 1]
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (audio.codec_context.sample_rate, audio.codec_context.channels) == (rate, channels)
        assert video.duration is not None
        assert video.time_base is not None
        assert float(video.duration * video.time_base) == pytest.approx(1.5, abs=0.01)
        assert audio.duration is not None
        assert audio.time_base is not None
        seconds = float(audio.duration * audio.time_base)
        assert seconds == pytest.approx(1.5, abs=1024 / rate)
        decoded = [frame.to_ndarray() for frame in container.decode(audio=0)]
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 12
    sound = np.concatenate(decoded, axis=1)[:, : waveform.shape[-1]]
    assert sound.shape[0] == channels
    wanted = waveform[0].numpy()[:, : sound.shape[1]]
    assert np.linalg.norm(sound - wanted) / np.linalg.norm(wanted) < 0.05  # lossy; not shifted


def test_what_is_not_finite_is_silence(tmp_path: Path) -> None:
    waveform = torch.full((1, 1, 16_000), math.nan)
    write_clip(
        tmp_path / "v.mp4",
        torch.zeros(1, 3, 4, 16, 16),
        fps=4,
        waveform=waveform,
        sample_rate=16_000,
    )
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert all(abs(f.to_ndarray()).max() < 1e-4 for f in container.decode(audio=0))


def test_frames_a_second_may_be_a_fraction(tmp_path: Path) -> None:
    write_clip(tmp_path / "v.mp4", torch.zeros(1, 3, 24, 16, 16), fps=24000 / 1001)
    with av.open(str(tmp_path / "v.mp4")) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        assert (rate.numerator, rate.denominator) == (24000, 1001)
        assert len(container.streams.audio) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"waveform": torch.zeros(1, 1, 9)}, "given waveform without sample_rate"),
        ({"sample_rate": 16_000}, "given sample_rate without waveform"),
        ({"waveform": torch.zeros(1, 3, 9), "sample_rate": 16_000}, r"shape \(1, 3, 9\); needed"),
        ({"waveform": torch.zeros(1, 2, 0), "sample_rate": 16_000}, "the sound cannot be written"),
        ({"waveform": torch.zeros(2, 9), "sample_rate": 16_000}, "the sound cannot be written"),
        ({"waveform": torch.zeros(1, 1, 9), "sample_rate": 20_000}, "rate of 20000 Hz"),
    ],
)
def test_a_sound_that_cannot_be_written(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        write_clip(tmp_path / "v.mp4", torch.zeros(1, 3, 1, 16, 16), fps=4, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
