"""Modules on the reference's inputs: faults are found where they are made, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import Recording, check, record
from truestep.case import Case
from truestep.runtime.pipeline import Pipeline
from truestep.tracing.drill import Subject, drill
from truestep.tracing.isolation import flow
from truestep.tracing.naming import named_modules


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](self.norm(x))
        return x + self.layers[1](torch.nn.functional.gelu(hidden))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))


def found(change: Callable[[Net], Any]) -> tuple[str | None, str | None]:
    ours, theirs = Net(), Net()
    change(ours)
    drilled = drill(
        Subject(ours, lambda: ours(X)), Subject(theirs, lambda: theirs(X)), step=0, branch="main"
    )
    place = drilled.divergence
    return (place.fqn, place.kind) if place else (None, None)


def test_flow_keeps_what_modules_receive_and_return_in_order() -> None:
    net = Net()
    seen = flow(net, lambda: net(X), step=2, branch="cond")
    assert seen.calls[:4] == ["(root)", "blocks.0", "blocks.0.norm", "blocks.0.layers.0"]
    names = list(seen.tensors)
    assert names[0] == "module/(root)/2/cond/in.0"
    assert names[-1] == "module/(root)/2/cond/out.0"
    assert names.index("module/blocks.0.norm/2/cond/out.0") < names.index(
        "module/blocks.0/2/cond/out.0"
    )
    assert not net._forward_hooks
    assert not net.blocks[0]._forward_pre_hooks


def test_a_leaf_is_named_with_its_kind() -> None:
    def bias(net: Net) -> None:
        net.blocks[1].layers[0].bias.data.add_(1)  # type: ignore[union-attr, operator]

    assert found(bias) == ("blocks.1.layers.0", "constant offset 1")


def test_code_between_modules_is_named_as_the_module_around_it() -> None:
    class Other(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.layers[0](self.norm(x))
            return x + self.layers[1](torch.relu(hidden))

    def relu(net: Net) -> None:
        net.blocks[2].__class__ = Other

    assert found(relu) == ("blocks.2", "before blocks.2.layers.1")


def test_a_block_that_is_left_out_is_named() -> None:
    def drop(net: Net) -> None:
        net.blocks[1].forward = lambda x: x  # type: ignore[assignment]

    assert found(drop)[0] == "blocks.1"


def test_nothing_is_named_without_a_fault_or_for_a_block_built_in_another_way() -> None:
    assert found(lambda net: None) == (None, None)

    def reordered(net: Net) -> None:
        order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
        first, second = net.blocks[1].layers  # type: ignore[union-attr, misc]
        first.weight.data, first.bias.data = first.weight[order].data, first.bias[order].data
        second.weight.data = second.weight[:, order].data

    assert found(reordered) == (None, None)


def test_wrappers_leave_no_mark_in_names() -> None:
    checkpointed = torch.nn.Module()
    checkpointed.add_module("_checkpoint_wrapped_module", torch.nn.ModuleDict({"attn1": Block()}))
    inner = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([checkpointed])})
    compiled = torch.nn.Module()
    compiled.add_module("_orig_mod", inner)
    assert "blocks.0.attn1" in named_modules(compiled).modules
    assert "blocks.0" in named_modules(torch.nn.DataParallel(inner)).modules


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **tiny_case)


@pytest.fixture(scope="module")
def reference(case: Case) -> Recording:
    return record(case)


def test_check_names_the_module(case: Case, reference: Recording) -> None:
    def fault(pipe: Pipeline) -> None:
        pipe.transformer.blocks[1].attn2.to_k.weight.data.mul_(1.01)

    result = check(case, reference, apply=fault, depth="modules")
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "blocks.1.attn2.to_k"
    assert "`blocks.1.attn2.to_k`, step 0, cond" in result.sentence
    assert any(row.fqn == "blocks.1.attn2.to_k" and not row.verdict.passed for row in result.rows)
    assert any("modules" in text for text in result.looked_at)


def test_check_opens_the_model_of_the_stage_that_failed(case: Case, reference: Recording) -> None:
    def text(pipe: Pipeline) -> None:
        pipe.text_encoder.encoder.final_layer_norm.weight.data.mul_(1.1)

    def decoder(pipe: Pipeline) -> None:
        pipe.vae.post_quant_conv.bias.data.add_(0.1)

    found = check(case, reference, apply=text, depth="modules").first_divergence
    assert found is not None
    assert found.fqn == "encoder.final_layer_norm"
    assert found.kind == "scaled by 1.1"
    found = check(case, reference, apply=decoder, depth="modules").first_divergence
    assert found is not None
    assert found.fqn == "post_quant_conv"


def test_a_fault_around_the_model_names_no_module(case: Case, reference: Recording) -> None:
    result = check(case, reference, settings={"guidance_scale": 5.0}, depth="modules")
    assert not result.verdict.passed
    assert result.first_divergence is not None
    assert result.first_divergence.fqn is None
