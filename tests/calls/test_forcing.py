"""Forced runs: answered from a recording, or made on recorded inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.bench_coverage import differences
from tests.calls.conftest import Tiny
from truestep.calls.forcing import Forcing
from truestep.calls.recorder import recorded
from truestep.calls.recording import read
from truestep.calls.seen import Plan


@pytest.mark.parametrize("made", ["none", "all", "last"])
def test_a_freshly_built_pipeline_replays_a_file_bit_for_bit(
    tiny: Tiny, made: str, tmp_path: Path
) -> None:
    path = tmp_path / "reference.safetensors"
    recorded(tiny.subject()).write(path)
    reference = read(path)
    plans = {
        "none": Plan(made=lambda call: False),
        "all": Plan(made=lambda call: True),
        "last": Plan(made=lambda call: call.step == reference.steps - 1),
    }
    result = Forcing(reference, plans[made]).run(tiny.subject())
    assert differences(result, reference) == []
    models = sum(call.kind == "model" for call in reference.calls)
    assert result.made == {"none": 0, "all": models}.get(made, result.made)
    arrived = {seen.key for seen in result.seen}
    assert any(key.side == "in" and key.component == "scheduler" for key in arrived)
