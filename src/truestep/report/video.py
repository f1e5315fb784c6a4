"""Write decoded frames as an mp4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from truestep.errors import MissingExtraError
from truestep.files import replacing

if TYPE_CHECKING:
    import torch

_SMALL = 256
"""Frames with both sides below this many pixels are enlarged by a whole factor, unfiltered."""


def write_video(path: str | Path, frames: torch.Tensor, *, fps: int) -> None:
    """Write frames as H.264 in yuv420p, atomically.

    Args:
        path: An .mp4 file.
        frames: `b c f h w` in [-1, 1] with 3 channels; the first sample is written. Values that are
            not finite become black.
        fps: Frames a second.

    Raises:
        MissingExtraError: PyAV is not installed.
        WriteError: The file could not be written.
    """
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "media", "writing a video") from None
    import torch

    pixels = ((frames[0].float().nan_to_num(-1.0) + 1) * 127.5).round().clamp(0, 255)
    pixels = pixels.to(torch.uint8).permute(1, 2, 3, 0)
    scale = max(1, _SMALL // max(pixels.shape[1:3]))
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    height, width = (int(n) // 2 * 2 for n in pixels.shape[1:3])
    with replacing(path, "the video") as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12"}
        for image in pixels[:, :height, :width].contiguous().numpy():
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
