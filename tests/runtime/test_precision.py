"""The dtype that a model computes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from truestep.runtime.precision import working_dtype


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
