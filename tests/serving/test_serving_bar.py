"""Faults that are found and healthy servers that are not accused, over ten trusted models, or two
of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from tests.bars import share
from tests.serving.conftest import Address
from truestep.serving.answers import gather
from truestep.serving.client import Endpoint, connected
from truestep.serving.judging import Answers, judge
from truestep.serving.plan import Ask, Plan
from truestep.verdict import Verdict

PICTURES, LARGE, VIDEOS = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "WanPipeline"

TRUSTED: list[tuple[str, int, Ask]] = [
    (PICTURES, 0, Ask("a red fox in the snow", steps=6, width=32, height=32)),
    (PICTURES, 1, Ask("a train at night", steps=4, guidance=7.5, width=48, height=32, seed=3)),
    (PICTURES, 2, Ask("two boats", steps=8, guidance=2.0, width=32, height=64, seed=9)),
    (PICTURES, 3, Ask("a clock", steps=10, guidance=4.0, width=64, height=64, seed=100)),
    (PICTURES, 4, Ask("a bear reads", negative="rain", steps=6, width=32, height=32, seed=5)),
    (PICTURES, 5, Ask("rain on a window", steps=3, guidance=9.0, width=32, height=32, seed=77)),
    (LARGE, 6, Ask("a red fox in the snow", steps=4, width=64, height=64)),
    (VIDEOS, 7, Ask("a fox runs", steps=6, width=32, height=32)),
    (VIDEOS, 8, Ask("a boat sails", steps=4, guidance=3.0, width=48, height=32, seed=2)),
    (VIDEOS, 9, Ask("rain falls", steps=8, guidance=6.0, width=32, height=32, seed=41)),
]

FAULTS: dict[str, dict[str, str]] = {
    "wrong model": {"model": "50"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "seed": {"ignore": "seed"},
    "another seed each time": {"ignore": "random"},
    "steps": {"ignore": "steps"},
    "guidance": {"ignore": "guidance"},
    "negative": {"ignore": "negative"},
}

HEALTHY: list[dict[str, str]] = [
    {},
    {"threads": "2"},
    {"jitter": "1e-5"},
    {"jitter": "1e-4"},
]


def asked(url: str, plan: Plan) -> Answers:
    with connected(Endpoint(url)) as asker:
        return gather(plan, asker.ask, label=url, progress=lambda *told: None)


@pytest.mark.slow
def test_every_fault_is_found_and_nothing_healthy_is_accused(server: Address) -> None:
    found: Counter[str] = Counter()
    healthy: Counter[str] = Counter()
    told, trusted = [], share(TRUSTED, 2)
    for kind, model, ask in trusted:
        plan = Plan("image", ask)
        own = {"class": kind, "model": str(model)}
        reference = asked(server(**own), plan)
        for name, fault in FAULTS.items():
            result = judge(plan, asked(server(**merged(own, fault)), plan), reference)
            found[name] += result.verdict is Verdict.DRIFTED and named(name, result.sentence)
            told.append(f"{kind} {model} {name}: {result.sentence}")
        for fault in HEALTHY:
            result = judge(plan, asked(server(**{**own, **fault}), plan), reference)
            healthy[result.verdict.value] += 1
            told.append(f"{kind} {model} healthy {fault}: {result.sentence}")
    print("\n".join(told))
    print(dict(found), dict(healthy))
    assert found == dict.fromkeys(FAULTS, len(trusted)), told
    assert healthy[Verdict.DRIFTED.value] == 0, told
    assert healthy[Verdict.EQUIVALENT.value] >= len(trusted) * 3, told


def named(fault: str, sentence: str) -> bool:
    """Whether a fault of a parameter is told as one of it."""
    if fault in ("wrong model", "bfloat16", "float16"):
        return "ignored" not in sentence
    name = "seed" if "seed" in fault else fault
    return sentence.startswith(f"drifted: {name}: ignored")


def merged(own: Mapping[str, str], fault: Mapping[str, str]) -> dict[str, Any]:
    """A fault of one server; another model is another one for each."""
    if "model" in fault:
        return {**own, "model": str(int(own["model"]) + int(fault["model"]))}
    return {**own, **fault}
