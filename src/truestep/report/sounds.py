"""A sound of a result as an outline to draw, from the WAV that is in it."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import wave

from truestep.records import Sound

COLUMNS, HEIGHT = 320, 48
"""Units of the drawing."""

PLAYED = 8_000_000
"""Characters of a sound that a page holds to be played: half a minute of 48 kHz in stereo."""


def outlines(sound: Sound) -> dict[str, str]:
    """Of candidate, reference and difference, an SVG path; empty for what cannot be read.

    Candidate and reference have one scale: the louder of the two fills the height.
    """
    own, theirs, apart = (
        _envelope(uri) for uri in (sound.actual, sound.reference, sound.difference)
    )
    loudest = max(
        (abs(value) for side in (own, theirs) for pair in side for value in pair), default=0
    )
    alone = max((abs(value) for pair in apart for value in pair), default=0)
    return {
        "candidate": _path(own, loudest),
        "reference": _path(theirs, loudest),
        "difference": _path(apart, alone),
    }


def _envelope(uri: str) -> list[tuple[int, int]]:
    """Lowest and highest sample of any channel, a column each."""
    import numpy as np

    if not uri:
        return []
    try:
        with wave.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True))) as file:
            channels, width = file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError, binascii.Error, struct.error):
        return []
    if width != 2 or not channels or len(data) < 2 * channels:
        return []
    samples = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], "<i2")
    low = samples.reshape(-1, channels).min(1)
    high = samples.reshape(-1, channels).max(1)
    edges = np.linspace(0, len(low), min(COLUMNS, len(low)) + 1).astype(int)[:-1]
    lows, highs = np.minimum.reduceat(low, edges), np.maximum.reduceat(high, edges)
    return [(int(a), int(b)) for a, b in zip(lows, highs, strict=True)]


def _path(columns: list[tuple[int, int]], loudest: int) -> str:
    if not columns:
        return ""
    middle, scale = HEIGHT / 2, (HEIGHT / 2 - 1) / (loudest or 1)
    step = COLUMNS / len(columns)
    above = [
        f"{at * step:.5g} {middle - high * scale - 0.25:.4g}"
        for at, (_, high) in enumerate(columns)
    ]
    below = [
        f"{at * step:.5g} {middle - low * scale + 0.25:.4g}" for at, (low, _) in enumerate(columns)
    ]
    return "M" + "L".join([*above, *reversed(below)]) + "z"
