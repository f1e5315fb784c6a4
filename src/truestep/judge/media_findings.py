"""What two decoded clips show beside a distance: findings, each proven or a plain fact. No I/O.

A plain fact is a size, a rate, a black frame. Anything else is told only where the same thing done
to the reference explains the difference (`measure.aligning.explains`); where it does not, nothing
is told of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from truestep.measure.aligning import (
    BETWEEN,
    Order,
    between,
    emptied,
    explains,
    order_of,
    reduced,
    squares,
    steps,
    straight,
    uniform,
)
from truestep.measure.frames import psnr_of_levels, ssim_frame
from truestep.measure.recolouring import Recolouring, recolouring
from truestep.progress import Progress, silent
from truestep.recording.clips import Clip
from truestep.records import FrameScore, MediaFinding
from truestep.text import spans

_SAMPLED = 8
"""Pairs of frames, evenly spaced, that a recolouring is looked for in, and then proven on all."""

_BLACK = 24.0
"""Mean level up to which a uniform frame is called black: 16 is black in limited range."""

_RATE = 0.01
"""Share by which frame rates may differ: 23.976 is 24."""

_GIF_S = 0.0051
"""Half of the step that GIF keeps delays in, and what a float rounds."""


@dataclass(frozen=True)
class Frames:
    """What was found out about the frames of two clips.

    Attributes:
        findings: In the order in which they were found.
        scores: Of each pair of frames of one number; none where sizes differ.
    """

    findings: tuple[MediaFinding, ...] = ()
    scores: tuple[FrameScore, ...] = ()


def facts(actual: Clip, reference: Clip) -> Iterator[MediaFinding]:
    """What differs and can be read off: streams, sizes, counts, rates, durations, damage."""
    for side, clip in (("actual", actual), ("reference", reference)):
        if clip.broken:
            text = f"the {side} side is damaged: {clip.broken}"
            yield MediaFinding(kind="damaged", text=text, effect="invalid")
    yield from _streams(actual, reference)
    if actual.frames is not None and reference.frames is not None:
        yield from _sizes(actual, reference)
    if actual.sound is not None and reference.sound is not None:
        yield from _lengths(actual, reference)
    for own, other in (
        (actual.colour_range, reference.colour_range),
        (actual.colour_matrix, reference.colour_matrix),
    ):
        if own and other and own != other:
            text = f"its colours are marked {own}, the reference's {other}"
            yield MediaFinding(
                kind="colour marks", modality="video", text=text, effect="inconclusive"
            )


def _streams(actual: Clip, reference: Clip) -> Iterator[MediaFinding]:
    pairs = (
        ("video", "frames", actual.frames, reference.frames),
        ("audio", "sound", actual.sound, reference.sound),
    )
    for modality, word, own, other in pairs:
        if (own is None) is not (other is None):
            side = "actual" if own is None else "reference"
            yield MediaFinding(
                kind=f"no {word}",
                modality=modality,
                text=f"the {side} side has no {word}",
                effect="incomparable",
            )


def _sizes(actual: Clip, reference: Clip) -> Iterator[MediaFinding]:
    assert actual.frames is not None
    assert reference.frames is not None
    own, other = tuple(actual.frames.shape[1:3]), tuple(reference.frames.shape[1:3])
    if own != other:
        text = f"its frames are {own[1]}x{own[0]}, the reference's {other[1]}x{other[0]}"
        yield MediaFinding(kind="other size", modality="video", text=text, effect="incomparable")
    if actual.count != reference.count:
        text = f"it has {counted(actual.count, 'frame')}, the reference {reference.count}"
        yield MediaFinding(
            kind="other number of frames",
            modality="video",
            text=text,
            effect="incomparable",
            value=actual.count - reference.count,
            unit="frames",
        )
    if actual.fps and reference.fps and not _same_rate(actual, reference):
        text = f"it has {actual.fps:.5g} frames a second, the reference {reference.fps:.5g}"
        if actual.seconds and reference.seconds:
            text += f" ({actual.seconds:.3g} s against {reference.seconds:.3g} s)"
        yield MediaFinding(
            kind="other frame rate",
            modality="video",
            text=text,
            effect="incomparable",
            value=actual.fps - reference.fps,
            unit="1/s",
        )


def _same_rate(actual: Clip, reference: Clip) -> bool:
    own, other = actual.fps or 1.0, reference.fps or 1.0
    if any(clip.form.startswith("GIF") for clip in (actual, reference)):
        return abs(1 / own - 1 / other) <= _GIF_S
    return abs(own - other) <= _RATE * other


def _lengths(actual: Clip, reference: Clip) -> Iterator[MediaFinding]:
    assert actual.sound is not None
    assert reference.sound is not None
    rates = actual.sample_rate or 0, reference.sample_rate or 0
    if rates[0] != rates[1]:
        text = f"its sound has {rates[0]:,} Hz, the reference's {rates[1]:,}"
        if torch.equal(actual.sound, reference.sound):
            text += ", and the samples are the same: one rate is stated wrong"
        yield MediaFinding(
            kind="other sample rate",
            modality="audio",
            text=text,
            effect="incomparable",
            value=rates[0] - rates[1],
            unit="Hz",
        )
    lengths = zip(actual.sound.shape, reference.sound.shape, strict=True)
    kinds = (("other channels", "channel"), ("other length of sound", "sample"))
    for (kind, unit), (own, other) in zip(kinds, lengths, strict=True):
        if own != other:
            yield MediaFinding(
                kind=kind,
                modality="audio",
                text=f"its sound has {counted(own, unit)}, the reference's {other:,}",
                effect="incomparable",
                value=own - other,
                unit=f"{unit}s",
            )


def counted(number: int, word: str) -> str:
    """`1 frame`, `2 frames`."""
    return f"{number:,} {word}{'s' * (number != 1)}"


# --- frames --------------------------------------------------------------------------------------


def frames_of(actual: Clip, reference: Clip, progress: Progress = silent) -> Frames:
    """Score every pair of frames, and look for what explains their difference."""
    a, r = actual.frames, reference.frames
    if a is None or r is None:
        return Frames()
    same_size = a.shape[1:] == r.shape[1:]
    scores = tuple(_scores(a, r, progress)) if same_size else ()
    if same_size and len(a) == len(r) and not any(score.rms for score in scores):
        return Frames((), scores)
    empty, bare = _emptied(a, r)
    findings = [_empty(a, empty, "actual")] if empty else []
    findings += [_empty(r, bare, "reference")] if bare else []
    keep = [at for at in range(len(a)) if at not in {*empty, *bare}]
    findings += _explained(a, r, keep, same_size=same_size)
    if not same_size and not findings:
        findings += _scaled(a, r)
    return Frames(tuple(findings), scores)


def _emptied(a: torch.Tensor, r: torch.Tensor) -> tuple[list[int], list[int]]:
    """Frames of either side that hold one colour where their partner has a picture.

    A clip that begins or ends in black and is shifted is no such case: its frames are set beside
    those that they are.
    """
    own, other = uniform(a), uniform(r)
    partners = straight(len(a), len(r))
    pairs = [(at, to) for at, to in enumerate(partners) if to >= 0]
    for again in (False, True):
        sides = [own[at] for at, _ in pairs], [other[to] for _, to in pairs]
        empty, bare = emptied(*sides), emptied(*reversed(sides))
        if again or not (empty or bare) or min(len(a), len(r)) < 2:
            break
        order = _order(a, r, reduced(a), (), range(len(a)))
        if order is None:
            break
        pairs = [(at, to) for at, to in enumerate(order.partners) if to >= 0]
    return [pairs[at][0] for at in empty], [pairs[at][1] for at in bare]


def _scores(
    actual: torch.Tensor, reference: torch.Tensor, progress: Progress
) -> Iterator[FrameScore]:
    total = min(len(actual), len(reference))
    for at, (a, r) in enumerate(zip(actual, reference, strict=False)):
        progress("frames", at + 1, total)
        if torch.equal(a, r):
            yield FrameScore(actual=at, reference=at, psnr_db=math.inf, ssim=1.0, rms=0.0)
            continue
        own, other = (side.permute(2, 0, 1).float() for side in (a, r))
        yield FrameScore(
            actual=at,
            reference=at,
            psnr_db=psnr_of_levels(own, other),
            ssim=ssim_frame(own.contiguous(), other.contiguous()),
            rms=math.sqrt(float((own - other).square().mean(dtype=torch.float64))),
        )


def _empty(frames: torch.Tensor, empty: Sequence[int], side: str) -> MediaFinding:
    """Frames of a side that hold one colour, where those of the other have a picture."""
    means = [float(frames[at].float().mean()) for at in empty]
    word = "black" if max(means) <= _BLACK else "uniform"
    which = f"{len(empty)} of {counted(len(frames), 'frame')} of the {side} side ({numbers(empty)})"
    which = f"all frames of the {side} side" if len(empty) == len(frames) > 1 else which
    which = f"the picture of the {side} side" if len(frames) == 1 else which
    verb = "is" if len(empty) == 1 else "are"
    return MediaFinding(
        kind=f"{word} frames",
        modality="video",
        text=f"{which} {verb} {word}, where the other side has a picture",
        effect="invalid",
        value=len(empty),
        unit="frames",
        frames=tuple(empty),
    )


def numbers(frames: Sequence[int]) -> str:
    """`3, 7 to 9`, at most six of them."""
    return spans(sorted(frames), most=6)


def _explained(
    actual: torch.Tensor, reference: torch.Tensor, keep: Sequence[int], *, same_size: bool
) -> list[MediaFinding]:
    """An order of frames and recolourings, each proven on what the ones before it leave."""
    small = reduced(actual)
    findings: list[MediaFinding] = []
    changes: list[Recolouring] = []
    partners = straight(len(actual), len(reference))
    order: Order | None = None
    for _ in range(3):
        told = len(findings)
        if order is None and len(actual) > 1 and len(reference) > 1:
            order = _order(actual, reference, small, changes, keep)
            if order is not None:
                partners = order.partners
                findings.append(_told_order(order, actual, reference, changes))
        if len(changes) < 2 and (same_size or not changes):
            change = _recoloured(actual, reference, partners, changes, keep)
            if change is not None and change.kind not in {known.kind for known in changes}:
                changes.append(change)
                findings.append(_told_change(change))
        if len(findings) == told:
            break
    return findings


def _changed(frames: torch.Tensor, changes: Sequence[Recolouring]) -> torch.Tensor:
    for change in changes:
        frames = change.change(frames)
    return frames


def _order(
    actual: torch.Tensor,
    reference: torch.Tensor,
    small: torch.Tensor,
    changes: Sequence[Recolouring],
    keep: Sequence[int],
) -> Order | None:
    other = _changed(reduced(reference), changes)
    if other.shape[1:] != small.shape[1:]:
        return None
    matrix = squares(small, other)
    lost = [at for at in range(len(small)) if at not in set(keep)]
    matrix[lost] = 0.0  # a black frame has no partner: it speaks for none
    variance = float(other.flatten(2).var(2, correction=0).mean())
    order = order_of(matrix, variance, steps(small))
    if order is None or between(small, other, order.partners) > BETWEEN:
        return None
    before, after, variance = _whole(actual, reference, order, changes)
    return order if explains(before, after, variance) else None


def _whole(
    actual: torch.Tensor,
    reference: torch.Tensor,
    order: Order,
    changes: Sequence[Recolouring],
) -> tuple[float, float, float]:
    """Mean squares of whole frames without an order and with it, and the reference's variance."""
    before, after, variance, count = 0.0, 0.0, 0.0, 0
    for at in order.frames:
        partner = order.partners[at]
        if partner < 0 or at >= len(reference):
            continue
        own, plain, moved = (
            x.permute(2, 0, 1).float() for x in (actual[at], reference[at], reference[partner])
        )
        plain, moved = (_changed(x[None], changes)[0] for x in (plain, moved))
        if own.shape != moved.shape:
            return 0.0, 0.0, 0.0
        before += float((own - plain).square().mean())
        after += float((own - moved).square().mean())
        variance += float(moved.flatten(1).var(1, correction=0).mean())
        count += 1
    return (before / count, after / count, variance / count) if count else (0.0, 0.0, 0.0)


def _told_order(
    order: Order,
    actual: torch.Tensor,
    reference: torch.Tensor,
    changes: Sequence[Recolouring],
) -> MediaFinding:
    before, after, _ = _whole(actual, reference, order, changes)
    frames = counted(abs(order.value), "frame")
    text = {
        "frame shift": f"its frames are the reference's {frames} "
        f"{'later' if order.value > 0 else 'earlier'}: frame 0 is the reference's {order.value}"
        if order.value > 0
        else f"its frames are the reference's {frames} earlier: frame {-order.value} is the "
        "reference's 0",
        "lost frames": f"{frames} of the reference {'is' if order.value == 1 else 'are'} lost "
        f"before its frame {order.frames[0]}",
        "added frames": f"{frames} {'is' if order.value == 1 else 'are'} added before its frame "
        f"{order.frames[0]}",
        "reversed": "its frames run backwards",
        "swapped frames": f"its frames {_pairs(order)} are in each other's place",
        "other order": f"its frames are the reference's in another order ({frames} moved)",
        "repeated frames": f"its frame{'s' * (order.value > 1)} {numbers(order.frames)} "
        f"repeat{'s' * (order.value == 1)} the one before, where the reference moves on",
    }[order.kind]
    return MediaFinding(
        kind=order.kind,
        modality="video",
        text=text + proof(before, after),
        effect="drifted",
        value=order.value,
        unit="frames",
        frames=order.frames if len(order.frames) < len(actual) else (),
        before=math.sqrt(before),
        after=math.sqrt(after),
    )


def _pairs(order: Order) -> str:
    pairs = [f"{at} and {order.partners[at]}" for at in order.frames if at < order.partners[at]]
    return ", ".join(pairs[:4]) + (", ..." if len(pairs) > 4 else "")


def proof(before: float, after: float, *, verb: str = "explains") -> str:
    """How much of the mean square a finding explains."""
    share = 1 - after / before if before else 1.0
    how = f"{100 * min(share, 0.9999):.4g} %" if after else "all"
    return f" ({verb} {how} of the difference)"


def _recoloured(
    actual: torch.Tensor,
    reference: torch.Tensor,
    partners: Sequence[int],
    changes: Sequence[Recolouring],
    keep: Sequence[int],
) -> Recolouring | None:
    """A recolouring that explains some frames, and then all of them."""
    pairs = [(at, partners[at]) for at in keep if partners[at] >= 0]
    if not pairs:
        return None
    step = max(1, len(pairs) // _SAMPLED)
    few = pairs[::step][:_SAMPLED]
    own = _stacked(actual, [at for at, _ in few])
    other = _changed(_stacked(reference, [at for _, at in few]), changes)
    change = recolouring(own, other)
    if change is None or len(few) == len(pairs) or own.shape != other.shape:
        return change
    before, after, variance = 0.0, 0.0, 0.0
    for at, partner in pairs:
        frame = _stacked(actual, [at])
        plain = _changed(_stacked(reference, [partner]), changes)
        before += float((frame - plain).square().mean())
        after += float((frame - change.change(plain)).square().mean())
        variance += float(plain.flatten(2).var(2, correction=0).mean())
    return change if explains(before, after, variance) else None


def _stacked(frames: torch.Tensor, chosen: Sequence[int]) -> torch.Tensor:
    return frames[list(chosen)].permute(0, 3, 1, 2).float()


def _told_change(change: Recolouring) -> MediaFinding:
    explained = "" if math.isinf(change.before) else proof(change.before, change.after)
    return MediaFinding(
        kind=change.kind,
        modality="video",
        text=change.text + explained,
        effect="drifted" if change.exact else "inconclusive",
        value=change.value,
        before=None if math.isinf(change.before) else math.sqrt(change.before),
        after=math.sqrt(change.after),
    )


def _scaled(actual: torch.Tensor, reference: torch.Tensor) -> list[MediaFinding]:
    """Of frames of two sizes: whether they show the same, brought to one size."""
    count = min(len(actual), len(reference))
    side = min(*actual.shape[1:3], *reference.shape[1:3], 32)
    own, other = (
        torch.nn.functional.adaptive_avg_pool2d(_stacked(frames, list(range(count))), side)
        for frames in (actual, reference)
    )
    square = float((own - other).square().mean())
    variance = float(other.flatten(2).var(2, correction=0).mean())
    if square > 0.1 * variance:
        return []
    text = f"brought to {side}x{side} pixels both show the same: {math.sqrt(square):.2g} levels rms"
    return [
        MediaFinding(
            kind="same content scaled",
            modality="video",
            text=text,
            effect="inconclusive",
            value=math.sqrt(square),
            unit="levels",
        )
    ]
