"""Write decoded frames, with or without their sound, as an mp4."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import MissingExtraError, UsageError
from truestep.files import replacing

if TYPE_CHECKING:
    import torch

_SMALL = 256
"""Frames with both sides below this many pixels are enlarged by a whole factor, unfiltered."""

_LAYOUTS = {1: "mono", 2: "stereo"}

_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
"""Sample rates that AAC can have. ISO/IEC 14496-3, table 1.18."""

_AAC_SAMPLES = 1024
"""Samples of one AAC frame."""


def write_video(path: str | Path, frames: torch.Tensor, *, fps: float) -> None:
    """Write frames without sound; see `write_clip`."""
    write_clip(path, frames, fps=fps)


def write_clip(
    path: str | Path,
    frames: torch.Tensor,
    *,
    fps: float,
    waveform: torch.Tensor | None = None,
    sample_rate: int | None = None,
) -> None:
    """Write frames as H.264 in yuv420p, and their sound as AAC, atomically.

    Args:
        path: An .mp4 file.
        frames: `b c f h w` in [-1, 1] with 3 channels; the first sample is written. Values that are
            not finite become black.
        fps: Frames a second.
        waveform: `b c n` in [-1, 1], c = 1 or 2; the first sample is written, as loud as it is.
            Values that are not finite become silence.
        sample_rate: Hz, of the waveform; one that AAC can have.

    Raises:
        MissingExtraError: PyAV is not installed.
        UsageError: The sound cannot be written: its shape or sample rate, or one without the other.
        WriteError: The file could not be written.
    """
    _check_sound(waveform, sample_rate)
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "media", "writing a video") from None
    pixels = _pixels(frames)
    height, width = (int(n) // 2 * 2 for n in pixels.shape[1:3])
    with replacing(path, "the video") as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12"}
        sound: Any = None
        if waveform is not None:
            layout = _LAYOUTS[waveform.shape[1]]
            sound = container.add_stream("aac", rate=sample_rate, layout=layout)
        for image in pixels[:, :height, :width].contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
        if waveform is not None and sample_rate is not None:
            for part in _sound_frames(waveform[0], sample_rate):
                container.mux(sound.encode(part))
            container.mux(sound.encode())


def write_animation(path: Path, frames: torch.Tensor, *, fps: float) -> None:
    """Write frames as an animated GIF, which needs Pillow alone, atomically.

    Args:
        path: A .gif file.
        frames, fps: As of `write_video`.

    Raises:
        MissingExtraError: Pillow is not installed.
        WriteError: The file could not be written.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("pillow", "media", "writing an animation") from None
    first, *others = (Image.fromarray(image) for image in _pixels(frames).numpy())
    with replacing(path, "the animation") as temporary:
        first.save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=round(1000 / fps),
            loop=0,
        )


def _pixels(frames: torch.Tensor) -> torch.Tensor:
    """`f h w c` in 8 bits of the first sample, small frames enlarged."""
    import torch

    pixels = ((frames[0].float().nan_to_num(-1.0) + 1) * 127.5).round().clamp(0, 255)
    pixels = pixels.to(torch.uint8).permute(1, 2, 3, 0)
    scale = max(1, _SMALL // max(pixels.shape[1:3]))
    return pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2).contiguous()


def _check_sound(waveform: torch.Tensor | None, sample_rate: int | None) -> None:
    """Refuse a sound that cannot be written, before anything is."""
    if (waveform is None) != (sample_rate is None):
        given, lacking = "waveform", "sample_rate"
        if waveform is None:
            given, lacking = lacking, given
        raise UsageError(f"a clip was given {given} without {lacking}", hint="give both or neither")
    if waveform is None:
        return
    if waveform.ndim != 3 or waveform.shape[1] not in _LAYOUTS or not waveform.numel():
        raise UsageError(
            "the sound cannot be written",
            measured=f"shape {tuple(waveform.shape)}; needed: b c n with 1 or 2 channels",
        )
    if sample_rate not in _AAC_RATES:
        raise UsageError(
            f"AAC cannot have a sample rate of {sample_rate} Hz",
            measured=f"it can have {', '.join(map(str, _AAC_RATES))}",
        )


def _sound_frames(waveform: torch.Tensor, sample_rate: int) -> Iterator[Any]:
    """A sound `c n` cut to the length that the encoder takes."""
    import av
    import numpy as np

    samples = waveform.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1).numpy()
    for start in range(0, samples.shape[1], _AAC_SAMPLES):
        part = np.ascontiguousarray(samples[:, start : start + _AAC_SAMPLES])
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=_LAYOUTS[len(part)])
        frame.sample_rate, frame.pts = sample_rate, start
        frame.time_base = Fraction(1, sample_rate)
        yield frame
