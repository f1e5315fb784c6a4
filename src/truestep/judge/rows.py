"""Match the tensors of two sides, judge every pair, and sum up. Pure: no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch

from truestep.environment import library_version
from truestep.floors import EPSILON, NoiseRun, RunMetrics
from truestep.judge.floor import (
    ANALYTIC,
    UNASKED,
    Floor,
    FloorLookup,
    Limits,
    analytic_floor,
    coarser,
    declared_pair,
    pair_for,
    pair_of,
    tolerance_floor,
)
from truestep.judge.modality import in_seconds, modalities, with_modalities
from truestep.judge.rule import SIZES, Measured, Outcome, bounded, judged, rule_of
from truestep.judge.sentence import sentence_of
from truestep.keys import PRECISIONS, SAMPLES, Address, address, stage_key, without_modality
from truestep.measure.batches import Found, is_small, measured_together
from truestep.measure.distance import distance, distance_to_itself, is_constant, same_bits
from truestep.measure.plain import plain
from truestep.measure.structure import bulk, structure
from truestep.verdict import (
    Comparison,
    Divergence,
    FloorUsed,
    Metrics,
    Row,
    Rows,
    Rule,
    Side,
    TensorInfo,
    Verdict,
)

EXACT = Rule(name="bits/1", text="every tensor agrees bit for bit")
WINDOW = (2048, 1 << 20)
"""Small pairs, and elements of either side of them, that are held at once."""
NOTHING = Rule(name="none/1", text="no distance was judged: what does not agree cannot be compared")


def compare_tensors(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    *,
    limits: Limits = ANALYTIC,
    describe: Callable[[str], Address] = address,
) -> list[Row]:
    """Judge every tensor of both sides.

    Args:
        actual, reference: Name to tensor.
        limits: How far is too far.
        describe: Stage, step and branch of a name.

    Returns:
        One row a name, in the reference's order, then names that only the actual side has.
    """
    floor_of = floors(limits)
    parts = (name.partition("/") for name in reference if name in actual)
    lifted = {rest for prefix, _, rest in parts if prefix in PRECISIONS}
    stages = {stage_key(name) for name in lifted}
    waiting: list[_Waiting | None] = []
    names = [*reference, *(name for name in actual if name not in reference)]
    for window in _windows(names, actual, reference):
        pairs = [(a, r) for _, a, r in window if a is not None and r is not None]
        together = iter(
            measured_together(pairs, bulk=limits.floor is None or limits.tolerance is not None)
            if len(window) > 1
            else [None] * len(pairs)
        )
        for name, a, r in window:
            infos = tensor_info(a), tensor_info(r)
            if a is None or r is None:
                waiting.append(_Waiting(name, *infos, one_sided(a)))
                continue
            known = next(together)
            same = known.same if known else a.shape == r.shape and same_bits(a, r)
            raised = limits.raised or name in lifted
            used = floor_of(name, a, r, structure=not (same or raised))
            inner = partial(_is_inner, name, describe)
            found = _without_rule(a, r, used, same=same, inner=inner, known=known)
            if isinstance(found, Measured):
                found = replace(found, raised=raised or stage_key(name) in stages)
            waiting.append(_Waiting(name, *infos, found))
            forget(name, actual, reference)
    return list(_rows(waiting, describe))


class _Waiting(NamedTuple):
    """A name whose row waits until all are measured.

    Attributes:
        found: Fields of its row, or what the rule is to judge.
    """

    name: str
    actual: TensorInfo | None
    reference: TensorInfo | None
    found: dict[str, Any] | Measured


def _rows(waiting: list[_Waiting | None], describe: Callable[[str], Address]) -> Iterator[Row]:
    """Judge what waits. There may be a million: each is let go where its row is made."""
    measured = [one.found for one in waiting if one and isinstance(one.found, Measured)]
    tailed = any(
        floor.tails
        for one in waiting
        if one and isinstance(one.found, dict) and (floor := one.found.get("floor"))
    )
    tests = sum(len(item.values()) for item in measured) if tailed else 0
    outcomes = judged(measured)
    for at, one in enumerate(waiting):
        waiting[at] = None
        if one is not None:
            base = place_fields(one.name, one.actual, one.reference, describe(one.name))
            if isinstance(one.found, Measured):
                yield _by_rule(base, one.found, next(outcomes))
            else:
                floor = one.found.get("floor")
                used = {"floor": bounded(floor, tests=tests)} if floor else {}
                yield Row(**{**base, **one.found, **used})


def _is_inner(name: str, describe: Callable[[str], Address]) -> bool:
    place = describe(name)
    return place.inner or place.stage == "module"


_Sides = tuple[str, torch.Tensor | None, torch.Tensor | None]


def _windows(
    names: Sequence[str],
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
) -> Iterator[list[_Sides]]:
    """Both sides of every name: as many small pairs at once as may be held, any other by itself."""
    waiting: list[_Sides] = []
    elements = 0
    for name in names:
        a, r = (
            None if tensor is None else plain(tensor, name)
            for tensor in (actual.get(name), reference.get(name))
        )
        small = a is not None and r is not None and is_small((a, r))
        elements += r.numel() if small and r is not None else 0
        if waiting and not (small and len(waiting) < WINDOW[0] and elements <= WINDOW[1]):
            yield waiting
            waiting, elements = [], r.numel() if small and r is not None else 0
        if small:
            waiting.append((name, a, r))
        else:
            yield [(name, a, r)]
    if waiting:
        yield waiting


def forget(name: str, *sides: Mapping[str, torch.Tensor]) -> None:
    """Let the pages of a tensor go where a side is a file: not more than a pair is in memory."""
    for side in sides:
        release = getattr(side, "release", None)
        if release is not None:
            release(name)


def row_fields(
    name: str, actual: torch.Tensor | None, reference: torch.Tensor | None, place: Address
) -> dict[str, Any]:
    """What a row says of a tensor before it is judged."""
    return place_fields(name, tensor_info(actual), tensor_info(reference), place)


def place_fields(
    name: str, actual: TensorInfo | None, reference: TensorInfo | None, place: Address
) -> dict[str, Any]:
    """The same, of what is known of the two sides."""
    return {
        "name": name,
        "stage": place.stage,
        "step": place.step,
        "branch": place.branch,
        "fqn": place.fqn,
        "modality": place.modality,
        "actual": actual,
        "reference": reference,
    }


def tensor_info(tensor: torch.Tensor | None) -> TensorInfo | None:
    """Dtype and shape of one side, if there."""
    if tensor is None:
        return None
    return _info(tensor.dtype, tensor.shape)


@lru_cache(maxsize=4096)
def _info(dtype: torch.dtype, shape: torch.Size) -> TensorInfo:
    return TensorInfo(dtype=_dtype_name(dtype), shape=tuple(shape))


def dtype_name(tensor: torch.Tensor) -> str:
    """`float32` for torch.float32."""
    return _dtype_name(tensor.dtype)


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def one_sided(actual: torch.Tensor | None) -> dict[str, Any]:
    """Row fields of a name that one side lacks."""
    if actual is None:
        return {"verdict": Verdict.MISSING, "note": "only the reference has it"}
    return {"verdict": Verdict.INCOMPARABLE, "note": "unexpected: the reference has no such tensor"}


class FloorOf(Protocol):
    """What judges a tensor: the tolerance, the measured floor, or the analytic one."""

    def __call__(
        self, name: str, actual: torch.Tensor, reference: torch.Tensor, *, structure: bool
    ) -> Floor:
        """The floor of one pair; `structure`: with tails for what is not size."""


def floors(limits: Limits) -> FloorOf:
    """What judges the tensors of one check."""
    declared = limits.pair or declared_pair(limits.floor)
    lookups: dict[str, FloorLookup] = {}

    def floor_of(
        name: str, actual: torch.Tensor, reference: torch.Tensor, *, structure: bool
    ) -> Floor:
        own, theirs = dtype_name(actual), dtype_name(reference)
        working = pair_for(name, declared)
        if limits.tolerance is not None:
            return tolerance_floor(limits.tolerance, pair=working or pair_of(own, theirs))
        if working not in lookups:
            lookups[working] = FloorLookup(limits.floor, pair=working)
        lookup = lookups[working]
        # A mean over predictions is kept in float64.
        mean = name == SAMPLES and working
        dtype = coarser(*working.split("/")) if mean else theirs
        found = lookup.find(name, dtype=dtype, structure=structure)
        judge = found or _analytic(own, theirs, working)
        unsteady = lookup.unsteady(name)
        return replace(judge, unsteady=unsteady) if unsteady else judge

    return floor_of


@cache
def _analytic(own: str, theirs: str, pair: str) -> Floor:
    """The analytic floor: of the declared precisions, or of the reference where there are none."""
    if theirs not in EPSILON:
        return analytic_floor(theirs, theirs)
    first, _, second = pair.partition("/")
    asked = "float32" if theirs in UNASKED and theirs != second else theirs
    if not pair:
        return analytic_floor(own, theirs, asked=asked)
    asked = coarser(asked, coarser(first, second))
    return analytic_floor(first, coarser(theirs, second), asked=asked)


def _without_rule(
    actual: torch.Tensor,
    reference: torch.Tensor,
    floor: Floor,
    *,
    same: bool,
    inner: Callable[[], bool],
    known: Found | None = None,
) -> dict[str, Any] | Measured:
    """What needs no rule to be judged, or the measured pair for the rule.

    Inside of a model (`inner`) two tensors that hold one value everywhere are judged by it: the
    timestep of every sample is such. `known` is what was measured already.
    """
    if actual.shape != reference.shape:
        return {"verdict": Verdict.INCOMPARABLE, "note": shape_note(actual, reference)}
    if not actual.numel():
        return {"verdict": Verdict.INVALID, "note": "empty: there is nothing to compare"}
    if actual.is_complex() or reference.is_complex():
        return {"verdict": Verdict.INVALID, "note": "complex tensors cannot be judged"}
    if known:
        metrics = known.metrics
    else:
        metrics = distance_to_itself(reference) if same else distance(actual, reference)
    found: dict[str, Any] = {"metrics": metrics, "floor": floor}
    if metrics.nonfinite_actual or metrics.nonfinite_reference:
        return {**found, "verdict": Verdict.INVALID, "note": nonfinite_note(metrics)}
    if same:
        return {**found, "verdict": Verdict.IDENTICAL, "ratio": 0.0, "ratio_metric": "rel_l2"}
    flags = known.constant if known else (is_constant(actual), is_constant(reference))
    constant = [side for side, flag in zip(("actual", "reference"), flags, strict=True) if flag]
    equal = metrics.max_abs == 0.0  # in two dtypes
    if constant and not ((equal or inner()) and one_value(actual) and one_value(reference)):
        value = (actual if constant[0] == "actual" else reference).reshape(-1)[0].item()
        text = f"the {' and the '.join(constant)} side holds one value everywhere ({value:g})"
        return {**found, "verdict": Verdict.INVALID, "note": text}
    if len(floor.tails) > len(SIZES):
        tested = structure(actual, reference)
    elif floor.tails:
        tested = {}
    else:
        small = known.bulk if known else None
        tested = bulk(actual, reference) if small is None else dict(small)
    return Measured(metrics, floor, tested)


def one_value(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds one value everywhere, whole numbers too."""
    if tensor.is_floating_point():
        return is_constant(tensor)
    return bool((tensor == tensor.reshape(-1)[0]).all())


def _by_rule(base: dict[str, Any], item: Measured, outcome: Outcome) -> Row:
    """The row of a pair that the rule judged."""
    kind = likely(item.metrics) if outcome.verdict is Verdict.DRIFTED else ""
    notes = (kind, outcome.note, _dtypes_differ(base["actual"].dtype, base["reference"].dtype))
    return Row(
        **base,
        metrics=item.metrics,
        verdict=outcome.verdict,
        floor=outcome.floor,
        ratio=outcome.ratio,
        ratio_metric=outcome.metric,
        statistics=outcome.statistics,
        note="; ".join(part for part in notes if part),
    )


def dtype_note(actual: torch.Tensor, reference: torch.Tensor) -> str:
    """A note where the dtypes differ, else empty."""
    return _dtypes_differ(dtype_name(actual), dtype_name(reference))


def _dtypes_differ(own: str, theirs: str) -> str:
    return "" if own == theirs else f"dtype {own} against {theirs}"


def shape_note(actual: torch.Tensor, reference: torch.Tensor) -> str:
    """How two shapes differ, with a guess at why."""
    own, theirs = list(actual.shape), list(reference.shape)
    text = f"shape {own} against {theirs}"
    if [n for n in own if n != 1] == [n for n in theirs if n != 1]:
        return f"{text}: a dimension of size 1 was added or dropped"
    if sorted(own) == sorted(theirs):
        return f"{text}: looks transposed"
    if math.prod(own) == math.prod(theirs):
        return f"{text}: looks reshaped"
    return text


def nonfinite_note(metrics: Metrics) -> str:
    """How many values are not finite, side by side."""
    total = metrics.count + max(metrics.nonfinite_actual, metrics.nonfinite_reference)
    sides = (("actual", metrics.nonfinite_actual), ("reference", metrics.nonfinite_reference))
    parts = [f"{count:,} in {side}" for side, count in sides if count]
    return f"non-finite values: {', '.join(parts)} (of {total:,})"


def likely(metrics: Metrics) -> str:
    """A word on the kind of a residual that is a fault, where it is plain from the metrics."""
    if metrics.gain < -0.9 and metrics.cosine_distance > 1.9:
        return "sign flipped"
    off = abs(metrics.gain - 1.0)
    factor = f"{metrics.gain:.6g}"
    gained = metrics.cosine_distance < 0.01 * off * off and factor != "1"
    return f"scaled by {factor}" if gained else ""


def build_comparison(
    rows: Sequence[Row],
    *,
    actual: Side,
    reference: Side,
    sample_rate: int | None = None,
    **fields: Any,
) -> Comparison:
    """Sum rows up as one comparison: verdict, sentence, rule, first divergence.

    Args:
        rows: Judged rows in execution order; none at all is `invalid`.
        actual, reference: What the two sides were.
        sample_rate: Hz, of decoded sound: two of different lengths are then told in seconds.
        fields: Further fields of `Comparison`; `verdict` or `notes` given here are respected.
    """
    if sample_rate:
        rows = [in_seconds(row, sample_rate) for row in rows]
    rows = with_modalities(rows)
    verdicts = {*rows.each("verdict")}
    if fields.get("case_differences"):
        verdicts.add(Verdict.INCOMPARABLE)
    verdict = fields.pop("verdict", None) or Verdict.worst(verdicts)
    first = _first_failing(rows)
    divergence = None
    if first is not None:
        divergence = Divergence(
            name=first.name,
            stage=first.stage,
            step=first.step,
            branch=first.branch,
            fqn=first.fqn,
            modality=first.modality,
        )
    judged = {
        id(floor): floor
        for floor, found in rows.each("floor", "verdict")
        if floor and found is not Verdict.IDENTICAL
    }
    return Comparison(
        tool_version=library_version("truestep") or "",
        verdict=verdict,
        sentence=sentence_of(verdict, rows, divergence, fields),
        rows=rows,
        rule=_rule(rows, list(judged.values())),
        first_divergence=divergence,
        modalities=modalities(rows),
        actual=actual,
        reference=reference,
        missing=tuple(name for name, side in rows.each("name", "actual") if side is None),
        unexpected=tuple(name for name, side in rows.each("name", "reference") if side is None),
        **fields,
    )


def _rule(rows: Rows, judged: Sequence[FloorUsed]) -> Rule:
    """What judged the rows; that every tensor agrees is said only where every one does."""
    if judged:
        return rule_of(judged, tests=_tests(rows))
    if {*rows.each("verdict")} == {Verdict.IDENTICAL}:
        return EXACT
    return NOTHING


def _first_failing(rows: Rows) -> Row | None:
    """The first row that failed; of the two modalities of one tensor the one that is further off.

    What one forward makes of both is made at once: an error in one of them reaches the other inside
    the model, and is larger where it is made.
    """
    failing = rows.having(Verdict.DRIFTED, Verdict.INVALID)
    if not failing:
        return None
    first = without_modality(failing[0].name)
    names = enumerate(failing.each("name"))
    both = failing.take(at for at, name in names if without_modality(name) == first)
    worst = Verdict.worst(row.verdict for row in both)
    return max((row for row in both if row.verdict is worst), key=lambda row: row.ratio or 0.0)


def _tests(rows: Rows) -> int:
    """Number of statistics that the rule set against a measured tail."""
    return sum(
        len(SIZES) + len(statistics)
        for ratio, floor, statistics in rows.each("ratio", "floor", "statistics")
        if ratio and floor and floor.source == "measured"
    )


def measured_run(
    kind: str, detail: str, pair: str, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> NoiseRun:
    """Distances and structure of every (output, recorded) pair of one benign run."""
    rows = []
    for name, (output, expected) in pairs.items():
        metrics = distance(output, expected)
        scale = metrics.rms_reference
        rows.append(
            RunMetrics(
                name=name,
                rel_l2=metrics.rel_l2,
                max_abs=metrics.max_abs / scale if scale else metrics.max_abs,
                dtype=_dtype_beside(output, expected),
                structure=structure(output, expected) if metrics.rel_l2 else {},
            )
        )
    return NoiseRun(kind=kind, detail=detail, pair=pair, tensors=tuple(rows))


def _dtype_beside(output: torch.Tensor, expected: torch.Tensor) -> str:
    return "" if output.dtype == expected.dtype else str(output.dtype).removeprefix("torch.")
