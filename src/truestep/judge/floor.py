"""Noise floor: how far a trusted run is from itself under benign variation.

Pure: no I/O, no torch, no knowledge of how the runs were made. Values are kept run by run and
relative to the reference (rel_l2, and everything else over the reference's rms), so that a floor
measured at some steps can judge the others.

A tensor's floor is more than its largest benign value: from the runs a tail is fitted that says
how surprising a larger value would be. Sizes (norms) are log-normal to good approximation, with a
spread that is shared by all tensors of a stage; statistics with a sign (gain) are normal around
zero. Few runs make wider tails (Student's t), and a prior, chosen on the public fault corpus,
stands in where there are hardly any.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import stdev

from truestep.errors import UsageError
from truestep.floors import EPSILON, FREELY, NoiseFloor, NoiseRun, RunMetrics
from truestep.judge.tail import Tail, modes
from truestep.keys import FREE_RUN, is_prediction, key_of, spread_key, stage_key
from truestep.verdict import FloorUsed

UNASKED = frozenset({"float8_e4m3fn", "float8_e5m2"})
"""Dtypes so coarse that their own rounding hides most faults: no floor is assumed for them unless
they are asked for by name, and what is stored in one is judged by what was measured alone."""

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

SIGNED = frozenset({"gain", "correlation"})
"""Statistics with a sign, zero on average where there is no structure."""

SHARE_OF_MINIMUM: Mapping[str, float] = {
    "rel_l2": 1.0,
    "max_abs": PEAK_SIGMA,
    "gain": 1.0,
    "correlation": 0.0,
    "channel_mean": 1.0,
    "frame_energy": 2.0,
    "row_energy": 2.0,
    "token_energy": PEAK_SIGMA / 2,
    "bulk": 3.0,
}
"""Least floor of each statistic, in multiples of that of rel_l2. The smaller half of normal
elements has 0.38 of the size, so that equal noise is 2.65 times as large beside it; blocks with a
channel up to 1e6 times the others measured 2.8. A matrix product that accumulates in float32 may
round with a bias: split into bfloat16 parts (matmul precision `high` on CPU) it measured a gain of
1.5 epsilon."""

NARROW_SHARE = 0.25
"""The same for gain and channel mean in 16 bits and less, where products accumulate in float32:
what is left is a constant folded into a weight, up to an eighth of an epsilon."""

PRIOR_SPREAD, PRIOR_FREEDOM = 0.2, 10.0
"""What is assumed of the log-spread of benign sizes before any is measured, and its weight in runs:
kinds of benign change measured 0.02 to 0.3 on the fault corpus's subjects (`bench/faults`)."""

LEAST_SPREAD = 0.1
"""A benign change of a kind that was not tried may be larger than all that were: two independent
roundings are the square root of two apart, and bounds are then 1.7 x the typical value or more."""

ELSEWHERE = frozenset({"instructions", "functions"})
"""Kinds of run that stand for another machine or library."""

OTHER_OUTCOME = 2.0
"""A run of `ELSEWHERE` that is further off than this times the others is an outcome of its own: a
third machine is then as far off as that one, not as the others. Other instructions measured up to
1.4 times the others on Wan, 2.5 on a recurrent detector, 5 on LTX-2, 7 on Flux."""


def sample_sizes(runs: Iterable[NoiseRun]) -> dict[str, float]:
    """Noise of each prediction in the first run that has any: weights of their mean.

    Returns:
        Name to rel_l2; empty until a run made every prediction that it replayed differ.
    """
    for run in runs:
        found = {m.name: m.rel_l2 for m in run.tensors if is_prediction(m.name)}
        if len(found) > 1 and all(found.values()):
            return found
    return {}


def pair_of(actual_dtype: str, reference_dtype: str) -> str:
    """Name of a pair of working precisions, candidate first."""
    return f"{actual_dtype}/{reference_dtype}"


def pair_for(name: str, pair: str) -> str:
    """The pair that a tensor is judged with: raised ones have the precision they were raised to."""
    raised = key_of(name).precision
    return pair_of(raised, raised) if raised else pair


def coarser(first: str, second: str) -> str:
    """The dtype with the larger epsilon; integers and booleans count as exact."""
    return first if EPSILON.get(first, 0.0) >= EPSILON.get(second, 0.0) else second


def minimum_floor(dtype: str) -> float:
    """Smallest rel_l2 floor for tensors stored in `dtype`."""
    dtype = "float32" if dtype in UNASKED else dtype
    return MINIMUM_ULPS.get(dtype, 0.5) * EPSILON.get(dtype, 0.0)


def declared_pair(floor: NoiseFloor | None) -> str:
    """Working precision of the trusted side, of both sides of a check that says nothing else."""
    working = floor.runs[0].pair.partition("/")[2] if floor and floor.runs else ""
    return pair_of(working, working) if working else ""


def unsteady(runs: Iterable[NoiseRun]) -> dict[str, float]:
    """Tensors that the same run gave differently a second time, by far more than it rounds.

    Random numbers without a seed and state between calls do this. A floor of such runs holds
    anything, so it judges nothing.

    Returns:
        Name to rel_l2.
    """
    return {
        found.name: found.rel_l2
        for run in runs
        if run.kind == "repeat"
        for found in run.tensors
        if not (found.rel_l2 <= repeat_limit(run.pair) or found.name.endswith(FREE_RUN))
    }


def repeat_limit(pair: str) -> float:
    """Largest rel_l2 between two runs of the same thing that is still rounding."""
    return ANALYTIC_BOUND * _default_floor(coarser(*pair.split("/")))


@dataclass(frozen=True)
class Floor:
    """What judges one tensor: a floor by size for the report, and a tail for each statistic.

    Without tails (analytic floors, tolerances) the size alone is judged, by ratio.

    Attributes:
        doubt: Without tails: what is said of a result between floor and bound.
        unsteady: Why nothing is equivalent by this floor, if so.
    """

    used: FloorUsed
    tails: Mapping[str, Tail] = field(default_factory=dict)
    doubt: str = "between the analytic floor and its bound: measure a floor to decide"
    unsteady: str = ""


@dataclass(frozen=True)
class Limits:
    """How far is too far, in one check: what the reference's runs measured, or a number.

    Attributes:
        floor: The reference's measured noise floor.
        pair: Declared working precisions, `candidate/reference`; default those of the floor's own
            runs. Without either, a candidate coarser than the reference is `inconclusive` where
            only its dtype's rounding could explain the difference.
        tolerance: Limit on rel_l2 that judges in the place of both.
        raised: The same tensors are judged in a higher precision as well. There the structure of a
            residual is that of a fault. In 16 bits it is that of rounding: all tokens share the one
            rounding of what modulates them, which is as large as any other. Size alone is judged.

    Raises:
        UsageError: The tolerance is no number, negative or not finite.
    """

    floor: NoiseFloor | None = None
    pair: str | None = None
    tolerance: float | None = None
    raised: bool = False

    def __post_init__(self) -> None:
        limit = self.tolerance
        if limit is None:
            return
        if not isinstance(limit, int | float) or not 0 <= limit < math.inf:
            raise UsageError(
                f"tolerance = {limit!r} cannot judge anything",
                measured="a limit on rel_l2 is a number from 0 up, and finite",
            )


ANALYTIC = Limits()
"""Where nothing was measured and nothing asked for: floors of the dtypes."""


def analytic_floor(actual_dtype: str, reference_dtype: str, *, asked: str = "") -> Floor:
    """Precision-scaled default floor for a pair of dtypes, where none was measured.

    Args:
        actual_dtype, reference_dtype: Of the two sides.
        asked: The dtype that was asked for, where that is not the coarser of the two: it sets the
            floor, and what only the other one's rounding could explain is left undecided.
    """
    widest = coarser(actual_dtype, reference_dtype)
    dtype = asked or widest
    rel_l2, most = _default_floor(dtype), _default_floor(widest)
    detail = f"{DEFAULT_ULPS.get(dtype, 1.0):g} x epsilon of {dtype}; no floor was measured"
    used = FloorUsed(
        rel_l2=rel_l2,
        max_abs=PEAK_SIGMA * rel_l2,
        bound=ANALYTIC_BOUND * max(most / rel_l2, 1.0) if rel_l2 else ANALYTIC_BOUND,
        source="analytic",
        pair=pair_of(actual_dtype, reference_dtype),
        detail=detail,
    )
    if not most > rel_l2:
        return Floor(used)
    doubt = f"within the rounding of {widest}, which nobody asked for: a tolerance of {most:.2g}"
    return Floor(used, doubt=f"{doubt} judges by it")


def _default_floor(dtype: str) -> float:
    return DEFAULT_ULPS.get(dtype, 1.0) * EPSILON.get(dtype, 0.0)


def tolerance_floor(tolerance: float, *, pair: str) -> Floor:
    """A user's limit on rel_l2."""
    return Floor(
        FloorUsed(
            rel_l2=tolerance,
            max_abs=math.inf,
            bound=1.0,
            source="tolerance",
            pair=pair,
            detail="given by the user",
        )
    )


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
        found = unsteady(floor.runs) if floor else {}
        self._unsteady = {stage_key(name): size for name, size in found.items()}
        self._spreads: dict[tuple[str, str], tuple[float, float]] = {}
        self._shares: dict[str, tuple[float, float]] = {}
        self._places: dict[tuple[str, str, bool], Floor | None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def find(self, name: str, *, dtype: str, structure: bool = True) -> Floor | None:
        """Floor of a tensor, or None if no run covers its stage.

        Runs at the tensor's own step are preferred; otherwise all steps of its stage count.

        Args:
            name: Tensor name, e.g. `step/0007/cond`.
            dtype: The reference's stored dtype. With that of the trusted runs it bounds the floor
                from below; a candidate's own has no say.
            structure: Fit the tails of structure statistics too.
        """
        if not self._by_name:
            return None
        key = (name if name in self._by_name else stage_key(name), dtype, structure)
        if key not in self._places:
            self._places[key] = self._find(name, dtype=dtype, structure=structure)
        return self._places[key]

    def _find(self, name: str, *, dtype: str, structure: bool) -> Floor | None:
        exact = self._by_name.get(name)
        found = exact or [
            item for other in self._of_stage(stage_key(name)) for item in self._by_name[other]
        ]
        if not found:
            return None
        own = [m for _, m in found]
        for metrics in own:
            dtype = coarser(metrics.dtype, dtype)
        least = minimum_floor(dtype)
        wanted = {key: None for m in own for key in m.structure} if structure else {}
        tails = {
            key: self._tail(key, found, name, least * _least_share(key, dtype))
            for key in ("rel_l2", "max_abs", *wanted)
            if key in SHARE_OF_MINIMUM
        }
        return Floor(self._used(found, tails, least, dtype, own_step=exact is not None), tails)

    def unsteady(self, name: str) -> str:
        """Why the reference cannot judge a tensor, or nothing."""
        size = self._unsteady.get(stage_key(name)) if self._unsteady else None
        if size is None:
            return ""
        return (
            f"the reference cannot judge: the trusted side differed from itself by rel_l2 "
            f"{size:.1e} when it was run again; record it again with fixed random numbers"
        )

    def _tail(
        self,
        statistic: str,
        found: Sequence[tuple[NoiseRun, RunMetrics]],
        name: str,
        least: float,
    ) -> Tail:
        here, others = _values(statistic, found)
        seen = [v for v in ({**here, **others}).values() if v]
        largest = max([least, *seen])
        if statistic in SIGNED:
            rms, freedom = self._gain_share(spread_key(name))
            size = 1.0
            if statistic != "correlation":
                width, _ = self._spread("rel_l2", spread_key(name))
                size = _geometric(_outcome(*_values("rel_l2", found), least)) * math.exp(width**2)
            scale = max(size * rms, least / 3, 1e-30)
            return Tail(scale, 0.0, freedom, len(seen), largest)
        upper = _outcome(here, others, least)
        spread, freedom = self._spread(statistic, spread_key(name))
        spread = math.hypot(spread, _between_steps(statistic, found))
        if not upper or max(upper) <= least:  # bit-equal, or below what can be told apart
            return Tail(least, max(spread, LEAST_SPREAD), math.inf, len(seen), least)
        return Tail(max(_geometric(upper), least / 2), spread, freedom, len(upper), largest)

    def _spread(self, statistic: str, key: str) -> tuple[float, float]:
        """Log-spread of a size within the tensors of a stage, and its degrees of freedom."""
        if (statistic, key) not in self._spreads:
            squares, freedom = PRIOR_FREEDOM * PRIOR_SPREAD**2, PRIOR_FREEDOM
            for name in self._of_spread.get(key, ()):
                here, others = _values(statistic, self._by_name[name])
                _, together = modes([*here.values(), *others.values()])
                upper = [v for v in here.values() if v in together] or modes(here.values())[1]
                logs = [math.log(v) for v in upper]
                mean = sum(logs) / len(logs) if logs else 0.0
                squares += sum((v - mean) ** 2 for v in logs)
                freedom += max(len(logs) - 1, 0)
            spread = max(math.sqrt(squares / freedom), LEAST_SPREAD)
            self._spreads[statistic, key] = spread, freedom
        return self._spreads[statistic, key]

    def _gain_share(self, key: str) -> tuple[float, float]:
        """Rms of gain over rel_l2 (the correlation) within a stage, and its degrees of freedom."""
        if key not in self._shares:
            shares = [
                m.structure["gain"] / m.rel_l2
                for name in self._of_spread.get(key, ())
                for m in _distinct(m for _, m in self._by_name[name] if m.rel_l2 > 0)
                if "gain" in m.structure
            ]
            count = max(len(shares), 1)
            rms = math.sqrt(sum(v * v for v in shares) / count)
            self._shares[key] = rms, float(count)
        return self._shares[key]

    def _used(
        self,
        found: Sequence[tuple[NoiseRun, RunMetrics]],
        tails: Mapping[str, Tail],
        least: float,
        dtype: str,
        *,
        own_step: bool,
    ) -> FloorUsed:
        """The floor as the report shows it; the rule fills in the bound."""
        largest_run, largest = max(found, key=lambda item: item[1].rel_l2)
        lower, upper = modes(m.rel_l2 for _, m in found)
        if largest.rel_l2 > least:
            detail = f"largest: {largest_run.kind} ({largest_run.detail})"
        else:
            detail = f"analytic minimum of {dtype} (benign runs: {largest.rel_l2:.1e})"
        if lower and upper and max(upper) > least:
            detail += (
                f"; two outcomes: {len(lower)} runs near {_geometric(lower):.1e}, "
                f"{len(upper)} near {_geometric(upper):.1e}"
            )
        if not own_step:
            detail += "; measured at other steps of this stage"
        return FloorUsed(
            rel_l2=tails["rel_l2"].largest,
            max_abs=tails["max_abs"].largest,
            bound=1.0,
            source="measured",
            pair=self._pair,
            runs=len({id(run) for run, _ in found}),
            detail=detail,
        )

    @cached_property
    def _stages(self) -> Mapping[str, list[str]]:
        by_stage = defaultdict(list)
        for name in self._by_name:
            by_stage[stage_key(name)].append(name)
        return by_stage

    @cached_property
    def _of_spread(self) -> Mapping[str, list[str]]:
        by_spread = defaultdict(list)
        for name in self._by_name:
            by_spread[spread_key(name)].append(name)
        return by_spread

    def _of_stage(self, key: str) -> list[str]:
        return self._stages.get(key, [])


_Sizes = dict[tuple[str, float, float], float]


def _values(statistic: str, found: Iterable[tuple[NoiseRun, RunMetrics]]) -> tuple[_Sizes, _Sizes]:
    """Sizes of a statistic: what runs made here, and what stands for `ELSEWHERE`.

    Runs that gave the very same numbers are one piece of evidence, not several.
    """
    here: _Sizes = {}
    others: _Sizes = {}
    for run, m in found:
        if m.rel_l2 > 0:
            side = others if run.kind in ELSEWHERE else here
            side[m.name, m.rel_l2, m.max_abs] = abs(m.value(statistic))
    return here, others


def _outcome(here: _Sizes, others: _Sizes, least: float) -> list[float]:
    """Benign sizes that a further one would be like: those of the larger outcome."""
    _, without = modes(here.values())
    most = max(others.values(), default=0.0)
    if most > OTHER_OUTCOME * max(_geometric(without), least / 2):
        return [most]
    return modes({**here, **others}.values())[1]


def _between_steps(statistic: str, found: Sequence[tuple[NoiseRun, RunMetrics]]) -> float:
    """Log-spread of a size between the steps that stand for one without runs; 0 of one step."""
    if len({metrics.name for _, metrics in found}) == 1:
        return 0.0
    by_name: dict[str, list[float]] = defaultdict(list)
    for run, metrics in found:
        value = abs(metrics.value(statistic))
        if value > 0 and run.kind not in ELSEWHERE:
            by_name[metrics.name].append(math.log(value))
    means = [sum(logs) / len(logs) for logs in by_name.values()]
    return stdev(means) if len(means) > 1 else 0.0


def _least_share(statistic: str, dtype: str) -> float:
    narrow = EPSILON.get(dtype, 0.0) > EPSILON["float32"]
    if narrow and statistic in {"gain", "channel_mean"}:
        return NARROW_SHARE
    return SHARE_OF_MINIMUM[statistic]


def _distinct(metrics: Iterable[RunMetrics]) -> list[RunMetrics]:
    """Runs that gave the very same numbers are one piece of evidence, not several."""
    return list({(m.name, m.rel_l2, m.max_abs): m for m in metrics}.values())


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else 0.0


def free_running(floor: NoiseFloor | None) -> NoiseFloor | None:
    """The floor of free generations: what the runs measured of `latent/final` without replay."""
    if floor is None:
        return None
    runs = []
    for run in floor.runs:
        found = [m for m in run.tensors if m.name.endswith(FREE_RUN)]
        if found:
            renamed = tuple(
                m.model_copy(update={"name": m.name.replace(FREE_RUN, "latent/final")})
                for m in found
            )
            # Chance grows over a free run: a repeat that is far off there is no unsteady reference.
            kind = f"{FREELY}{run.kind}"
            runs.append(run.model_copy(update={"kind": kind, "tensors": renamed}))
    return NoiseFloor(runs=tuple(runs)) if runs else None
