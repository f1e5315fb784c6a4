"""Nothing here changes the random numbers that the caller draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import truestep
from truestep.case import Case
from truestep.randomness import own_randomness
from truestep.replay.trace import record_trace

CASE = Case(model="builtin:digits", prompt="a red three", settings={"device": "cpu"}, steps=3)


def drawn() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def test_the_callers_numbers_go_on_and_the_blocks_are_its_own() -> None:
    seed()
    expected = [drawn(), drawn()]
    inside = []
    for _ in range(2):
        seed()
        assert drawn() == expected[0]
        with own_randomness():
            inside.append(drawn())
        assert drawn() == expected[1]
    assert not set(inside[0]) & set(inside[1])  # without a seed: other numbers each time


def test_a_block_that_raises_leaves_them_too() -> None:
    @own_randomness()
    def fail() -> None:
        torch.rand(5)
        raise KeyError

    seed()
    expected = drawn()
    seed()
    with pytest.raises(KeyError):
        fail()
    assert drawn() == expected


def record(folder: Path) -> None:
    truestep.record(CASE).save(folder / "r.safetensors")


def check(folder: Path) -> None:
    assert truestep.check(CASE, folder / "r.safetensors").verdict.passed


def functions(folder: Path) -> None:
    net = torch.nn.Linear(3, 3)
    samples = [{"input": torch.ones(2, 3)}]
    truestep.record_function(net, samples).save(folder / "f.safetensors")
    assert truestep.check_function(net, folder / "f.safetensors").verdict.passed


def trace(folder: Path) -> None:
    record_trace(CASE, path=folder / "t.safetensors")


def test_verbs_leave_the_random_state(tmp_path: Path) -> None:
    verbs: tuple[Callable[[Path], None], ...] = (record, check, trace)
    for verb in verbs:
        seed()
        verb(tmp_path)
        after = drawn()
        seed()
        assert after == drawn(), verb.__name__
    seed()
    functions(tmp_path)
    torch.manual_seed(1)
    torch.nn.Linear(3, 3)
    expected = torch.get_rng_state()
    torch.manual_seed(1)
    functions(tmp_path)
    assert torch.equal(torch.get_rng_state(), expected)
