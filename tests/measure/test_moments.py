"""Fused moments against the exact ones, on tensors that are hard for sums."""

from __future__ import annotations

import pytest
import torch

from truestep.measure.moments import CHUNK, Moments, from_device, moments, on_device

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


TENSORS = {
    "plain": randn(37, 53),
    "long": randn(3 * CHUNK + 17),
    "bfloat16": randn(2 * CHUNK + 5).bfloat16(),
    "float16": randn(1000).half(),
    "float64": randn(1000).double(),
    "positive": randn(1000).abs(),
    "negative": -randn(1000).abs(),
    "far from zero": randn(100_000) * 1e-3 + 1000,
    "constant": torch.full((5000,), 0.1),
    "zeros": torch.zeros(100),
    "one": torch.tensor(3.5),
    "integers": torch.arange(-50, 60),
    "bool": torch.arange(10) > 4,
    "nan": torch.tensor([1.0, float("nan"), 3.0]),
    "infinite": torch.tensor([1.0, float("inf"), -3.0]),
    "both infinities": torch.tensor([float("-inf"), float("inf"), 2.0]),
    "all nan": torch.full((4,), float("nan")),
    "overflowing squares": torch.tensor([1e30, -1e30, 5.0]),
    "tiny": torch.full((100,), 1e-30) * randn(100),
    "empty": torch.empty(0),
    "strided": randn(20, 30).t()[::2],
}


@pytest.mark.parametrize("name", TENSORS)
def test_agree_with_the_exact_ones(name: str) -> None:
    tensor = TENSORS[name]
    exact = moments(tensor)
    quick = torch.tensor(Moments().of(tensor), dtype=torch.float64)
    scale = float(exact[5]) if exact[5].isfinite() else 1.0
    torch.testing.assert_close(quick, exact, rtol=1e-5, atol=1e-6 * scale, equal_nan=True)
    assert quick[0] == exact[0]
    assert quick[1] == exact[1]


@pytest.mark.parametrize("name", [name for name in TENSORS if name != "empty"])
def test_sums_made_on_a_device_agree(name: str) -> None:
    tensor = TENSORS[name]
    exact = moments(tensor)
    found = torch.tensor(from_device(on_device(tensor).tolist()), dtype=torch.float64)
    scale = float(exact[5]) if exact[5].isfinite() else 1.0
    atol = 1e-7 * scale + 1e-6 * (name == "far from zero")
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=atol, equal_nan=True)
    if name in ("constant", "zeros", "one"):
        assert found[4] == 0.0  # whatever the order in which this machine adds
