"""Which plain change makes one sound of another: gain, polarity, offset, channels. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from truestep.measure.aligning import explains

_LEAST_DB = 0.1
"""Gain below which nothing is told: encoders change levels by a few hundredths."""

_LONGEST_S = 2.0
"""Seconds, most, that an offset is looked for within."""

SILENT = 2.0**-15
"""Peak below which a sound of 16 bits is silent: half of the smallest step."""

HEARD = 16 * SILENT
"""Peak from which on a sound is none beside one that is silent."""


@dataclass(frozen=True)
class Hearing:
    """What was done to the actual side of two sounds.

    Attributes:
        gain: Factor, negative where the polarity is turned.
        offset: Samples by which it comes later than the reference.
        swapped: Left is right.
        before, after: Root mean squares of the difference, without all this and with it, over that
            of the reference.
    """

    gain: float
    offset: int
    swapped: bool
    before: float
    after: float

    def words(self, sample_rate: int) -> dict[str, str]:
        """Kind and sentence of each change that there is."""
        told = {}
        if self.swapped:
            told["channels swapped"] = "its left channel is the reference's right one"
        if self.gain < 0:
            told["polarity"] = "its polarity is turned: it is the reference times -1"
        level = 20 * math.log10(abs(self.gain))
        if abs(level) >= _LEAST_DB:
            word = "louder" if level > 0 else "quieter"
            told["sound gain"] = f"its sound is {abs(level):.3g} dB {word} (x {abs(self.gain):.3g})"
        if self.offset:
            when = "later" if self.offset > 0 else "earlier"
            count = abs(self.offset)
            told["sound offset"] = (
                f"its sound comes {count:,} sample{'s' * (count > 1)} {when} "
                f"({count / sample_rate * 1000:.3g} ms)"
            )
        return told


def hearing(actual: torch.Tensor, reference: torch.Tensor, *, sample_rate: int) -> Hearing | None:
    """The simplest change that explains the difference; None where none does.

    The changes are a gain, a turned polarity, an offset and swapped channels, one alone or all
    together. What is left must be a quarter of the mean square, and a tenth of the reference's own.

    Args:
        actual, reference: `c n` floating-point, finite, as many channels; n may differ.
        sample_rate: Hz.
    """
    a, r = (side.detach().double() for side in (actual, reference))
    length = min(a.shape[1], r.shape[1])
    power = float(r[:, :length].square().mean()) if length else 0.0
    if not power or not bool(a.any()):
        return None
    before = float((a[:, :length] - r[:, :length]).square().mean())
    best: Hearing | None = None
    orders = [False, True] if len(r) == 2 and not torch.equal(r[0], r[1]) else [False]
    for lag in dict.fromkeys((0, *(_lag(a, r, swapped, sample_rate) for swapped in orders))):
        for swapped in orders:
            tried = _tried(a, r.flip(0) if swapped else r, lag)
            if tried is None:
                continue
            gain, after = tried
            if not explains(before, after, power) or gain == 0.0:
                continue
            if best is None or 2 * after < best.after**2 * power:
                left = math.sqrt(after / power)
                best = Hearing(gain, lag, swapped, math.sqrt(before / power), left)
    return best if best is not None and best.words(sample_rate) else None


def _tried(actual: torch.Tensor, reference: torch.Tensor, lag: int) -> tuple[float, float] | None:
    """The best gain at an offset, and the mean square that is left; None without an overlap."""
    a = actual[:, max(lag, 0) :]
    r = reference[:, max(-lag, 0) :]
    length = min(a.shape[1], r.shape[1])
    if length < reference.shape[1] // 2:
        return None
    a, r = a[:, :length], r[:, :length]
    power = float(r.square().mean())
    if not power:
        return None
    gain = float((a * r).mean()) / power
    return gain, float((a - gain * r).square().mean())


def _lag(actual: torch.Tensor, reference: torch.Tensor, swapped: bool, sample_rate: int) -> int:
    """The offset at which the two correlate most, either way up."""
    r = reference.flip(0) if swapped else reference
    size = actual.shape[1] + r.shape[1]
    spectra = torch.fft.rfft(actual, size) * torch.fft.rfft(r, size).conj()
    correlation = torch.fft.irfft(spectra.sum(0), size).abs()
    most = min(int(_LONGEST_S * sample_rate), size // 4)
    near = torch.cat([correlation[-most:], correlation[: most + 1]]) if most else correlation[:1]
    return int(near.argmax()) - most
