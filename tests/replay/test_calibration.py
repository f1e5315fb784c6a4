"""Calibration: more benign runs, false alarms measured on runs that were left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import Recording, check, record
from truestep.case import Case
from truestep.floors import NoiseFloor
from truestep.replay.calibration import calibrate
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Verdict


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **tiny_case)


@pytest.fixture(scope="module")
def recording(case: Case) -> Recording:
    return record(case)


def test_runs_are_added_and_judged_by_the_others(case: Case, recording: Recording) -> None:
    floor = recording.manifest.noise_floor
    assert floor is not None
    found = calibrate(load(case), recording, floor, runs=20)
    assert len(found.floor.runs) == len(floor.runs) + 20
    assert found.flagged == 0
    assert 0.10 < found.flagged_below < 0.16  # 1 - 0.05 ** (1 / 20)
    (prediction,) = [row for row in found.stages if row.stage == "prediction"]
    assert prediction.runs >= 20
    assert prediction.bound <= prediction.before
    (decoding,) = [row for row in found.stages if row.stage == "decoding"]
    assert decoding.outcomes == 1
    kinds = [run.detail for run in found.floor.runs if run.kind == "mixed"]
    assert len(set(kinds)) == 20
    assert any(" + " in detail for detail in kinds)


def test_runs_can_be_added_again(case: Case, recording: Recording) -> None:
    pipe = load(case)
    once = calibrate(pipe, recording, NoiseFloor(), runs=3)
    twice = calibrate(pipe, recording, once.floor, runs=3)
    details = [run.detail for run in twice.floor.runs]
    assert len(set(details)) == 6


def test_a_kernel_that_flips_between_two_results_is_recognised(case: Case) -> None:
    """Every fifth prediction comes out of another kernel, whose rounding is a thousand ulp."""

    def flipping(pipe: Pipeline) -> Pipeline:
        predict, calls = pipe.predict, [0]

        def flip(*inputs: Any) -> torch.Tensor:
            made = predict(*inputs)
            calls[0] += 1
            return made * (1 + 1e-4) if calls[0] % 5 == 1 else made

        return replace(pipe, predict=flip)

    reference = record(case)
    found = calibrate(flipping(load(case)), reference, NoiseFloor(), runs=15)
    (prediction,) = [row for row in found.stages if row.stage == "prediction"]
    assert prediction.outcomes == 2
    assert prediction.floor == pytest.approx(1e-4, rel=0.1)
    assert prediction.spread < 0.3  # of the upper outcome, not of both together
    calibrated = reference.manifest.model_copy(update={"noise_floor": found.floor})
    updated = Recording.in_memory(dict(reference), calibrated)
    result = check(case, updated, apply=flipping)
    assert result.verdict is Verdict.EQUIVALENT
    details = [row.floor.detail for row in result.rows if row.floor]
    assert any("two outcomes: " in detail for detail in details)
