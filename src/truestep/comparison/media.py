"""Frames to look at: both sides and their difference as lossless PNG. Pure: no I/O.

The encoder is a few lines of zlib, so that a report needs no optional package.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib

import torch

from truestep.verdict import FrameTriple, Media

MAGENTA = (255, 0, 255)
"""Colour of pixels that are not finite."""

_LARGEST_GAIN = 2**20


def frame_media(
    actual: torch.Tensor, reference: torch.Tensor, *, name: str, limit: int = 9
) -> Media:
    """Pick frames of two videos and show them beside their amplified difference.

    Args:
        actual, reference: Frames `b c f h w` in [-1, 1], 3 channels; the first sample is shown.
        name: Tensor name.
        limit: Most frames shown; they are evenly spaced, the first and last among them.

    Returns:
        PNG data URIs. Differences are absolute, multiplied by `gain`: the largest power of two
        (from 1 on) at which the largest finite difference is not clipped, taken before rounding.

    Raises:
        ValueError: The shapes differ or are not those of a video.
    """
    if actual.shape != reference.shape or actual.ndim != 5 or actual.shape[1] != 3:
        raise ValueError(f"not two videos: {tuple(actual.shape)} and {tuple(reference.shape)}")
    total = actual.shape[2]
    count = min(limit, total)
    indices = sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(count)})
    own, theirs = (t[0][:, indices].detach().float() for t in (actual, reference))
    difference = (own - theirs).abs() / 2
    finite = difference[torch.isfinite(difference)]
    largest = float(finite.max()) if finite.numel() else 0.0
    gain = 1.0
    if 0 < largest < 1:
        gain = float(min(2 ** math.floor(math.log2(1 / largest)), _LARGEST_GAIN))
    frames = tuple(
        FrameTriple(
            index=frame,
            actual=_uri((own[:, i] + 1) / 2),
            reference=_uri((theirs[:, i] + 1) / 2),
            difference=_uri(difference[:, i] * gain),
        )
        for i, frame in enumerate(indices)
    )
    height, width = actual.shape[3:]
    return Media(name=name, width=int(width), height=int(height), gain=gain, frames=frames)


def _uri(image: torch.Tensor) -> str:
    """A `3 h w` image in [0, 1] as a PNG data URI; pixels that are not finite are magenta."""
    bad = ~torch.isfinite(image).all(dim=0)
    pixels = (image.nan_to_num(0.0) * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.permute(1, 2, 0).contiguous()
    pixels[bad] = torch.tensor(MAGENTA, dtype=torch.uint8)
    data = png(pixels.numpy().tobytes(), width=pixels.shape[1], height=pixels.shape[0])
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(rgb: bytes, *, width: int, height: int) -> bytes:
    """Encode 8-bit RGB rows as PNG.

    Source:
        PNG specification, third edition, sections 5 (chunks) and 9 (filter type 0).
    """

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    stride = 3 * width
    rows = b"".join(b"\0" + rgb[y * stride : (y + 1) * stride] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 6))
        + chunk(b"IEND", b"")
    )
