"""The dtype that a model computes in, and quantised weights in a wider one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from truestep.replay.statements import differing_parameters
from truestep.runtime.identity import weights_of
from truestep.runtime.precision import converted, working_dtype


def model(*dtypes: torch.dtype) -> nn.Module:
    layers = nn.ModuleList(nn.Linear(2, 2, bias=False, device="meta") for _ in dtypes)
    for layer, dtype in zip(layers, dtypes, strict=True):
        layer.to(dtype)
    return layers


@pytest.mark.parametrize(
    ("dtypes", "working"),
    [
        ([torch.float32], torch.float32),
        ([torch.float32, torch.bfloat16, torch.float32], torch.bfloat16),
        ([torch.bfloat16, torch.float32], torch.bfloat16),
        ([torch.float32, torch.float16], torch.float16),
        ([torch.float64, torch.float32], torch.float32),
        ([torch.float8_e4m3fn, torch.bfloat16, torch.float32], torch.bfloat16),
        ([torch.float8_e4m3fn], torch.float8_e4m3fn),
        ([], None),
    ],
)
def test_the_dtype_that_rounds_most_is_the_working_one(
    dtypes: list[torch.dtype], working: torch.dtype | None
) -> None:
    assert working_dtype(model(*dtypes)) == working


def test_whole_numbers_and_things_without_weights_have_no_working_dtype() -> None:
    quantised = nn.Module()
    quantised.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert working_dtype(quantised) is None
    assert working_dtype(object()) is None


class Packed(torch.Tensor):
    """Numbers of 8 bits and a scale a row, as libraries that quantise weights hold them."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight: torch.Tensor) -> Packed:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self) -> torch.Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.t.default):
            plain = [a.dequantize() if isinstance(a, Packed) else a for a in args]
            return func(*plain, **(kwargs or {}))
        raise NotImplementedError(f"no {func} of packed weights")


@torch.no_grad()
def packed_linear(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Linear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 16).to(dtype)
    linear.weight = torch.nn.Parameter(Packed.of(linear.weight), False)
    return linear


@torch.no_grad()
def test_a_quantised_weight_is_written_out_in_the_wider_dtype() -> None:
    linear = packed_linear()
    weight = linear.weight
    x = torch.randn(3, 16)
    expected = torch.nn.functional.linear(x, weight.dequantize().float(), linear.bias.float())
    with converted(linear, torch.float32):
        assert torch.equal(linear(x), expected)
    assert linear.weight is weight
    assert linear(x.bfloat16()).dtype is torch.bfloat16


@torch.no_grad()
def test_a_quantised_weight_of_a_module_of_its_own_stays() -> None:
    class Own(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(
                x, self.weight.dequantize().to(x.dtype), self.bias.to(x.dtype)
            )

    linear = packed_linear()
    linear.__class__ = Own
    weight = linear.weight
    with converted(linear, torch.float32):
        assert linear.weight is weight
        assert linear(torch.randn(3, 16)).dtype is torch.float32


@torch.no_grad()
def test_quantised_weights_are_told_apart_by_what_they_are_made_of() -> None:
    one, other = packed_linear(), packed_linear()
    assert differing_parameters(one, other) is None
    assert weights_of({"net": one}) == weights_of({"net": other})
    other.weight.scale[3] *= 1.5
    told = differing_parameters(one, other)
    assert told is not None
    assert told.startswith("weight.scale differs by ")
    assert weights_of({"net": one}) != weights_of({"net": other})
    plain = torch.nn.Linear(16, 16).to(torch.bfloat16)
    plain.bias.copy_(one.bias)
    assert differing_parameters(plain, one) == "weight is a Parameter for a Packed"


class Unpacks(torch.nn.Module):
    """A module that computes with quantised weights in a dtype that it was made with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.compute_dtype = dtype
        self.weight = torch.nn.Parameter(torch.arange(16).view(4, 4).to(torch.uint8), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.compute_dtype) @ self.weight.to(self.compute_dtype)


@torch.no_grad()
def test_a_module_that_unpacks_its_weights_computes_in_the_wider_dtype() -> None:
    model = torch.nn.Sequential(Unpacks(torch.bfloat16))
    assert working_dtype(model) is torch.bfloat16
    x = torch.randn(2, 4)
    with converted(model, torch.float32):
        assert torch.equal(model(x), x @ torch.arange(16.0).view(4, 4))
    assert model(x).dtype is torch.bfloat16
