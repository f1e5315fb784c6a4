"""Weights that were changed on purpose: is each as far off as its change explains? Pure: no I/O.

A quantiser may move a number by half a step, or by as much as it clips. What a weight is off is
set against that, number by number and by rows, columns and blocks; then the layers are set against
one another, for a quantiser that is made otherwise (its scales in another precision, searched or
clipped) is off by as much more in all of them. One that is further off than the others is broken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.special import ndtri, stdtrit

from truestep.measure.quantisers import QUANTISERS, Quantised, Quantiser, rms

Tensor = torch.Tensor

LEVEL = 1e-3
"""Chance that a healthy model is accused, over all of its layers, by the spread of its layers."""

SPREAD = 0.05
"""Least spread of the logarithms: a quantiser that explains all layers leaves none."""

SLACK = 1.05
"""So many times as far off as is explained, nothing is unexplained: codes at the very middle."""

WHOLE_STEP = 2.05
"""Half-steps within which a known quantiser explains all: whoever rounds down, or by chance, is."""

WHOLE_STEPS = 2.5
"""Likewise of 32 numbers together, over rounding to the nearest."""

LEAST = 4
"""Layers that must be there for a spread to say anything."""

BLOCK = 32


@dataclass(frozen=True)
class Fit:
    """How far one weight is off, over what a quantiser explains.

    Attributes:
        peak: Of its numbers the furthest, over its reach.
        over: Of its rows, columns and blocks of 32 the furthest, over rounding to the nearest.
        size: Root mean square of the reaches, relative to that of the weight.
        inside: Share of its numbers within their reach.
        shifted: Of its rows the middle one: how far all of it is shifted one way, over its reach.
        far: Share of its numbers that are off by more than one who makes it otherwise is.
        outward: Of these the share, of all, that no clipping made: larger than the trusted, or of
            the other sign.
    """

    peak: float
    over: float
    size: float
    inside: float
    shifted: float = 0.0
    far: float = 0.0
    outward: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Above which a layer is broken, of `Fit`'s peak and over, and of the share outside.

    Attributes:
        spread: The peak by the spread of all layers alone.
        far, outward: Shares above which a layer is broken, whatever others are.
        unlike: Whether layers differ so much among themselves that they say nothing of one.
    """

    peak: float
    over: float
    outside: float = 1.0
    spread: float = math.inf
    far: float = 1.0
    outward: float = 1.0
    unlike: bool = False


def reach_of(trusted: Tensor, candidate: Tensor, quantised: Quantised | None, eps: float) -> Tensor:
    """How far each number of a weight may be off.

    Args:
        trusted, candidate: float32.
        quantised: What the quantiser makes of the trusted one; None of what it leaves as it is.
        eps: Of the precision that both are kept in.
    """
    stored = eps * (trusted.abs() + candidate.abs().nan_to_num(0.0, 0.0, 0.0))
    least = 1e-6 * float(trusted.abs().max()) if trusted.numel() else 0.0
    return (stored if quantised is None else quantised.reach + stored) + max(least, 1e-30)


def fit(trusted: Tensor, candidate: Tensor, quantiser: Quantiser | None, *, eps: float) -> Fit:
    """How far a weight is off.

    Args:
        trusted, candidate: Of one shape, any float dtype.
        quantiser: What is to explain it; None where nothing but storing does.
        eps: See `reach_of`.
    """
    trusted, candidate = trusted.detach().float(), candidate.detach().float()
    quantised = quantiser(trusted) if quantiser is not None else None
    if not bool(candidate.isfinite().all()):
        return Fit(math.inf, math.inf, math.nan, 0.0, far=1.0, outward=1.0)
    reach = reach_of(trusted, candidate, quantised, eps)
    off = (candidate - trusted).abs()
    if not off.numel():
        return Fit(0.0, 0.0, 0.0, 1.0)
    shares = off / reach
    peak, inside = float(shares.max()), float((shares <= SLACK).double().mean())
    over = max(float(r.max()) for r in unit_ratios(off, reach).values())
    rows = [side.reshape(side.shape[0] if side.ndim > 1 else 1, -1) for side in (trusted, reach)]
    moved = candidate.reshape(rows[0].shape) - rows[0]
    shifted = float((moved.mean(1).abs() / rows[1].mean(1)).median())
    away = shares > _MADE_OTHERWISE
    clipped = (candidate.abs() < trusted.abs()) & (candidate * trusted >= 0)
    return Fit(
        peak,
        over,
        rms(reach) / (rms(trusted) or 1.0),
        inside,
        shifted,
        float(away.double().mean()),
        float((away & ~clipped).double().mean()),
    )


def unit_ratios(off: Tensor, reach: Tensor) -> dict[str, Tensor]:
    """Of every row, column and block, how far it is off over rounding to the nearest.

    An error that is spread evenly over a step has a third of the square of its half.
    """
    taken, given = off.double().square(), reach.double().square() / 3
    if off.ndim < 2:
        return {"number": (taken / given).sqrt()}
    taken, given = taken.flatten(1), given.flatten(1)
    found = {
        "row": (taken.sum(1) / given.sum(1)).sqrt(),
        "column": (taken.sum(0) / given.sum(0)).sqrt(),
    }
    if off.numel() % BLOCK == 0:
        sums = [each.reshape(-1, BLOCK).sum(1) for each in (taken, given)]
        found["block"] = (sums[0] / sums[1]).sqrt()
    return found


def limits(fits: Iterable[Fit], *, known: bool) -> Limits | None:
    """Above what a layer is broken, by the spread of all of them.

    Args:
        fits: Of all layers that were changed.
        known: Whether the quantiser is one that explains them: its reach is then a limit of itself.

    Returns:
        The limits; None where there are too few layers to tell.
    """
    every = list(fits)
    if len(every) < LEAST:
        fixed = Limits(WHOLE_STEP, WHOLE_STEPS, far=_FAR, outward=_OUTWARD)
        return fixed if known else None
    spread = _limit([each.peak for each in every])
    if not known:
        middle = _middle(each.peak for each in every)
        over = _limit([each.over for each in every])
        return Limits(spread, over, spread=spread, unlike=spread > _UNLIKE * middle)
    return Limits(
        max(spread, WHOLE_STEP),
        max(_limit([each.over for each in every]), WHOLE_STEPS),
        max(_limit([max(1 - each.inside, _CLIPPED) for each in every]), _OUTSIDE),
        spread,
        _FAR,
        _OUTWARD,
    )


def beside(limit: Limits, siblings: Sequence[Fit]) -> Limits:
    """The limits of a layer whose siblings are all rounded to the nearest: a whole step is what who
    rounds otherwise takes.

    Args:
        limit: Of all layers, for a quantiser that is known.
        siblings: The other layers with rows as long, whose groups are the same.
    """
    ordered = sorted(each.peak for each in siblings)
    if len(ordered) < LEAST or ordered[int(0.9 * len(ordered))] > _TIGHT:
        return limit
    return replace(limit, peak=min(limit.peak, max(limit.spread, _BESIDE_TIGHT)))


def _limit(values: Sequence[float]) -> float:
    """The value that one of as many would exceed once in 1 / `LEVEL` models.

    By the median of the logarithms and their spread, which one broken layer in ten does not move,
    with the tails of Student's distribution: a spread of few layers is itself uncertain. Makers
    that clip do so in some layers and not in others: the spread upwards counts.
    """
    logs = torch.tensor([math.log(max(value, 1e-9)) for value in values if math.isfinite(value)])
    if not len(logs):
        return math.inf
    middle = float(logs.median())
    share = 0.9 if len(logs) >= _MANY else 0.75
    upwards = (float(logs.quantile(share)) - middle) / float(ndtri(share))
    spread = max(1.4826 * float((logs - middle).abs().median()), upwards, SPREAD)
    freedom = min(len(values) - 1, _FREEDOM)
    score = -float(stdtrit(freedom, LEVEL / (2 * len(values))))
    return math.exp(min(middle + score * spread, 700.0))


_FREEDOM = 10
"""Degrees of freedom of the tails, at most: what clips has heavier ones than a normal spread."""

_MANY = 12
"""Layers of which the upper tenth is not one alone."""


_TIGHT = 1.1
"""So near to their reach nine layers in ten are where a quantiser rounds all to the nearest."""

_BESIDE_TIGHT = 1.4
"""Then so much is what one of them may be off."""

_CLIPPED = 1e-3
"""Share of the numbers of a weight that makers who clip do clip."""

_OUTSIDE = 0.05
"""Least share outside of their reach by which a layer is told from the others."""

_FAR, _OUTWARD = 0.1, 0.02
"""Shares of numbers far off that no maker of a format leaves: of 22 makers the most are 0.012 and
0.008; rows exchanged, zeros and a LoRA left in have 0.03 and more of the latter, or 0.6 of both."""

_UNLIKE = 30.0
"""So many times the middle layer's peak another's may not be, where nothing but others tell."""


def on_grids(pairs: Iterable[Pair]) -> bool:
    """Whether the candidate's weights are rounded to a grid that the trusted ones are not on.

    Of 16 consecutive numbers the smallest third lies on few levels of any quantiser, so that some
    are equal (2.2 % and more of those of 22 makers); of a floating dtype's own numbers, which are
    the denser the smaller they are, hardly any are (0.8 % and less).
    """
    equal = [0, 0]
    total = 0
    for pair in pairs:
        for at, side in enumerate((pair.trusted, pair.candidate)):
            found, count = _equal(side)
            equal[at] += found
            total += count if at else 0
    return not total or (equal[1] - 2 * equal[0]) / total >= _GRIDDED


_GRIDDED = 0.012
"""Share of the small numbers that are equal to others, from which on there is a grid."""

_TOGETHER = 16
"""Consecutive numbers that no quantiser parts: its groups are as many, or more."""

_FINE = 1 << 14
"""Levels to the largest number of a group within which two numbers are equal."""


def _equal(weight: Tensor) -> tuple[int, int]:
    """How many of the small numbers are equal to another in their group, and of how many."""
    flat = weight.detach().float().flatten()
    flat = flat[: len(flat) // _TOGETHER * _TOGETHER]
    if not len(flat):
        return 0, 0
    groups = flat.reshape(-1, _TOGETHER)
    peak = groups.abs().amax(1, keepdim=True)
    small = groups.gather(1, groups.abs().argsort(1)[:, : _TOGETHER // 3])
    levels = (small / peak.clamp_min(1e-30) * _FINE).round().sort(1).values
    same = levels[:, 1:] == levels[:, :-1]
    return int(same.sum()), levels.numel()


def of_another_kind(fits: Iterable[Fit]) -> float | None:
    """How far off most layers are where a quantiser does not explain them; None where it does."""
    every = list(fits)
    peak = _middle(each.peak for each in every) if every else 0.0
    explained = not every or _middle(each.inside for each in every) >= _INSIDE
    if every and _middle(each.shifted for each in every) > _SHIFTED:
        return peak
    return None if explained or peak <= _MADE_OTHERWISE else peak


def broken(found: Fit, limit: Limits) -> float | None:
    """How many times as far off as is explained a layer is; None of one that is not broken."""
    outside = 1 - found.inside > limit.outside and found.peak > WHOLE_STEP
    away = found.far > limit.far or found.outward > limit.outward
    if found.peak <= limit.peak and found.over <= limit.over and not outside and not away:
        return None
    return max(found.peak, found.over)


_SHIFTED = 1.5
"""Half-steps by which whole rows are shifted one way: who rounds down shifts them by one."""


@dataclass(frozen=True)
class Pair:
    """A weight of both sides; float32, of one shape."""

    trusted: Tensor
    candidate: Tensor


_ENOUGH = 12
"""Layers that a quantiser is inferred from."""

_INSIDE = 0.99
"""Share of the numbers of a weight that its quantiser explains: what is clipped are few."""

_ALIKE = 1.05
"""Steps this near to the smallest are as small."""

_MADE_OTHERWISE = 3.0
"""So far beyond its reach, in most layers, is what another maker of the same format makes."""


def infer(pairs: Mapping[str, Pair], *, eps: float) -> Quantiser | None:
    """The quantiser with the smallest steps that explains most of the weights.

    Args:
        pairs: Weights that differ.
        eps: See `reach_of`.
    """
    names = list(pairs)
    names = names[:: max(len(names) // _ENOUGH, 1)][: _ENOUGH + 1]
    seen: dict[str, list[Fit]] = {}
    for name, quantiser in QUANTISERS.items():
        fits = [fit(pairs[n].trusted, pairs[n].candidate, quantiser, eps=eps) for n in names]
        fits = [each for each in fits if math.isfinite(each.peak)]
        if fits:
            seen[name] = fits
    explains = [n for n, fits in seen.items() if _middle(f.inside for f in fits) >= _INSIDE]
    explains = explains or [
        n for n, fits in seen.items() if _middle(f.peak for f in fits) <= _MADE_OTHERWISE
    ]
    if not explains:
        return None
    sizes = {name: _middle(f.size for f in seen[name]) for name in explains}
    alike = [name for name in explains if sizes[name] <= _ALIKE * min(sizes.values())]
    # Of steps as small, those that explain most: a row of 32 is a block of 32, and a longer is not.
    return QUANTISERS[max(alike, key=lambda name: sum(f.inside for f in seen[name]))]


def _middle(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
