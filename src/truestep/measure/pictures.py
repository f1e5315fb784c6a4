"""Frames as small lossless pictures: PNG by a few lines of zlib, so that no package is needed."""

from __future__ import annotations

import struct
import zlib

import torch

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST = 4096
"""Sides of a picture that is read at most."""


def png(rgb: bytes, *, width: int, height: int, level: int = 3) -> bytes:
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
        SIGNATURE
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, level))
        + chunk(b"IEND", b"")
    )


def pixels(data: bytes) -> torch.Tensor:
    """Read what `png` wrote, as `h w 3` uint8; hostile data is refused before it takes memory.

    Raises:
        ValueError: It is no such picture.
    """
    if data[:8] != SIGNATURE or len(data) < 57 or data[12:16] != b"IHDR":
        raise ValueError("no PNG")
    width, height, depth, colour, packing, filters, interlaced = struct.unpack(
        ">IIBBBBB", data[16:29]
    )
    if (depth, colour, packing, filters, interlaced) != (8, 2, 0, 0, 0):
        raise ValueError("another kind of PNG")
    if not (0 < width <= LARGEST and 0 < height <= LARGEST):
        raise ValueError(f"a PNG of {width} x {height}")
    (length,) = struct.unpack(">I", data[33:37])
    if data[37:41] != b"IDAT" or 41 + length > len(data):
        raise ValueError("a PNG in another layout")
    size = height * (3 * width + 1)
    reader = zlib.decompressobj()
    try:
        rows = reader.decompress(data[41 : 41 + length], size)
    except zlib.error as error:
        raise ValueError(f"a damaged PNG: {error}") from None
    if len(rows) != size:
        raise ValueError("a PNG with another number of pixels")
    table = torch.frombuffer(bytearray(rows), dtype=torch.uint8).reshape(height, 3 * width + 1)
    if bool(table[:, 0].any()):
        raise ValueError("a PNG with filters")
    return table[:, 1:].reshape(height, width, 3).clone()


def reduced(frames: torch.Tensor, factor: int) -> torch.Tensor:
    """Frames `f h w 3` uint8 with each side a whole number of times smaller: means of pixels."""
    if factor <= 1:
        return frames
    planes = frames.permute(0, 3, 1, 2).float()
    means = torch.nn.functional.avg_pool2d(planes, factor, ceil_mode=True)
    return means.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
