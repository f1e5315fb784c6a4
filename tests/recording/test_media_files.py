"""What a pipeline is called with, read from files: pictures, videos, sounds and tensors."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from truestep.errors import FileFormatError, MissingExtraError, UsageError
from truestep.recording import media
from truestep.recording.media import read_input

RATE = 8000


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 8)) -> Any:
    from PIL import Image

    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(
        mode
    )


def video(path: Path, *, codec: str, frames: int = 3) -> None:
    """Write grey frames, each brighter than the one before."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height = 32, 16
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for index in range(frames):
            grey = np.full((16, 32, 3), 40 + 60 * index, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


def tone(channels: int = 1) -> np.ndarray[Any, Any]:
    """A quarter of a second of a tone, each channel quieter than the one before."""
    time = np.arange(RATE // 4) / RATE
    wave = 0.5 * np.sin(2 * np.pi * 440 * time)
    return np.stack([wave / (1 + channel) for channel in range(channels)])


def sound(path: Path, *, codec: str, channels: int = 1) -> None:
    import av

    samples = (tone(channels) * 32767).astype(np.int16)
    layout = "mono" if channels == 1 else "stereo"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            samples.T.reshape(1, -1).copy(), format="s16", layout=layout
        )
        frame.sample_rate = RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_pictures_keep_their_mode_or_are_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    picture(mode).save(path)
    read = read_input([path])
    assert read.mode == (mode if mode in ("RGB", "RGBA", "L") else "RGB")
    assert read.size == (16, 8)
    if mode == "RGB":
        assert np.array_equal(np.asarray(read), np.asarray(picture()))


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture().save(tmp_path / "a.png", exif=exif)
    read = read_input([tmp_path / "a.png"])
    assert read.size == (8, 16)
    turned = picture().transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(read), np.asarray(turned))


def test_several_files_are_a_list(tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        picture().save(path)
    assert [read.size for read in read_input(paths)] == [(16, 8), (16, 8)]


# --- videos and sounds -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "mpeg4"), (".avi", "ffv1"), (".gif", "gif")]
)
def test_videos_are_lists_of_pictures(suffix: str, codec: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    video(path, codec=codec)
    frames = read_input([path])
    assert [frame.size for frame in frames] == [(32, 16)] * 3
    levels = [float(np.asarray(frame.convert("RGB")).mean()) for frame in frames]
    for level, expected in zip(levels, (40, 100, 160), strict=True):
        assert level == pytest.approx(expected, abs=20)
    assert levels == sorted(levels)


def test_a_video_of_too_many_frames_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "_MOST_FRAMES", 2)
    video(tmp_path / "clip.avi", codec="ffv1")
    with pytest.raises(FileFormatError, match="the video cannot be read") as caught:
        read_input([tmp_path / "clip.avi"])
    assert "it has more than 2 frames" in caught.value.measured


@pytest.mark.parametrize(("suffix", "codec"), [(".wav", "pcm_s16le"), (".flac", "flac")])
@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_are_samples_of_each_channel(
    suffix: str, codec: str, channels: int, tmp_path: Path
) -> None:
    path = tmp_path / f"tone{suffix}"
    sound(path, codec=codec, channels=channels)
    read = read_input([path])
    assert read.dtype == np.float32
    assert read.shape == (channels, RATE // 4)
    assert np.abs(read - tone(channels)).max() < 1e-3


def test_a_sound_that_is_a_video_has_no_sound(tmp_path: Path) -> None:
    video(tmp_path / "clip.avi", codec="ffv1")
    (tmp_path / "clip.avi").rename(tmp_path / "clip.wav")
    with pytest.raises(FileFormatError, match="the sound cannot be read"):
        read_input([tmp_path / "clip.wav"])


# --- tensors -----------------------------------------------------------------------------------

VALUES = torch.arange(6, dtype=torch.float32).reshape(2, 3)

WRITERS: dict[str, Callable[[Path], Any]] = {
    ".npy": lambda path: np.save(path, VALUES.numpy()),
    ".npz": lambda path: np.savez(path, latents=VALUES.numpy()),
    ".pt": lambda path: torch.save(VALUES, path),
    ".safetensors": lambda path: save_file({"latents": VALUES}, path),
}


@pytest.mark.parametrize("suffix", sorted(WRITERS))
def test_tensors_are_arrays_or_tensors(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"latents{suffix}"
    WRITERS[suffix](path)
    read = read_input([path])
    assert isinstance(read, np.ndarray) == (suffix in (".npy", ".npz"))
    assert torch.equal(torch.as_tensor(read), VALUES)


def test_a_file_of_several_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    save_file({"a": VALUES, "b": VALUES.clone()}, path)
    with pytest.raises(UsageError, match="a file of an argument holds one tensor") as caught:
        read_input([path])
    assert caught.value.measured == "it holds 2: a, b"


# --- what cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"), [("a.png", "picture"), ("a.mp4", "video"), ("a.wav", "sound")]
)
def test_damaged_and_absent_files_are_named(name: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in (None, b"no such thing"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(FileFormatError, match=f"the {what} cannot be read") as caught:
            read_input([path])
        assert caught.value.where == str(path)
        assert caught.value.measured
        absent = "paths in a case file count from that file" if content is None else ""
        assert caught.value.likely == absent
    path.unlink()
    path.mkdir()
    with pytest.raises(FileFormatError) as caught:
        read_input([path])
    assert "it is no file" in caught.value.measured


@pytest.mark.parametrize(("name", "package"), [("a.png", "PIL"), ("a.mp4", "av"), ("a.wav", "av")])
def test_a_package_that_is_not_there_is_named(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"")
    own = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.partition(".")[0] == package:
            raise ImportError(f"no {package}")
        return own(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError) as caught:
        read_input([tmp_path / name])
    assert caught.value.hint == "pip install 'truestep[media]'"
