"""Estimates of cases: bytes as a recording's, weights that are not read, what is free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import truestep
from truestep.engines import needs
from truestep.engines.needs import estimate, free_disk, free_memory
from truestep.recording.format import Recording
from truestep.runtime import lent, stored
from truestep.testing import tiny

CALL = {
    "prompt": "a cat",
    "height": 32,
    "width": 32,
    "num_inference_steps": 12,
    "max_sequence_length": 16,
}


def held(recording: Recording) -> int:
    return sum(recording[name].nbytes for name in recording)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_a_recording(dtype: str, tmp_path: Path) -> None:
    tiny.save("FluxPipeline", tmp_path / "flux", dtype=dtype)
    case = truestep.CallCase(model=str(tmp_path / "flux"), dtype=dtype, call=CALL)  # type: ignore[arg-type]
    told = estimate(case)
    assert (told.steps, told.dtype) == (12, dtype)
    sizes = [held(truestep.record(case, keep=keep)) for keep in ((), "all")]  # type: ignore[arg-type]
    if dtype == "float32":  # what is raised is not kept where it is only another dtype
        assert [told.recording, told.whole] == sizes
    assert 0.8 * sizes[0] < told.recording < 1.3 * sizes[0]
    assert 0.8 * sizes[1] < told.whole < 1.3 * sizes[1]
    assert told.recording < told.whole
    assert 0 < told.generation.seconds < told.record.seconds
    assert told.generation.memory <= told.check.memory <= told.record.memory


def test_a_case_of_the_runtime_is_foretold_by_its_stages() -> None:
    case = truestep.Case(model="builtin:digits", prompt="a red three moving left", steps=12)
    told = estimate(case)
    recording, whole = truestep.record(case), truestep.record(case, floor="none", keep="all")
    assert told.recording < 0.7 * told.whole
    assert 0.95 * held(recording) < told.recording < 1.05 * held(recording)
    assert 0.95 * held(whole) < told.whole < 1.05 * held(whole)
    assert told.forwards == recording.manifest.forwards + 3  # two texts, and the decoder
    assert 0 < told.generation.seconds < told.record.seconds


def test_weights_stay_in_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save("FluxPipeline", tmp_path / "flux")
    monkeypatch.setattr(stored, "LEAST", 1 << 12)
    monkeypatch.setattr(lent, "LEAST", 1 << 12)
    read: list[int] = []
    own = os.preadv

    def counted(file: int, buffers: Any, offset: int) -> int:
        count = own(file, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counted)
    told = estimate(truestep.CallCase(model=str(tmp_path / "flux"), call=CALL))
    total = sum(told.weights.values())
    assert total > 8e5
    assert 0 < sum(read) < 0.35 * total, "weights of 4 KiB and more are not read"


def test_a_model_of_more_steps_takes_longer_and_a_larger_one_more_memory(tmp_path: Path) -> None:
    tiny.save("FluxPipeline", tmp_path / "flux")
    case = truestep.CallCase(model=str(tmp_path / "flux"), call=CALL)
    some, more = estimate(case), estimate(case.replace(num_inference_steps=24))
    large = estimate(case.replace(height=128, width=128))
    assert more.flops > 1.5 * some.flops
    assert more.generation.seconds > some.generation.seconds
    assert large.generation.memory > some.generation.memory


def test_what_is_free_is_the_least_of_all_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(needs, "_meminfo", lambda: 5)
    monkeypatch.setattr(needs, "_control_group", lambda: 3)
    monkeypatch.setattr(needs, "_limits", lambda: [4])
    assert free_memory() == 3
    monkeypatch.setattr(needs, "_meminfo", lambda: None)
    monkeypatch.setattr(needs, "_control_group", lambda: None)
    monkeypatch.setattr(needs, "_limits", list)
    assert free_memory() is None
    assert free_disk(tmp_path / "not" / "there" / "file") == free_disk(tmp_path)
