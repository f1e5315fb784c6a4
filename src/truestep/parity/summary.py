"""A run in numbers, and what its declared coverage still lacks."""

from __future__ import annotations

from truestep.keys import key_of
from truestep.parity.component import Coverage, Kind, Loaded, Parity
from truestep.parity.evidence import Numbers
from truestep.parity.redaction import redact
from truestep.parity.sides import module_of, state_of_side
from truestep.recording.format import Recording
from truestep.verdict import Comparison, Row


def numbers_of(comparison: Comparison, parity: Parity) -> Numbers:
    """The worst of a comparison, and the rule that judged it."""
    judged = [row for row in comparison.rows if row.metrics]
    worst = max(judged, key=_badness, default=None)
    samples = {n for row in comparison.rows if (n := key_of(row.name).number) is not None}
    floor = worst.floor if worst else None
    source = floor.source if floor else ""
    if source == "tolerance":
        source = "loosened tolerance" if parity.loosened else f"starting tolerance of {parity.kind}"
    return Numbers(
        verdict=comparison.verdict.value,
        sentence=redact(comparison.sentence),
        tensors=len(judged),
        samples=len(samples) or 1,
        worst_tensor=worst.name if worst else "",
        rel_l2=worst.metrics.rel_l2 if worst and worst.metrics else None,
        ratio=worst.ratio if worst else None,
        floor=floor.rel_l2 if floor else None,
        floor_source=source,
        detectable=comparison.detectable,
        rule=comparison.rule.text,
    )


def _badness(row: Row) -> tuple[bool, float]:
    size = row.metrics.rel_l2 if row.metrics else 0.0
    return not row.verdict.passed, row.ratio if row.ratio is not None else size


def uncovered(
    parity: Parity, official: Loaded | Recording | None, port: Loaded | Recording | None
) -> str:
    """What the declared coverage needs and a run did not have; empty if nothing."""
    if parity.coverage is Coverage.IMPLEMENTATION_SUBCOMPONENT or parity.kind is Kind.SCHEDULER:
        return ""
    for name, side in (("official side", official), ("port", port)):
        if not isinstance(side, Loaded) or list(side.weights):
            continue
        if side.state is None and module_of(side) is not None and not state_of_side(side):
            continue  # a module without parameters has no weights to name
        return f"coverage {parity.coverage}, but the {name} names no weight files"
    return ""
