"""Limits come from benign free runs, and from nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gates.thresholds.samples import FRAMES
from truestep.case import Case
from truestep.errors import UsageError
from truestep.gates.kinds import key_frames
from truestep.gates.thresholds.file import METRICS, Thresholds
from truestep.gates.thresholds.linting import lint
from truestep.gates.thresholds.rule import judge, measure
from truestep.gates.thresholds.running import decoded, free_run, with_gate
from truestep.gates.thresholds.writing import (
    LEAST_SHARE,
    _limit,
    _size,
    _value,
    calibrated,
    one_level_off,
    refuse,
    rounded,
)
from truestep.measure.frames import levels
from truestep.recording.format import Recording

BY_NAME = {metric.name: metric for metric in METRICS}


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, object]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **tiny_case)


@pytest.fixture(scope="module")
def recording(case: Case) -> Recording:
    from truestep import record

    return record(case)


def test_limits_of_a_real_case(case: Case, recording: Recording) -> None:
    from truestep.runtime.loading import load

    told: list[str] = []
    found = calibrated(
        load(case), recording, commit="abc", progress=lambda what, done, total: told.append(what)
    )
    assert len(told) == found.runs > 5
    assert set(found.limits) == {"ssim", "psnr_db", "mad"}
    for name, limit in found.limits.items():
        assert BY_NAME[name].holds(found.floor[name], limit)
        assert limit != found.floor[name]
    thresholds = Thresholds("x", {"cases": {}}).with_case("a", found.entry)
    limits = thresholds.limits("a", video=True)
    own = decoded(recording)
    assert judge(limits, measure(free_run(load(case)), own)).passed is None  # clip alone is left
    result = lint(
        thresholds, own, tried_on="own", other=free_run(load(case.replace(seed=1))), only=["a"]
    )
    assert result.findings == ()
    from truestep.gates.thresholds.file import Provenance

    provenance = Provenance.model_validate(found.entry["truestep"])
    assert provenance.runs == len(provenance.measured["ssim"]) == found.runs
    assert provenance.reference.commit == "abc"
    assert provenance.reference.weights == recording.manifest.environment["model.weights"]
    assert "diffusers" in provenance.reference.implementation
    assert provenance.environment == recording.manifest.environment


def test_a_changed_candidate_fails_the_gate_and_the_verdict_stays(
    case: Case, recording: Recording
) -> None:
    from truestep import check
    from truestep.verdict import Verdict

    tight = {"ssim_threshold": 0.999, "psnr_threshold": 60.0, "mean_abs_diff_threshold": 0.02}
    thresholds = Thresholds("x.json", {"cases": {"three": tight}})

    def gated(**settings: object):  # type: ignore[no-untyped-def]
        result = check(case, recording, settings=settings)
        return with_gate(result, case, recording, thresholds, name="three", settings=settings)

    same = gated()
    assert (same.verdict, same.gates[0].name) == (Verdict.IDENTICAL, "sglang x.json [three]")
    assert same.gates[0].passed is None
    changed = gated(guidance_scale=8.0)
    assert (changed.verdict, changed.gates[0].passed) == (Verdict.DRIFTED, False)
    assert changed.exit_code == 1
    assert changed.notes[-1] == "the rule of x.json judged one more generation: 8 forwards"
    missing = same.model_copy(update={"verdict": Verdict.MISSING, "gates": ()})
    (gate,) = with_gate(missing, case, None, thresholds).gates
    assert (gate.passed, gate.metrics) == (None, {})


def test_a_candidate_that_raises_fails(case: Case, recording: Recording) -> None:
    from truestep import check

    def broken(pipe):  # type: ignore[no-untyped-def]
        def decode(*_: object) -> torch.Tensor:
            raise RuntimeError("no kernel\nfor this")

        pipe.decode = decode

    result = check(case, recording, apply=broken)
    thresholds = Thresholds("x", {"cases": {}})
    (gate,) = with_gate(result, case, recording, thresholds, apply=broken).gates
    assert gate.passed is False
    assert gate.note.startswith("the candidate raised RuntimeError: no kernel; x has no case")


def test_no_limits_without_a_floor_or_frames(recording: Recording) -> None:
    refuse(recording)
    bare = recording.manifest.model_copy(update={"noise_floor": None})
    with pytest.raises(UsageError, match="no limits without a measured noise floor") as caught:
        refuse(Recording.in_memory(dict(recording), bare))
    assert "hint: truestep record CASE --update" in str(caught.value)
    kept = {name: tensor for name, tensor in recording.items() if name != "video/frames"}
    with pytest.raises(UsageError, match="no decoded frames to measure on"):
        refuse(Recording.in_memory(kept, recording.manifest))


def test_one_level_off_moves_the_share_it_says() -> None:
    moved = levels(one_level_off(FRAMES)) - levels(FRAMES)
    assert set(moved.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert float((moved != 0).float().mean()) == pytest.approx(LEAST_SHARE, rel=0.4)
    (first, *_) = key_frames(one_level_off(FRAMES), FRAMES)
    assert 60 < first.psnr < 75


def test_sound_may_be_rounded_as_a_file_holds_it(reference: dict[str, torch.Tensor]) -> None:
    least = measure(rounded(reference), reference, sample_rate=16_000).values
    assert 0 < least["audio_rms_db"] < 1e-3
    assert 1 - 1e-6 < least["audio_correlation"] < 1
    exact = (0.0, 0.0)  # no benign run moved the sound
    limit = _limit(BY_NAME["audio_rms_db"], exact, least["audio_rms_db"])
    assert limit == pytest.approx(2 * least["audio_rms_db"], rel=0.02)
    assert set(rounded({"video/frames": FRAMES})) == {"video/frames"}


@settings(deadline=None)
@given(st.floats(1e-5, 1.0))
def test_a_size_survives_as_a_limit_never_tighter(size: float) -> None:
    for name in ("ssim", "psnr_db", "mad"):
        again = _size(BY_NAME[name], _value(BY_NAME[name], size))
        assert size * (1 - 1e-9) <= again <= size * 1.02 + 2e-6


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 0.4), min_size=1, max_size=12), st.floats(1e-4, 0.01))
def test_every_benign_value_is_within_its_limit(sizes: list[float], least: float) -> None:
    for name in ("ssim", "psnr_db", "mad"):
        metric = BY_NAME[name]
        exact = name == "psnr_db"
        values = tuple(_of_size(name, size) for size in sizes)
        limit = _limit(metric, values, _of_size(name, least))
        for value in (*values, _of_size(name, least)):
            assert metric.holds(value, limit), (name, value, limit, exact)


def _of_size(name: str, size: float) -> float:
    import math

    if name == "psnr_db":
        return math.inf if size == 0 else -20 * math.log10(size)
    return 1 - size if name == "ssim" else size
