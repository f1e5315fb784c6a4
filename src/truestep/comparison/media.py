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

_LARGEST_GAIN = 2**24
"""One rounding step of float32 below 1, half of 2^-24, then shows at half brightness."""


def frame_media(
    actual: torch.Tensor, reference: torch.Tensor, *, name: str, limit: int = 9
) -> Media:
    """Pick frames of two videos and show them beside their amplified difference.

    Args:
        actual, reference: Frames `b c f h w` in [-1, 1], 3 channels; the first sample is shown.
        name: Tensor name.
        limit: Most frames shown, evenly spaced, the first and last among them; of two equal
            videos at most three.

    Returns:
        PNG data URIs. Differences are absolute, multiplied by `gain`: the largest power of two
        (from 1 on) at which the largest finite difference is not clipped, taken before rounding.

    Raises:
        ValueError: The shapes differ or are not those of a video, or `limit` is below 1.
    """
    shape = actual.shape
    if shape != reference.shape or len(shape) != 5 or shape[1] != 3 or not actual.numel():
        raise ValueError(f"not two videos: {tuple(actual.shape)} and {tuple(reference.shape)}")
    if limit < 1:
        raise ValueError(f"limit is {limit}: at least one frame is shown")
    actual, reference = actual[:1].detach().cpu(), reference[:1].detach().cpu()
    total = shape[2]
    same = actual.dtype == reference.dtype and torch.equal(actual, reference)
    count = min(limit, total, 3) if same else min(limit, total)
    indices = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
    theirs = reference[0][:, indices].float()
    own = theirs if same else actual[0][:, indices].float()
    difference = (own - theirs).abs() / 2
    finite = difference[torch.isfinite(difference)]
    largest = float(finite.max()) if finite.numel() else 0.0
    gain = 1.0
    if 0 < largest < 1:
        gain = float(min(2 ** math.floor(math.log2(1 / largest)), _LARGEST_GAIN))
    reference_uris = _uris((theirs + 1) / 2)
    actual_uris = reference_uris if same else _uris((own + 1) / 2)
    difference_uris = _uris(difference[:, :1]) * count if same else _uris(difference * gain)
    frames = tuple(
        FrameTriple(
            index=frame,
            actual=actual_uris[i],
            reference=reference_uris[i],
            difference=difference_uris[i],
        )
        for i, frame in enumerate(indices)
    )
    height, width = actual.shape[3:]
    return Media(name=name, width=int(width), height=int(height), gain=gain, frames=frames)


def _uris(images: torch.Tensor) -> list[str]:
    """Images `3 n h w` in [0, 1] as PNG data URIs; pixels that are not finite are magenta."""
    bad = ~torch.isfinite(images).all(dim=0)
    pixels = (images.nan_to_num(0.0) * 255).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels.permute(1, 2, 3, 0).contiguous()
    pixels[bad] = torch.tensor(MAGENTA, dtype=torch.uint8)
    height, width = pixels.shape[1:3]
    return [
        "data:image/png;base64,"
        + base64.b64encode(png(image.tobytes(), width=width, height=height)).decode()
        for image in pixels.numpy()
    ]


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
        + chunk(b"IDAT", zlib.compress(rows, 3))
        + chunk(b"IEND", b"")
    )
