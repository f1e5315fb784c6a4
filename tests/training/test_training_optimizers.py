"""What two optimisers say otherwise is a cause only of what is wrong; losses in any form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.small import Made
from truestep import Recording, TrainingStep, check_training, record_training
from truestep.training.comparable import with_losses
from truestep.training.stepping import of_given
from truestep.verdict import Verdict

Tensor = torch.Tensor
DECAY = 0.1
WITH = Made(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=DECAY))


def split(flat: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Two groups, of which the one of biases and norms has a decay of its own."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        held = [*parameters]
        groups = [
            {"params": [p for p in held if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in held if p.ndim < 2], "weight_decay": flat},
        ]
        return torch.optim.AdamW(groups, lr=1e-3)

    return make


class Silent(torch.optim.Optimizer):
    """AdamW under another name, which says nothing of itself; biases may have no decay."""

    def __init__(self, parameters: Any, flat: float = DECAY) -> None:
        super().__init__([*parameters], {})
        self.inner = split(flat)(self.param_groups[0]["params"])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


@pytest.fixture(scope="module")
def reference() -> Recording:
    return record_training(WITH)


def test_groups_and_a_class_of_another_name_are_notes(reference: Recording) -> None:
    for optimizer, note in ((split(DECAY), "parameter groups 2"), (Silent, "optimizer Silent")):
        right = check_training(WITH.but(optimizer=optimizer), reference)
        assert right.verdict.passed, right.sentence
        assert any(text.startswith(note) for text in right.notes)


def test_no_decay_of_biases_is_named_with_those_that_lack_it(reference: Recording) -> None:
    said = check_training(WITH.but(optimizer=split(0.0)), reference)
    assert said.exit_code == 1
    assert f"weight_decay 0.0 (was {DECAY}) of" in said.sentence
    assert "parameter groups" not in said.sentence
    silent = check_training(WITH.but(optimizer=lambda p: Silent(p, 0.0)), reference)
    assert silent.exit_code == 1
    assert "no weight decay" in silent.sentence
    assert "all of one dimension: biases, norms" in silent.sentence
    assert "Silent" not in silent.sentence


def test_a_class_that_stands_for_another_decay_is_said_with_it(reference: Recording) -> None:
    coupled = WITH.but(optimizer=lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=DECAY))
    found = check_training(coupled, reference)
    assert "optimizer Adam (was AdamW); decoupled_weight_decay False (was True)" in found.sentence
    plain = WITH.but(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0))
    other = WITH.but(optimizer=lambda p: torch.optim.Adam(p, lr=2e-3))
    recording = record_training(plain, floor=False)
    told = check_training(other, recording)
    assert "lr 0.002 (was 0.001)" in told.sentence
    assert "decoupled" not in told.sentence
    same = plain.but(optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
    assert check_training(same, recording).verdict.passed


def test_a_weight_in_the_gradient_is_found_under_a_clip() -> None:
    weight, gradient = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    reference = {"weight/w": weight, "clipped/0/w": gradient}

    def said(given: Tensor) -> str:
        return of_given("w", {"clipped/0/w": given}, reference)

    assert said(gradient + 1e-2 * weight).startswith("0.01 x the weight is added")
    assert said(0.5 * gradient + 0.1 * weight).startswith("0.1 x")
    assert said(0.5 * gradient) == ""
    assert said(gradient.flip(0)) == ""


def scaled(factor: float, name: str = "loss") -> Callable[[], TrainingStep]:
    def build() -> TrainingStep:
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        given, target = torch.randn(2, 6, 8)

        def run() -> Any:
            loss = (model(given) - target).square().mean()
            (factor * loss).backward()
            value = loss.detach()
            returned = {"loss": value, "dict": {"loss": value}, "total": {"total": value}}
            return returned.get(name, float(value) if name == "float" else None)

        return TrainingStep(model=model, run=run)

    return build


def test_a_large_power_of_two_is_told_as_a_scaler() -> None:
    reference = record_training(scaled(1.0))
    found = check_training(scaled(1024.0), reference)
    assert found.exit_code == 1
    assert "a GradScaler's factor?" in found.sentence
    for factor in (2.0, 1000.0):
        other = check_training(scaled(factor), reference)
        assert other.exit_code == 1
        assert "GradScaler" not in other.sentence


@pytest.mark.parametrize("name", ["loss", "dict", "total", "float", "none"])
def test_a_loss_is_paired_however_it_is_returned(name: str) -> None:
    result = check_training(scaled(1.0, name), record_training(scaled(1.0), floor=False))
    assert result.verdict.passed, result.sentence
    lacking = [text for text in result.not_looked_at if text.startswith("loss/")]
    assert len(lacking) == (name == "none")
    back = check_training(scaled(1.0), record_training(scaled(1.0, name), floor=False))
    assert back.verdict.passed, back.sentence
    wrong = check_training(scaled(1.5, name), record_training(scaled(1.0), floor=False))
    assert wrong.exit_code == 1, "its gradient is judged without it"


def test_parts_of_a_loss_are_not_exchanged() -> None:
    one, two = torch.ones(1), torch.full((1,), 2.0)
    own, unread = with_losses({"loss/total": one, "loss/mask": two}, ["loss/out"])
    assert set(own) == {"loss/out", "loss/mask"}
    assert own["loss/out"] is one
    assert not unread
    own, _ = with_losses({"loss/mse": one, "loss/kl": two}, ["loss/total", "loss/kl"])
    assert set(own) == {"loss/total", "loss/kl"}


def test_a_harmless_change_that_the_floor_lacks_is_said() -> None:
    def build() -> TrainingStep:
        step = Made()()

        def run() -> Any:
            if next(step.model.parameters()).dtype is torch.float64:
                raise RuntimeError("no kernel of float64")
            return step.run()

        return replace(step, run=run)

    recording = record_training(build)
    result = check_training(build, recording)
    assert result.verdict is Verdict.IDENTICAL
    assert any("noise floor without precision" in text for text in result.not_looked_at)
    whole = record_training(Made())
    assert not check_training(Made(), whole).not_looked_at


def test_an_average_is_raised_with_the_model() -> None:
    def build() -> TrainingStep:
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        ema = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def run() -> Tensor:
            loss = model(torch.ones(2, 8, dtype=model.weight.dtype)).square().mean()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for own, new in zip(ema.parameters(), model.parameters(), strict=True):
                    torch.lerp(own, new, 0.1, out=own)
            return loss.detach()

        return TrainingStep(model=model, run=run, optimizer=optimizer, ema=ema)

    recording = record_training(build)
    assert not recording.manifest.notes, "every harmless change could be made"
