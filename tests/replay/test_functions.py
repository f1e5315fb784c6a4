"""Any function: recorded, checked, and its faults seen; what it cannot do is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from truestep import check_function, record_function
from truestep.errors import UsageError
from truestep.recording.format import Recording
from truestep.verdict import Verdict


class Block(torch.nn.Module):
    """A small network with attention; deterministic weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.qkv = torch.nn.Linear(32, 96)
        self.out = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.nn.functional.silu(self.out(mixed)) * scale.view(-1, 1, 1)


SAMPLES = [
    {"x": torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(i)), "scale": torch.ones(1)}
    for i in range(3)
]


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record_function(Block(), SAMPLES)


def test_inputs_outputs_and_floor_are_recorded(recording: Recording) -> None:
    assert {name for name in recording if name.startswith("sample/0001/")} == {
        "sample/0001/input/x",
        "sample/0001/input/scale",
        "sample/0001/output/out",
    }
    floor = recording.manifest.noise_floor
    assert floor is not None
    kinds = {run.kind for run in floor.runs}
    assert kinds >= {"precision", "repeat", "batch", "attention", "jitter"}


def test_the_same_function_is_identical_and_a_harmless_change_equivalent(
    recording: Recording,
) -> None:
    assert check_function(Block(), recording).verdict is Verdict.IDENTICAL

    def explicit(x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        block = Block()
        q, k, v = block.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(1, 2) / 32**0.5, dim=-1)
        return {"out": torch.nn.functional.silu(block.out(weights @ v)) * scale}

    assert check_function(explicit, recording).verdict is Verdict.EQUIVALENT


def test_a_fault_is_drifted_and_named(recording: Recording) -> None:
    faulty = Block()
    with torch.no_grad():
        faulty.out.bias[3] += 1e-4
    result = check_function(faulty, recording, label="port")
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.name == "sample/0000/output/out"
    assert result.actual.label == "port"


def test_a_small_probability_by_tanh_is_equivalent_and_one_of_other_logits_is_not() -> None:
    """Libraries add one half last, which costs a probability of 0.004 a dozen roundings."""
    logits = torch.linspace(-6.5, -5, 4096)[None]
    recording = record_function(lambda logits: torch.sigmoid(logits), [{"logits": logits}])
    by_tanh = check_function(lambda logits: 0.5 + 0.5 * torch.tanh(logits / 2), recording)
    assert by_tanh.verdict is Verdict.EQUIVALENT
    found = check_function(lambda logits: torch.sigmoid(logits + 2e-5), recording)
    assert found.verdict is Verdict.DRIFTED


def test_a_call_that_raises_is_said(recording: Recording) -> None:
    def broken(**inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    result = check_function(broken, recording)
    assert result.verdict is Verdict.INVALID
    assert result.notes[0] == "sample/0000: raised RuntimeError: no kernel image"


def test_sequences_and_the_disk(tmp_path: Path) -> None:
    def two(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * scale, x.sum(dim=-1)

    path = tmp_path / "two.safetensors"
    assert "sample/0002/output/out.1" in record_function(two, SAMPLES, path=path)
    assert check_function(two, path).verdict is Verdict.IDENTICAL


def test_what_the_function_cannot_do_is_in_the_notes() -> None:
    def unbatched(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        assert x.shape[0] == 1
        return x * scale

    notes = record_function(unbatched, SAMPLES).manifest.notes
    assert any("without batch (row 0 in a batch of 2): AssertionError" in note for note in notes)


def test_errors() -> None:
    with pytest.raises(UsageError, match="the samples cannot be recorded"):
        record_function(Block(), [])
    with pytest.raises(UsageError, match="returned NoneType, which holds no tensor"):
        record_function(lambda **_: None, SAMPLES)
    plain = record_function(Block(), SAMPLES, floor=False)
    assert plain.manifest.noise_floor is None
    other = Recording.in_memory({}, plain.manifest.model_copy(update={"tensors": ()}))
    with pytest.raises(UsageError, match="not a recording of a function"):
        check_function(Block(), other)


def test_a_function_that_answers_otherwise_when_called_again_is_drifted(
    recording: Recording,
) -> None:
    block = Block()
    calls: list[int] = []

    def tired(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        answer: torch.Tensor = block(x, scale)
        return answer * (1.01 if len(calls) > len(SAMPLES) else 1.0)

    result = check_function(tired, recording)
    assert result.verdict is Verdict.DRIFTED
    assert result.sentence.endswith("the same input gave another output the second time")
    assert "identical, then drifted" in result.failing[0].note


def test_a_function_that_only_answers_the_first_call_wrong_is_told_as_such(
    recording: Recording,
) -> None:
    block = Block()
    calls: list[int] = []

    def cold(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        answer: torch.Tensor = block(x, scale)
        return answer * (1.01 if len(calls) == 1 else 1.0)

    result = check_function(cold, recording)
    assert [row.name for row in result.failing] == ["sample/0000/output/out"]
    assert "drifted, then identical" in result.failing[0].note


def test_every_sample_is_called_twice_and_in_another_order(recording: Recording) -> None:
    block, seen = Block(), []

    def watched(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        seen.append(float(x.sum()))
        answer: torch.Tensor = block(x, scale)
        return answer

    assert check_function(watched, recording).verdict is Verdict.IDENTICAL
    assert len(seen) == 2 * len(SAMPLES)
    assert seen[len(SAMPLES) :] == seen[: len(SAMPLES)][::-1]


def test_complex_outputs_are_judged_by_their_parts_and_complex_inputs_refused() -> None:
    samples = [{"x": torch.linspace(0.1, 1.0, 8)[None]}]

    def turned(by: float) -> Callable[..., torch.Tensor]:
        return lambda x: torch.polar(torch.ones_like(x), x * by)

    recording = record_function(turned(1.0), samples)
    assert tuple(recording["sample/0000/output/out"].shape) == (1, 8, 2)
    assert check_function(turned(1.0), recording).verdict is Verdict.IDENTICAL
    assert check_function(turned(1.001), recording).verdict is Verdict.DRIFTED
    real = check_function(lambda x: torch.cos(x), recording)
    assert real.verdict is Verdict.INCOMPARABLE
    with pytest.raises(UsageError, match="the samples cannot be recorded") as caught:
        record_function(turned(1.0), [{"x": torch.ones(2, dtype=torch.complex64)}])
    assert caught.value.measured == "x is complex"


def test_a_tolerance_that_is_no_number_is_refused(recording: Recording) -> None:
    with pytest.raises(UsageError, match="tolerance = '1e-3' cannot judge anything"):
        check_function(Block(), recording, tolerance="1e-3")  # type: ignore[arg-type]
