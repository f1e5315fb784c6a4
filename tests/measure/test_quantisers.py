"""Quantisers of weights: as their formats have them, and never further off than they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.measure.quantisers import QUANTISERS

NAMES = sorted(QUANTISERS)


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_blocks_are_those_of_the_gguf_package(name: str) -> None:
    import gguf

    source = weight(24, 64)
    kind = getattr(gguf.GGMLQuantizationType, name)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(source.numpy(), kind), kind)
    found = QUANTISERS[f"gguf:{name}"](source)
    assert found is not None
    assert torch.equal(found.values, torch.from_numpy(theirs))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 12), seed=st.integers(0, 1000), scale=st.sampled_from([1e-4, 0.05, 3.0]))
def test_no_number_is_further_off_than_its_reach(
    name: str, rows: int, seed: int, scale: float
) -> None:
    source = weight(rows, 256, seed=seed) * scale
    found = QUANTISERS[name](source)
    assert found is not None
    assert found.values.shape == found.reach.shape == source.shape
    assert bool((((found.values - source).abs()) <= found.reach).all())
    assert bool(found.values.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    source = weight(4, 256)
    source[1] = 0
    found = QUANTISERS[name](source)
    assert found is not None
    assert bool(found.values.isfinite().all())
    if "tensor" not in name and not name.startswith("gguf:Q"):
        assert not bool(found.values[1].any())


@pytest.mark.parametrize(
    ("name", "finer"),
    [("gguf:Q4_0", "gguf:Q4_K"), ("gguf:Q4_K", "gguf:Q5_K"), ("gguf:Q5_K", "gguf:Q8_0")],
)
def test_more_bits_are_nearer(name: str, finer: str) -> None:
    source = weight(16, 256)
    off = []
    for each in (name, finer):
        found = QUANTISERS[each](source)
        assert found is not None
        off.append(float((found.values - source).norm()))
    assert off[1] < off[0]


def test_a_search_is_no_worse_than_the_whole_range() -> None:
    """Q4_K's steps are searched for: rounding from least to largest takes more."""
    source = weight(16, 256)
    searched, plain = QUANTISERS["gguf:Q4_K"](source), QUANTISERS["gguf:Q4_1"](source)
    assert searched is not None
    assert plain is not None
    assert float((searched.values - source).norm()) < float((plain.values - source).norm())


def test_q4_k_has_the_codes_that_its_format_has() -> None:
    """Of each block of 32, sixteen values at most, evenly spaced."""
    found = QUANTISERS["gguf:Q4_K"](weight(2, 256))
    assert found is not None
    for block in found.values.reshape(-1, 32):
        values = block.unique()
        assert len(values) <= 16
        steps = torch.diff(values)
        assert bool(((steps / steps.min()).round() - steps / steps.min()).abs().max() < 1e-2)


def test_what_does_not_suit_is_left() -> None:
    assert QUANTISERS["gguf:Q4_0"](weight(3, 7)) is None
    assert QUANTISERS["int8"](weight(8)) is None
    assert QUANTISERS["int8"](torch.empty(0, 4)) is None
    fallback = QUANTISERS["gguf:Q4_K"](weight(2, 32))  # as llama.cpp: Q5_0
    same = QUANTISERS["gguf:Q5_0"](weight(2, 32))
    assert fallback is not None
    assert same is not None
    assert torch.equal(fallback.values, same.values)
