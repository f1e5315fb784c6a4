"""What a cohort's own runs say about a new median, and the percent rule beside it.

Pure: numbers in, numbers out; no I/O, no torch.

Times come in **batches**: the runs of one process. Processes differ by more than the runs of one do
(memory layout, clock, neighbours), so a new batch is set against whole batches where there are
three, and against single runs before that, which can only suspect.

- Of **processes** (three batches or more): the t prediction interval of one more batch median, on
  logarithms of times (Whitmore 1986, "Prediction limits for a univariate normal observation").
- Of **runs**: the distribution-free interval of the median of a future sample, between two of the
  sorted runs (Fligner and Wolfe 1979, "Nonparametric prediction intervals for a future sample
  median").

With three batches the interval is the hull of both, so that medians that lie close by chance cannot
make it narrower than the runs allow. The false alarms are simulated in
`tests/experiment/test_perf_statistics.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from truestep.experiment.statistics import Outcome, median, sign_rank

LEVEL = 0.99
"""Confidence of an interval, or of several together."""

ENOUGH_BATCHES = 3
"""Batches from which the spread of processes is known well enough for an interval."""

NEEDED_CAP = 100_000
"""More runs or processes than this would decide nothing in practice."""

_MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a normal distribution to its standard deviation."""

Scope = Literal["processes", "runs", "none"]


@dataclass(frozen=True)
class Limit:
    """Percent-and-absolute rule: a value may be `max(base * (1 + relative), base + pad)`."""

    relative: float
    pad: float

    def bound(self, base: float) -> float:
        """Largest value that still passes, in the unit of `base`."""
        return max(base * (1 + self.relative), base + self.pad)


LIMITS: Mapping[str, Limit] = {
    "e2e": Limit(0.25, 20.0),
    "denoise_stage": Limit(0.25, 120.0),
    "other_stage": Limit(0.8, 120.0),
    "step": Limit(0.3, 20.0),
    "aggregate": Limit(0.2, 20.0),
    "device_memory": Limit(0.02, 0.0),
    "resident_memory": Limit(0.1, 50.0),
}
"""Source but of the last: SGLang, `multimodal_gen/test/server`: tolerances `pr_test` of
perf_baselines/h100.json (03dbd7a; `runtime_peak_vram` among them), pads in ms of `_assert_le` in
test_server_utils.py. Resident memory: ten times the 1 % by which processes differed that ran the
builtin model."""


@dataclass(frozen=True)
class Expectation:
    """Where the median of new runs is to be expected.

    Attributes:
        base: Median of the batch medians, in the unit of the values.
        low, high: The interval; 0 and infinity where there are too few runs for one.
        batches, runs: What it is made of.
        scope: What the interval knows about: whole processes, runs of one or two, or nothing.
    """

    base: float
    low: float
    high: float
    batches: int
    runs: int
    scope: Scope

    def outcome(self, value: float) -> Outcome:
        """Where a new median lies; `undecided` where there is no interval."""
        if self.scope == "none":
            return Outcome.UNDECIDED
        if value > self.high:
            return Outcome.SLOWER
        return Outcome.FASTER if value < self.low else Outcome.SAME


@dataclass(frozen=True)
class Needed:
    """What would decide: runs to record in all, over so many more processes."""

    runs: int
    processes: int


def expect(batches: Sequence[Sequence[float]], *, new: int, level: float = LEVEL) -> Expectation:
    """Where the median of `new` more runs of one process is to be expected.

    Args:
        batches: Recorded values, all above 0, one sequence a process.
        new: Runs that the median to be judged is made of.
        level: Confidence of the interval.
    """
    found = [list(batch) for batch in batches if batch]
    values = sorted(value for batch in found for value in batch)
    if not values:
        return Expectation(math.nan, 0.0, math.inf, 0, 0, "none")
    base = median([median(batch) for batch in found])
    low, high, scope = 0.0, math.inf, "none"
    rank = prediction_rank(len(values), new=new, level=level)
    if rank:
        low, high, scope = values[rank - 1], values[len(values) - rank], "runs"
    if len(found) >= ENOUGH_BATCHES:
        centre, half = _of_processes(found, new=new, level=level)
        own = (math.exp(centre - half), math.exp(centre + half))
        low, high = (min(low, own[0]), max(high, own[1])) if rank else own
        scope = "processes"
    known: Scope = scope  # type: ignore[assignment]
    return Expectation(base, low, high, len(found), len(values), known)


def prediction_rank(count: int, *, new: int, level: float = LEVEL) -> int:
    """Rank, from each end, of the sorted values between which a future median lies.

    Of an even number of new values the median lies between two; the outer one is taken, which errs
    on the wide side.

    Args:
        count: Values there are.
        new: Values that the future median is of.
        level: Probability that it lies between the two.

    Returns:
        The largest rank from 1; 0 where even the extremes are too narrow.

    Source:
        Fligner and Wolfe 1979: the number of old values below the j-th of m new ones is negative
        hypergeometric, whatever the distribution.
    """
    if count < 1 or new < 1:
        return 0
    j = (new + 1) // 2
    allowed = (1 - level) / 2
    whole = _log_choose(count + new, count)
    tail, rank = 0.0, 0
    while rank < (count + 1) // 2:
        ways = _log_choose(rank + j - 1, rank) + _log_choose(count - rank + new - j, count - rank)
        tail += math.exp(ways - whole)
        if tail > allowed * (1 + 1e-9):  # a tie, but for rounding, is allowed
            return rank
        rank += 1
    return rank


def needed(
    batches: Sequence[Sequence[float]], *, new: int, value: float, level: float = LEVEL
) -> Needed | None:
    """What would decide about a new median that `expect` cannot decide about.

    The spread found so far is taken for the truth.

    Args:
        batches: Recorded values, one sequence a process.
        new: Runs that the new median is of.
        value: The new median.
        level: Confidence.

    Returns:
        None where it is decided, or where no number in practice would.
    """
    found = expect(batches, new=new, level=level)
    used = [list(batch) for batch in batches if batch]
    outcome = found.outcome(value)
    if outcome is Outcome.UNDECIDED:
        for count in range(found.runs + 1, found.runs + NEEDED_CAP):
            if prediction_rank(count, new=new, level=level):
                missing = count - found.runs
                each = max(1, found.runs // max(1, len(used)), new)
                return Needed(missing, max(1, math.ceil(missing / each)))
        return None
    if outcome is Outcome.SAME or found.scope == "processes":
        return None
    each = max(1, round(found.runs / len(used)))
    within = _within(used)
    spread = within * math.sqrt(math.pi / 2 * (1 / new + 1 / each) / 2)
    if len(used) > 1:
        spread = max(spread, _deviation([math.log(median(batch)) for batch in used]))
    distance = abs(math.log(value / found.base))
    count = ENOUGH_BATCHES
    while _student(count - 1, level) * spread * math.sqrt(1 + 1 / count) >= distance:
        count += 1
        if count > 1000:
            return None
    more = max(1, count - len(used))
    return Needed(more * each, more)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the median of one batch, by the sign test; None below eight values at 99 %."""
    rank = sign_rank(len(values), level=LEVEL)
    ordered = sorted(values)
    return (ordered[rank - 1], ordered[len(ordered) - rank]) if rank else None


def _of_processes(
    batches: Sequence[Sequence[float]], *, new: int, level: float
) -> tuple[float, float]:
    """Mean of the logarithmic batch medians, and half the width of the t prediction interval.

    A new median of fewer runs than the batches have is noisier by what the runs spread.
    """
    logs = [math.log(median(batch)) for batch in batches]
    count = len(logs)
    fewer = 1 / new - sum(1 / len(batch) for batch in batches) / count
    extra = math.pi / 2 * _within(batches) ** 2 * max(0.0, fewer)
    width = math.sqrt(_deviation(logs) ** 2 * (1 + 1 / count) + extra)
    return sum(logs) / count, _student(count - 1, level) * width


def _within(batches: Sequence[Sequence[float]]) -> float:
    """Robust standard deviation of the logarithm of a run about its batch's median."""
    rests = [abs(math.log(v / median(batch))) for batch in batches if len(batch) > 1 for v in batch]
    return _MAD_TO_SIGMA * median(rests) if rests else 0.0


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _student(freedom: int, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - (1 - level) / 2))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
