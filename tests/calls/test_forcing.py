"""Forced runs: answered from a recording, or made on recorded inputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.calls.conftest import Tiny
from truestep.calls.forcing import Forcing
from truestep.calls.record import record
from truestep.calls.recording import CallRecording, read
from truestep.calls.seen import Forced, Plan
from truestep.comparison.distance import same_bits


def different(result: Forced, reference: CallRecording) -> list[str]:
    """What is not bit for bit what was recorded."""
    wrong = []
    for seen in result.seen:
        recorded = seen.recorded
        if seen.actual is None or recorded is None or seen.odd:
            wrong.append(str(seen.key))
        elif isinstance(recorded, str):
            if not same_bits(seen.actual, reference.recording[recorded]):
                wrong.append(str(seen.key))
        elif float(seen.actual) != recorded:
            wrong.append(str(seen.key))
    return wrong


@pytest.mark.parametrize("made", ["none", "all", "last"])
def test_a_freshly_built_pipeline_replays_a_file_bit_for_bit(
    tiny: Tiny, made: str, tmp_path: Path
) -> None:
    path = tmp_path / "reference.safetensors"
    record(tiny.subject()).write(path)
    reference = read(path)
    plans = {
        "none": Plan(made=lambda call: False),
        "all": Plan(made=lambda call: True),
        "last": Plan(made=lambda call: call.step == reference.steps - 1),
    }
    result = Forcing(reference, plans[made]).run(tiny.subject())
    assert different(result, reference) == []
    assert (result.missing, result.unexpected) == ([], [])
    models = sum(call.kind == "model" for call in reference.calls)
    assert result.made == {"none": 0, "all": models}.get(made, result.made)
    arrived = {seen.key for seen in result.seen}
    assert any(key.side == "in" and key.component == "scheduler" for key in arrived)
