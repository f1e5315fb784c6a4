"""The line at which a port in another form parts: what is fused or laid out anew is no fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from truestep.replay.accounted import accounted
from truestep.replay.statements import Operator, first_operator, operators

Tensor = torch.Tensor

WIDTH, HEADS = 8, 2


def turned(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    parts = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(parts, -1).flatten(-2)


class Attention(nn.Module):
    """Three projections, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = functional.scaled_dot_product_attention(turned(q, angle), turned(k, angle), v)
        return self.last(y.transpose(1, 2).flatten(-2))


class Fused(nn.Module):
    """The same in one projection, with a fault."""

    def __init__(self, official: Attention, fault: str = "") -> None:
        super().__init__()
        self.fault, self.qkv, self.out = fault, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        parts = (official.q, official.k, official.v)
        self.qkv.weight.data = torch.cat([part.weight.data for part in parts])
        self.qkv.bias.data = torch.cat([part.bias.data for part in parts])
        self.out.load_state_dict(official.last.state_dict())
        if fault == "bias":
            self.out.bias = None

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.rotated(q, angle), self.rotated(k, angle)
        if self.fault == "scale":
            q = q * 1.01
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))

    def rotated(self, x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        if self.fault == "halves":
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


class Whole(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *given: Tensor) -> Any:
        return self.part(*given)


def watched(part: nn.Module) -> list[Operator]:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, 5, WIDTH, generator=generator), torch.rand(5, 2, generator=generator)
    model = Whole(part)
    return operators(model, lambda: model(*given), "part", place=(0, "main"))


def line_of(text: str) -> str:
    with open(__file__, encoding="utf-8") as file:
        return str(next(n for n, line in enumerate(file, 1) if line.strip() == text))


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("halves", "return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)"),
        ("bias", "return self.out(y.transpose(1, 2).flatten(2))"),
        ("scale", "q = q * 1.01"),
    ],
)
def test_the_line_of_a_port_in_another_form(fault: str, code: str) -> None:
    official = Attention()
    found = first_operator(watched(Fused(official, fault)), watched(official), same_class=False)
    assert found is not None
    assert f"test_accounted.py:{line_of(code)}: {code}" in found.text


def test_another_form_alone_is_no_fault() -> None:
    official = Attention()
    port, trusted = watched(Fused(official)), watched(official)
    assert first_operator(port, trusted, same_class=False) is None
    assert first_operator(trusted, port, same_class=False) is None  # split, not fused


def test_what_is_accounted_for() -> None:
    x, y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    parts: list[tuple[str, Tensor | None]] = [("mm", x), ("mm", y), ("arange", None)]
    whole: list[tuple[str, Tensor | None]] = [("mm", torch.cat([x, y]).T), ("mul", x * 1.001)]
    assert accounted(whole, parts) == [True, False]
    assert accounted(parts, whole) == [True, True, True]
    assert accounted(parts, [("mm", -x)]) == [False, False, True]
