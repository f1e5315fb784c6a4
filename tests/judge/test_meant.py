"""What a declared quantisation explains of weights, and what is named that it does not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.judge.meant import (
    WHOLE_STEP,
    Fit,
    Limits,
    Pair,
    beside,
    broken,
    fit,
    infer,
    limits,
    of_another_kind,
    on_grids,
)
from truestep.judge.meant_kinds import what_is_wrong
from truestep.measure.quantisers import QUANTISERS

LIMIT = Limits(2.05, 2.5)


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def values(name: str, source: torch.Tensor) -> torch.Tensor:
    found = QUANTISERS[name](source)
    assert found is not None
    return found.values


@pytest.mark.parametrize("name", sorted(QUANTISERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantiser_explains_itself(name: str, dtype: torch.dtype) -> None:
    source = weight(8, 256).to(dtype)
    eps = torch.finfo(dtype).eps / 2
    found = fit(source, values(name, source.float()).to(dtype), QUANTISERS[name], eps=eps)
    assert found.peak <= 1.001
    assert broken(found, LIMIT) is None


@pytest.mark.parametrize(
    "name", ["int8", "fp8-channel", "gguf:Q8_0", "gguf:Q5_1", "gguf:Q4_0", "nf4"]
)
def test_a_quantiser_is_inferred(name: str) -> None:
    pairs = {}
    for seed in range(6):
        source = weight(16, 256, seed=seed)
        pairs[f"blocks.{seed}"] = Pair(source, values(name, source))
    found = infer(pairs, eps=2**-24)
    assert found is not None
    size = fit(*_sides(pairs), found, eps=2**-24).size
    assert size <= fit(*_sides(pairs), QUANTISERS[name], eps=2**-24).size * 1.001


def _sides(pairs: dict[str, Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    first = next(iter(pairs.values()))
    return first.trusted, first.candidate


def test_nothing_is_inferred_where_nothing_explains() -> None:
    pairs = {str(i): Pair(weight(8, 64, seed=i), weight(8, 64, seed=i + 100)) for i in range(5)}
    assert infer(pairs, eps=2**-24) is None
    assert infer({}, eps=2**-24) is None


def test_a_broken_layer_is_told_from_its_siblings() -> None:
    healthy = [Fit(1.0 + 0.05 * i, 1.0, 0.01, 1.0) for i in range(12)]
    limit = limits([*healthy, Fit(40.0, 30.0, 0.01, 0.5)], known=False)
    assert limit is not None
    assert broken(Fit(40.0, 30.0, 0.01, 0.5), limit) == 40.0
    assert not [each for each in healthy if broken(each, limit) is not None]


def test_a_maker_who_clips_in_some_layers_is_not_accused() -> None:
    clipped = [Fit(peak, 1.0, 0.01, 1.0) for peak in (1, 1, 1, 1.1, 1, 2.2, 1, 2.9, 1, 1.8, 1, 3.4)]
    limit = limits(clipped, known=True)
    assert limit is not None
    assert not [each for each in clipped if broken(each, limit) is not None]


def test_too_few_layers_say_nothing_of_an_unknown_change() -> None:
    few = [Fit(3.0, 2.0, 0.1, 0.5)] * 3
    assert limits(few, known=False) is None
    known = limits(few, known=True)
    assert known is not None
    assert known.peak == WHOLE_STEP


def test_a_number_that_is_none_is_broken_beyond_measure() -> None:
    source = weight(4, 32)
    candidate = source.clone()
    candidate[1, 2] = math.nan
    found = fit(source, candidate, QUANTISERS["int8"], eps=2**-24)
    assert broken(found, LIMIT) == math.inf
    limit = limits([found] * 4, known=True)
    assert limit is not None


def test_another_change_is_not_taken_for_faults() -> None:
    source = weight(16, 256)
    coarse = fit(source, values("gguf:Q4_0", source), QUANTISERS["int8"], eps=2**-24)
    assert of_another_kind([coarse] * 5) == pytest.approx(coarse.peak)
    assert of_another_kind([]) is None
    fine = fit(source, values("int8", source), QUANTISERS["int8"], eps=2**-24)
    assert of_another_kind([fine, fine, fine, coarse]) is None


@settings(max_examples=25, deadline=None)
@given(row=st.integers(0, 15), seed=st.integers(0, 500))
def test_a_row_that_is_off_is_named(row: int, seed: int) -> None:
    source = weight(16, 128, seed=seed)
    candidate = values("int8", source)
    candidate[row] *= 1.5
    assert f"row {row}: scaled by 1.5" in told(source, candidate)


def test_what_a_weight_became_is_said() -> None:
    source = weight(32, 32)
    healthy = values("int8", source)
    assert told(source, -healthy) == "its sign is turned"
    assert told(source, healthy.T.contiguous()) == "it is transposed"
    assert told(source, healthy * 1.3) == "all of it is scaled by 1.3"
    assert told(source, torch.zeros_like(source)) == "all of it is 0"
    other = weight(32, 32, seed=9)
    assert told(source, values("int8", other), blocks=other) == "it is that of blocks"
    swapped = healthy[[1, 0, *range(2, 32)]]
    assert told(source, swapped) == "rows 0, 1: 0 is row 1, 1 is row 0"
    zeroed = healthy.clone()
    zeroed[7] = 0
    assert told(source, zeroed) == "row 7: 0"
    nan = healthy.clone()
    nan[0, :2] = math.nan
    assert told(source, nan) == "NaN or infinity in 2 numbers"


def test_a_block_and_columns_are_named() -> None:
    source = weight(32, 128)
    block = values("int8", source)
    block[3, 32:64] *= 1.5
    assert told(source, block).startswith("row 3, columns 3")
    columns = values("int8", source)
    columns[:, 5] = 0
    assert told(source, columns).startswith("column 5")


def test_a_bias_is_named_by_its_numbers() -> None:
    source = weight(16)
    candidate = source.clone()
    candidate[4] += 1
    limit = Limits(1.05, 2.5)
    found = what_is_wrong(source, candidate, None, limit=limit, eps=2**-8, others={})
    assert found == "number 4"


def told(source: torch.Tensor, candidate: torch.Tensor, **others: torch.Tensor) -> str:
    quantised = QUANTISERS["int8"](source)
    return what_is_wrong(source, candidate, quantised, limit=LIMIT, eps=2**-24, others=others)


def clipped(source: torch.Tensor) -> torch.Tensor:
    step = source.abs().quantile(0.995, dim=1, keepdim=True) / 127
    return (source / step).round().clamp(-127, 127) * step


def test_among_layers_that_clip_one_that_is_scaled_is_told() -> None:
    originals = [weight(64, 512, seed=seed) for seed in range(12)]
    made = [clipped(each) for each in originals]
    made[5] = made[5] * 1.1
    fits = [
        fit(own, candidate, QUANTISERS["int8"], eps=1e-7)
        for own, candidate in zip(originals, made, strict=True)
    ]
    limit = limits(fits, known=True)
    assert limit is not None
    assert [broken(each, limit) is not None for each in fits] == [at == 5 for at in range(12)]


@pytest.mark.parametrize("name", sorted(QUANTISERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantiser_puts_numbers_on_a_grid(name: str, dtype: torch.dtype) -> None:
    source = weight(64, 256, seed=1)
    made = QUANTISERS[name](source)
    assert made is not None
    own, reference = made.values.to(dtype), source.to(dtype)
    assert on_grids([Pair(reference, own)])
    assert not on_grids([Pair(reference, (1.01 * source).to(dtype))])
    assert not on_grids([Pair(reference, (source + 0.6 * weight(64, 256, seed=2)).to(dtype))])


def test_rows_that_are_shifted_by_a_step_are_another_change_and_rounding_down_is_not() -> None:
    source = weight(64, 256, seed=3)
    step = source.abs().amax(1, keepdim=True) / 127
    codes = source / step
    shifted, down = (codes.round() + 1) * step, codes.floor() * step
    fits = [[fit(source, made, QUANTISERS["int8"], eps=1e-7)] * 6 for made in (shifted, down)]
    assert of_another_kind(fits[0]) is not None
    assert of_another_kind(fits[1]) is None


def test_where_its_siblings_are_tight_less_than_a_step_is_told() -> None:
    tight, off = [Fit(1.0, 1.0, 0.01, 1.0)] * 12, Fit(1.7, 1.2, 0.01, 0.9)
    limit = limits([*tight, off], known=True)
    assert limit is not None
    assert broken(off, limit) is None
    assert broken(off, beside(limit, tight)) == 1.7
    assert broken(off, beside(limit, tight[:3])) is None
    by_chance = [Fit(1.9 + 0.01 * i, 1.2, 0.01, 0.6) for i in range(12)]
    limit = limits(by_chance, known=True)
    assert limit is not None
    assert not [f for f in by_chance if broken(f, beside(limit, by_chance)) is not None]
