"""compare(): recordings, their floors, cases and environments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from truestep import Recording, compare
from truestep.case import Case
from truestep.floors import NoiseFloor, NoiseRun, RunMetrics
from truestep.recording.manifest import Manifest
from truestep.recording.table import tensor_table
from truestep.verdict import Verdict

CASE = Case(model="builtin:digits", prompt="a red three")
torch.manual_seed(0)
X = torch.randn(1, 4, 3, 8, 8)
FLOOR = NoiseFloor(
    runs=(
        NoiseRun(
            kind="jitter",
            detail="",
            pair="float32/float32",
            tensors=(RunMetrics(name="latent/final", rel_l2=1e-3, max_abs=1e-2),),
        ),
    )
)


def recording(tensor: torch.Tensor, *, case: Case = CASE, **fields: Any) -> Recording:
    tensors = {"latent/final": tensor}
    manifest = Manifest(
        tool_version="0",
        created="now",
        **{"level": "full", "case_id": case.id, "case": case.canonical(), **fields},
        tensors=tensor_table(tensors),
    )
    return Recording.in_memory(tensors, manifest)


def test_the_references_floor_judges() -> None:
    reference = recording(X, noise_floor=FLOOR)
    noisy = recording(X + 5e-4 * torch.randn_like(X))
    assert compare(noisy, reference).verdict is Verdict.EQUIVALENT
    assert compare(noisy, recording(X)).verdict is Verdict.DRIFTED
    assert "measured noise floor" in compare(noisy, reference).rule.text
    assert "analytic noise floor" in compare(noisy, recording(X)).rule.text


def test_different_cases_are_incomparable_and_named() -> None:
    result = compare(recording(X, case=CASE.replace(seed=3)), recording(X))
    assert result.verdict is Verdict.INCOMPARABLE
    assert [(d.key, d.actual, d.reference) for d in result.case_differences] == [("seed", "3", "0")]
    assert "different cases (seed differ)" in result.sentence


def test_a_port_in_its_own_folder_and_precision_is_comparable() -> None:
    port = recording(X, case=CASE.replace(model="./port", dtype="bfloat16"))
    result = compare(port, recording(X))
    assert result.verdict is Verdict.IDENTICAL
    assert [d.key for d in result.environment_differences] == ["dtype", "model"]


def test_different_environments_are_named_and_still_compared() -> None:
    result = compare(
        recording(X, environment={"library.torch": "2.14"}),
        recording(X, environment={"library.torch": "2.13"}),
    )
    assert result.verdict is Verdict.IDENTICAL
    assert result.environment_differences[0].key == "library.torch"


@pytest.mark.parametrize(
    ("actual", "verdict"),
    [
        (X, Verdict.INCONCLUSIVE),
        (X.flip(1), Verdict.INCONCLUSIVE),
        (X * 1.5, Verdict.DRIFTED),
        (X * float("nan"), Verdict.INVALID),
        (X[:, :2], Verdict.INCOMPARABLE),
    ],
)
def test_moments_never_say_equivalent(actual: torch.Tensor, verdict: Verdict) -> None:
    result = compare(recording(actual), recording(X, level="stats"))
    assert result.verdict is verdict
    if verdict is Verdict.INCONCLUSIVE:
        assert "cannot see a permutation" in result.sentence


def test_moments_of_nothing_are_invalid() -> None:
    nothing = torch.empty(0)
    result = compare(recording(nothing), recording(nothing, level="stats"))
    assert result.verdict is Verdict.INVALID


def test_two_whole_runs_may_differ_by_grown_rounding_and_a_check_decides() -> None:
    """A floor is measured on recorded inputs, which a run of its own does not have."""
    names = ("text/cond", "step/0000/cond", "step/0000/guided", "latent/final")

    def run(**off: float) -> Recording:
        tensors = {n: X * (1 + off.get(n.replace("/", "_"), 0.0)) for n in names}
        manifest = recording(X).manifest.model_copy(update={"tensors": tensor_table(tensors)})
        return Recording.in_memory(tensors, manifest)

    result = compare(run(text_cond=5e-7, step_0000_guided=4e-5), run())
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "rounding before it may have grown to this (" in result.sentence
    assert result.hint.endswith("on recorded inputs: truestep check CASE --apply FILE.py:FUNCTION")
    assert compare(run(step_0000_guided=4e-5), run()).verdict is Verdict.DRIFTED
    limited = compare(run(text_cond=5e-7, step_0000_guided=4e-5), run(), tolerance=1e-6)
    assert limited.verdict is Verdict.DRIFTED
