"""The sentence that sums a comparison up. Pure: no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from truestep.judge.modality import told_apart
from truestep.verdict import Comparison, Divergence, Row, Rows, Verdict, detectable


def with_divergence(
    comparison: Comparison, divergence: Divergence, rows: Sequence[Row]
) -> Comparison:
    """A comparison whose first divergence was followed into a model, with the rows it took."""
    fields = {"case_differences": comparison.case_differences, "deeper": rows}
    known = comparison.first_divergence
    if known is not None and (known.stage, known.step) == (divergence.stage, divergence.step):
        divergence = divergence.model_copy(update={"modality": known.modality})
    judged = Rows.of(comparison.rows)
    sentence = sentence_of(comparison.verdict, judged, divergence, fields)
    update: dict[str, Any] = {"first_divergence": divergence, "sentence": sentence}
    if rows:
        seen = f"{len({row.fqn for row in rows})} modules"
        update["rows"] = Rows.of((*judged, *rows))
        update["looked_at"] = (*comparison.looked_at, seen)
    return comparison.model_copy(update=update)


def sentence_of(
    verdict: Verdict, rows: Rows, first: Divergence | None, fields: Mapping[str, Any]
) -> str:
    """The sentence of a comparison.

    Args:
        verdict, rows, first: Its verdict, rows and first divergence.
        fields: Of its other fields `case_differences`, and `deeper`: rows of an opened model.
    """
    text = _outcome(verdict, rows, first, fields)
    return text if verdict.passed or fields.get("case_differences") else text + told_apart(rows)


def _outcome(
    verdict: Verdict, rows: Rows, first: Divergence | None, fields: Mapping[str, Any]
) -> str:
    total = f"{len(rows)} tensor{'s' if len(rows) != 1 else ''}"
    alike = rows.having(verdict)
    count = len(alike)
    seen = detectable(rows)
    sight = f"a relative change of {seen:.1e} would have been seen" if seen is not None else ""
    if not rows:
        return "invalid: there was nothing to compare"
    if verdict is Verdict.IDENTICAL:
        return f"identical: {total} agree{'s' if len(rows) == 1 else ''} bit for bit"
    if verdict is Verdict.EQUIVALENT:
        passed = (r for r, v in rows.each("ratio", "verdict") if r is not None and v.passed)
        worst = max(passed, default=0.0)
        return f"equivalent: {total}, the worst at {worst:.2g} x the noise floor; {sight}"
    place = f" (first divergence: {first})" if first else ""
    if verdict is Verdict.INVALID and first:
        named = (r for r in chain(alike, fields.get("deeper", ())) if r.name == first.name)
        return f"invalid: {count} of {total}{place}: {(next(named, None) or alike[0]).note}"
    if verdict is Verdict.DRIFTED:
        row = _worst(alike)
        bound = row.floor.bound if row.floor else math.inf
        if row.note and (row.ratio or 0.0) <= bound:  # not by size: another rule said so
            return f"drifted: {count} of {total}{place}: {row.note}"
        over = f"{row.ratio or 0.0:.3g} x the noise floor"
        return f"drifted: {count} of {total}{place}, the worst at {over}"
    if verdict is Verdict.INCOMPARABLE:
        differences = fields.get("case_differences", ())
        if differences:
            differing = ", ".join(d.key or "a key without a name" for d in differences)
            return f"incomparable: the two sides are of different cases ({differing} differ)"
        return f"incomparable: {count} of {total}: {alike[0].name}: {alike[0].note}"
    if verdict is Verdict.MISSING:
        return f"missing: {count} of {total}: {alike[0].name}: {alike[0].note}"
    row = _worst(alike)
    return f"inconclusive: {count} of {total}: {row.name}: {row.note}"


def _worst(rows: Rows) -> Row:
    """The first of those that are furthest over their floor."""
    ratios = [ratio or 0.0 for ratio in rows.each("ratio")]
    return rows[max(range(len(rows)), key=ratios.__getitem__)]
