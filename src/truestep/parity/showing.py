"""One component's status as text for a person: what was measured, and against what."""

from __future__ import annotations

from truestep.parity.evidence import SideEvidence
from truestep.parity.ledger import Status, measured, plural
from truestep.text import visible


def details(item: Status) -> str:
    """A component's last run in a few aligned lines, without hashes."""
    rows = [("test", item.test), ("why", item.reason), ("missing", item.missing)]
    evidence, numbers, fault = item.evidence, item.evidence.numbers, item.evidence.fault
    if numbers is not None:
        floor = "" if numbers.floor is None else f"{numbers.floor:.1e} ({numbers.floor_source})"
        seen = "" if numbers.detectable is None else f"rel_l2 {numbers.detectable:.1e}"
        rows += [
            ("measured", f"{measured(evidence)}, at {numbers.worst_tensor}"),
            ("floor", floor),
            ("detectable", seen),
            ("rule", numbers.rule),
        ]
    if fault is not None:
        partner = f" ({fault.port_module} in the port)" if fault.port_module else ""
        kind = f": {fault.kind}" if fault.kind else ""
        rows += [
            ("output", fault.output),
            ("module", f"{fault.module}{partner}{kind}" if fault.module else fault.note),
            ("at", fault.operator),
            ("weights", fault.weights),
        ]
    if evidence.missing is not None:
        rows += [("searched", ", ".join(evidence.missing.searched))]
    if evidence.tolerance is not None:
        agreed = evidence.tolerance
        until = f"until {agreed.expires} by {agreed.owner}: {agreed.reason}"
        rows += [("tolerance", f"rel_l2 {agreed.rel_l2:g} {until}")]
    rows += [
        ("official", _side(evidence.official)),
        ("port", _side(evidence.port)),
        ("coverage", item.coverage_scope),
        ("run", f"{evidence.date}, {evidence.result}"),
    ]
    rows += [("concern", concern) for concern in item.concerns]
    width = max(len(label) for label, _ in rows)
    lines = [f"{item.family}/{item.component} ({item.kind}): {item.status}"]
    lines += [f"  {label:<{width}}  {text}" for label, text in rows if text]
    return "\n".join(map(visible, lines))


def _side(side: SideEvidence) -> str:
    counts = (
        plural(len(side.code), "source file"),
        plural(len(side.weights), "weight file"),
        plural(side.keys, "parameter"),
    )
    return ", ".join(counts) if side.code or side.weights or side.keys else "not loaded"
