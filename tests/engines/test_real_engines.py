"""Real engines, where they are: right ones, and six faults planted in each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench.bench_engines import (
    ENGINES,
    FAULTS,
    OF_OTHERS,
    PLANTED,
    TRUSTED,
    absent,
    judged,
    reference,
)
from bench.engines.tiny_wan import make, make_two

PYTHON = os.environ.get("TRUESTEP_ENGINES", str(Path(".engines/bin/python").absolute()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    make(folder / "wan")
    make_two(folder / "wan")
    for name, own in OF_OTHERS.items():
        own.make(folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_right_engine_is_equivalent_and_each_fault_is_named(engine: str, place: Path) -> None:
    why = absent(engine, PYTHON)
    if why:
        pytest.skip(why)
    name = TRUSTED.get(engine, "trusted")
    references = {name: reference(place, name)}
    for fault in PLANTED.get(engine, FAULTS):
        row = judged(engine, fault, PYTHON, place, references)
        assert row.get("right"), row
        assert row["predictions"] == {"flux": 4, "cosmos_predict2": 10}.get(engine, 8)
        assert row.get("bit_equal", True), row


def test_an_engine_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "make engines" in absent("diffsynth", "no-such-python")
    monkeypatch.setenv("TRUESTEP_WAN", "no-such-folder")
    assert absent("wan", sys.executable) == "TRUESTEP_WAN names no folder"
    monkeypatch.delenv("TRUESTEP_WAN")
    assert absent("wan", sys.executable) == "TRUESTEP_WAN is not set"
