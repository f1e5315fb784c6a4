"""All outputs of any nest, and inputs that are put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from truestep.errors import UsageError
from truestep.nests import flatten, take_apart

X = torch.arange(3.0)


@dataclass
class Output:
    sample: torch.Tensor
    extra: Any = None


class Distribution:
    def __init__(self) -> None:
        self.mean, self.name = X, "posterior"


class Two(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (X, ["out"]),
        ((X, [X, {"k": X}], None), ["out.0", "out.1.0", "out.1.1.k"]),
        ({"a": X, "b": {"c": np.ones(2)}}, ["a", "b.c"]),
        (Output(X, (X, "text")), ["sample", "extra.0"]),
        (Distribution(), ["mean"]),
        ({"sigmas": [1.0, 0.5, 0.0], "steps": 3, "flag": True}, ["sigmas", "steps"]),
    ],
)
def test_every_output_is_found(value: Any, names: list[str]) -> None:
    assert list(flatten(value)) == names


def test_what_cannot_be_taken_apart_is_an_error() -> None:
    with pytest.raises(UsageError, match="the output holds a object, which cannot be taken apart"):
        flatten({"a": X, "b": object()})
    with pytest.raises(UsageError, match="a dict that holds no tensor"):
        flatten({"a": None})


def test_inputs_come_back_as_they_were() -> None:
    inputs = {"x": X, "cond": [Two(X + 1, X + 2), {"k": (X, 3)}], "flag": True}
    tensors, build = take_apart(inputs)
    assert list(tensors) == ["x", "cond.0.0", "cond.0.1", "cond.1.k.0"]
    again = build({name: tensor.clone() for name, tensor in tensors.items()})
    assert isinstance(again["cond"][0], Two)
    assert torch.equal(again["cond"][0].b, X + 2)
    assert again["cond"][1]["k"][1] == 3
    assert again["x"] is not X
    with pytest.raises(UsageError, match="hold no tensor"):
        take_apart({"x": 1})
    with pytest.raises(UsageError, match="an input was not made on the CPU"):
        take_apart({"x": torch.empty(1, device="meta")})
