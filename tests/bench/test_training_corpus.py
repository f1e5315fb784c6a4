"""Faults of a training step are found and named, harmless twins pass; the table counts them."""

from __future__ import annotations

from functools import cache, partial

import pytest

from bench.bench_training import named, report
from bench.faults.training import FAULTS, SUBJECTS, TWINS, Planted, build
from truestep import Recording, check_training, record_training

SAMPLE = ("rotation-forward", "gate-detached", "micro-batch-forgotten", "adam-uncorrected")
PASSING = ("attention-written-out", "checkpointing-reentrant", "clip-by-hand", "adam-by-hand")


@cache
def reference(subject: str) -> Recording:
    return record_training(partial(build, None, subject))


def params(entries: tuple[Planted, ...], quick: tuple[str, ...]) -> list[object]:
    """All entries by name; the others are a bar."""
    return [
        pytest.param(e, id=e.name, marks=[] if e.name in quick else [pytest.mark.bar])
        for e in entries
    ]


@pytest.mark.parametrize("entry", params(FAULTS, SAMPLE))
def test_a_fault_is_found_and_named(entry: Planted) -> None:
    result = check_training(partial(build, entry, entry.subject), reference(entry.subject))
    assert result.exit_code == 1, result.sentence
    assert named(entry, result), (result.first_divergence, result.sentence)


@pytest.mark.parametrize("entry", params(TWINS, PASSING))
def test_a_twin_is_not_accused(entry: Planted) -> None:
    result = check_training(partial(build, entry, entry.subject), reference(entry.subject))
    assert result.verdict.passed, str(result)


def test_the_corpus_is_as_large_as_it_says() -> None:
    names = [entry.name for entry in (*FAULTS, *TWINS)]
    assert len(set(names)) == len(names)
    assert sum(entry.backward for entry in FAULTS) >= 20
    assert all(entry.stage for entry in FAULTS)
    assert not any(entry.stage for entry in TWINS)
    assert {entry.subject for entry in (*FAULTS, *TWINS)} == set(SUBJECTS)


def test_the_report_counts_what_was_named() -> None:
    row = {"subject": "whole", "stage": "loss", "module": "", "said": "a | b",
           "sentence": "x", "verdict": "drifted"}  # fmt: skip
    rows = [
        {**row, "entry": FAULTS[0].name, "exit_code": 1, "named": True},
        {**row, "entry": FAULTS[1].name, "exit_code": 0, "named": False},
        {**row, "entry": TWINS[0].name, "exit_code": 1, "named": False},
    ]
    text = report(rows)
    assert "1 of 2 found, 1 named" in text
    assert "Of 1 harmless twins 1 accused" in text
    assert "a \\| b" in text
