"""Matrices, cases and arms are refused before any model is loaded, in words that help."""

from __future__ import annotations

import re

import pytest

from truestep.case import Case
from truestep.errors import CaseError, UsageError
from truestep.experiment.planning import (
    arm_case,
    parse_matrix,
    pinned_cases,
    planned_cases,
    validate,
)
from truestep.experiment.prompts import DIGITS, pinned

CASES = planned_cases(pinned_cases("builtin:digits"))


def test_a_matrix_is_every_combination_with_a_folder_of_its_own() -> None:
    cells = parse_matrix(["dtype=float32,bfloat16", "compile=off,on"])
    assert [cell.folder for cell in cells] == [
        "eager/dtype=float32",
        "compile/dtype=float32",
        "eager/dtype=bfloat16",
        "compile/dtype=bfloat16",
    ]
    assert [cell.compile for cell in cells] == [False, True, False, True]
    assert cells[0].settings == {"dtype": "float32"}
    assert parse_matrix([])[0].folder == "eager/as-is"


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        (["dtype"], "--matrix needs KEY=VALUE,VALUE, got 'dtype'"),
        (["dtype="], "--matrix dtype has no values"),
        (["dtype=float32,,bfloat16"], "a value is empty"),
        (["dtype=float32", "dtype=bfloat16"], "--matrix dtype is given twice"),
        (["dtype=float32,float32"], "--matrix dtype=float32 is given twice"),
        (["compile=maybe"], "compile = 'maybe': it is on or off"),
    ],
)
def test_impossible_matrices(dimensions: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_matrix(dimensions)


def checked(matrix: list[str], **options: object) -> None:
    values = {"baseline": {}, "candidate": {}, "apply": "", "alike": False, **options}
    validate(CASES, parse_matrix(matrix), **values)  # type: ignore[arg-type]


def test_impossible_cells_are_named() -> None:
    with pytest.raises(CaseError, match="unknown setting 'dtpye'") as caught:
        checked(["dtpye=float32"], apply="f.py:f")
    assert caught.value.where == "--matrix, cell dtpye=float32"
    assert caught.value.likely == "did you mean 'dtype'?"
    with pytest.raises(CaseError, match="dtype = 'float8'") as caught:
        checked(["dtype=float32,float8"], apply="f.py:f")
    assert "cell dtype=float8" in caught.value.where


def test_unknown_settings_of_an_arm_are_named() -> None:
    with pytest.raises(CaseError, match="unknown setting 'guidance'") as caught:
        checked([], candidate={"guidance": "3"})
    assert caught.value.where == "--set guidance=3"
    with pytest.raises(CaseError, match="unknown setting 'guidance'") as caught:
        checked([], baseline={"guidance": "3"})
    assert caught.value.where == "--vs guidance=3"


def test_arms_must_differ() -> None:
    with pytest.raises(UsageError, match="there is no switch to test"):
        checked([])
    with pytest.raises(UsageError, match="the candidate is the baseline") as caught:
        checked([], candidate={"guidance_scale": "3.0"})
    assert "--set guidance_scale=3.0 is what the baseline has already" in caught.value.measured
    with pytest.raises(UsageError, match="both in --matrix and in an arm"):
        checked(["dtype=float32"], candidate={"dtype": "bfloat16"})
    checked([], alike=True)
    checked([], candidate={"compile": "on"})


def test_cases_share_a_model() -> None:
    one, other = Case(model="builtin:digits", prompt="x"), Case(model="else/where", prompt="x")
    with pytest.raises(UsageError, match="share a model and its settings: model differs"):
        planned_cases({"one": one, "other": other})
    with pytest.raises(UsageError, match="no case"):
        planned_cases({})
    assert [c.name for c in planned_cases({"a": one, "b": one}, most=1)] == ["a"]


def test_the_pinned_prompts_are_five_and_in_the_vocabulary_of_the_model() -> None:
    pattern = re.compile(r"a (red|green|blue|yellow) \w+ moving (left|right|up|down)")
    assert all(pattern.fullmatch(prompt) for prompt in DIGITS)
    for model in ("builtin:digits", "Wan-AI/any"):
        assert len(set(pinned(model))) == 5
    cases = list(pinned_cases("builtin:digits").values())
    assert [case.seed for case in cases] == [0, 1, 2, 3, 4]


def test_an_arm_is_the_case_the_cell_and_its_own() -> None:
    cell = parse_matrix(["dtype=bfloat16"])[0]
    case, compiled = arm_case(CASES[0], cell, {"guidance_scale": "3.5", "compile": "on"})
    assert (case.dtype, case.guidance_scale, compiled) == ("bfloat16", 3.5, "on")
