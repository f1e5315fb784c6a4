"""A gradient of 0 hides no backward: another is drawn in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from truestep import Recording, TrainingStep, check_training, record_training
from truestep.training.incoming import silent, with_drawn
from truestep.training.pulling import Recorded
from truestep.training.recording import KIND

Tensor = torch.Tensor


class Lora(torch.nn.Module):
    """A linear layer with two factors beside it, of which the second begins at zero."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.base = torch.nn.Linear(width, width)
        self.down = torch.nn.Linear(width, 2, bias=False)
        self.up = torch.nn.Linear(2, width, bias=False)
        torch.nn.init.zeros_(self.up.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class Gated(torch.nn.Module):
    """A residual whose gate begins at zero, as in adaLN-zero."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.inner = torch.nn.Linear(width, width)
        self.gate = torch.nn.Parameter(torch.zeros(width))
        self.lora = Lora(width, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.lora(x + self.gate * self.inner(x).tanh())


def build(change: Callable[[Gated], Any] = lambda model: None, scale: float = 2.0) -> TrainingStep:
    torch.manual_seed(0)
    model = Gated(8, scale)
    given, target = torch.randn(2, 3, 8)
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        difference: Tensor = model(batch[0]) - batch[1]
        return difference.square().mean()

    return TrainingStep.of_loss(model, loss, (given, target), optimizer=optimizer)


@pytest.fixture(scope="module")
def reference() -> Recording:
    return record_training(build)


def negated(fqn: str) -> Callable[[Gated], None]:
    class Negated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return -gradient

    def change(model: Gated) -> None:
        module: Any = model.get_submodule(fqn)
        inner = module.forward
        module.forward = lambda x: Negated.apply(inner(x))

    return change


def detached(model: Gated) -> None:
    inner = model.inner.forward
    model.inner.forward = lambda x: inner(x.detach())  # type: ignore[method-assign]


def test_what_is_behind_a_gate_of_zero_is_judged(reference: Recording) -> None:
    drawn = reference.manifest.settings[KIND]["drawn"]
    assert drawn == [["inner", 0], ["lora.down", 0]]
    right = check_training(build, reference)
    assert right.verdict.passed
    assert not right.not_looked_at
    for change, fqn in (
        (negated("inner"), "inner"),
        (negated("lora.down"), "lora.down"),
        (detached, "inner"),
    ):
        result = check_training(lambda change=change: build(change), reference)
        assert result.exit_code == 1, fqn
        first = result.first_divergence
        assert first is not None
        assert (first.stage, first.fqn) == ("backward", fqn)
        assert "backward alone is wrong" in result.sentence


def test_a_scale_that_zero_hides_is_the_forward_s(reference: Recording) -> None:
    result = check_training(lambda: build(scale=4.0), reference)
    assert result.exit_code == 1
    assert "backward alone is wrong" not in result.sentence
    assert "the forward is another function" in result.sentence
    assert "scaled by 2" in result.sentence


def test_a_recording_of_zeros_says_what_it_cannot_judge(reference: Recording) -> None:
    tensors = {
        name: torch.zeros_like(reference[name])
        if name.startswith(("pulled/inner/", "module/inner/0/backward/"))
        else reference[name]
        for name in reference
    }
    old = Recording.in_memory(tensors, reference.manifest)
    result = check_training(build, old)
    assert any("backward of 1 calls" in text and "inner" in text for text in result.not_looked_at)


def test_only_what_is_zero_is_drawn_and_always_the_same() -> None:
    zero, some = torch.zeros(2, 3), torch.full((4,), 2.0)
    calls = {
        ("a", 0): Recorded({}, frozenset(), {"out.0": zero}),
        ("b", 0): Recorded({}, frozenset(), {"out.0": some}),
        ("c", 0): Recorded({}, frozenset(), {}),
        ("(root)", 0): Recorded({}, frozenset(), {"out.0": zero}),
    }
    found, drawn = with_drawn(calls, [("(root)", 0)])
    assert drawn == [("a", 0)]
    assert not silent(found["a", 0])
    assert 0.2 < float(found["a", 0].pulled["out.0"].square().mean().sqrt()) < 20
    assert torch.equal(found["b", 0].pulled["out.0"], some)
    assert silent(found["(root)", 0])
    again, _ = with_drawn(calls, [("(root)", 0)])
    assert torch.equal(again["a", 0].pulled["out.0"], found["a", 0].pulled["out.0"])
