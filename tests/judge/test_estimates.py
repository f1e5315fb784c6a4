"""Recordings at level `sketch` against full ones: the same verdicts, or inconclusive in between."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from truestep import Recording, compare
from truestep.errors import UsageError
from truestep.floors import NoiseFloor, NoiseRun, RunMetrics
from truestep.measure.sketch import estimate, sketch
from truestep.recording.manifest import Level, Manifest
from truestep.recording.table import tensor_table
from truestep.verdict import Comparison, Row, Verdict

NAME = "latent/final"
FLOOR = NoiseFloor(
    runs=tuple(
        NoiseRun(
            kind="jitter",
            detail="",
            pair="float32/float32",
            tensors=(RunMetrics(name=NAME, rel_l2=rel_l2, max_abs=6 * rel_l2),),
        )
        for rel_l2 in (0.9e-3, 0.95e-3, 1e-3)
    )
)
Tensors = torch.Tensor | dict[str, torch.Tensor]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(1, 8, 5, 32, 32)
ZERO = torch.zeros_like(X)
OFF = randn(1, 8, 5, 32, 32, seed=1)


def recording(
    tensors: Tensors, *, level: Level = "sketch", floor: NoiseFloor | None = None
) -> Recording:
    named = tensors if isinstance(tensors, dict) else {NAME: tensors}
    manifest = Manifest(
        tool_version="0",
        created="now",
        level=level,
        tensors=tensor_table(named),
        noise_floor=floor,
    )
    return Recording.in_memory(named, manifest)


def judged(actual: Tensors, reference: Tensors, *, tolerance: float | None = None) -> Row:
    """The row of a pair of which the reference is a sketch, with a measured floor."""
    (row,) = sketched(actual, reference, tolerance=tolerance).rows
    return row


def sketched(actual: Tensors, reference: Tensors, *, tolerance: float | None = None) -> Comparison:
    ours = actual if isinstance(actual, dict) else {NAME: actual}
    return compare(ours, recording(reference, floor=FLOOR), tolerance=tolerance)


def one_element(value: float) -> torch.Tensor:
    changed = X.clone()
    changed[0, 3, 2, 7, 9] = value
    return changed


PAIRS: dict[str, tuple[torch.Tensor, torch.Tensor, Verdict]] = {
    "equal": (X.clone(), X, Verdict.EQUIVALENT),
    "noise within the floor": (X + 5e-4 * OFF, X, Verdict.EQUIVALENT),
    "noise 5 times beyond": (X + 5e-3 * OFF, X, Verdict.DRIFTED),
    "channels permuted": (X[:, [1, 0, 2, 3, 4, 5, 6, 7]], X, Verdict.DRIFTED),
    "frames swapped": (X[:, :, [0, 1, 3, 2, 4]], X, Verdict.DRIFTED),
    "elements rolled": (X.flatten().roll(1), X.flatten(), Verdict.DRIFTED),
    "sign flipped": (-X, X, Verdict.DRIFTED),
    "gain 1.01": (X * 1.01, X, Verdict.DRIFTED),
    "gain 1 + 1e-5": (X * (1 + 1e-5), X, Verdict.EQUIVALENT),
    "one NaN": (one_element(math.nan), X, Verdict.INVALID),
    "infinity on both sides": (one_element(math.inf), one_element(math.inf), Verdict.INVALID),
    "one huge value": (one_element(1e30), X, Verdict.DRIFTED),
    "one huge value, double": (
        torch.where(X.isclose(X.max()), 1e300, X.double()),
        X,
        Verdict.DRIFTED,
    ),
    "one large element": (one_element(30.0), X, Verdict.DRIFTED),
    "zero reference": (X, ZERO, Verdict.INVALID),
    "zero candidate": (ZERO, X, Verdict.INVALID),
    "both zero": (ZERO, ZERO, Verdict.EQUIVALENT),
    "both one constant": (ZERO + 3, ZERO + 3, Verdict.EQUIVALENT),
    "two constants": (ZERO + 2, ZERO + 3, Verdict.INVALID),
    "empty": (X[:0], X[:0], Verdict.INVALID),
    "transposed": (X[..., :16].transpose(3, 4), X[..., :16], Verdict.INCOMPARABLE),
    "few elements equal": (X[0, 0, 0], X[0, 0, 0], Verdict.EQUIVALENT),
    "few elements near": (X[0, 0, 0] + 5e-4 * OFF[0, 0, 0], X[0, 0, 0], Verdict.EQUIVALENT),
    "few elements rolled": (X[0, 0, 0].roll(1), X[0, 0, 0], Verdict.DRIFTED),
    "one element": (torch.tensor(2.0), torch.tensor(2.0), Verdict.EQUIVALENT),
    "integers equal": (torch.arange(5000), torch.arange(5000), Verdict.EQUIVALENT),
    "integers off by one": (torch.arange(50) + 1, torch.arange(50), Verdict.DRIFTED),
    "booleans": (X > 0, X > 0, Verdict.EQUIVALENT),
    "one boolean": (X > 0, (X > 0) ^ X.isclose(X.max()), Verdict.DRIFTED),
    "zero integers": (torch.ones(9).long(), torch.zeros(9).long(), Verdict.DRIFTED),
    "other dtype": (X.bfloat16(), X, Verdict.EQUIVALENT),
}


@pytest.mark.parametrize("kind", list(PAIRS))
def test_verdicts_are_those_of_full_recordings(kind: str) -> None:
    actual, reference, expected = PAIRS[kind]
    row = judged(actual, reference)
    assert row.verdict is expected, row.note
    (full,) = compare({NAME: actual}, recording(reference, level="full", floor=FLOOR)).rows
    same = {Verdict.IDENTICAL: Verdict.EQUIVALENT}
    assert same.get(full.verdict, full.verdict) is expected
    assert (row.actual, row.reference) == (full.actual, full.reference)
    # whichever side is the sketch
    for ours in (recording(actual), recording(actual, level="full")):
        for level in ("sketch", "full") if ours.manifest.level == "sketch" else ("sketch",):
            theirs = recording(reference, level=level, floor=FLOOR)  # type: ignore[arg-type]
            assert compare(ours, theirs).rows == (row,) or math.isnan(_rel_l2(row))


def _rel_l2(row: Row) -> float:
    return row.metrics.rel_l2 if row.metrics else math.nan


@pytest.mark.parametrize("seed", range(3))
def test_only_what_straddles_is_inconclusive(seed: int) -> None:
    dice = random.Random(seed)
    undecided = 0
    for _ in range(40):
        level = math.exp(dice.uniform(math.log(3e-4), math.log(6e-3)))
        actual = X + level * randn(*X.shape, seed=dice.getrandbits(30))
        row = judged(actual, X)
        (full,) = compare({NAME: actual}, recording(X, level="full", floor=FLOOR)).rows
        assert row.metrics
        assert row.floor
        assert full.metrics
        assert row.metrics.rel_l2 == pytest.approx(full.metrics.rel_l2, rel=0.1)
        if row.verdict is full.verdict:
            continue
        undecided += 1
        assert row.verdict is Verdict.INCONCLUSIVE, (level, row.note, full.note)
        assert ": record at level full to decide" in row.note
        near = (row.floor.rel_l2, row.floor.rel_l2 * row.floor.bound)
        assert near[0] / 1.15 < full.metrics.rel_l2 < near[1] * 1.15
    assert undecided < 12


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 1.01,
        lambda x: -x,
        lambda x: x + 0.3 * OFF,
        lambda x: 0.2 * x + OFF,
        lambda x: x.roll(1, 1),
    ],
)
def test_metrics_are_those_of_the_tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    actual = change(X)
    found = judged(actual, X).metrics
    (full,) = compare({NAME: actual}, {NAME: X}).rows
    true = full.metrics
    assert found
    assert true
    assert found.count == true.count
    assert found.norm_ratio == pytest.approx(true.norm_ratio, rel=1e-7)
    assert found.rms_reference == pytest.approx(true.rms_reference, rel=1e-7)
    assert found.rel_l2 == pytest.approx(true.rel_l2, rel=0.08)
    error = abs(found.rel_l2**2 - true.rel_l2**2) / 2
    assert found.gain == pytest.approx(true.gain, abs=error + 1e-6)
    assert found.cosine_distance == pytest.approx(
        true.cosine_distance, abs=error / true.norm_ratio + 1e-6
    )
    assert math.isnan(found.max_abs)
    assert found.max_abs_index == ()


def test_notes_say_what_was_estimated() -> None:
    row = judged(X + 5e-3 * OFF, X)
    assert row.metrics
    inside = estimate(sketch(X + 5e-3 * OFF), sketch(X), norm=float(X.double().norm()))
    assert row.note == f"sketch: {inside.rel_l2:.2e} ({inside.low:.2e} to {inside.high:.2e})"
    assert row.floor
    assert (row.floor.source, row.floor.runs) == ("measured", 3)
    assert row.ratio == pytest.approx(row.metrics.rel_l2 / row.floor.rel_l2)
    assert row.ratio_metric == "rel_l2"
    equal = judged(X.clone(), X)
    assert equal.note.endswith("; sketches agree exactly (a change below 1.2e-07 is not seen)")
    assert equal.ratio == pytest.approx(1.25e-7 / 1e-3, rel=0.05)
    other = judged(X.bfloat16(), X)
    assert other.note.endswith("; dtype bfloat16 against float32")
    constant = judged(X, ZERO)
    assert constant.note == "the reference side holds one value everywhere (0)"
    nan = judged(one_element(math.nan), X)
    assert nan.note == "non-finite values: 1 in actual (of 40,960)"
    assert nan.metrics
    assert (nan.metrics.nonfinite_actual, nan.metrics.nonfinite_reference) == (1, 0)
    assert (
        "shape [1, 8, 5, 16, 32] against [1, 8, 5, 32, 16]: looks transposed"
        in judged(X[..., :16].transpose(3, 4), X[..., :16]).note
    )


def test_a_tolerance_is_held_by_the_whole_interval() -> None:
    actual = X + 1e-2 * OFF
    assert judged(actual, X, tolerance=2e-2).verdict is Verdict.EQUIVALENT
    assert judged(actual, X, tolerance=5e-3).verdict is Verdict.DRIFTED
    row = judged(actual, X, tolerance=1e-2)
    assert row.verdict is Verdict.INCONCLUSIVE
    assert row.note.startswith("sketch: estimate ")
    assert row.note.endswith(") straddles the bound 1.00e-02: record at level full to decide")
    result = sketched(actual, X, tolerance=1e-2)
    assert result.hint == "record it whole: truestep record CASE --level full --output FILE"
    assert "user tolerance 0.01" in result.rule.text
    with pytest.raises(UsageError, match="tolerance = inf cannot judge"):
        sketched(actual, X, tolerance=math.inf)


@pytest.mark.parametrize("tolerance", [0.0, 1e-9])
def test_equal_sketches_are_not_called_closer_than_they_can_tell(tolerance: float) -> None:
    row = judged(X.clone(), X, tolerance=tolerance)
    assert row.verdict is Verdict.INCONCLUSIVE
    assert "sketches agree exactly, but a change below 1.2e-07 is not seen" in row.note


def test_nothing_is_said_where_no_float_can_hold_it() -> None:
    for factor in (1e-200, 1e200):
        row = judged((X.double() * factor).roll(1), X.double() * factor)
        assert row.verdict is Verdict.INCONCLUSIVE, row.note


def test_every_name_of_both_sides_has_a_row() -> None:
    ours = {"a": X, "stats/a": X, "only ours": X}
    theirs = {"only theirs": X, "a": X, "stats/a": X}
    for actual, reference in (
        (recording(ours), recording(theirs)),
        (ours, recording(theirs)),
        (recording(ours), theirs),
    ):
        result = compare(actual, reference)
        assert [row.name for row in result.rows] == ["only theirs", "a", "stats/a", "only ours"]
        verdicts = [row.verdict.value for row in result.rows]
        assert verdicts == ["missing", "equivalent", "equivalent", "incomparable"]
        assert (result.missing, result.unexpected) == (("only theirs",), ("only ours",))
        assert result.verdict is Verdict.INCOMPARABLE


def test_other_kinds_of_sides_are_sketched_too() -> None:
    reference = recording({"tensor": X})
    assert compare(X, reference).verdict is Verdict.EQUIVALENT
    assert compare(X.numpy(), reference).verdict is Verdict.EQUIVALENT
    assert compare(np.ones((1, 8, 5, 32, 32)) * X.numpy() * 2, reference).verdict is Verdict.DRIFTED
    assert compare(reference, X).verdict is Verdict.EQUIVALENT
    assert compare({}, reference).verdict is Verdict.MISSING
    assert compare(reference, {}).verdict is Verdict.INCOMPARABLE


def test_results_say_what_was_not_looked_at() -> None:
    result = sketched(X + 5e-4 * OFF, X)
    assert result.verdict is Verdict.EQUIVALENT
    assert result.rule.name == "sketch/1"
    assert "against the measured noise floor (float32/float32)" in result.rule.text
    assert "smaller half and structure of the differences" in result.not_looked_at[0]
    assert compare(X, recording({"tensor": X})).rule.text.count("analytic noise floor") == 1
    assert Comparison.model_validate_json(result.to_json()).rows[0].note == result.rows[0].note


@pytest.mark.parametrize("other", ["sketch", "full"])
def test_moments_against_anything_stay_moments(other: Level) -> None:
    for actual, reference in (
        (recording(X, level=other), recording(X, level="stats")),
        (recording(X, level="stats"), recording(X, level=other)),
    ):
        (row,) = compare(actual, reference).rows
        assert row.name == NAME
        assert row.verdict is Verdict.INCONCLUSIVE
        assert "moments cannot see a permutation" in row.note


def test_the_order_of_summation_does_not_matter() -> None:
    reference = recording(X)
    moved = dict(reference)
    moved[f"stats/{NAME}"] = moved[f"stats/{NAME}"] * (1 + 1e-15)
    moved[f"stats/{NAME}"][[0, 6, 7]] = reference[f"stats/{NAME}"][[0, 6, 7]]
    (row,) = compare(
        X,
        Recording(
            recording({"tensor": X}).manifest,
            tensors={name.replace(NAME, "tensor"): tensor for name, tensor in moved.items()},
        ),
    ).rows
    assert "sketches agree exactly" in row.note
