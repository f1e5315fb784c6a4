"""Forced runs: answered from a recording, or made on recorded inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.bench_coverage import differences
from tests.calls.conftest import Tiny
from truestep.calls.forcing import Forcing
from truestep.calls.recorder import recorded
from truestep.calls.recording import read
from truestep.calls.seen import Plan
from truestep.calls.subject import subject_of


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


class Elsewhere:
    """Stands for torch's own generators of two CUDA devices: the state of each is a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
        for name, function in {
            "is_initialized": lambda: True,
            "device_count": lambda: len(self.states),
            "manual_seed_all": lambda seed: self.set_all([1, 2]),
            "get_rng_state_all": lambda: [state.clone() for state in self.states],
            "set_rng_state_all": lambda states: self.set_all([int(state) for state in states]),
            "set_rng_state": lambda state, number: self.states.__setitem__(number, state),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def set_all(self, numbers: list[int]) -> None:
        self.states = [torch.tensor([number], dtype=torch.uint8) for number in numbers]

    def draw(self) -> None:
        self.states[1] = self.states[1] + 5


def test_a_generator_of_a_device_is_moved_where_a_call_that_draws_is_answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = Elsewhere(monkeypatch)
    ends: list[list[int]] = []

    class Draws(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            device.draw()
            return x * 2

    part = Draws()

    def run(x: torch.Tensor) -> torch.Tensor:
        made = part(x) + part(x + 1)
        ends.append([int(state) for state in device.states])
        return made

    subject = subject_of(run, torch.randn(2, 3), components={"part": part})
    path = tmp_path / "reference.safetensors"
    recorded(subject).write(path)
    reference = read(path)
    moved = [[name for name, _ in call.random] for call in reference.calls]
    assert moved[:2] == [["cuda:1"], ["cuda:1"]]
    result = Forcing(reference, Plan(made=lambda call: False)).run(subject)
    assert result.made == 0
    assert differences(result, reference) == []
    assert ends == [[1, 12], [1, 12]]
    device.states = device.states[:1]  # fewer devices, as on another machine
    Forcing(reference, Plan(made=lambda call: False)).run(subject)
