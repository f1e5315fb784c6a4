"""Paired ratios of interleaved runs, their interval, and how many rounds would decide.

Pure: numbers in, numbers out; no I/O, no torch.

A **round** runs every arm twice, in a random order and back (`x y z z y x`), so that a drift of the
machine cancels. Each half of it gives one paired ratio of two arms, of runs next to each other. The
estimate is the median of these ratios; the interval is that of the sign test, from two of the
sorted ratios, and holds whatever the noise looks like: heavy tails, two speeds of a shared core,
a few slow first runs.

Chosen by simulation on recorded generations (`bench/bench_ab.py`, `bench/results/ab.md`), where it
was compared with bootstrap intervals of the median and with Wilcoxon's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

LEVEL = 0.99
"""Confidence of every interval here."""

ROUNDS_CAP = 1_000_000
"""More rounds than this would decide nothing in practice."""


class Outcome(str, Enum):
    """What an interval says of two speeds."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Interval:
    """Median of paired ratios, and where the true median lies with confidence `LEVEL`.

    Attributes:
        ratio: Time of an arm over time of the baseline; above 1 is slower.
        low, high: The interval; 0 and infinity where there are too few pairs for one.
        pairs: Ratios it is made of.
    """

    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def half_width(self) -> float:
        """Half the interval's width on a logarithmic scale: 0.01 is about 1 %."""
        if self.low <= 0 or not math.isfinite(self.high):
            return math.inf
        return math.log(self.high / self.low) / 2

    @property
    def excludes_one(self) -> bool:
        """Whether the two speeds are told apart."""
        return self.low > 1 or self.high < 1


def order_of(arms: Sequence[str], *, seed: str) -> list[str]:
    """The runs of one round: the arms in an order drawn from `seed`, then the same order back."""
    drawn = list(arms)
    random.Random(seed).shuffle(drawn)
    return [*drawn, *reversed(drawn)]


def paired_ratios(
    rounds: Sequence[Sequence[tuple[str, float]]], *, actual: str, reference: str
) -> list[float]:
    """Ratio of two arms in each half of each round.

    Args:
        rounds: Of each round, arm and seconds of its runs in the order they ran. Runs whose time
            is not above 0 and finite are left out with their partner.
        actual, reference: Arms above and below the fraction.
    """
    found = []
    for runs in rounds:
        half = len(runs) // 2
        for part in (runs[:half], runs[half:]):
            times = dict(part)
            above, below = times.get(actual, 0.0), times.get(reference, 0.0)
            if above > 0 and below > 0 and math.isfinite(above) and math.isfinite(below):
                found.append(above / below)
    return found


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def sign_rank(count: int, *, level: float = LEVEL) -> int:
    """How many values to leave out at each end of a sorted sample for an interval of its median.

    Returns:
        The largest k with `P(Binomial(count, 1/2) < k) <= (1 - level) / 2`; 0 where the sample is
        too small (below 8 at 99 %).

    Source:
        Thompson 1936, "On confidence ranges for the median"; David and Nagaraja, Order Statistics,
        section 7.1.
    """
    allowed = (1 - level) / 2
    logs = -count * math.log(2)
    tail, k = 0.0, 0
    while k <= count // 2:
        term = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        tail += math.exp(term + logs)
        if tail > allowed:
            return k
        k += 1
    return k


def interval(ratios: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Median of paired ratios with the sign test's interval; see the module."""
    ordered = sorted(ratios)
    k = sign_rank(len(ordered), level=level)
    if k < 1:
        return Interval(median(ordered), 0.0, math.inf, len(ordered))
    return Interval(median(ordered), ordered[k - 1], ordered[len(ordered) - k], len(ordered))


def outcome(found: Interval, *, margin: float) -> Outcome:
    """What an interval says.

    Args:
        found: Of the candidate over the baseline.
        margin: Relative difference that is still called the same speed, such as 0.05.
    """
    if found.high < 1:
        return Outcome.FASTER
    if found.low > 1:
        return Outcome.SLOWER
    return Outcome.SAME if within(found, margin=margin) else Outcome.UNDECIDED


def within(found: Interval, *, margin: float) -> bool:
    """Whether the whole interval lies within a relative difference of `margin` from 1."""
    return 1 / (1 + margin) <= found.low and found.high <= 1 + margin


def rounds_to_decide(found: Interval, *, rounds: int, margin: float) -> int | None:
    """Rounds after which an undecided speed would be told apart, or be called the same.

    The half-width shrinks with the square root of the number of rounds; the estimate is taken for
    the truth. Of the two ways to decide, the nearer one counts.

    Args:
        found: An interval.
        rounds: Rounds it is made of.
        margin: See `outcome`.

    Returns:
        Rounds in all, from the first; None where there is no interval to go by.
    """
    width = found.half_width
    if not math.isfinite(width) or rounds < 1 or not found.ratio > 0:
        return None
    distance = abs(math.log(found.ratio))
    targets = [distance, math.log1p(margin) - distance]
    needed = [rounds * (width / t) ** 2 for t in targets if t > 0]
    fewest = min((n for n in needed if n <= ROUNDS_CAP), default=None)
    return None if fewest is None else max(rounds + 1, math.ceil(fewest))


def rounds_for_width(found: Interval, *, rounds: int, width: float) -> int | None:
    """Rounds after which the half-width would be `width` or less; None as above."""
    if not math.isfinite(found.half_width) or rounds < 1:
        return None
    return max(rounds, math.ceil(rounds * (found.half_width / width) ** 2))
