"""Whether a model gives one answer to one input: state kept over steps, over calls and over runs.

A cache that acts from step to step, a first call that differs from all later ones, noise that
nobody seeded: each shows where an input that was answered is given once more, after others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from truestep.verdict import Comparison, Row, Verdict

if TYPE_CHECKING:
    import torch

    from truestep.judge.floor import Limits

UNSTEADY = "the same input gave another output the second time"
"""What is said of an answer that was not given again."""


def differing(
    first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor], limits: Limits
) -> tuple[str, ...]:
    """Names of both whose second answer is not the first one, bit for bit or within the floor."""
    from truestep.judge.rows import compare_tensors
    from truestep.measure.distance import same_bits

    names = [name for name in second if name in first]
    names = [  # not a number twice is one answer
        name
        for name in names
        if first[name].shape != second[name].shape or not same_bits(first[name], second[name])
    ]
    rows = compare_tensors(
        {name: second[name] for name in names}, {name: first[name] for name in names}, limits=limits
    )
    return tuple(row.name for row in rows if not row.verdict.passed)


def with_second_answers(
    rows: Iterable[Row],
    second: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    names: Iterable[str],
    limits: Limits,
) -> list[Row]:
    """Judge second answers too: the worse of the two stands, and its row says that they differ.

    Args:
        rows: Rows of the first answers.
        second: What was given the second time.
        expected: What was recorded.
        names: Those of which the two answers differ; the others' first answer stands.
        limits: How the first answers were judged.
    """
    from truestep.judge.rows import compare_tensors

    differing = [name for name in names if name in second and name in expected]
    later = {
        row.name: row
        for row in compare_tensors(
            {name: second[name] for name in differing},
            {name: expected[name] for name in differing},
            limits=limits,
        )
    }
    return [_worse(row, later[row.name]) if row.name in later else row for row in rows]


def _worse(first: Row, second: Row) -> Row:
    if first.verdict.passed and second.verdict.passed:
        return first
    worst = Verdict.worst((first.verdict, second.verdict))
    row = first if first.verdict is worst else second
    said = f"{UNSTEADY}: {first.verdict.value}, then {second.verdict.value}"
    return row.model_copy(update={"note": "; ".join(p for p in (said, row.note) if p)})


def said_unsteady(result: Comparison) -> Comparison:
    """A failing result whose sentence says that answers were not given again, where it fails so."""
    if result.verdict.passed or not any(UNSTEADY in row.note for row in result.failing):
        return result
    return result.model_copy(update={"sentence": f"{result.sentence}; {UNSTEADY}"})
