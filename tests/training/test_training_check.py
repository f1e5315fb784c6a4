"""A training step is judged part by part: a fault of each is found where it is, a twin passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import truestep
from tests.training.small import TRUSTED, Attention, Made, Model, Tensor, squared
from truestep import Recording, TrainingStep, check_training, record_training
from truestep.errors import UsageError
from truestep.training.names import ORDER, describe
from truestep.training.recording import KIND
from truestep.verdict import Verdict


@pytest.fixture(scope="module")
def reference() -> Recording:
    return record_training(TRUSTED)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


def at(fqn: str, change: Callable[[Any], Any]) -> Callable[[Model], None]:
    return lambda model: change(model.get_submodule(fqn))


def halved(module: Any) -> None:
    own = module.forward
    module.forward = lambda x: Halved.apply(own(x))


def detached(module: Any) -> None:
    own = module.forward
    module.forward = lambda x: own(x).detach()


def moved(module: Any) -> None:
    own = module.forward
    module.forward = lambda x: own(x) * (1 + 1e-3)


def keys_that_count(module: Attention) -> None:
    own = module.k.forward
    module.k.forward = lambda x: Halved.apply(own(x)) + 1e-2 * (own(x) - own(x).detach())  # type: ignore[method-assign]


def nan(module: Any) -> None:
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        made: Tensor = own(x)
        made.register_hook(lambda gradient: gradient * float("nan"))
        return made

    module.forward = forward


def unequal(model: Model) -> torch.nn.Module:
    merged = copy.deepcopy(model)
    merged.out.bias.data.add_(1e-2)
    return merged


FAULTS = {
    "weights": (TRUSTED.but(change=at("out", lambda m: m.bias.data.add_(0.1))), "weights", ""),
    "input": (TRUSTED.but(batches=lambda: [b + 0.01 for b in TRUSTED.batches()]), "input", ""),
    "forward": (TRUSTED.but(change=at("blocks.1.norm", moved)), "forward", "blocks.1.norm"),
    "loss": (TRUSTED.but(loss=lambda p, t: squared(p, -t)), "loss", ""),
    "share": (TRUSTED.but(share=1.0), "loss", ""),
    "backward": (TRUSTED.but(change=at("blocks.0.attention.v", halved)), "backward",
                 "blocks.0.attention.v"),
    "detached": (TRUSTED.but(change=at("blocks.1.feed", detached)), "backward", "blocks.1.feed"),
    "frozen": (TRUSTED.but(change=at("blocks.0.feed.0", lambda m: m.requires_grad_(False))),
               "backward", "blocks.0.feed.0"),
    "nan": (TRUSTED.but(change=at("blocks.0.norm", nan)), "backward", "blocks.0.norm"),
    "gradient": (TRUSTED.but(again=lambda model: model.zero_grad()), "gradient", ""),
    "clip": (TRUSTED.but(clip=0.25), "optimizer", ""),
    "optimizer": (TRUSTED.but(optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3)), "optimizer", ""),
    "ema": (TRUSTED.but(decay=0.99), "optimizer", ""),
    "merge": (TRUSTED.but(merge=unequal), "merge", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_in_its_part(name: str, reference: Recording) -> None:
    build, stage, module = FAULTS[name]
    result = check_training(build, reference)
    assert result.exit_code == 1, result.sentence
    first = result.first_divergence
    assert first is not None
    assert first.stage == stage
    assert not module or first.fqn == module


TWINS = {
    "the same": TRUSTED,
    "attention by hand": TRUSTED.but(
        change=lambda m: [setattr(block.attention, "by_hand", True) for block in m.blocks]
    ),
    "foreach": TRUSTED.but(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True)),
    "fused": TRUSTED.but(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)),
    "loss": TRUSTED.but(loss=lambda p, t: torch.nn.functional.mse_loss(p, t)),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_harmless_twin_passes(name: str, reference: Recording) -> None:
    result = check_training(TWINS[name], reference)
    assert result.verdict.passed, str(result)
    assert "loss" in result.looked_at


def test_backward_alone_is_said_only_where_the_forward_agrees(reference: Recording) -> None:
    alone = check_training(FAULTS["backward"][0], reference)
    assert "backward alone is wrong, the forward agrees" in alone.sentence
    assert "it is not the derivative of its own forward" in alone.sentence
    assert alone.first_divergence is not None
    assert "HalvedBackward (test_training_check.py:" in (alone.first_divergence.operator or "")
    both = check_training(FAULTS["forward"][0], reference)
    assert "backward alone" not in both.sentence


def test_what_a_fault_makes_downstream_is_inherited(reference: Recording) -> None:
    result = check_training(FAULTS["backward"][0], reference)
    origins = {row.stage: row.origin for row in result.failing if row.stage == "gradient"}
    assert origins == {"gradient": "inherited"}
    holders = [row for row in result.failing if row.fqn in ("blocks.0", "(root)")]
    assert holders
    assert {row.origin for row in holders if row.stage == "backward"} == {"inherited"}


def test_a_gradient_that_is_rounding_alone_is_judged_beside_others(reference: Recording) -> None:
    anchors = reference.manifest.settings[KIND]["anchors"]
    assert "gradient/blocks.0.attention.k.bias" in anchors
    assert "gradient/blocks.0.attention.q.weight" not in anchors
    wrong = check_training(TRUSTED.but(change=at("blocks.0.attention", keys_that_count)), reference)
    assert wrong.exit_code == 1


def test_a_module_that_raises_and_a_step_that_raises_are_invalid(reference: Recording) -> None:
    def broken(module: Any) -> None:
        def forward(x: Tensor) -> Tensor:
            raise RuntimeError("no kernel")

        module.forward = forward

    result = check_training(TRUSTED.but(change=at("out", broken)), reference)
    assert result.verdict is Verdict.INVALID
    assert "no kernel" in result.sentence


def test_a_candidate_that_is_built_otherwise_inside_is_judged_by_what_holds_it(
    reference: Recording,
) -> None:
    def fused(module: Attention) -> None:
        weight = torch.cat([module.q.weight, module.k.weight, module.v.weight])
        bias = torch.cat([module.q.bias, module.k.bias, module.v.bias])

        def forward(x: Tensor) -> Tensor:
            w = torch.cat([m.weight for m in (module.q, module.k, module.v)])
            b = torch.cat([m.bias for m in (module.q, module.k, module.v)])
            q, k, v = torch.nn.functional.linear(x, w, b).chunk(3, -1)
            return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

        assert weight.shape[0] == bias.shape[0]
        module.forward = forward  # type: ignore[method-assign]

    right = check_training(TRUSTED.but(change=at("blocks.0.attention", fused)), reference)
    assert right.verdict.passed, str(right)
    assert "blocks.0.attention.q: the candidate does not call it" in right.not_looked_at

    def wrong(model: Model) -> None:
        fused(model.blocks[0].attention)  # type: ignore[arg-type]
        halved(model.blocks[0].attention)

    found = check_training(TRUSTED.but(change=wrong), reference)
    assert found.first_divergence is not None
    assert found.first_divergence.fqn == "blocks.0.attention"


def test_checkpointing_passes_and_a_wrong_one_is_named(reference: Recording) -> None:
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    def around(module: Any, **options: Any) -> None:
        own = module.forward
        module.forward = partial(checkpoint, own, **options)

    for reentrant in (True, False):
        change = at("blocks.1", lambda m, r=reentrant: around(m, use_reentrant=r))
        result = check_training(TRUSTED.but(change=change), reference)
        assert result.verdict.passed, str(result)

    def otherwise(module: Any) -> None:
        own = module.feed.forward
        calls: list[int] = []

        def forward(x: Tensor) -> Tensor:
            from truestep.training.watching import in_backward

            calls.append(1)
            return own(x * (2.0 if in_backward() else 1.0))

        module.feed.forward = forward
        around(module, use_reentrant=False)

    wrong = check_training(TRUSTED.but(change=at("blocks.1", otherwise)), reference)
    assert "without activation checkpointing the gradient is right" in wrong.sentence


def test_a_recording_is_the_same_from_a_file(reference: Recording, tmp_path: Path) -> None:
    path = tmp_path / "step.safetensors"
    small = record_training(TRUSTED, path=path, floor=False, select="blocks.*.norm,(root)")
    modules = {describe(name).fqn for name in small if name.startswith("module/")}
    assert modules == {"blocks.0.norm", "blocks.1.norm", "(root)"}
    assert check_training(TRUSTED, path).verdict is Verdict.IDENTICAL
    assert check_training(FAULTS["backward"][0], path).exit_code == 1


def test_two_models_that_are_trained_together() -> None:
    def build(factor: float = 1.0) -> TrainingStep:
        torch.manual_seed(0)
        both = torch.nn.ModuleDict({"text": torch.nn.Linear(4, 4), "image": torch.nn.Linear(4, 4)})
        if factor != 1.0:
            own = both["text"].forward
            both["text"].forward = lambda x: factor * own(x) + (1 - factor) * own(x).detach()
        given = torch.randn(3, 4)

        def run() -> Tensor:
            loss = both["image"](both["text"](given).tanh()).square().mean()
            loss.backward()
            return loss

        return TrainingStep(model=both, run=run)

    reference = record_training(build)
    assert check_training(build, reference).verdict.passed
    wrong = check_training(lambda: build(0.5), reference)
    assert wrong.first_divergence is not None
    assert (wrong.first_divergence.stage, wrong.first_divergence.fqn) == ("backward", "text")


def test_autocast_is_part_of_the_step() -> None:
    def build(flag: bool = True, wrong: bool = False) -> TrainingStep:
        step = TRUSTED.but(change=at("blocks.0.feed.0", halved) if wrong else TRUSTED.change)()

        def run() -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=flag):
                return step.run()

        return TrainingStep(model=step.model, run=run, optimizer=step.optimizer)

    reference = record_training(build)
    assert reference.manifest.noise_floor is not None
    assert reference.manifest.noise_floor.pairs() == ("bfloat16/bfloat16",)
    assert check_training(build, reference).verdict.passed
    found = check_training(lambda: build(wrong=True), reference)
    assert found.first_divergence is not None
    assert found.first_divergence.fqn == "blocks.0.feed.0"


def test_what_is_no_training_step_is_refused(reference: Recording) -> None:
    with pytest.raises(UsageError, match="not a training step"):
        record_training(lambda: torch.nn.Linear(2, 2))  # type: ignore[arg-type,return-value]
    with pytest.raises(UsageError, match="nothing to train"):
        record_training(lambda: Made(change=lambda m: m.requires_grad_(False), optimizer=none)())
    with pytest.raises(UsageError, match="no gradient came back"):
        record_training(lambda: TrainingStep(model=Model(), run=lambda: None))
    plain = truestep.record_function(torch.nn.Linear(2, 2), [{"input": torch.ones(1, 2)}])
    with pytest.raises(UsageError, match="not a recording of a training step"):
        check_training(TRUSTED, plain)


def none(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])


def test_a_trusted_step_that_differs_from_itself_is_refused() -> None:
    count = iter(range(1, 1000))
    build = TRUSTED.but(batches=lambda: [b * next(count) for b in Made().batches()])
    with pytest.raises(UsageError, match="differs from itself"):
        record_training(build)


def test_every_name_has_a_stage(reference: Recording) -> None:
    given = ("given", "returned", "pulled", "random")
    judged = {describe(n).stage for n in reference if n.partition("/")[0] not in given}
    assert judged == set(ORDER)
