"""What an endpoint is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from truestep.errors import UsageError
from truestep.serving.plan import BASE, PARAMETERS, SIZE, Ask, Plan, check, plan_of

PLAN = Plan("image", Ask("a fox", steps=6, width=64, height=32))


def test_one_request_is_repeated_and_each_parameter_changed_alone() -> None:
    asks = PLAN.asks()
    repeats = [name for name in asks if name.startswith(f"{BASE}/")]
    assert [*asks] == [
        "base/0", "seed/1", "seed/2", "steps", "guidance",
        "base/1", "negative", "prompt", "size", "base/2",
    ]  # fmt: skip
    assert all(asks[name] == PLAN.base for name in repeats)
    for name in set(asks) - set(repeats):
        changed = [
            key for key, value in vars(PLAN.base).items() if getattr(asks[name], key) != value
        ]
        known = ["width", "height"] if name == SIZE else [name.partition("/")[0]]
        assert changed == known


@pytest.mark.parametrize("repeats", [2, 3, 5, 12])
@pytest.mark.parametrize("without", [(), PARAMETERS[:5], PARAMETERS])
def test_repeats_stand_first_and_last(repeats: int, without: tuple[str, ...]) -> None:
    plan = replace(PLAN, repeats=repeats, without=without)
    asks = [*plan.asks()]
    assert sum(name.startswith("base/") for name in asks) == repeats
    assert asks[0] == "base/0"
    assert asks[-1] == f"base/{repeats - 1}"
    assert not {name.partition("/")[0] for name in asks} & set(without)


def test_the_smallest_picture_is_tried_larger() -> None:
    small = replace(PLAN, base=replace(PLAN.base, width=16, height=48)).asks()[SIZE]
    assert (small.width, small.height) == (32, 16)


def test_a_plan_comes_back_from_json() -> None:
    plan = replace(PLAN, without=("size",), seeds=4)
    assert plan_of(json.loads(json.dumps(plan.as_json()))) == plan


@pytest.mark.parametrize(
    "wrong",
    [
        {"repeats": 1},
        {"repeats": 10**6},
        {"seeds": 0},
        {"kind": "sound"},
        {"without": ["colour"]},
        {"base": {"prompt": "x", "steps": 0}},
        {"base": {"prompt": "x", "steps": "6"}},
        {"base": {"prompt": "x", "seed": True}},
        {"base": {"prompt": "x", "width": 10**9}},
        {"base": {"prompt": 3}},
        {"base": {"prompt": "x", "more": 1}},
        {"base": None},
        {"more": 1},
    ],
)
def test_a_plan_of_a_file_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="what was asked cannot be read"):
        plan_of({**PLAN.as_json(), **wrong})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("steps", {"steps": 1}),
        ("guidance", {"guidance": 1.0}),
        ("negative", {"negative": PLAN.other_negative}),
        ("prompt", {"prompt": PLAN.other_prompt}),
    ],
)
def test_a_parameter_without_another_value_is_refused(name: str, change: dict[str, Any]) -> None:
    plan = replace(PLAN, base=replace(PLAN.base, **change))
    with pytest.raises(UsageError, match=f"whether {name} is ignored cannot be tried"):
        check(plan)
    check(replace(plan, without=(name,)))
