"""Noise floor: how far a trusted run is from itself under benign variation, and the rule by size.

Pure: no I/O, no torch, no knowledge of how the runs were made.

Floors are kept run by run and relative (rel_l2, and max_abs over the reference's rms), so that a
floor measured at some steps can judge the others.
"""

from __future__ import annotations

import math

from pydantic import Field

from truestep.verdict import Float, FloorUsed, Metrics, Record, Rule, Verdict

EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
    "float8_e5m2": 2.0**-2,
}
"""Distance from 1 to the next number, per dtype."""

MINIMUM_ULPS = {"float64": 2.0, "float32": 2.0}
"""The floor used is never below this many epsilon (half of one for 16-bit and narrower dtypes: one
rounding to nearest is 0.29 epsilon of an element)."""

DEFAULT_ULPS = {"float64": 32.0, "float32": 32.0}
"""Analytic floor where none was measured, in epsilon. Matrix products accumulate in the working
dtype for 32-bit and wider (rounding grows with the square root of the depth: 1 against 2 threads
measured 42 epsilon on a Wan transformer), and in float32 for narrower ones (a bf16 Wan forward
measured 0.75 epsilon): 1."""

PEAK_SIGMA = 16.0
"""Analytic floor of max_abs over rms, in multiples of the rel_l2 floor (heavy-tailed rounding)."""

ANALYTIC_BOUND = 4.0
"""Above this multiple of an analytic floor a result is drifted; below it, inconclusive."""


class RunMetrics(Record):
    """Distance of one tensor of one benign run from the reference."""

    name: str
    rel_l2: Float
    max_abs: Float = Field(description="over the rms of the reference")


class NoiseRun(Record):
    """One benign run. `pair` is `candidate dtype/reference dtype`."""

    kind: str
    detail: str
    pair: str
    tensors: tuple[RunMetrics, ...]


class NoiseFloor(Record):
    """Benign runs of one reference, kept run by run."""

    runs: tuple[NoiseRun, ...] = ()

    def pairs(self) -> tuple[str, ...]:
        """Precision pairs for which at least one run exists."""
        return tuple(sorted({run.pair for run in self.runs}))


def stage_key(name: str) -> str:
    """Name without its step: floors of one stage are shared over steps (`step/*/cond`)."""
    parts = name.split("/")
    return "/".join(["step", "*", *parts[2:]]) if parts[0] == "step" and len(parts) > 2 else name


def pair_of(actual_dtype: str, reference_dtype: str) -> str:
    """Name of a pair of working precisions, candidate first."""
    return f"{actual_dtype}/{reference_dtype}"


def coarser(first: str, second: str) -> str:
    """The dtype with the larger epsilon; integers and booleans count as exact."""
    return first if EPSILON.get(first, 0.0) >= EPSILON.get(second, 0.0) else second


def minimum_floor(dtype: str) -> float:
    """Smallest rel_l2 floor for tensors stored in `dtype`."""
    return MINIMUM_ULPS.get(dtype, 0.5) * EPSILON.get(dtype, 0.0)


def analytic_floor(actual_dtype: str, reference_dtype: str) -> FloorUsed:
    """Precision-scaled default floor for a pair of dtypes, where none was measured."""
    dtype = coarser(actual_dtype, reference_dtype)
    ulps = DEFAULT_ULPS.get(dtype, 1.0)
    rel_l2 = ulps * EPSILON.get(dtype, 0.0)
    return FloorUsed(
        rel_l2=rel_l2,
        max_abs=PEAK_SIGMA * rel_l2,
        bound=ANALYTIC_BOUND,
        source="analytic",
        pair=pair_of(actual_dtype, reference_dtype),
        detail=f"{ulps:g} x epsilon of {dtype}; no floor was measured",
    )


def bound_for(runs: int) -> float:
    """Multiple of the largest benign value above which a result is drifted.

    Widens as 1 + 3/sqrt(n): with few runs the largest of them says little about the next one.
    """
    return 1.0 + 3.0 / math.sqrt(max(runs, 1))


def runs_to_decide(ratio: float) -> int:
    """Benign runs after which a result at `ratio` times the floor is no longer inconclusive."""
    return math.ceil((3.0 / (ratio - 1.0)) ** 2) + 1 if ratio > 1 else 0


class FloorLookup:
    """A noise floor's runs of one precision pair, by tensor."""

    def __init__(self, floor: NoiseFloor | None, *, pair: str) -> None:
        self._pair = pair
        self._by_name: dict[str, list[tuple[NoiseRun, RunMetrics]]] = {}
        for run in floor.runs if floor else ():
            if run.pair != pair:
                continue
            for metrics in run.tensors:
                self._by_name.setdefault(metrics.name, []).append((run, metrics))

    def find(self, name: str, *, dtype: str) -> FloorUsed | None:
        """Floor of a tensor, or None if no run covers its stage.

        Runs at the tensor's own step are preferred; otherwise all steps of its stage count.

        Args:
            name: Tensor name, e.g. `step/0007/cond`.
            dtype: Coarser stored dtype of the two tensors; bounds the floor from below.
        """
        exact = self._by_name.get(name)
        found = exact or self._of_stage(stage_key(name))
        if not found:
            return None
        largest_run, largest = max(found, key=lambda item: item[1].rel_l2)
        least = minimum_floor(dtype)
        count = len({id(run) for run, _ in found})
        return FloorUsed(
            rel_l2=max(largest.rel_l2, least),
            max_abs=max(max(m.max_abs for _, m in found), PEAK_SIGMA * least),
            bound=bound_for(count),
            source="measured",
            pair=self._pair,
            runs=count,
            detail=(
                f"largest: {largest_run.kind} ({largest_run.detail})"
                if largest.rel_l2 > least
                else f"analytic minimum of {dtype} (benign runs: {largest.rel_l2:.1e})"
            )
            + ("" if exact else "; measured at other steps of this stage"),
        )

    def _of_stage(self, key: str) -> list[tuple[NoiseRun, RunMetrics]]:
        return [
            item
            for name, items in self._by_name.items()
            if stage_key(name) == key
            for item in items
        ]


def judge(metrics: Metrics, floor: FloorUsed) -> tuple[Verdict, float, str, str]:
    """Verdict by size of a finite, non-constant, not identical pair.

    Returns:
        Verdict, largest ratio, the metric it is of, and a note.
    """
    relative_peak = _over(metrics.max_abs, metrics.rms_reference)
    ratios = {
        "rel_l2": _over(metrics.rel_l2, floor.rel_l2),
        "max_abs": _over(relative_peak, floor.max_abs),
    }
    metric = max(ratios, key=lambda key: ratios[key])
    ratio = ratios[metric]
    if any(math.isnan(value) for value in ratios.values()):
        return Verdict.INVALID, math.nan, metric, "a metric is not a number"
    if ratio <= 1.0:
        return Verdict.EQUIVALENT, ratio, metric, ""
    if ratio > floor.bound:
        return Verdict.DRIFTED, ratio, metric, ""
    if floor.source == "analytic":
        note = "between the analytic floor and its bound: measure a floor to decide"
    else:
        note = f"between floor and bound: {runs_to_decide(ratio)} benign runs would decide"
    return Verdict.INCONCLUSIVE, ratio, metric, note


def _over(value: float, floor: float) -> float:
    """value / floor; nothing over nothing is 0, and an infinite floor judges nothing."""
    if floor > 0:
        return 0.0 if math.isinf(floor) else value / floor
    return math.inf if value > 0 else 0.0


def size_rule(floors: list[FloorUsed]) -> Rule:
    """The rule that judged these rows, in one sentence with its numbers."""
    sources = sorted({f.source for f in floors})
    if sources == ["tolerance"]:
        limit = max((f.rel_l2 for f in floors), default=0.0)
        return Rule(name="tolerance", text=f"user tolerance: rel_l2 <= {limit:.3g}")
    bounds = sorted({round(f.bound, 2) for f in floors})
    span = f"{bounds[0]:g} to {bounds[-1]:g}" if len(bounds) > 1 else f"{max(bounds, default=1):g}"
    pairs = ", ".join(sorted({f.pair for f in floors}))
    return Rule(
        name="size/1",
        text=(
            f"size against the {' and '.join(sources) or 'no'} noise floor ({pairs}): "
            f"rel_l2 and max_abs at most 1 x floor is equivalent, above {span} x drifted, "
            "between is inconclusive"
        ),
    )


FREE_RUN = "run/final"
"""Name under which a run keeps the metrics of the final latent of a free generation."""


def free_running(floor: NoiseFloor | None) -> NoiseFloor | None:
    """The floor of free generations: what the runs measured of `latent/final` without replay."""
    if floor is None:
        return None
    runs = []
    for run in floor.runs:
        found = [m for m in run.tensors if m.name == FREE_RUN]
        if found:
            renamed = tuple(m.model_copy(update={"name": "latent/final"}) for m in found)
            runs.append(run.model_copy(update={"tensors": renamed}))
    return NoiseFloor(runs=tuple(runs)) if runs else None
