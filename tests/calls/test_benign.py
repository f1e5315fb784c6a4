"""The floor of any subject: which harmless changes it is made of, and what they change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.calls.conftest import TINY
from tests.calls.loops import Copying, Loop, Scheduler, subject
from truestep.calls.batching import NoBatchError, with_neighbour
from truestep.calls.elsewhere import begun_elsewhere
from truestep.calls.forcing import Forcing
from truestep.calls.instructions import Elsewhere, other_sets
from truestep.calls.keys import key_of
from truestep.calls.record import record
from truestep.calls.recorder import recorded
from truestep.calls.recording import CallRecording
from truestep.calls.seen import Plan
from truestep.calls.tape import Tape
from truestep.floors import NoiseRun

EVERY = Plan(made=lambda call: True)


def kinds(recording: CallRecording) -> dict[str, NoiseRun]:
    assert recording.floor is not None
    return {run.kind: run for run in recording.floor.runs}


def components(run: NoiseRun) -> set[str]:
    return {key_of(tensor.name).component for tensor in run.tensors}


@pytest.fixture(scope="module")
def loop_floor() -> CallRecording:
    return record(subject(Loop()))


def test_a_floor_is_made_of_every_kind_of_harmless_change(loop_floor: CallRecording) -> None:
    expected = {"repeat", "precision", "threads", "attention", "functions", "batch", "jitter"}
    expected |= {"instructions"} if other_sets() else set()
    assert set(kinds(loop_floor)) == expected
    assert loop_floor.recording.manifest.notes == ()
    repeat = kinds(loop_floor)["repeat"]
    assert {tensor.rel_l2 for tensor in repeat.tensors} == {0.0}


@pytest.mark.skipif(not other_sets(), reason="this processor has one set of instructions")
def test_other_instructions_are_measured_at_every_call(loop_floor: CallRecording) -> None:
    here = {m.name for m in kinds(loop_floor)["attention"].tensors}
    there = {m.name: m.rel_l2 for m in kinds(loop_floor)["instructions"].tensors}
    outputs = {name for name in here if "/net/" in name or "/decoder/" in name}
    assert outputs <= set(there)
    assert all(size < 1e-5 for size in there.values())


@pytest.mark.parametrize(
    "pipeline", [Loop, Copying, lambda: Loop(Scheduler(noise=0.3))], ids=["plain", "copy", "noise"]
)
def test_a_taped_run_hands_on_nothing_that_it_made(pipeline: Callable[[], Any]) -> None:
    """A model that is wrong by much changes its own outputs, and no call that follows."""
    reference = recorded(subject(pipeline()))
    forced = replace(EVERY, given=lambda t: t, handed=lambda t: t, copies=True)
    candidate = subject(pipeline())
    with torch.no_grad():
        candidate.components["net"].out.weight.mul_(2)
    with Tape() as tape:
        result = Forcing(reference, forced).run(candidate)
    assert tape.problem == ""
    assert result.raised == ""
    wrong = set()
    for seen in result.seen:
        if isinstance(seen.recorded, str) and seen.actual is not None:
            assert seen.actual is not reference.recording[seen.recorded]
            if not torch.equal(seen.actual, reference.recording[seen.recorded]):
                wrong.add((seen.key.component, seen.key.side, seen.key.path))
    assert {part[:2] for part in wrong} == {("net", "out")}


def test_a_subject_that_cannot_be_taped_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if not other_sets():
        pytest.skip("this processor has one set of instructions")
    told: list[str] = []
    reference = recorded(subject(Loop()))

    def broken(pipeline: Any) -> None:
        pipeline.net.register_forward_hook(lambda *_: 1 / 0)

    with Elsewhere(told.append) as elsewhere:
        collect = begun_elsewhere(subject(Loop(), broken), reference, EVERY, elsewhere)
        assert collect("float32/float32") == []
    (text,) = told
    assert text.startswith("noise floor without other instructions: raised ZeroDivisionError")


class Mixed(torch.nn.Module):
    """Its rows depend on one another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.linear(x) - x.mean(0),)


class Alone(Mixed):
    """It takes one sample."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
        if x.shape[0] != 1:
            raise ValueError("one sample only")
        return (self.linear(x),)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (Mixed, "noise floor without batch (beside a neighbour) of net: no rounding"),
        (
            Alone,
            "noise floor without a batch of two of net: forward: ValueError: one sample only",
        ),
    ],
)
def test_a_model_whose_rows_are_not_alike_has_no_noise_in_a_batch(
    net: type[torch.nn.Module], said: str
) -> None:
    pipeline = Loop()
    pipeline.net = net()  # type: ignore[assignment]
    recording = record(subject(pipeline))
    batch = kinds(recording)["batch"]
    assert "net" not in components(batch)
    assert "decoder" in components(batch)
    assert all(tensor.rel_l2 < 1e-5 for tensor in batch.tensors)
    assert said in recording.recording.manifest.notes


def test_every_sample_gets_a_neighbour_and_shared_arguments_stay() -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def call(x: torch.Tensor, *, ids: torch.Tensor, positions: torch.Tensor, scale: float) -> Any:
        seen.update(x=tuple(x.shape), ids=tuple(ids.shape), positions=tuple(positions.shape))
        return {"sample": x * scale, "ids": ids}

    x = torch.randn(3, 4, 5)
    ids = torch.arange(3)
    made = with_neighbour(call, (x,), {"ids": ids, "positions": x[0, 0], "scale": 2.0})
    assert seen == {"x": (6, 4, 5), "ids": (6,), "positions": (5,)}
    assert torch.equal(made["sample"], x * 2)
    assert torch.equal(made["ids"], ids)


def test_ids_are_samples_where_nothing_else_is() -> None:
    table = torch.randn(9, 4)
    ids = torch.tensor([[1, 2, 3]])
    seen: list[torch.Tensor] = []

    def call(input_ids: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids)
        return table[input_ids]

    assert torch.equal(with_neighbour(call, (), {"input_ids": ids}), table[ids])
    assert seen[0].tolist() == [[1, 2, 3], [3, 1, 2]]


@pytest.mark.parametrize(
    ("call", "args", "said"),
    [
        (lambda x: x, (torch.tensor(0.5),), "no sample is among its arguments"),
        (lambda x: x[0], ([torch.randn(2, 3)],), "no sample is among its arguments"),
        (lambda x: x.sum(), (torch.randn(2, 3),), "it does not give a row for each sample"),
        (lambda x: x[:3], (torch.randn(2, 3),), "it does not give a row for each sample"),
        (lambda x: x.view(2, 3), (torch.randn(2, 3),), "RuntimeError: shape '[2, 3]'"),
    ],
)
def test_what_takes_no_batch_says_so(
    call: Callable[..., Any], args: tuple[Any, ...], said: str
) -> None:
    with pytest.raises(NoBatchError) as caught:
        with_neighbour(call, args, {})
    assert str(caught.value).startswith(said)


def test_the_floor_of_a_pipeline_holds_a_batch_and_other_instructions() -> None:
    found = kinds(record(TINY["sd"].subject()))
    assert {"unet", "vae"} <= components(found["batch"])
    if other_sets():
        assert {"unet", "vae", "text_encoder"} <= components(found["instructions"])
