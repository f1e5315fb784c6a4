"""The rule that turns measured distances into verdicts. Pure: no I/O, no torch.

Every statistic of every tensor is a test against its own measured tail. Many tests are many chances
for a false alarm, so Holm's step-down correction keeps the probability that *any* benign check is
called drifted at `RATE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from truestep.floors import NoiseFloor, NoiseRun, RunMetrics
from truestep.judge.floor import SHARE_OF_MINIMUM, Floor, FloorLookup, coarser
from truestep.verdict import FloorUsed, Metrics, Rule, Statistic, Verdict

BLIND = 0.5
"""Largest measured floor (rel_l2) that can pass anything: half of the values may be noise there."""

UNSEEN = 1.0
"""Largest change (rel_l2) that may pass unseen where nothing else judges: as much as the values."""

RATE = 1e-4
"""False alarms per check that the bounds are made for."""

SMALL = 0.5
"""Below this share of the typical benign size a residual's correlation says nothing."""

SIZES = ("rel_l2", "max_abs")
"""Statistics of size; all others are of structure."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A finite, non-constant, not identical pair.

    Attributes:
        metrics: Its distances.
        structure: Structure statistics of its residual, over the reference's rms.
        floor: What judges it.
        raised: Whether its stage is judged in a higher precision, too.
    """

    metrics: Metrics
    floor: Floor
    structure: Mapping[str, float] = field(default_factory=dict)
    raised: bool = False

    def values(self) -> dict[str, float]:
        """Every statistic by name, over the reference's rms.

        The correlation is left out where it says nothing: where the residual is small beside benign
        ones (a single rounding correlates with anything), or its gain is no larger than theirs.
        """
        metrics, tails = self.metrics, self.floor.tails
        found = {"rel_l2": metrics.rel_l2, "max_abs": _over(metrics.max_abs, metrics.rms_reference)}
        if not self.structure:
            return found
        size, gain = tails.get("rel_l2"), tails.get("gain")
        mute = (
            size is None
            or gain is None
            or metrics.rel_l2 < SMALL * size.scale
            or abs(self.structure.get("gain", 0.0)) <= gain.largest
        )
        return found | {k: v for k, v in self.structure.items() if k != "correlation" or not mute}


@dataclass(frozen=True)
class Outcome:
    """What the rule says of one pair.

    Attributes:
        ratio: The deciding statistic over its floor.
        metric: Which statistic that is: the largest by size, or by structure if that alone drifted.
        floor: The floor, with the bound that was used.
        statistics: The structure tests.
    """

    verdict: Verdict
    ratio: float
    metric: str
    note: str
    floor: FloorUsed
    statistics: tuple[Statistic, ...] = ()


def judge(items: Sequence[Measured], *, rate: float = RATE) -> list[Outcome]:
    """Judge the pairs of one check together.

    Args:
        items: Pairs in any order.
        rate: Probability of one or more false alarms.
    """
    return list(judged(items, rate=rate))


def judged(items: Sequence[Measured], *, rate: float = RATE) -> Iterator[Outcome]:
    """As `judge`, one outcome after the other."""
    tests = [
        (item.floor.tails[name].surprise(value), at, name)
        for at, item in enumerate(items)
        if item.floor.tails
        for name, value in item.values().items()
        if name in item.floor.tails
    ]
    rejected: dict[int, set[str]] = {}
    level = rate / max(len(tests), 1)
    for done, (surprise, at, name) in enumerate(sorted(tests)):  # Holm, 1979
        level = rate / (len(tests) - done)
        if surprise > level:
            break
        rejected.setdefault(at, set()).add(name)
    for at, item in enumerate(items):
        tailed = bool(item.floor.tails)
        outcome = _by_tails(item, rejected.get(at, set()), level) if tailed else _by_ratio(item)
        yield _steady(item, outcome)


def _steady(item: Measured, outcome: Outcome) -> Outcome:
    """Nothing is equivalent to a reference that is not so to itself, or by noise as large as it."""
    if outcome.verdict is not Verdict.EQUIVALENT:
        return outcome
    note, floor = item.floor.unsteady, outcome.floor
    if not note and floor.source == "measured" and not item.raised:
        seen = floor.rel_l2 * floor.bound
        if floor.rel_l2 > BLIND:
            note = f"the floor itself is {floor.rel_l2:.1g} of the values: it says nothing here"
        elif seen > UNSEEN:
            note = f"only a change of {seen:.1g} times the values would have been seen here"
    return replace(outcome, verdict=Verdict.INCONCLUSIVE, note=note) if note else outcome


def judge_run(run: NoiseRun, floor: NoiseFloor, dtypes: Mapping[str, str]) -> list[Outcome]:
    """Judge a benign run as a candidate would be, by a floor that it is not part of.

    Args:
        run: What it measured.
        floor: The other runs.
        dtypes: Stored dtype of each tensor; those of other names are taken as the pair's coarser.
    """
    lookup = FloorLookup(floor, pair=run.pair)
    items = []
    for found in run.tensors:
        if not found.rel_l2 > 0:
            continue
        dtype = dtypes.get(found.name, coarser(*run.pair.split("/")))
        place = lookup.find(found.name, dtype=dtype)
        if place is not None:
            items.append(Measured(_metrics(found), place, found.structure))
    return judge(items)


def _metrics(run: RunMetrics) -> Metrics:
    return Metrics(
        count=1,
        rel_l2=run.rel_l2,
        max_abs=run.max_abs,
        max_abs_index=(),
        cosine_distance=0.0,
        norm_ratio=1.0,
        gain=1.0,
        rms_reference=1.0,
    )


def bounded(floor: Floor, *, tests: int) -> FloorUsed:
    """The floor of a tensor that needed no test, with the bound that a test would have had."""
    if "rel_l2" not in floor.tails:
        return floor.used
    critical = floor.tails["rel_l2"].critical(RATE / max(tests, 1))
    return floor.used.model_copy(update={"bound": _over(critical, floor.used.rel_l2)})


def _by_tails(item: Measured, rejected: set[str], level: float) -> Outcome:
    values, tails = item.values(), item.floor.tails
    used = item.floor.used
    bound = _over(tails["rel_l2"].critical(level), used.rel_l2)
    floor = used.model_copy(update={"bound": bound})
    found = tuple(
        Statistic(
            name=name,
            value=values[name],
            floor=tail.largest,
            bound=_over(tail.critical(level), tail.largest),
            ratio=_over(abs(values[name]), tail.largest),
        )
        for name, tail in tails.items()
        if name in values and name not in SIZES
    )
    ratios = {name: _over(values[name], tails[name].largest) for name in SIZES}
    metric = max(ratios, key=lambda key: ratios[key])
    if any(math.isnan(values[name]) for name in tails if name in values):
        return Outcome(Verdict.INVALID, math.nan, metric, "a metric is not a number", floor, found)
    if rejected:
        by_structure = [s for s in found if s.name in rejected]
        if not rejected & set(SIZES):
            worst = max(by_structure, key=lambda s: s.ratio / s.bound)
            return Outcome(
                Verdict.DRIFTED, worst.ratio, worst.name, _structured(worst), floor, found
            )
        return Outcome(Verdict.DRIFTED, ratios[metric], metric, "", floor, found)
    doubtful = [
        name
        for name, tail in tails.items()
        if name in values and tail.surprise(values[name], known=True) <= level
    ]
    if doubtful:
        name = max(doubtful, key=lambda n: _over(abs(values[n]), tails[n].largest))
        runs = max(tails[n].runs_to_decide(values[n], level) for n in doubtful)
        ratio = _over(abs(values[name]), tails[name].largest)
        note = f"{name} is between floor and bound: {runs} more benign runs would decide"
        return Outcome(Verdict.INCONCLUSIVE, ratio, name, note, floor, found)
    return Outcome(Verdict.EQUIVALENT, ratios[metric], metric, "", floor, found)


def _structured(statistic: Statistic) -> str:
    name = statistic.name.replace("_", " ")
    value = f"{1 + statistic.value:.6g}" if statistic.name == "gain" else f"{statistic.value:.1e}"
    return f"structure: {name} {value} ({statistic.ratio:.3g} x floor)"


def _by_ratio(item: Measured) -> Outcome:
    """Size against a floor that was not measured, or a tolerance."""
    values, floor = item.values(), item.floor.used
    size, peak = (_over(values[name], getattr(floor, name)) for name in SIZES)
    metric, ratio = ("max_abs", peak) if peak > size else ("rel_l2", size)
    if math.isnan(size) or math.isnan(peak):
        return Outcome(Verdict.INVALID, math.nan, metric, "a metric is not a number", floor)
    if ratio > floor.bound:
        return Outcome(Verdict.DRIFTED, ratio, metric, "", floor)
    within = Outcome(Verdict.EQUIVALENT, ratio, metric, "", floor)
    small = _over(values.get("bulk", 0.0), SHARE_OF_MINIMUM["bulk"] * floor.rel_l2)
    hidden = _hidden(values, small, within) if small > 1.0 else within
    if ratio <= 1.0 or hidden.verdict is Verdict.DRIFTED:
        return hidden
    return replace(within, verdict=Verdict.INCONCLUSIVE, note=item.floor.doubt)


def _hidden(values: Mapping[str, float], ratio: float, by_size: Outcome) -> Outcome:
    """A few large elements agree and hold the size; the many small ones do not agree."""
    floor = by_size.floor
    found = f"the smaller half of the elements differs by {values['bulk']:.1e} of its own size"
    if floor.source == "tolerance":  # of rel_l2 alone, as was asked for
        return replace(by_size, note=f"{found}, which rel_l2 does not show")
    gain = values.get("bulk_gain")
    if gain is not None and ratio > floor.bound:
        note = f"structure: the smaller half of the elements is scaled by {gain:.6g}"
        return Outcome(Verdict.DRIFTED, ratio, "bulk", note, floor)
    note = f"{found}; large ones hide it, or round it: measure a floor to decide"
    return Outcome(Verdict.INCONCLUSIVE, ratio, "bulk", note, floor)


def _over(value: float, floor: float) -> float:
    """value / floor; nothing over nothing is 0, and an infinite floor judges nothing."""
    if floor > 0:
        return 0.0 if math.isinf(floor) else value / floor
    return math.inf if value > 0 else 0.0


def rule_of(floors: Sequence[FloorUsed], *, tests: int = 0) -> Rule:
    """The rule that judged these rows, in one sentence with its numbers."""
    sources = sorted({f.source for f in floors})
    if sources == ["tolerance"]:
        limit = max((f.rel_l2 for f in floors), default=0.0)
        return Rule(name="tolerance", text=f"user tolerance: rel_l2 <= {limit:.3g}")
    pairs = ", ".join(sorted({f.pair for f in floors}))
    bounds = sorted({round(f.bound, 2) for f in floors})
    span = f"{bounds[0]:g} to {bounds[-1]:g}" if len(bounds) > 1 else f"{max(bounds, default=1):g}"
    if "measured" in sources:
        other = " (some floors are analytic)" if "analytic" in sources else ""
        return Rule(
            name="floor/2",
            text=(
                f"size and structure against the measured noise floor ({pairs}){other}: drifted "
                f"above {span} x floor by size, 1 false alarm in {1 / RATE:,.0f} checks"
                + (f" (Holm over {tests} tests)" if tests else "")
            ),
        )
    return Rule(
        name="size/1",
        text=(
            f"size against the {' and '.join(sources) or 'no'} noise floor ({pairs}): "
            f"rel_l2 and max_abs at most 1 x floor is equivalent, above {span} x drifted, "
            "between is inconclusive; the smaller half of the elements by itself"
        ),
    )
