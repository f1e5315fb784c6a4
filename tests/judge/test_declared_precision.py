"""The declared precision of both sides chooses the floor; what a candidate returns does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import Case, check, check_function, record, record_function
from truestep.joint import each, floating
from truestep.recording.format import Recording
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Verdict

NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16)
STAGES = ("encode_text", "make_latent", "predict", "combine", "update", "decode")


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **tiny_case)


@pytest.fixture(scope="module")
def recording(case: Case) -> Recording:
    return record(case)


@pytest.fixture(scope="module")
def narrow(case: Case) -> Recording:
    return record(case.replace(dtype="bfloat16"))


def cast(stage: str, dtype: torch.dtype) -> Callable[[Pipeline], None]:
    def apply(pipe: Pipeline) -> None:
        original = getattr(pipe, stage)
        to = floating(lambda tensor: tensor.to(dtype))
        setattr(pipe, stage, lambda *args: each(to, original(*args)))

    return apply


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_casts_its_output_has_drifted(
    case: Case, recording: Recording, stage: str, dtype: torch.dtype
) -> None:
    result = check(case, recording, apply=cast(stage, dtype))
    assert result.verdict is Verdict.DRIFTED
    row = next(row for row in result.rows if row.verdict is Verdict.DRIFTED)
    assert f"dtype {str(dtype).removeprefix('torch.')} against float32" in row.note
    assert row.floor is not None
    assert row.floor.pair == "float32/float32"


@pytest.mark.parametrize("dtype", NARROW[:2])
@pytest.mark.parametrize("stage", ["predict", "update", "decode"])
def test_a_stage_of_a_16_bit_case_that_casts_to_8_has_drifted(
    case: Case, narrow: Recording, stage: str, dtype: torch.dtype
) -> None:
    same = case.replace(dtype="bfloat16")
    assert check(same, narrow, apply=cast(stage, dtype)).verdict is Verdict.DRIFTED


@pytest.mark.parametrize("stage", ["predict", "combine", "decode"])
def test_a_16_bit_case_whose_stage_returns_32_bits_is_the_same(
    case: Case, narrow: Recording, stage: str
) -> None:
    same = case.replace(dtype="bfloat16")
    result = check(same, narrow, apply=cast(stage, torch.float32))
    assert result.verdict.passed
    assert any("dtype float32 against bfloat16" in row.note for row in result.rows)


def test_a_candidate_that_is_declared_in_16_bits_is_judged_as_one(
    case: Case, recording: Recording
) -> None:
    other = {"dtype": "bfloat16"}
    result = check(case, recording, settings=other)
    assert result.verdict.passed
    pairs = {row.floor.pair for row in result.rows if row.floor}
    assert pairs == {"bfloat16/float32"}
    for stage in ("make_latent", "update"):  # float32 in the trusted bfloat16 run, too
        spoiled = check(case, recording, settings=other, apply=cast(stage, torch.bfloat16))
        assert spoiled.verdict is Verdict.DRIFTED


@pytest.mark.parametrize("dtype", NARROW)
def test_a_function_that_casts_its_output_has_drifted(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
    reference = record_function(net, [{"input": torch.randn(1, 16)} for _ in range(3)])
    result = check_function(lambda input: net(input).to(dtype), reference)
    assert result.verdict is Verdict.DRIFTED
    name = str(dtype).removeprefix("torch.")
    assert all(f"dtype {name} against float32" in row.note for row in result.rows)
    asked = check_function(
        lambda input: net(input).to(dtype), reference, pair=f"{name}/float32", label="asked"
    )
    assert asked.verdict is Verdict.EQUIVALENT
