"""Match the tensors of two sides, judge every pair, and sum up. Pure: no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from truestep import noise
from truestep.comparison.distance import distance, distance_to_itself, is_constant, same_bits
from truestep.environment import library_version
from truestep.errors import UsageError
from truestep.recording.names import Address, address
from truestep.verdict import (
    Comparison,
    Divergence,
    FloorUsed,
    Metrics,
    Row,
    Rule,
    Side,
    TensorInfo,
    Verdict,
)

EXACT = Rule(name="bits/1", text="every tensor agrees bit for bit")


def compare_tensors(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    *,
    floor: noise.NoiseFloor | None = None,
    pair: str | None = None,
    tolerance: float | None = None,
    describe: Callable[[str], Address] = address,
) -> list[Row]:
    """Judge every tensor of both sides.

    Args:
        actual, reference: Name to tensor.
        floor: The reference's measured noise floor.
        pair: Working precisions, `candidate/reference`; None is each pair's stored dtypes.
        tolerance: Judge rel_l2 by this limit instead.
        describe: Stage, step and branch of a name.

    Returns:
        One row a name, in the reference's order, then names that only the actual side has.

    Raises:
        UsageError: The tolerance is negative or not finite.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(
            f"tolerance = {tolerance:g} cannot judge anything",
            measured="a limit on rel_l2 is a number from 0 up, and finite",
        )
    lookups: dict[str, noise.FloorLookup] = {}
    rows = []
    for name in [*reference, *(name for name in actual if name not in reference)]:
        a, r = actual.get(name), reference.get(name)
        place = describe(name)
        base: dict[str, Any] = {
            "name": name,
            "stage": place.stage,
            "step": place.step,
            "branch": place.branch,
            "fqn": place.fqn,
            "actual": _info(a),
            "reference": _info(r),
        }
        if a is None or r is None:
            rows.append(Row(**base, **_one_sided(a)))
            continue
        working = pair or noise.pair_of(dtype_name(a), dtype_name(r))
        if working not in lookups:
            lookups[working] = noise.FloorLookup(floor, pair=working)
        used = _floor_for(name, a, r, lookups[working], pair=working, tolerance=tolerance)
        rows.append(Row(**base, **_judge(a, r, used)))
    return rows


def _info(tensor: torch.Tensor | None) -> TensorInfo | None:
    if tensor is None:
        return None
    return TensorInfo(dtype=dtype_name(tensor), shape=tuple(tensor.shape))


def dtype_name(tensor: torch.Tensor) -> str:
    """`float32` for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def _one_sided(actual: torch.Tensor | None) -> dict[str, Any]:
    if actual is None:
        return {"verdict": Verdict.MISSING, "note": "only the reference has it"}
    return {"verdict": Verdict.INCOMPARABLE, "note": "unexpected: the reference has no such tensor"}


def _floor_for(
    name: str,
    actual: torch.Tensor,
    reference: torch.Tensor,
    lookup: noise.FloorLookup,
    *,
    pair: str,
    tolerance: float | None,
) -> FloorUsed:
    own, theirs = dtype_name(actual), dtype_name(reference)
    if tolerance is not None:
        return FloorUsed(
            rel_l2=tolerance,
            max_abs=math.inf,
            bound=1.0,
            source="tolerance",
            pair=pair,
            detail="given by the user",
        )
    measured = lookup.find(name, dtype=noise.coarser(own, theirs))
    return measured or noise.analytic_floor(*_working(own, theirs, pair))


def _working(own: str, theirs: str, pair: str) -> tuple[str, str]:
    """Dtypes that scale the analytic floor: the stored ones, or coarser working precisions."""
    if own not in noise.EPSILON:
        return own, theirs
    first, _, second = pair.partition("/")
    return noise.coarser(own, first), noise.coarser(theirs, second)


def _judge(actual: torch.Tensor, reference: torch.Tensor, floor: FloorUsed) -> dict[str, Any]:
    if actual.shape != reference.shape:
        return {"verdict": Verdict.INCOMPARABLE, "note": _shapes(actual, reference)}
    if not actual.numel():
        return {"verdict": Verdict.INVALID, "note": "empty: there is nothing to compare"}
    if actual.is_complex() or reference.is_complex():
        return {"verdict": Verdict.INVALID, "note": "complex tensors cannot be judged"}
    same = same_bits(actual, reference)
    metrics = distance_to_itself(reference) if same else distance(actual, reference)
    found: dict[str, Any] = {"metrics": metrics, "floor": floor}
    note = (
        ""
        if actual.dtype == reference.dtype
        else (f"dtype {dtype_name(actual)} against {dtype_name(reference)}")
    )
    if metrics.nonfinite_actual or metrics.nonfinite_reference:
        return {**found, "verdict": Verdict.INVALID, "note": _nonfinite(metrics)}
    if same:
        return {**found, "verdict": Verdict.IDENTICAL, "ratio": 0.0, "ratio_metric": "rel_l2"}
    constant = [
        side for side, t in (("actual", actual), ("reference", reference)) if is_constant(t)
    ]
    if constant and (metrics.max_abs > 0 or len(constant) == 1):
        value = (actual if constant[0] == "actual" else reference).reshape(-1)[0].item()
        text = f"the {' and the '.join(constant)} side holds one value everywhere ({value:g})"
        return {**found, "verdict": Verdict.INVALID, "note": text}
    verdict, ratio, metric, why = noise.judge(metrics, floor)
    notes = [part for part in (_likely(metrics, verdict), why, note) if part]
    return {
        **found,
        "verdict": verdict,
        "ratio": ratio,
        "ratio_metric": metric,
        "note": "; ".join(notes),
    }


def _shapes(actual: torch.Tensor, reference: torch.Tensor) -> str:
    own, theirs = list(actual.shape), list(reference.shape)
    text = f"shape {own} against {theirs}"
    if [n for n in own if n != 1] == [n for n in theirs if n != 1]:
        return f"{text}: a dimension of size 1 was added or dropped"
    if sorted(own) == sorted(theirs):
        return f"{text}: looks transposed"
    if math.prod(own) == math.prod(theirs):
        return f"{text}: looks reshaped"
    return text


def _nonfinite(metrics: Metrics) -> str:
    total = metrics.count + max(metrics.nonfinite_actual, metrics.nonfinite_reference)
    sides = (("actual", metrics.nonfinite_actual), ("reference", metrics.nonfinite_reference))
    parts = [f"{count:,} in {side}" for side, count in sides if count]
    return f"non-finite values: {', '.join(parts)} (of {total:,})"


def _likely(metrics: Metrics, verdict: Verdict) -> str:
    """A word on the residual's kind, where it is plain from the metrics."""
    if verdict is not Verdict.DRIFTED:
        return ""
    if metrics.gain < -0.9 and metrics.cosine_distance > 1.9:
        return "sign flipped"
    off = abs(metrics.gain - 1.0)
    if metrics.cosine_distance < 0.01 * off**2:
        return f"scaled by {metrics.gain:.4g}"
    return ""


def build_comparison(
    rows: Sequence[Row], *, actual: Side, reference: Side, **fields: Any
) -> Comparison:
    """Sum rows up as one comparison: verdict, sentence, rule, first divergence.

    Args:
        rows: Judged rows in execution order; none at all is `invalid`.
        actual, reference: What the two sides were.
        fields: Further fields of `Comparison`; `verdict` or `notes` given here are respected.
    """
    verdicts = [row.verdict for row in rows]
    if fields.get("case_differences"):
        verdicts.append(Verdict.INCOMPARABLE)
    verdict = fields.pop("verdict", None) or Verdict.worst(verdicts)
    first = next((row for row in rows if row.verdict in (Verdict.DRIFTED, Verdict.INVALID)), None)
    divergence = None
    if first is not None:
        divergence = Divergence(
            name=first.name, stage=first.stage, step=first.step, branch=first.branch, fqn=first.fqn
        )
    judged = [row.floor for row in rows if row.floor and row.verdict is not Verdict.IDENTICAL]
    return Comparison(
        tool_version=library_version("truestep") or "",
        verdict=verdict,
        sentence=_sentence(verdict, rows, divergence, fields),
        rows=tuple(rows),
        rule=noise.size_rule(judged) if judged else EXACT if rows else noise.size_rule([]),
        first_divergence=divergence,
        actual=actual,
        reference=reference,
        missing=tuple(row.name for row in rows if row.actual is None),
        unexpected=tuple(row.name for row in rows if row.reference is None),
        **fields,
    )


def _sentence(
    verdict: Verdict, rows: Sequence[Row], first: Divergence | None, fields: Mapping[str, Any]
) -> str:
    total = f"{len(rows)} tensor{'s' if len(rows) != 1 else ''}"
    count = sum(row.verdict is verdict for row in rows)
    ratios = [row.ratio for row in rows if row.ratio is not None and row.verdict.passed]
    seen = [d for row in rows if (d := row.detectable) is not None]
    sight = f"a relative change of {max(seen):.1e} would have been seen" if seen else ""
    if not rows:
        return "invalid: there was nothing to compare"
    if verdict is Verdict.IDENTICAL:
        return f"identical: {total} agree{'s' if len(rows) == 1 else ''} bit for bit"
    if verdict is Verdict.EQUIVALENT:
        return f"equivalent: {total}, the worst at {max(ratios):.2g} x the noise floor; {sight}"
    place = f" (first divergence: {first})" if first else ""
    if verdict is Verdict.INVALID and first:
        note = next(row.note for row in rows if row.name == first.name)
        return f"invalid: {count} of {total}{place}: {note}"
    if verdict is Verdict.DRIFTED:
        row = max((r for r in rows if r.verdict is verdict), key=lambda r: r.ratio or 0.0)
        bound = row.floor.bound if row.floor else math.inf
        if row.note and (row.ratio or 0.0) <= bound:  # not by size: another rule said so
            return f"drifted: {count} of {total}{place}: {row.note}"
        worst = row.ratio or 0.0
        return f"drifted: {count} of {total}{place}, the worst at {worst:.3g} x the noise floor"
    if verdict is Verdict.INCOMPARABLE:
        differing = ", ".join(d.key for d in fields.get("case_differences", ()))
        if differing:
            return f"incomparable: the two sides are of different cases ({differing} differ)"
        row = next(row for row in rows if row.verdict is verdict)
        return f"incomparable: {count} of {total}: {row.name}: {row.note}"
    if verdict is Verdict.MISSING:
        row = next(row for row in rows if row.verdict is verdict)
        return f"missing: {count} of {total}: {row.name}: {row.note}"
    row = max((r for r in rows if r.verdict is verdict), key=lambda r: r.ratio or 0.0)
    return f"inconclusive: {count} of {total}: {row.name}: {row.note}"
