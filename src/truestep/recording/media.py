"""Read what a pipeline is called with: pictures, videos, sounds and tensors in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import FileFormatError, MissingExtraError, UsageError
from truestep.reading import reason
from truestep.recording.readers import load

if TYPE_CHECKING:
    import numpy as np

TENSORS = (".npy", ".npz", ".pt", ".pth", ".safetensors")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".m4a")

_MOST_FRAMES = 4096
"""Of one video: what a call is given is held in memory, and kept in the recording."""

_KEPT_MODES = ("L", "RGB", "RGBA")
"""Of pictures; all others are turned into RGB, as diffusers' own reader does."""


def read_input(paths: Sequence[Path]) -> Any:
    """What the files of one argument hold, decoded; a list of several files.

    Pictures are PIL images turned upright, videos lists of them, sounds float32 arrays `c n`, .npy
    files arrays, all other files of tensors tensors.

    Raises:
        FileFormatError: One is absent, damaged, or of a kind that nothing here reads.
        UsageError: One holds several tensors.
    """
    values = [_read(path) for path in paths]
    return values[0] if len(values) == 1 else values


def _read(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in TENSORS:
        return _tensor(path)
    readers: dict[str, Callable[[Path], Any]] = dict.fromkeys(VIDEOS, _video)
    readers |= dict.fromkeys(SOUNDS, _sound)
    what = "video" if suffix in VIDEOS else "sound" if suffix in SOUNDS else "picture"
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file" if not path.exists() else "it is no file")
        return readers.get(suffix, _picture)(path)
    except MissingExtraError:
        raise
    except Exception as error:  # a damaged file makes decoders raise almost anything
        raise FileFormatError(
            f"the {what} cannot be read",
            where=str(path),
            measured=reason(error),
            likely="" if path.is_file() else "paths in a case file count from that file",
        ) from None


def _tensor(path: Path) -> Any:
    tensors = load(path, label="input").tensors
    if len(tensors) != 1:
        raise UsageError(
            "a file of an argument holds one tensor",
            where=str(path),
            measured=f"it holds {len(tensors)}: {', '.join(list(tensors)[:5])}",
        )
    (tensor,) = (tensors[name] for name in tensors)
    return tensor.numpy() if path.suffix.lower() in (".npy", ".npz") else tensor


def _picture(path: Path) -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtraError("pillow", "media", "reading pictures") from None
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        return upright.copy() if upright.mode in _KEPT_MODES else upright.convert("RGB")


def _video(path: Path) -> list[Any]:
    av = _av()
    with av.open(str(path)) as container:
        frames: list[Any] = []
        for frame in container.decode(video=0):
            if len(frames) == _MOST_FRAMES:
                raise ValueError(f"it has more than {_MOST_FRAMES} frames")
            frames.append(frame.to_image())
    if not frames:
        raise ValueError("it has no frames")
    return frames


def _sound(path: Path) -> np.ndarray[Any, Any]:
    """Samples `c n` in [-1, 1] at the file's own rate."""
    import numpy as np

    av = _av()
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp")
        frames = [*container.decode(audio=0), None]
        parts = [part.to_ndarray() for frame in frames for part in resampler.resample(frame)]
    if not parts:
        raise ValueError("it has no sound")
    return np.concatenate(parts, axis=1)


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "media", "reading videos and sounds") from None
    return av
