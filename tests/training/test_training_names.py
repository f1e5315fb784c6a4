"""Wrappers change no name; what has other names, or other micro-batches, is not comparable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.training.small import Made, Model
from truestep import Recording, TrainingStep, check_training, record_training
from truestep.training.step import inside, parameters
from truestep.verdict import Verdict

BATCHES = list(torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(1)))


def made(
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
    *,
    parts: int = 2,
    share: float = 1.0,
    change: Callable[[Model], Any] = lambda model: None,
) -> TrainingStep:
    """A step whose four samples come in any number of micro-batches."""
    torch.manual_seed(0)
    inner = Model()
    change(inner)
    model = wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> torch.Tensor:
        total = torch.zeros(())
        for batch in BATCHES[0].chunk(parts):
            loss = (model(batch)["sample"] - batch.flip(-1)).square().mean() * share / parts
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        return total

    return TrainingStep(model=model, run=run, optimizer=optimizer)


class Held(torch.nn.Module):
    """Holds a model by a name, as wrappers do."""

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.name)(*args, **kwargs)


WRAPPERS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "module": lambda m: Held("module", m),
    "DataParallel": torch.nn.DataParallel,
    "_fsdp_wrapped_module": lambda m: Held("_fsdp_wrapped_module", m),
    "base_model.model": lambda m: Held("base_model", Held("model", m)),
    "_orig_mod": lambda m: torch.compile(Held("module", m), backend="eager"),  # type: ignore[dict-item]
}


@pytest.fixture(scope="module")
def reference() -> Recording:
    return record_training(made)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_paired(name: str, reference: Recording) -> None:
    result = check_training(lambda: made(WRAPPERS[name]), reference)
    assert result.verdict.passed, result.sentence
    assert "gradient" in result.looked_at

    def halved(model: Model) -> None:
        model.out.weight.register_hook(lambda gradient: gradient / 2)

    wrong = check_training(lambda: made(WRAPPERS[name], change=halved), reference)
    assert wrong.exit_code == 1
    assert wrong.first_divergence is not None
    assert wrong.first_divergence.stage == "backward"


def test_a_recording_of_a_wrapped_model_has_the_same_names(reference: Recording) -> None:
    other = record_training(lambda: made(WRAPPERS["module"]), floor=False)
    assert {*other} == {*reference}


def test_a_peft_model_is_paired_with_what_it_wraps() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q", "v"], r=2)

    def injected(model: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(3)
        found: torch.nn.Module = peft.inject_adapter_in_model(config, model)
        return found

    def wrapped(model: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(3)
        found: torch.nn.Module = peft.get_peft_model(model, config)
        return found

    recording = record_training(lambda: made(injected), floor=False)
    result = check_training(lambda: made(wrapped), recording)
    assert result.verdict.passed, result.sentence
    assert any(row.stage == "backward" and "lora_A" in row.name for row in result.rows)


def test_other_names_are_not_comparable(reference: Recording) -> None:
    result = check_training(lambda: made(lambda model: Held("transformer", model)), reference)
    assert result.verdict is Verdict.INCOMPARABLE
    assert "no parameter has a name that was recorded" in result.sentence
    assert "transformer.blocks.0" in result.sentence
    assert "backward" not in result.sentence


def test_a_parameter_of_another_name_is_missing_and_not_frozen(reference: Recording) -> None:
    class Renamed(Model):
        def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
            for block in self.blocks:
                hidden = block(hidden)
            return {"sample": scale * self.last(hidden)}

    def renamed(model: Model) -> None:
        model.last = model.out
        del model.out
        model.__class__ = Renamed

    result = check_training(lambda: made(change=renamed), reference)
    assert result.verdict is Verdict.MISSING, result.sentence
    assert "frozen" not in result.sentence
    assert any(
        text.startswith("last.weight: the recording has no") for text in result.not_looked_at
    )


def test_other_micro_batches_are_not_comparable_and_say_their_numbers(
    reference: Recording,
) -> None:
    for parts in (1, 4):
        result = check_training(lambda parts=parts: made(parts=parts), reference)
        assert (result.verdict, result.exit_code) == (Verdict.INCOMPARABLE, 3), result.sentence
        assert "recorded with 2 micro-batches of [2, 6, 16]" in result.sentence
        assert "the total gradient agrees" in result.sentence
    wrong = check_training(lambda: made(parts=4, share=2.0), reference)
    assert wrong.verdict is Verdict.INCOMPARABLE
    assert "total gradients differ, by up to rel_l2 1.0e+00" in wrong.sentence
    moved = made(parts=4, change=lambda model: model.out.bias.data.add_(0.1))
    assert check_training(lambda: moved, reference).first_divergence is not None
    same = check_training(lambda: made(share=2.0), reference)
    assert same.verdict is Verdict.DRIFTED, "with the recorded micro-batches a loss is judged"


def test_a_call_without_a_gradient_is_no_micro_batch(reference: Recording) -> None:
    def build() -> TrainingStep:
        step = made()

        def run() -> Any:
            loss = step.run()
            with torch.no_grad():
                step.model(BATCHES[1][:1])
            return loss

        return replace(step, run=run)

    assert check_training(build, reference).verdict.passed


def test_only_what_holds_nothing_else_is_a_wrapper() -> None:
    inner = torch.nn.Linear(2, 2)
    both = Held("module", Held("module", inner))
    assert [prefix for prefix, _ in inside(both)] == ["", "module.", "module.module."]
    assert [name for name, _ in parameters(both)] == ["weight", "bias"]
    both.scale = torch.nn.Parameter(torch.ones(1))
    assert [name for name, _ in parameters(both)] == [
        "scale",
        "module.module.weight",
        "module.module.bias",
    ]
    assert next(name for name, _ in parameters(Made()().model)).startswith("blocks.0.")
