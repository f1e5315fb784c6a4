"""What a parameter is at the end of a step is judged, whoever makes it so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.training.small import Made, Model
from truestep import Recording, check_training, record_training
from truestep.recording.format import Recording as Kept
from truestep.training.masters import stepped_for

PLAIN = Made(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0))


@pytest.fixture(scope="module")
def reference() -> Recording:
    return record_training(PLAIN)


def every(change: Callable[[torch.Tensor], Any]) -> Callable[[Model], None]:
    return lambda model: [change(parameter) for parameter in model.parameters()]  # type: ignore[return-value]


AFTER = {
    "multiplied by 0.999": every(lambda p: p.mul_(0.999)),
    "rounded to bfloat16": every(lambda p: p.copy_(p.bfloat16().float())),
    "zeroed": lambda model: model.blocks[1].feed[0].weight.zero_(),
    "changed": lambda model: model.out.weight.clamp_(-0.1, 0.1),
}


@pytest.mark.parametrize("text", AFTER)
def test_what_is_done_to_weights_after_the_optimiser_is_found(
    text: str, reference: Recording
) -> None:
    result = check_training(PLAIN.but(after=AFTER[text]), reference)
    assert result.exit_code == 1, result.sentence
    first = result.first_divergence
    assert first is not None
    assert (first.stage, first.name.partition("/")[0]) == ("optimizer", "after")
    assert f"after the optimiser's step the weights are {text}" in result.sentence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_that_the_optimiser_steps_and_the_trainer_copies_back_pass(
    dtype: torch.dtype, reference: Recording
) -> None:
    right = check_training(PLAIN.but(masters=dtype), reference)
    assert right.verdict.passed, right.sentence
    assert any(row.name.startswith("probe/3/") for row in right.rows), "its later steps count, too"
    wrong = PLAIN.but(masters=dtype, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3))
    assert check_training(wrong, reference).exit_code == 1
    forgotten = PLAIN.but(masters=dtype, after=lambda model: model.out.weight.sub_(1e-3))
    assert check_training(forgotten, reference).exit_code == 1


def test_a_frozen_weight_that_a_step_changes_is_found() -> None:
    def frozen(model: Model) -> None:
        model.blocks[0].requires_grad_(False)

    made = PLAIN.but(change=frozen)
    recording = record_training(made, floor=False)
    assert check_training(made, recording).verdict.passed
    moved = made.but(after=lambda model: model.blocks[0].norm.weight.mul_(1.01))
    result = check_training(moved, recording)
    assert result.exit_code == 1
    assert "the step changes it, and the reference's does not" in result.sentence


def test_a_recording_without_ends_says_that_they_are_not_looked_at(reference: Recording) -> None:
    tensors = {name: reference[name] for name in reference if not name.startswith("after/")}
    old = Kept.in_memory(tensors, reference.manifest)
    result = check_training(PLAIN, old)
    assert result.verdict.passed
    assert any("the weights at the end of the step" in text for text in result.not_looked_at)


def test_a_parameter_s_copy_is_known_by_its_values() -> None:
    one, two, other = (torch.nn.Parameter(torch.randn(3).bfloat16()) for _ in range(3))
    masters = [torch.nn.Parameter(p.detach().float()) for p in (one, two)]
    strange = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.SGD([*masters, strange], lr=0.1)
    found = stepped_for(optimizer, {"two": two, "one": one, "other": other})
    assert found == {"one": masters[0], "two": masters[1]}
    assert stepped_for(torch.optim.SGD([one], lr=0.1), {"one": one})["one"] is one
