"""Judge sides of which one holds moments, or moments and sketches, in place of tensors.

Moments alone can tell that two tensors differ, never that they agree. With sketches the distance
itself is estimated, and a verdict is given where the whole 95 % interval deserves it. An interval
misses the true distance in 5 % of cases, but only by a few per cent of its value: it takes a benign
tensor that close to its bound to make a false alarm of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import torch

from truestep.judge.floor import ANALYTIC, Floor, Limits
from truestep.judge.rows import (
    dtype_note,
    floors,
    nonfinite_note,
    one_sided,
    row_fields,
    shape_note,
)
from truestep.judge.rule import Measured, Outcome, bounded, judge
from truestep.keys import address
from truestep.measure.moments import moments
from truestep.measure.sketch import Estimate, estimate, sketch
from truestep.recording.columns import Table
from truestep.recording.readers import Source
from truestep.records import SKETCH_SIZE, STATS
from truestep.verdict import Metrics, Row, Rows, Rule, Verdict

_SUMMATION = 1e-12
"""Relative error of moments: the order of torch's float64 sums depends on the number of threads."""

_DOUBLE = 2.0**-53
"""Of float64 sums, the rounding."""

_SINGLE = 2e-6
"""Moments of a trace are summed in float32: two of them are that far apart, over the rms."""

FULL = "record at level full to decide"


def moment_rows(
    actual: Source,
    reference: Source,
    *,
    limits: Limits = ANALYTIC,
) -> Rows:
    """Judge two sides of which at least one holds moments only.

    No moment can differ by more of the reference's rms than the tensors do in rel. L2, so where one
    does by more than the bound, the tensors drifted. Nothing else can be said: a permutation has
    the same moments. Args and order are those of `compare_tensors`; `rel_l2` is the lower limit.
    """
    return Rows.of(_moment_rows(actual, reference, limits))


def _moment_rows(actual: Source, reference: Source, limits: Limits) -> Iterator[Row]:
    ours, theirs = _stand_ins(actual), _stand_ins(reference)
    floor_of = floors(limits)
    for name in chain(theirs, (name for name in ours if name not in theirs)):
        a, r = ours.get(name), theirs.get(name)
        base = row_fields(name, a, r, address(name))
        if a is None or r is None:
            yield Row(**{**base, **one_sided(a)})
            continue
        used = floor_of(name, a, r, structure=False)
        found = _judge_moments(
            _moments(actual, name, a), _moments(reference, name, r), used, tests=len(theirs)
        )
        if a.shape != r.shape:
            found = {"verdict": Verdict.INCOMPARABLE, "note": shape_note(a, r)}
        notes = (str(found["note"]), dtype_note(a, r))
        yield Row(**{**base, **found, "note": "; ".join(filter(None, notes))})


def _moments(source: Source, name: str, like: torch.Tensor) -> Mapping[str, float]:
    if source.manifest is None or source.manifest.level == "full":
        return _named(moments(like))
    read = getattr(source.tensors, "moments", None)
    if read is not None:
        return dict(zip(STATS, read(name), strict=True))
    return _named(source.tensors[f"stats/{name}"])


def _judge_moments(
    a: Mapping[str, float], r: Mapping[str, float], floor: Floor, *, tests: int
) -> dict[str, object]:
    if a["nonfinite"] or r["nonfinite"]:
        text = f"non-finite values: {a['nonfinite']:g} against {r['nonfinite']:g}"
        return {"verdict": Verdict.INVALID, "note": text}
    if not a["count"] and not r["count"]:
        return {"verdict": Verdict.INVALID, "note": "empty: there is nothing to compare"}
    if a["count"] != r["count"]:
        text = f"{a['count']:g} elements against {r['count']:g}"
        return {"verdict": Verdict.INCOMPARABLE, "note": text}
    blind = "moments cannot see a permutation: record at level full or sketch"
    gaps = {key: _gap(a[key], r[key], r["rms"]) for key in ("mean", "abs_mean", "rms")}
    worst = max(gaps, key=lambda key: gaps[key])
    apart = gaps[worst]
    counts = {"count": int(r["count"]), "nonfinite_actual": 0, "nonfinite_reference": 0}
    metrics = _metrics_of(r["rms"], _ratio(a["rms"], r["rms"]), apart, counts)
    used = bounded(floor, tests=tests)
    limit = used.rel_l2 * used.bound + _SINGLE
    ratio = _ratio(apart, used.rel_l2) if apart else 0.0
    told = {"metrics": metrics, "floor": used, "ratio": ratio, "ratio_metric": "rel_l2"}
    if apart > limit:
        text = f"{worst} differs by {apart:.1e} of the rms, so rel_l2 is at least that"
        return {**told, "verdict": Verdict.DRIFTED, "note": text}
    agree = "agree exactly" if dict(a) == dict(r) else f"differ by at most {apart:.1e} of the rms"
    return {**told, "verdict": Verdict.INCONCLUSIVE, "note": f"moments {agree}; {blind}"}


def _gap(actual: float, reference: float, rms: float) -> float:
    """How far two moments are apart, over the rms; infinite where that left float64."""
    if actual == reference:
        return 0.0
    gap = _ratio(abs(actual - reference), rms)
    return math.inf if math.isnan(gap) else gap


def _named(stats: torch.Tensor) -> dict[str, float]:
    return dict(zip(STATS, stats.tolist(), strict=True))


@dataclass(frozen=True)
class _Estimated:
    """A finite, not constant pair: metrics with the estimate, its interval, and what judges it.

    `equal` says that neither sketches nor moments differ.
    """

    metrics: Metrics
    low: float
    high: float
    equal: bool
    floor: Floor
    base: dict[str, Any] = field(default_factory=dict)

    def at(self, rel_l2: float) -> Measured:
        """The pair for the rule, were this its distance; a peak of 0 is no evidence of anything."""
        known = {"rel_l2": rel_l2, "max_abs": 0.0}
        return Measured(self.metrics.model_copy(update=known), self.floor)


def sketch_rows(
    actual: Source,
    reference: Source,
    *,
    limits: Limits = ANALYTIC,
) -> list[Row]:
    """Judge two sides of which at least one is a recording at level `sketch`.

    The other is sketched here. Args and order are those of `compare_tensors`. Of `Metrics`,
    `rel_l2` is the estimate, norm ratio and counts are exact, gain and cosine distance follow from
    those (gain is off by half the error of rel_l2^2), and `max_abs` is not known.
    """
    ours, theirs = _stand_ins(actual), _stand_ins(reference)
    floor_of = floors(limits)
    rows: list[dict[str, Any] | _Estimated] = []
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        a, r = ours.get(name), theirs.get(name)
        base = row_fields(name, a, r, address(name))
        if a is None or r is None:
            rows.append({**base, **one_sided(a)})
            continue
        if a.shape != r.shape:
            rows.append({**base, "verdict": Verdict.INCOMPARABLE, "note": shape_note(a, r)})
            continue
        if not a.numel():
            note = "empty: there is nothing to compare"
            rows.append({**base, "verdict": Verdict.INVALID, "note": note})
            continue
        if a.is_complex() or r.is_complex():
            note = "complex tensors cannot be judged"
            rows.append({**base, "verdict": Verdict.INVALID, "note": note})
            continue
        used = floor_of(name, a, r, structure=False)
        base["note"] = dtype_note(a, r)
        rows.append(_pair(_kept(actual, name, a), _kept(reference, name, r), used, base))
    return _judged(rows)


def _sketched(source: Source) -> bool:
    return source.manifest is not None and source.manifest.level == "sketch"


def _stand_ins(source: Source) -> Mapping[str, torch.Tensor]:
    """The tensors of a side, or where they were not kept, ones of their dtype and shape only."""
    if source.manifest is None or source.manifest.level == "full":
        return source.tensors
    return _StandIns(Table.of(source.manifest.tensors))


class _StandIns(Mapping[str, torch.Tensor]):
    """Tensors of a table without content, by name."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._table.value(name, "shape")
        if shape is None:
            raise KeyError(name)
        return _stand_in(shape, self._table.value(name, "dtype"))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._table.names.find(name) is not None

    def __iter__(self) -> Iterator[str]:
        return self._table.each("name")

    def __len__(self) -> int:
        return len(self._table)


@lru_cache(maxsize=4096)
def _stand_in(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


@dataclass(frozen=True)
class _Kept:
    """What level `sketch` keeps of a tensor, and the tensor or its stand-in."""

    like: torch.Tensor
    moments: Mapping[str, float]
    sketch: torch.Tensor

    @property
    def norm(self) -> float:
        """L2 norm; nan where the squares left the range of float64."""
        found = math.sqrt(self.moments["count"]) * self.moments["rms"]
        lost = found == 0.0 and not self.moments["max"] == self.moments["min"] == 0.0
        return math.nan if lost else found

    @property
    def constant(self) -> bool:
        """As `distance.is_constant`."""
        return self.one_value and self.like.is_floating_point() and self.like.numel() > 1

    @property
    def one_value(self) -> bool:
        """As `rows.one_value`."""
        return self.moments["min"] == self.moments["max"]


def _kept(source: Source, name: str, like: torch.Tensor) -> _Kept:
    projected = source.tensors[f"sketch/{name}"] if _sketched(source) else sketch(like)
    return _Kept(like, _moments(source, name, like), projected)


def _pair(a: _Kept, r: _Kept, floor: Floor, base: dict[str, Any]) -> dict[str, Any] | _Estimated:
    """What needs no rule to be judged, or the estimated pair for the rule."""
    counts = {
        "count": int(min(a.moments["count"], r.moments["count"])),
        "nonfinite_actual": int(a.moments["nonfinite"]),
        "nonfinite_reference": int(r.moments["nonfinite"]),
    }
    if counts["nonfinite_actual"] or counts["nonfinite_reference"]:
        metrics = _metrics(a, r, math.nan, counts)
        plain = {"verdict": Verdict.INVALID, "note": nonfinite_note(metrics), "metrics": metrics}
        return {**base, **plain, "floor": floor}
    if a.moments["count"] != r.moments["count"]:
        note = f"{a.moments['count']:g} elements against {r.moments['count']:g}"
        return {**base, "verdict": Verdict.INCOMPARABLE, "note": note}
    found = estimate(a.sketch, r.sketch, norm=r.norm, count=counts["count"])
    equal = found.rel_l2 == 0.0 and _same_moments(a.moments, r.moments)
    found = _narrowed(found, a, r, equal=equal)
    metrics = _metrics(a, r, found.rel_l2, counts)
    constant = [side for side, kept in (("actual", a), ("reference", r)) if kept.constant]
    inner = base["stage"] == "module" and a.one_value and r.one_value  # as in `rows`
    if constant and not equal and not inner:
        value = (a if constant[0] == "actual" else r).moments["min"]
        note = f"the {' and the '.join(constant)} side holds one value everywhere ({value:g})"
        plain = {"verdict": Verdict.INVALID, "note": note, "metrics": metrics}
        return {**base, **plain, "floor": floor}
    return _Estimated(metrics, found.low, found.high, equal, floor, base)


def _same_moments(a: Mapping[str, float], r: Mapping[str, float]) -> bool:
    exact = all(a[key] == r[key] for key in ("min", "max"))
    return exact and math.isclose(a["rms"], r["rms"], rel_tol=_SUMMATION)


def _narrowed(found: Estimate, a: _Kept, r: _Kept, *, equal: bool) -> Estimate:
    """The estimate within what the norms alone say: | |a| - |r| | <= |a - r| <= |a| + |r|."""
    whole = not a.like.is_floating_point() and not r.like.is_floating_point()
    if equal and whole and found.high * r.norm < 1.0:  # less than the least that integers differ by
        return Estimate(0.0, 0.0, 0.0)
    if equal and _seen_by_moments(a, r):
        return Estimate(0.0, 0.0, _DOUBLE * math.sqrt(a.like.numel()))
    ratio = _ratio(a.norm, r.norm)
    if equal or math.isnan(ratio):
        return found
    low = max(found.low, abs(ratio - 1.0) - _SUMMATION)
    high = max(min(found.high, (ratio + 1.0) * (1.0 + _SUMMATION)), low)
    value = found.rel_l2
    return Estimate(value if math.isnan(value) else min(max(value, low), high), low, high)


def _seen_by_moments(a: _Kept, r: _Kept) -> bool:
    """Whether the moments of a short tensor say more than its sketch, which is in float32: they
    are sums in float64, in which a change of one element shows down to that dtype's rounding."""
    wide = a.like.dtype == r.like.dtype == torch.float64
    return wide and a.like.numel() <= SKETCH_SIZE and dict(a.moments) == dict(r.moments)


def _ratio(actual: float, reference: float) -> float:
    if reference:
        return actual / reference
    return math.inf if actual else 1.0


def _metrics(a: _Kept, r: _Kept, rel_l2: float, counts: Mapping[str, int]) -> Metrics:
    return _metrics_of(r.moments["rms"], _ratio(a.norm, r.norm), rel_l2, counts)


def _metrics_of(rms: float, ratio: float, rel_l2: float, counts: Mapping[str, int]) -> Metrics:
    """Metrics with gain and cosine distance from |a|^2 = |r|^2 + 2 (a - r) r + |a - r|^2."""
    gain = cosine = math.nan
    if math.isfinite(rel_l2 + ratio):
        gain = 1.0 + ((ratio - 1.0) * (ratio + 1.0) - rel_l2 * rel_l2) / 2.0
        spread = rel_l2 * rel_l2 - (ratio - 1.0) * (ratio - 1.0)
        cosine = min(max(spread / (2.0 * ratio), 0.0), 2.0) if ratio else 1.0
    return Metrics(
        rel_l2=rel_l2,
        max_abs=math.nan,
        max_abs_index=(),
        cosine_distance=cosine,
        norm_ratio=ratio,
        gain=gain,
        rms_reference=rms,
        **counts,
    )


def _judged(rows: Sequence[dict[str, Any] | _Estimated]) -> list[Row]:
    """Ask the rule at both ends of every interval, and for the ratio to show."""
    items = [row for row in rows if isinstance(row, _Estimated)]
    shown = [
        item.high if item.equal else item.low if math.isnan(value) else value
        for item in items
        for value in (item.metrics.rel_l2,)
    ]
    lows = judge([item.at(item.low) for item in items])
    highs = judge([item.at(item.high) for item in items])
    ratios = judge([item.at(value) for item, value in zip(items, shown, strict=True)])
    outcomes = zip(lows, highs, ratios, strict=True)
    tests = 2 * len(items)
    found = []
    for row in rows:
        if isinstance(row, _Estimated):
            low, high, middle = next(outcomes)
            found.append(_row(row, low, high, ratio=middle.ratio))
        else:
            floor = row.get("floor")
            found.append(Row(**{**row, "floor": bounded(floor, tests=tests) if floor else None}))
    return found


def _row(item: _Estimated, low: Outcome, high: Outcome, *, ratio: float) -> Row:
    span = f"{item.metrics.rel_l2:.2e} ({item.low:.2e} to {item.high:.2e})"
    blind = f"a change below {item.high:.1e} is not seen"
    limit = low.floor.rel_l2 * low.floor.bound
    parts = [f"sketch: {span}"]
    verdict = Verdict.INCONCLUSIVE
    if low.verdict is Verdict.DRIFTED:
        verdict = Verdict.DRIFTED
    elif high.verdict is Verdict.EQUIVALENT:
        verdict = Verdict.EQUIVALENT
        if item.equal:
            parts.append("sketches agree exactly" + (f" ({blind})" if item.high else ""))
    elif item.equal:
        parts.append(f"sketches agree exactly, but {blind} and the bound is {limit:.2e}: {FULL}")
    elif high.verdict is Verdict.DRIFTED:
        parts = [f"sketch: estimate {span} straddles the bound {limit:.2e}: {FULL}"]
    elif low.verdict is Verdict.EQUIVALENT:
        parts = [f"sketch: estimate {span} reaches over the floor {low.floor.rel_l2:.2e}: {FULL}"]
    else:
        parts.append(low.note)
    parts.append(item.base["note"])
    return Row(
        **{
            **item.base,
            "verdict": verdict,
            "metrics": item.metrics,
            "floor": low.floor,
            "ratio": ratio,
            "ratio_metric": "rel_l2",
            "note": "; ".join(part for part in parts if part),
        }
    )


def sketch_rule(rows: Sequence[Row]) -> Rule:
    """The rule that judged the rows of `sketch_rows`, in one sentence with its numbers."""
    floors = [row.floor for row in rows if row.floor and row.floor.rel_l2]  # 0: whole numbers
    sources = sorted({floor.source for floor in floors})
    head = "rel_l2 is estimated from sketches, and its whole 95 % interval judged"
    if sources == ["tolerance"]:
        return Rule(
            name="sketch/1", text=f"{head}: user tolerance {max(f.rel_l2 for f in floors):.3g}"
        )
    pairs = ", ".join(sorted({floor.pair for floor in floors}))
    bounds = sorted({round(floor.bound, 2) for floor in floors})
    span = f"{bounds[0]:g} to {bounds[-1]:g}" if len(bounds) > 1 else f"{max(bounds, default=1):g}"
    return Rule(
        name="sketch/1",
        text=(
            f"{head} against the {' and '.join(sources) or 'no'} noise floor ({pairs}): "
            f"drifted above {span} x floor, inconclusive where it straddles that"
        ),
    )
