"""Frames and sound of both sides, to look at and to hear: lossless PNG and WAV. Pure: no I/O.

The encoders are a few lines of zlib and struct, so that a report needs no optional package.
"""

from __future__ import annotations

import base64
import math
import struct

import torch

from truestep.measure.pictures import png
from truestep.measure.sound import FLOOR_DB, spectrogram_db, waveform_metrics
from truestep.verdict import FrameTriple, Media, Sound

MAGENTA = (255, 0, 255)
"""Colour of pixels that are not finite."""

_PICTURE = (256, 640)
"""Most rows and columns of a spectrogram's picture."""

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
    reference_uris = uris((theirs + 1) / 2)
    actual_uris = reference_uris if same else uris((own + 1) / 2)
    difference_uris = uris(difference[:, :1]) * count if same else uris(difference * gain)
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


def sound_media(
    actual: torch.Tensor,
    reference: torch.Tensor,
    *,
    name: str,
    sample_rate: int,
    limit_s: float = 30.0,
) -> Media:
    """Two sounds to hear, and their spectrograms beside the difference of these.

    Args:
        actual, reference: Waveforms `b c n` in [-1, 1]; the first sample is played and shown. They
            may differ in shape: in a picture the shorter one goes on as silence.
        name: Tensor name.
        sample_rate: Hz, of both.
        limit_s: Longest part that is played and shown, from the start. All of it is measured.

    Returns:
        Metrics, 16-bit WAV and PNG data URIs. Sounds are as loud as they are; what is beyond full
        scale is cut off, and what is not finite is silent. Their difference is made louder by the
        largest power of two at which it is not cut off. Pictures have time to the right,
        frequency from 0 upwards to half the sample rate, and the loudest channel: black is
        `FLOOR_DB`, white is 0 dB. In that of the difference (the largest of any channel) white is
        `difference_db`.

    Raises:
        ValueError: A side is not a waveform, or nothing of it would be played.
    """
    metrics = waveform_metrics(actual, reference, sample_rate=sample_rate)
    length = min(max(actual.shape[-1], reference.shape[-1]), int(limit_s * sample_rate))
    if length < 1:
        raise ValueError(f"limit_s is {limit_s:g}: at least one sample is played")
    own, theirs = (side[0, :, :length].detach().cpu().float() for side in (actual, reference))
    pictures = [spectrogram_db(_lengthened(side, length)) for side in (own, theirs)]
    loudest = [picture.amax(0) for picture in pictures]
    channels = len(own) == len(theirs)
    heard, loud = _heard(own, theirs, sample_rate)
    ours, others = pictures if channels else (side[None] for side in loudest)
    difference = (ours - others).abs().amax(0)
    finite = difference[torch.isfinite(difference)]
    largest = float(finite.max()) if finite.numel() else 0.0
    images = [1 - side / FLOOR_DB for side in loudest] + [difference / (largest or 1.0)]
    shown = [uris(_picture(image))[0] for image in images]
    sound = Sound(
        sample_rate=sample_rate,
        metrics=metrics,
        actual=_wav_uri(own, sample_rate),
        reference=_wav_uri(theirs, sample_rate),
        difference=heard,
        difference_gain=loud,
        seconds_shown=length / sample_rate,
        spectrograms=FrameTriple(index=0, actual=shown[0], reference=shown[1], difference=shown[2]),
        difference_db=largest,
    )
    height, width = _picture(difference).shape[-2:]
    return Media(name=name, width=width, height=height, gain=1.0, frames=(), sound=sound)


def _heard(own: torch.Tensor, theirs: torch.Tensor, sample_rate: int) -> tuple[str, float]:
    """The difference of two sounds `c n` to hear, and how many times as loud as it is."""
    if own.shape != theirs.shape:
        return "", 1.0
    difference = (own - theirs).nan_to_num(0.0, 0.0, 0.0)
    largest = float(difference.abs().max())
    if not largest:
        return "", 1.0
    gain = (
        float(min(2 ** math.floor(math.log2(1 / largest)), _LARGEST_GAIN)) if largest < 1 else 1.0
    )
    return _wav_uri(difference * gain, sample_rate), gain


def _lengthened(waveform: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(waveform, (0, length - waveform.shape[-1]))


def _picture(image: torch.Tensor) -> torch.Tensor:
    """A spectrogram `k t` as an image `3 1 h w`, low frequencies below, its largest values kept."""
    height, width = min(image.shape[0], _PICTURE[0]), min(image.shape[1], _PICTURE[1])
    pooled = torch.nn.functional.adaptive_max_pool2d(image[None], (height, width))
    return pooled.flip(1).expand(3, 1, height, width)


def _wav_uri(waveform: torch.Tensor, sample_rate: int) -> str:
    """A sound `c n` as a WAV data URI."""
    pcm = (waveform.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1) * 32767).round().to(torch.int16)
    data = wav(pcm.T.contiguous().numpy().astype("<i2").tobytes(), len(pcm), sample_rate)
    return "data:audio/wav;base64," + base64.b64encode(data).decode()


def wav(pcm: bytes, channels: int, sample_rate: int) -> bytes:
    """Encode interleaved 16-bit samples, little-endian, as WAV.

    Source:
        Multimedia Programming Interface and Data Specifications 1.0, 1991, "Waveform Audio File
        Format": format 1 (PCM).
    """
    frame = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, sample_rate, frame * sample_rate, frame, 16)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", len(pcm)) + pcm
    return b"RIFF" + struct.pack("<I", len(body)) + body


def uris(images: torch.Tensor) -> list[str]:
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
