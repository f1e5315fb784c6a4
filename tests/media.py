"""Finished media to compare: moving pictures and sounds, and writers of the files people have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
RATE = 16_000


def moving(seed: int = 0, *, frames: int = 12, height: int = 48, width: int = 64) -> Array:
    """A clip `f h w c` uint8: waves of several colours, and a block that crosses them."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    phase, pace = draw.uniform(0, 6.28, 6), draw.uniform(0.2, 0.6, 6)
    slope, colour = draw.uniform(0.05, 0.25, (6, 2)), draw.uniform(8, 30, (6, 3))
    clip = []
    for at in range(frames):
        picture = np.full((height, width, 3), 105.0)
        for wave in range(6):
            angle = slope[wave, 0] * x + slope[wave, 1] * y + phase[wave] + pace[wave] * at
            picture += colour[wave] * np.sin(angle)[..., None]
        place = 6 + (width - 12) * at / frames
        picture[(abs(x - place) < 4) & (abs(y - height / 3) < 7)] = (210, 70, 40)
        clip.append(picture.clip(0, 255))
    return np.stack(clip).round().astype(np.uint8)


def panned(first: float, *, step: float = 1.0, frames: int = 12, seed: int = 0) -> Array:
    """A soft texture that moves to the left by `step` pixels a frame, from some place on."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).normal(0, 60, (48, 256, 3))
    texture = gaussian_filter(noise, (2, 2, 0)) * 3 + 120
    clip = []
    for at in range(frames):
        whole, part = divmod(first + at * step, 1)
        left = int(whole)
        clip.append(
            (1 - part) * texture[:, left : left + 64] + part * texture[:, left + 1 : left + 65]
        )
    return levels(np.stack(clip))


def levels(values: Array) -> Array:
    """Any numbers as levels."""
    return values.round().clip(0, 255).astype(np.uint8)


def noisy(clip: Array, sigma: float, seed: int = 1) -> Array:
    """A clip with noise of so many levels."""
    return levels(clip + np.random.default_rng(seed).normal(0, sigma, clip.shape))


def tones(seed: int = 0, *, channels: int = 2, seconds: float = 1.0) -> Array:
    """A sound `c n` of short tones, each channel its own."""
    draw = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    sound = np.zeros((channels, len(time)))
    for channel in range(channels):
        for _ in range(10):
            pitch, when = draw.uniform(100, 3000), draw.uniform(0.1, 0.9) * seconds
            envelope = np.exp(-((time - when) ** 2) / 0.01)
            sound[channel] += 0.15 * envelope * np.sin(2 * np.pi * pitch * time)
    return sound


def write_mp4(
    path: Path,
    clip: Array,
    *,
    crf: int = 12,
    fps: float = 8,
    sound: Array | None = None,
    pixels: str = "yuv420p",
    matrix: str = "",
) -> Path:
    """H.264, and AAC where there is a sound `c n`."""
    import av

    layout = "stereo" if sound is not None and len(sound) == 2 else "mono"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt, stream.options = pixels, {"crf": str(crf)}
        if matrix:
            stream.options = {"crf": str(crf), "x264-params": f"colormatrix={matrix}"}
        track = container.add_stream("aac", rate=RATE, layout=layout) if sound is not None else None
        for at, picture in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = at, 1 / stream.codec_context.framerate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None and track is not None:
            for start in range(0, sound.shape[1], 1024):
                part = np.ascontiguousarray(sound[:, start : start + 1024].astype(np.float32))
                samples = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                samples.sample_rate, samples.pts = RATE, start
                samples.time_base = Fraction(1, RATE)
                container.mux(track.encode(samples))
            container.mux(track.encode())
    return path


def write_gif(path: Path, clip: Array, *, delay_ms: int = 120) -> Path:
    from PIL import Image

    first, *others = [Image.fromarray(picture).quantize(256) for picture in clip]
    first.save(path, save_all=True, append_images=others, duration=delay_ms, loop=0)
    return path


def write_png(path: Path, picture: Array) -> Path:
    from PIL import Image

    Image.fromarray(picture).save(path)
    return path


def write_frames(folder: Path, clip: Array, *, first: int = 0) -> Path:
    """A folder of numbered pictures."""
    folder.mkdir()
    for at, picture in enumerate(clip):
        write_png(folder / f"frame_{first + at}.png", picture)
    return folder


def write_wav(path: Path, sound: Array, *, rate: int = RATE, floating: bool = False) -> Path:
    from scipy.io import wavfile

    pcm = sound.T.astype(np.float32)
    if not floating:
        pcm = (sound.T * 32767).round().clip(-32768, 32767).astype(np.int16)
    wavfile.write(path, rate, pcm)
    return path


def swapped(clip: Array) -> Array:
    """Frames 3 and 7 in each other's place."""
    changed = clip.copy()
    changed[[3, 7]] = changed[[7, 3]]
    return changed


def frozen(clip: Array) -> Array:
    """Frames 5 to 7 repeat frame 4."""
    changed = clip.copy()
    changed[5:8] = changed[4]
    return changed


def blacked(clip: Array) -> Array:
    """Frame 5 is black."""
    changed = clip.copy()
    changed[5] = 0
    return changed


def _range(clip: Array) -> Array:
    return levels(clip * (219 / 255) + 16)


def _stretched(clip: Array) -> Array:
    return levels((clip.astype(float) - 16) * 255 / 219)


PLANTED: Mapping[str, tuple[str, str, Callable[[Array], Array]]] = {
    "shift": ("frame shift", "drifted", lambda x: np.concatenate([x[1:], x[-1:]])),
    "shift back": ("frame shift", "drifted", lambda x: np.concatenate([x[:2], x[:-2]])),
    "swap": ("swapped frames", "drifted", swapped),
    "reversed": ("reversed", "drifted", lambda x: x[::-1]),
    "shuffled": (
        "other order",
        "drifted",
        lambda x: x[np.random.default_rng(3).permutation(len(x))],
    ),
    "lost": ("lost frames", "drifted", lambda x: np.delete(x, 5, 0)),
    "added": ("added frames", "drifted", lambda x: np.insert(x, 5, x[4], 0)),
    "frozen": ("repeated frames", "drifted", frozen),
    "black": ("black frames", "invalid", blacked),
    "all black": ("black frames", "invalid", lambda x: x * 0),
    "grey": ("uniform frames", "invalid", lambda x: x * 0 + np.uint8(128)),
    "bgr": ("channel order", "drifted", lambda x: x[..., ::-1]),
    "mirrored": ("flipped", "drifted", lambda x: x[:, :, ::-1]),
    "upside down": ("flipped", "drifted", lambda x: x[:, ::-1]),
    "half turn": ("turned", "drifted", lambda x: x[:, ::-1, ::-1]),
    "quarter turn": ("turned", "drifted", lambda x: np.rot90(x, 1, (1, 2))),
    "limited": ("colour range", "drifted", _range),
    "full": ("colour range", "drifted", _stretched),
    "gain": ("brightness", "inconclusive", lambda x: levels(x * 0.9)),
    "offset": ("brightness", "inconclusive", lambda x: levels(x + 12.0)),
    "gamma": ("gamma", "inconclusive", lambda x: levels(255 * (x / 255) ** 1.25)),
    "tint": ("gain per channel", "inconclusive", lambda x: levels(x * [1.0, 0.85, 1.1])),
}
"""Name to the kind of finding, the verdict it makes, and what makes it of a clip."""
