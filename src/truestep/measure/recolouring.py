"""Which plain change of all pixels makes one video of another: colours, range, gamma, flips. Pure.

Each change is done to the reference, as whatever wrote or read a file would have done it, cut off
at 0 and 255. One is believed only where it explains the difference (`aligning.explains`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from truestep.measure.aligning import explains

Change = Callable[[torch.Tensor], torch.Tensor]

_SIMPLER = 1.5
"""A simpler change is preferred where it leaves at most this many times the mean square."""

_PIXELS = 2**18
"""Pixels of each side that a fit is made of."""

_INSIDE = (4.0, 251.0)
"""Levels between which a pixel was not cut off, and fits are made of."""

_LEAST_GAIN, _LEAST_OFFSET = 0.005, 0.75
"""What a rounding, a cast that cuts, or an encoder moves the levels by is no finding: half a level,
and half a level of 255 (0.002)."""

LUMA = {"BT.601": (0.299, 0.114), "BT.709": (0.2126, 0.0722)}
"""Shares of red and blue. ITU-R BT.601-7, 2.5.1; BT.709-6, 3.2."""

_ORDERS = {"BGR": (2, 1, 0), "GRB": (1, 0, 2), "RBG": (0, 2, 1), "GBR": (1, 2, 0), "BRG": (2, 0, 1)}


@dataclass(frozen=True)
class Recolouring:
    """A change of all pixels.

    Attributes:
        kind: `flipped`, `turned`, `channel order`, `colour range`, `colour matrix`, `gamma`,
            `brightness` or `gain per channel`.
        text: What was done to the actual side, with its numbers.
        change: Makes of frames `n c h w` of the reference (float32, levels) those of the actual.
        exact: It has no numbers that were fitted: no rounding and no other run looks like it.
        value: The number of a fit: a gain, a gamma; None where there is none, or several.
        before, after: Mean squares, without it and with it.
    """

    kind: str
    text: str
    change: Change
    exact: bool
    value: float | None = None
    before: float = 0.0
    after: float = 0.0


def recolouring(actual: torch.Tensor, reference: torch.Tensor) -> Recolouring | None:
    """The simplest change that explains the difference; None where none does.

    Args:
        actual, reference: Pairs of frames `n c h w` float32 in [0, 255]; a turned video has its
            sides exchanged.
    """
    same = actual.shape == reference.shape
    before = _square(actual, reference) if same else math.inf
    if not before:
        return None
    variance = float(reference.flatten(2).var(2, correction=0).mean())
    tried = []
    for candidate in _candidates(actual, reference, same=same):
        changed = candidate.change(reference)
        if changed.shape != actual.shape:
            continue
        after = _square(actual, changed)
        if explains(before if same else variance * 2, after, variance):
            tried.append(replace(candidate, before=before, after=after))
    least = min((item.after for item in tried), default=0.0)
    return next((item for item in tried if item.after <= _SIMPLER * least), None)


def _square(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return float((actual - reference).square().mean(dtype=torch.float64))


def _candidates(
    actual: torch.Tensor, reference: torch.Tensor, *, same: bool
) -> Iterator[Recolouring]:
    """Changes to try, the simplest first."""
    yield from _geometry()
    if not same:
        return
    for name, order in _ORDERS.items():
        yield Recolouring(
            "channel order", f"its channels are in the order {name}", partial(_ordered, order), True
        )
    yield from _ranges()
    yield from _matrices()
    yield from _fits(actual, reference)


def _geometry() -> Iterator[Recolouring]:
    turns: Sequence[tuple[str, str, Change]] = (
        ("flipped", "left and right are exchanged", lambda x: x.flip(3)),
        ("flipped", "top and bottom are exchanged", lambda x: x.flip(2)),
        ("turned", "it is turned by 180 degrees", lambda x: x.flip(2, 3)),
        ("turned", "rows and columns are exchanged", lambda x: x.transpose(2, 3)),
        ("turned", "it is turned to the left by 90 degrees", lambda x: x.rot90(1, (2, 3))),
        ("turned", "it is turned to the right by 90 degrees", lambda x: x.rot90(-1, (2, 3))),
        (
            "turned",
            "rows and columns are exchanged from the other corner",
            lambda x: x.transpose(2, 3).flip(2, 3),
        ),
    )
    for kind, text, change in turns:
        yield Recolouring(kind, text, change, True)


def _ordered(order: Sequence[int], frames: torch.Tensor) -> torch.Tensor:
    return frames[:, list(order)]


def _scaled(gain: float, offset: float, frames: torch.Tensor) -> torch.Tensor:
    return (frames * gain + offset).clamp(0, 255)


def _ranges() -> Iterator[Recolouring]:
    """Full range kept as limited (16 to 235) and read as it is, or the other way round, in RGB and
    in Y'CbCr. ITU-R BT.709-6, 4.2: 219 steps of luma, 224 of colour differences."""
    small = "its levels are squeezed: 0 to 255 are 16 to 235 (limited range shown as full)"
    large = "its levels are stretched: 16 to 235 are 0 to 255 (full range shown as limited)"
    yield Recolouring("colour range", small, partial(_scaled, 219 / 255, 16.0), True)
    yield Recolouring("colour range", large, partial(_scaled, 255 / 219, -16 * 255 / 219), True)
    for name in LUMA:
        squeezed = partial(_through, name, name, (219 / 255, 16.0, 224 / 255))
        yield Recolouring("colour range", small, squeezed, True)
        stretched = partial(_through, name, name, (255 / 219, -16 * 255 / 219, 255 / 224))
        yield Recolouring("colour range", large, stretched, True)


def _matrices() -> Iterator[Recolouring]:
    for written, read in (("BT.601", "BT.709"), ("BT.709", "BT.601")):
        text = f"its colours are those of {written} read as {read}"
        change = partial(_through, written, read, (1.0, 0.0, 1.0))
        yield Recolouring("colour matrix", text, change, True)


def _through(
    written: str, read: str, scale: tuple[float, float, float], frames: torch.Tensor
) -> torch.Tensor:
    """RGB to Y'CbCr by one matrix, scaled, and back by another; all in levels, Cb and Cr about 0.

    Args:
        scale: Gain and offset of luma, gain of both colour differences.
    """
    gain, offset, colour = scale
    red, blue = LUMA[written]
    r, g, b = frames.unbind(1)
    luma = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - luma) / (2 - 2 * blue) * colour, (r - luma) / (2 - 2 * red) * colour
    luma = luma * gain + offset
    red, blue = LUMA[read]
    r, b = luma + (2 - 2 * red) * cr, luma + (2 - 2 * blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return torch.stack([r, g, b], 1).clamp(0, 255)


def _fits(actual: torch.Tensor, reference: torch.Tensor) -> Iterator[Recolouring]:
    """Changes with numbers, by least squares over pixels that were not cut off."""
    a, r = (side.movedim(1, 0).flatten(1) for side in (actual, reference))
    if a.shape[1] > _PIXELS:
        chosen = torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(0))[:_PIXELS]
        a, r = a[:, chosen], r[:, chosen]
    gain, offset = _line(a.flatten(), r.flatten())
    if abs(gain - 1) >= _LEAST_GAIN or abs(offset) >= _LEAST_OFFSET:
        parts = [f"a gain of {gain:.3g}"] * (abs(gain - 1) >= _LEAST_GAIN)
        parts += [f"{offset:+.3g} levels"] * (abs(offset) >= _LEAST_OFFSET)
        change = partial(_scaled, gain, offset)
        text = f"its brightness has {' and '.join(parts)}"
        yield Recolouring("brightness", text, change, False, value=gain)
    power = _power(a.flatten(), r.flatten())
    if power is not None and abs(power - 1) >= 0.01:
        text = f"its levels have a gamma of {power:.3g}"
        yield Recolouring("gamma", text, partial(_raised, power), False, value=power)
    lines = [_line(own, other) for own, other in zip(a, r, strict=True)]
    if any(abs(g - 1) >= _LEAST_GAIN or abs(o) >= _LEAST_OFFSET for g, o in lines):
        words = zip(("red", "green", "blue"), lines, strict=True)
        shown = ", ".join(f"{name} {g:.3g} x {o:+.3g}" for name, (g, o) in words)
        change = partial(_by_channel, tuple(lines))
        text = f"each channel has a gain and levels added: {shown}"
        yield Recolouring("gain per channel", text, change, False)


def _inside(actual: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    low, high = _INSIDE
    return (actual > low) & (actual < high) & (reference > low) & (reference < high)


def _line(actual: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Gain and offset; those of no change where nothing can be fitted."""
    inside = _inside(actual, reference)
    a, r = actual[inside].double(), reference[inside].double()
    if len(r) < 16:
        return 1.0, 0.0
    centred = r - r.mean()
    spread = float((centred * centred).sum())
    if not spread:
        return 1.0, float(a.mean() - r.mean())
    gain = float((centred * a).sum()) / spread
    return gain, float(a.mean() - gain * r.mean())


def _power(actual: torch.Tensor, reference: torch.Tensor) -> float | None:
    """The exponent between two sides in [0, 1], by a line through the origin of their logarithms,
    each pixel with the weight that makes it least squares of levels at first order."""
    inside = _inside(actual, reference)
    a, r = actual[inside].double() / 255, reference[inside].double() / 255
    if len(r) < 16:
        return None
    weights = (a * r.log()).square()
    total = float(weights.sum())
    return float((weights * a.log() / r.log()).sum()) / total if total else None


def _raised(power: float, frames: torch.Tensor) -> torch.Tensor:
    return (frames / 255).clamp(0, 1) ** power * 255


def _by_channel(lines: Sequence[tuple[float, float]], frames: torch.Tensor) -> torch.Tensor:
    gains, offsets = (torch.tensor(n, dtype=torch.float32) for n in zip(*lines, strict=True))
    return (frames * gains[:, None, None] + offsets[:, None, None]).clamp(0, 255)
