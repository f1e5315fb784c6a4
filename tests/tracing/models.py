"""Small modules that return what real ones do."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    sample: torch.Tensor
    extra: Any = None


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * scale


class Model(nn.Module):
    """Two blocks, of which the second runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.blocks[0](x)
        x = self.blocks[1](x)
        x = self.blocks[1](x[:, :2], scale=2.0)
        return self.out(x if mask is None else x * mask)


class Returns(nn.Module):
    """Returns whatever it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        y = x * 2
        return {
            "tensor": lambda: y,
            "tuple": lambda: (y, None, 3),
            "list": lambda: [x, [y, {"deep": y}]],
            "dict": lambda: {"a": y, 5: x, "with.dot/slash": y},
            "ordered": lambda: OrderedDict(sample=y),
            "dataclass": lambda: Output(y, extra=(x,)),
            "named": lambda: Pair(x, y),
            "none": lambda: None,
            "text": lambda: "nothing",
            "complex": lambda: torch.complex(x, y),
            "sparse": lambda: y.to_sparse(),
            "expanded": lambda: y[:1, :1, :1].expand(1, 1, 1),
            "empty": lambda: y[:0],
            "integers": lambda: torch.arange(5),
            "bool": lambda: y > 0,
            "bfloat16": lambda: y.bfloat16(),
        }[self.kind]()


class Outer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = Returns(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner(x)
        return x


def model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().eval()


def given(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
