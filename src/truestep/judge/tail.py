"""How surprising a value would be among benign ones: the tail of a noise floor's statistic.

Pure: no I/O, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

MODE_GAP = math.log(4.0)
"""Benign values further apart than this factor are two outcomes, not one spread."""

MARGIN = 1.1
"""Nothing within this multiple of the largest benign value is surprising, whatever the tail."""


@dataclass(frozen=True)
class Tail:
    """How surprising a value of one statistic would be among benign runs.

    Attributes:
        scale: Typical benign value: geometric mean, or rms of a signed statistic.
        spread: Standard deviation of the logarithm; 0 for a signed statistic.
        freedom: Degrees of freedom of spread (or of the rms); inf where nothing is estimated.
        count: Distinct benign values of this very tensor.
        largest: Largest benign value, or the analytic minimum.
    """

    scale: float
    spread: float
    freedom: float
    count: int
    largest: float

    def surprise(self, value: float, *, known: bool = False) -> float:
        """Probability that a benign run gives `value` or more; 1 up to the largest seen (`MARGIN`).

        Args:
            value: Its magnitude counts.
            known: As if the tail were known exactly, not from few runs.
        """
        value = abs(value)
        if math.isnan(value) or value > self.largest * 1e6:
            return 0.0
        if value <= self.largest * MARGIN:
            return 1.0
        if not self.spread:
            return 2.0 * _student(-value / self.scale, math.inf if known else self.freedom)
        distance = math.log(value / self.scale) / self._width(known)
        return _student(-distance, math.inf if known else self.freedom)

    def critical(self, rate: float) -> float:
        """Smallest value that is more surprising than `rate`."""
        from scipy.special import ndtri, stdtrit

        def deviations(share: float) -> float:
            inverse = ndtri(share) if math.isinf(self.freedom) else stdtrit(self.freedom, share)
            return -float(inverse)

        if not self.spread:
            return max(self.scale * deviations(rate / 2), self.largest * MARGIN)
        exponent = min(self._width(False) * deviations(rate), 700.0)
        return max(self.scale * math.exp(exponent), self.largest * MARGIN)

    def runs_to_decide(self, value: float, rate: float) -> int:
        """Benign runs after which `value` would be more surprising than `rate`, all else equal."""
        for runs in (10, 20, 30, 50, 100, 200, 500, 1000):
            more = Tail(self.scale, self.spread, self.freedom + runs, self.count + runs, 0.0)
            if more.surprise(value) < rate:
                return runs
        return 1000

    def _width(self, known: bool) -> float:
        return self.spread * math.sqrt(1.0 + (0.0 if known else 1.0 / max(self.count, 1)))


def _student(t: float, freedom: float) -> float:
    from scipy.special import ndtr, stdtr

    return float(ndtr(t) if math.isinf(freedom) else stdtr(freedom, t))


def modes(values: Iterable[float]) -> tuple[list[float], list[float]]:
    """Split positive values at their widest gap if it is wide enough to be two outcomes.

    Returns:
        The lower and the upper outcome's values, sorted; the lower is empty where there is one.
    """
    ordered = sorted(v for v in values if v > 0)
    gaps = [math.log(b / a) for a, b in pairwise(ordered)]
    if not gaps or max(gaps) < MODE_GAP:
        return [], ordered
    at = gaps.index(max(gaps)) + 1
    return ordered[:at], ordered[at:]
