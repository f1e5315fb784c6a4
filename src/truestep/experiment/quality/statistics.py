"""Whether scores of a candidate are not worse than a baseline's by more than a margin.

Pure: numbers in, numbers out; numpy and scipy, no torch, no I/O.

The unit is the **prompt**: prompts are what a conclusion is to hold for, and seeds of one prompt
are no independent witnesses. Of every prompt there is one number: the mean over its seeds of
candidate minus baseline, both from the same noise.

**Interval.** A Bayesian bootstrap over prompts (weights from a flat Dirichlet, Rubin 1981) with one
more prompt that was never seen and lost `UNSEEN_LOSS` spreads, or `UNSEEN_MARGINS`: without it,
prompts that were all alike would be certain. For differences bounded below by that loss this is
Gaffke's bound for the mean of a bounded variable ("Three test statistics for a nonparametric
one-sided hypothesis on the mean of a nonnegative variable", 2005; Learned-Miller and Thomas, "A new
confidence interval for the mean of a bounded random variable", 2019), which has held in every case
that was tried. The observed worst takes the place of the assumed one where it is worse.

**Margin.** A share of the spread between seeds of one prompt, which is itself measured: by the same
baseline that is compared. What is resampled is therefore not the difference but the difference plus
the margin, each prompt with what it adds to the spread (its influence on the root of the mean
variance). Treating a measured margin as known doubles the wrong passes of steady scores, and worse.

Chosen by simulation (`bench/bench_quality.py`, `bench/results/quality.md`), where Student's t, the
percentile, BCa and studentised bootstraps were compared with it on skewed, discrete,
heteroscedastic, heavy-tailed and constant scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
"""Of every one-sided test here; an interval of both sides holds with 90 %."""

MARGIN_SHARE = 0.5
"""Of the spread between seeds: the default margin. See `bench/results/quality.md` for its power."""

UNSEEN_LOSS = 2.0
"""Spreads between seeds that the prompt that was never seen is assumed to lose (or to win). Of 1,
1.5, 2, 2.5 and 3 the least that kept wrong passes of every shape of data below 5 % at 32 prompts;
see `bench/results/quality.md`."""

UNSEEN_MARGINS = 4.0
"""The same in margins, where that is more; of the default margin it is the same. Prompts without
any difference pass from 11 on, never sooner."""

DRAWS = 10_000
"""Weights drawn: the 5 % quantile of a bound is then known to 0.2 % of the probability."""

LARGEST = 1e100
"""Of the numbers that are compared: sums and squares of larger ones may be no numbers any more."""

LEAST_PROMPTS = 3
MOST_PROMPTS = 100_000
"""More prompts than this would decide nothing in practice."""

POWER = 0.8
"""With which the number of prompts that is asked for would decide."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Margin:
    """How much worse may still be good enough, and what it was measured from.

    Attributes:
        value: In units of the score; 0 where there is no spread.
        share: Of `spread`; None where the value was declared, or is the least that counts.
        spread: Root mean square over prompts of the deviation between seeds, baseline alone.
    """

    value: float
    share: float | None
    spread: float

    @property
    def unseen(self) -> float:
        """What the prompt that was never seen is assumed to lose."""
        return max(UNSEEN_LOSS * self.spread, UNSEEN_MARGINS * self.value)


@dataclass(frozen=True)
class Paired:
    """Two arms' scores of one metric.

    Attributes:
        difference: Mean of all prompts, candidate less baseline; higher is better.
        low, high: One-sided bounds, each at 95 %.
        p_worse: P-value against "worse by more than the margin": small is good enough.
        p_better: Likewise against "better by more than the margin".
        p_degraded: Against "not worse by more than the margin": small is a shown loss.
        prompts: How many there are.
        needed: Prompts that would decide, at `POWER`; None where it is decided or nothing would.
    """

    difference: float
    low: float
    high: float
    p_worse: float
    p_better: float
    p_degraded: float
    prompts: int
    needed: int | None = None

    @property
    def not_worse(self) -> bool:
        """Whether it is shown to lose less than the margin."""
        return self.p_worse <= ALPHA

    @property
    def equivalent(self) -> bool:
        """Whether both sides hold: two one-sided tests (Schuirmann 1987)."""
        return self.not_worse and self.p_better <= ALPHA

    @property
    def better(self) -> bool:
        """Whether it is shown to win something."""
        return self.low > 0


def margin_of(
    baseline: Array,
    *,
    share: float = MARGIN_SHARE,
    declared: float | None = None,
    least: float = 0.0,
) -> Margin:
    """The margin of a metric, from the baseline arm alone.

    Args:
        baseline: Scores `prompt seed`.
        share: Of the spread between seeds.
        declared: In units of the score, instead.
        least: In units of the score: what is too little to count, however steady seeds are.
    """
    spread = math.sqrt(float(_variances(baseline).mean())) if baseline.shape[1] > 1 else 0.0
    if declared is not None:
        return Margin(declared, None, spread)
    if 0 < share * spread < least:
        return Margin(least, None, spread)
    return Margin(share * spread, share, spread)


def _variances(scores: Array) -> Array:
    """Of every prompt, the variance between its seeds; exactly 0 where they are equal."""
    if scores.shape[1] < 2:
        return np.zeros(len(scores))
    found: Array = scores.var(axis=1, ddof=1)
    found[np.ptp(scores, axis=1) == 0] = 0.0
    return found


def measurable(scores: Array) -> bool:
    """Whether every number is one, and none so large that its square is not."""
    return bool((np.abs(scores) <= LARGEST).all())


def compare(baseline: Array, candidate: Array, margin: Margin) -> Paired:
    """Set two arms side by side, prompt by prompt.

    Args:
        baseline, candidate: Scores `prompt seed`, from the same noise; finite; higher is better.
        margin: Of this baseline.
    """
    if baseline.shape != candidate.shape or baseline.ndim != 2:
        raise ValueError(f"shapes {baseline.shape} and {candidate.shape}: both are prompt x seed")
    if len(baseline) < LEAST_PROMPTS:
        raise ValueError(f"{len(baseline)} prompts, {LEAST_PROMPTS} are the least")
    if not (measurable(baseline) and measurable(candidate)):
        raise ValueError("a score is not finite, or too large to be compared")
    if not 0 <= margin.value <= LARGEST:
        raise ValueError(f"a margin of {margin.value} judges nothing")
    differences = (candidate - baseline).mean(axis=1)
    allowed = _allowances(baseline, margin)
    assumed = margin.unseen
    lower, upper = differences + allowed, differences - allowed
    p_worse = _share(_lowered(lower, margin.value - assumed), below=True)
    p_better = _share(_raised(upper, assumed - margin.value), below=False)
    p_degraded = _share(_raised(lower, margin.value + assumed), below=False)
    mean = float(differences.mean())
    return Paired(
        difference=mean,
        low=min(float(np.quantile(_lowered(differences, -assumed), ALPHA)), mean),
        high=max(float(np.quantile(_raised(differences, assumed), 1 - ALPHA)), mean),
        p_worse=p_worse,
        p_better=p_better,
        p_degraded=p_degraded,
        prompts=len(differences),
        needed=None
        if p_worse <= ALPHA or p_degraded <= ALPHA
        else prompts_to_decide(lower, assumed=assumed),
    )


def _allowances(baseline: Array, margin: Margin) -> Array:
    """What each prompt adds to the margin: its mean is the margin."""
    if margin.share is None or margin.spread == 0:
        return np.full(len(baseline), margin.value)
    mean_square = margin.spread**2
    own: Array = margin.share * (_variances(baseline) + mean_square) / (2 * margin.spread)
    return own


@cache
def _weights(count: int) -> Array:
    """Weights `draw prompt` of a flat Dirichlet, the same for the same count."""
    drawn = np.random.default_rng(20_260_101).standard_exponential((DRAWS, count))
    found: Array = drawn / drawn.sum(axis=1, keepdims=True)
    return found


def _lowered(values: Array, unseen: float) -> Array:
    """Means under drawn weights, with one more prompt that is as bad as `unseen` or the worst."""
    worst = min(float(values.min()), unseen)
    found: Array = _weights(len(values) + 1) @ np.append(np.sort(values), worst)
    return found


def _raised(values: Array, unseen: float) -> Array:
    return -_lowered(-values, -unseen)


def _share(means: Array, *, below: bool) -> float:
    """Share of the means that are at or beyond 0, never 0 itself: what was drawn is finite."""
    beyond = (means <= 0) if below else (means >= 0)
    return float(beyond.sum() + 1) / (len(means) + 1)


def prompts_to_decide(values: Array, *, assumed: float) -> int | None:
    """How many prompts like these would tell their mean from 0, at `POWER`.

    Args:
        values: Differences plus margin, one a prompt.
        assumed: Loss of the prompt that was never seen.

    Returns:
        None where no number in reach would: the mean is 0, at the margin.
    """
    from scipy import stats

    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    sure = float(stats.norm.ppf(1 - ALPHA) + stats.norm.ppf(POWER))
    count = len(values) + 1
    while count <= MOST_PROMPTS:
        room = abs(mean) - (assumed + abs(mean)) / (count + 1)
        if room > 0 and room * math.sqrt(count) >= sure * deviation:
            return count
        count = count + max(1, count // 50)
    return None


def holm(p_values: Mapping[str, float], *, alpha: float = ALPHA) -> tuple[str, ...]:
    """Names whose hypotheses are rejected, together wrong with at most `alpha`.

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    found: list[str] = []
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        if p_values[name] > alpha / (len(p_values) - rank):
            break
        found.append(name)
    return tuple(found)


def binomial_bounds(count: int, total: int, *, alpha: float = ALPHA) -> tuple[float, float]:
    """Exact one-sided bounds of a rate, each at 1 - alpha.

    Source:
        Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case
        of the binomial".
    """
    from scipy import stats

    if not 0 <= count <= total or total < 1:
        raise ValueError(f"{count} of {total} is no rate")
    low = float(stats.beta.ppf(alpha, count, total - count + 1)) if count else 0.0
    high = float(stats.beta.ppf(1 - alpha, count + 1, total - count)) if count < total else 1.0
    return low, high


def more_often(new: int, gone: int) -> float:
    """Exact one-sided p-value that something became more frequent, from pairs that changed.

    Args:
        new, gone: Prompts that have it in the candidate alone, and in the baseline alone.

    Source:
        McNemar 1947; the exact form is the binomial test of the discordant pairs.
    """
    from scipy import stats

    if new + gone == 0:
        return 1.0
    return float(stats.binom.sf(new - 1, new + gone, 0.5))


@dataclass(frozen=True)
class Rate:
    """How many prompts have something in either arm; bounds are exact, one-sided, at 95 %.

    Attributes:
        new: In the candidate and not in the baseline; `gone` the other way round.
        high: Upper bound of the candidate's rate.
        new_high: Upper bound of the rate of what is new.
        p_more: Against "not more often than in the baseline".
        needed: Prompts after which `new_high` could be below its limit, none new among them.
    """

    baseline: int
    candidate: int
    new: int
    gone: int
    prompts: int
    low: float
    high: float
    new_high: float
    p_more: float


def rate_of(baseline: Sequence[bool], candidate: Sequence[bool]) -> Rate:
    """Count something in paired prompts."""
    pairs = list(zip(baseline, candidate, strict=True))
    new = sum(theirs and not ours for ours, theirs in pairs)
    gone = sum(ours and not theirs for ours, theirs in pairs)
    low, high = binomial_bounds(sum(candidate), len(pairs))
    return Rate(
        baseline=sum(baseline),
        candidate=sum(candidate),
        new=new,
        gone=gone,
        prompts=len(pairs),
        low=low,
        high=high,
        new_high=binomial_bounds(new, len(pairs))[1],
        p_more=more_often(new, gone),
    )


def prompts_for_rate(new: int, limit: float) -> int:
    """The least number of prompts of which `new` leave an upper bound below a limit."""
    count = max(new, 1)
    while binomial_bounds(new, count)[1] > limit and count < MOST_PROMPTS:
        count += max(1, count // 100)
    while count > max(new, 1) and binomial_bounds(new, count - 1)[1] <= limit:
        count -= 1
    return count


DECILE = 0.1


@dataclass(frozen=True)
class Tail:
    """The worst tenth of the prompts, each by the worst of its seeds.

    Attributes:
        difference: Mean of the candidate's worst tenth less that of the baseline's.
        low, high: Of it, from a bootstrap over prompts; 5 % on either side.
        rate: Prompts that are worse than nine tenths of the baseline's.
    """

    difference: float
    low: float
    high: float
    rate: Rate


def tail_of(baseline: Array, candidate: Array) -> Tail:
    """Compare the worst decile of two arms `prompt seed`."""
    ours, theirs = baseline.min(axis=1), candidate.min(axis=1)
    worst = float(np.quantile(ours, DECILE, method="lower"))
    # at the quantile itself a score is as bad as the baseline's, unless most are equal to it
    ties = float((ours <= worst).mean()) > 2 * DECILE
    bad: Any = np.less if ties else np.less_equal
    rate = rate_of(bad(ours, worst).tolist(), bad(theirs, worst).tolist())
    drawn = np.random.default_rng(20_260_102).integers(0, len(ours), (1_000, len(ours)))
    moved = _lowest(theirs[drawn]) - _lowest(ours[drawn])
    low, high = (float(np.quantile(moved, side)) for side in (ALPHA, 1 - ALPHA))
    return Tail(float(_lowest(theirs) - _lowest(ours)), low, high, rate)


def _lowest(scores: Array) -> Array:
    """Mean of the lowest tenth along the last axis, at least one."""
    most = max(1, math.ceil(DECILE * scores.shape[-1]))
    found: Array = np.sort(scores, axis=-1)[..., :most].mean(axis=-1)
    return found
