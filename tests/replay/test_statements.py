"""The operator and the line at which two runs of one module part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from truestep.replay.statements import Operator, differing_parameters, first_operator, operators

Tensor = torch.Tensor


class Part(nn.Module):
    """One module whose code can be changed in ways that ports get wrong."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.change = nn.Linear(8, 16), change

    def forward(self, x: Tensor) -> Any:
        y = self.up(x)
        if self.change == "argument":
            y = functional.gelu(y)
        else:
            y = functional.gelu(y, approximate="tanh")
        if self.change == "added":
            y = y * 1.01
        if self.change == "other":
            return y.clamp(-1, 1) if y.ndim > 9 else y - y.sum(-1, keepdim=True)
        if self.change == "lacks":
            return y
        if self.change == "cast":
            y = y.to(torch.bfloat16).to(torch.float32)
        return y - y.mean(-1, keepdim=True)


class Whole(nn.Module):
    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.part = Part(change)

    def forward(self, x: Tensor) -> Any:
        return self.part(x) + x.new_empty(1).fill_(0)


def watched(model: Any) -> list[Operator]:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    return operators(model, lambda: model(x), "part", place=(0, "main"))


def line_of(text: str) -> str:
    with open(__file__, encoding="utf-8") as file:
        return str(next(n for n, line in enumerate(file, 1) if line.strip() == text))


@pytest.mark.parametrize(
    ("change", "said", "code"),
    [
        ("argument", "(default for approximate = 'tanh')", "y = functional.gelu(y)"),
        ("added", "adds aten.mul", "y = y * 1.01"),
        ("lacks", "lacks aten.mean", "return y - y.mean(-1, keepdim=True)"),
        ("cast", "adds aten._to_copy", "y = y.to(torch.bfloat16).to(torch.float32)"),
    ],
)
def test_the_line_is_named(change: str, said: str, code: str) -> None:
    found = first_operator(watched(Whole(change)), watched(Whole()))
    assert found is not None
    assert said in found.text
    assert f"test_statements.py:{line_of(code)}: {code}" in found.text
    own = None if change == "lacks" else ("tests/replay/test_statements.py", int(line_of(code)))
    assert found.place == own  # what is lacking stands in the trusted code alone


def test_a_line_elsewhere_is_no_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = first_operator(watched(Whole("added")), watched(Whole()))
    assert found is not None
    assert "test_statements.py:" in found.text
    assert found.place is None


def test_an_operator_that_was_exchanged() -> None:
    found = first_operator(watched(Whole("other")), watched(Whole()))
    assert found is not None
    assert "aten.sum" in found.text
    assert "for aten.mean" in found.text


def test_another_value_is_found_at_the_operator_that_made_it() -> None:
    model: Any = Whole()
    with torch.no_grad():
        model.part.up.bias.add_(0.5)
    found = first_operator(watched(model), watched(Whole()))
    assert found is not None
    assert found.text.startswith("aten.addmm at ")
    assert found.place is None or found.place[0] == "tests/replay/test_statements.py"
    assert differing_parameters(model.part.up, Part().up) == "bias differs by 2.7"
    assert differing_parameters(Part().up, Part().up) is None


def test_rounding_is_not_an_operator_that_differs() -> None:
    model: Any = Whole()
    with torch.no_grad():
        model.part.up.weight.mul_(1 + 2e-7)
    assert "all its operators agree" in str(first_operator(watched(model), watched(Whole())))


def test_hooks_of_the_module_are_seen() -> None:
    model: Any = Whole()
    model.part.register_forward_hook(lambda module, args, output: output + 1)
    found = str(first_operator(watched(model), watched(Whole())))
    assert found.startswith("adds aten.add.Tensor at ")
    assert "lambda module, args, output: output + 1" in found


def test_another_implementation_is_not_compared_line_by_line() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.cat([x, x], -1).cumsum(-1).sqrt()

    model: Any = Whole()
    other: Any = Whole()
    other.part = Other()
    assert first_operator(watched(other), watched(model), same_class=False) is None


def test_parameters_that_one_side_lacks_are_named() -> None:
    bare = nn.Linear(8, 16, bias=False)
    assert "bias is missing" in str(differing_parameters(bare, nn.Linear(8, 16)))
    assert "bias is extra" in str(differing_parameters(nn.Linear(8, 16), bare))
    assert "weight has shape [16, 8] for [8, 16]" in str(
        differing_parameters(nn.Linear(8, 16), nn.Linear(16, 8))
    )


def test_a_module_that_raises_leaves_nothing_behind() -> None:
    model: Any = Whole()

    def fails(*_: object) -> None:
        raise RuntimeError("no")

    handle = model.part.up.register_forward_hook(fails)
    with pytest.raises(RuntimeError):
        watched(model)
    handle.remove()
    assert not model.part._forward_hooks
    assert [op.name for op in watched(model)] == [op.name for op in watched(Whole())]
