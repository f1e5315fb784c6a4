"""Every fault inside a model has a label of its cause, and only those have."""

from __future__ import annotations

from bench.bench_causes import ABSTAINS, RIGHT, WRONG, outcome, report
from bench.faults.causes import LABELS, OF_STAGES
from bench.faults.registry import FAULTS


def test_every_fault_inside_a_wan_model_has_a_label() -> None:
    inside = {e.name for e in FAULTS.values() if e.where and "wan" in e.subjects and not e.slow}
    assert set(LABELS) == inside


def test_a_cause_is_right_by_its_label_alone() -> None:
    assert outcome("norm-epsilon", "epsilon", "") == RIGHT
    assert outcome("norm-epsilon", "scaled", "") == WRONG
    assert outcome("norm-epsilon", None, "a bias") == ABSTAINS
    assert outcome("blocks-exchanged", None, "called in another order: `blocks.1`") == RIGHT


def test_the_report_counts_what_was_named() -> None:
    row = {"subject": "s", "port": "p", "entry": "e", "module": "m", "text": "a | b"}
    rows = [{**row, "outcome": o} for o in (RIGHT, RIGHT, WRONG, ABSTAINS, "without effect")]
    text = report(rows)
    assert "Of 4 faults planted inside models, the cause was named rightly for 2 (50.0%)" in text
    assert "| s | p | 4 | 2 | 1 | 1 |" in text
    assert "a \\| b" in text


def test_faults_of_stages_have_labels_of_their_own() -> None:
    assert set(OF_STAGES) <= set(FAULTS)
    assert not set(OF_STAGES) & set(LABELS)
    assert len(OF_STAGES) + len(LABELS) >= 80
    assert outcome("guidance-tenth-more", "guidance scale", "") == RIGHT
