"""Estimates from sketches against exact distances, and bits that may never change."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.measure.sketch import RESOLUTION, SIZE, Estimate, estimate, sketch

Generator = torch.Generator


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(sketch(tensor).numpy().astype("<f4").tobytes()).hexdigest()[:16]


def exact(actual: torch.Tensor, reference: torch.Tensor) -> float:
    a, r = actual.to(torch.float64), reference.to(torch.float64)
    return float((a - r).norm() / r.norm())


def estimated(actual: torch.Tensor, reference: torch.Tensor) -> Estimate:
    norm = float(reference.to(torch.float64).norm())
    return estimate(sketch(actual), sketch(reference), norm=norm)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


def column(period: int) -> Callable[[torch.Tensor, Generator], torch.Tensor]:
    """One column, or channel, of a row-major tensor whose rows are `period` long."""

    def build(r: torch.Tensor, g: Generator) -> torch.Tensor:
        chosen = int(torch.randint(period, (), generator=g))
        return torch.randn(len(r), generator=g) * (torch.arange(len(r)) % period == chosen)

    return build


def frame(r: torch.Tensor, g: Generator) -> torch.Tensor:
    residual, length = torch.zeros(len(r)), len(r) // 16
    start = int(torch.randint(len(r) - length, (), generator=g))
    residual[start : start + length] = torch.randn(length, generator=g)
    return residual


def channel_of_frames(r: torch.Tensor, g: Generator) -> torch.Tensor:
    """One constant channel of 16 in `frame channel pixel`: ranges that repeat."""
    pixels = len(r) // 128
    chosen = int(torch.randint(16, (), generator=g))
    return (torch.arange(len(r)) // pixels % 16 == chosen).float()


def few(r: torch.Tensor, g: Generator) -> torch.Tensor:
    """Two to eight equal elements: where two of them share a place it shows most."""
    residual = torch.zeros(len(r))
    count = 2 + int(torch.randint(7, (), generator=g))
    residual[torch.randint(len(r), (count,), generator=g)] = 1.0
    return residual


RESIDUALS: dict[str, Callable[[torch.Tensor, Generator], torch.Tensor]] = {
    "noise": lambda r, g: torch.randn(len(r), generator=g),
    "column of 64": column(64),
    "column of 128": column(128),
    "column of 1021": column(1021),
    "column of 1024": column(1024),
    "frame": frame,
    "channel of frames": channel_of_frames,
    "constant": lambda r, g: torch.ones(len(r)),
    "gradient": lambda r, g: torch.linspace(-1, 1, len(r)),
    "wave": lambda r, g: torch.sin(torch.arange(len(r)) / (1 + 99 * torch.rand(1, generator=g))),
    "gain": lambda r, g: r.clone(),
    "few": few,
}


def cases(kind: str, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for seed in range(count):
        g = Generator().manual_seed(seed)
        size = int(2_000 * 100 ** float(torch.rand(1, generator=g)))
        level = 10.0 ** -float(4 * torch.rand(1, generator=g))
        r = torch.randn(size, generator=g) * 3 + 1
        d = RESIDUALS[kind](r, g)
        yield r + d * (level * r.norm() / d.norm()), r


def test_known_answers_of_one_and_of_many_chunks() -> None:
    small = torch.arange(5000, dtype=torch.float64) * 0.001
    large = torch.arange(100_000, dtype=torch.float64) * 0.001
    assert digest(small) == "f4718196b708cdef"
    assert digest(large) == "c958ab61233576bd"
    assert digest(torch.arange(1000) * 0.5) == "4a107b3fd0589ac4"


def test_threads_and_strides_change_no_bit() -> None:
    tensor = randn(300, 1000).transpose(0, 1)
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found |= {digest(tensor), digest(tensor.contiguous()), digest(tensor.reshape(10, -1))}
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    assert digest(tensor.t()) not in found


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
def test_modes_and_gradients_change_nothing(context: Callable[[], torch.inference_mode]) -> None:
    tensor = randn(20_000)
    expected = digest(tensor)
    with context():
        assert digest(tensor) == expected
    assert digest(tensor.requires_grad_()) == expected


@pytest.fixture(scope="module")
def estimates() -> dict[str, list[tuple[float, bool]]]:
    """Of each kind of residual 40 times: estimate over truth, and whether the interval holds it."""
    found: dict[str, list[tuple[float, bool]]] = {}
    for kind in RESIDUALS:
        for actual, reference in cases(kind, 40):
            truth, got = exact(actual, reference), estimated(actual, reference)
            held = got.low <= truth <= got.high
            found.setdefault(kind, []).append((got.rel_l2 / truth, held))
    return found


def near(ratios: list[float]) -> float:
    return sum(abs(ratio - 1) <= 0.05 for ratio in ratios) / len(ratios)


def test_95_of_100_estimates_within_5_percent(
    estimates: dict[str, list[tuple[float, bool]]],
) -> None:
    every = [case for kind in estimates.values() for case in kind]
    assert near([ratio for ratio, _ in every]) >= 0.95
    assert sum(held for _, held in every) >= 0.93 * len(every)


@pytest.mark.parametrize("kind", RESIDUALS)
def test_estimates_without_bias_whatever_the_structure(
    kind: str, estimates: dict[str, list[tuple[float, bool]]]
) -> None:
    ratios = [ratio for ratio, _ in estimates[kind]]
    # Of 40 at 95 %, 34 or fewer would be seen once in 300 times.
    assert near(ratios) >= 35 / 40
    assert sum(held for _, held in estimates[kind]) >= 35
    # 40 independent estimates have a standard error of 0.35 %.
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.014)


def swapped(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.view(-1)[[5, 40_005]] = x.view(-1)[[40_005, 5]]
    return y


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(0),
        lambda x: x.flip(1),
        lambda x: x.transpose(2, 3).contiguous(),
        lambda x: x.roll(1, 0),
        lambda x: x.roll(1, -1),
        lambda x: x.view(-1).roll(1),
        lambda x: x.view(-1).roll(16_384),
        lambda x: -x,
        swapped,
    ],
)
def test_sees_what_sums_of_squares_do_not(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    reference = randn(8, 16, 32, 32)
    actual = change(reference).view(reference.shape)
    assert estimated(actual, reference).rel_l2 == pytest.approx(exact(actual, reference), rel=0.08)


@pytest.mark.parametrize("place", [0, 63, 1024, 16_383, 16_384, 99_999])
def test_one_element_is_exact(place: int) -> None:
    reference = randn(100_000).double()
    actual = reference.clone()
    actual[place] += 1.0
    assert estimated(actual, reference).rel_l2 == pytest.approx(
        exact(actual, reference), abs=2 * RESOLUTION
    )


@pytest.mark.parametrize("count", [1, 2, 63, 1023, SIZE])
def test_as_many_elements_as_floats_are_exact(count: int) -> None:
    reference, noise = randn(count) + 2, randn(count, seed=1)
    actual = reference + 1e-2 * noise
    found = estimated(actual, reference)
    assert found.rel_l2 == pytest.approx(exact(actual, reference), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 60_000), seed=st.integers(0, 1000), factor=st.sampled_from([-1.0, 0.1, 3])
)
def test_is_linear(count: int, seed: int, factor: float) -> None:
    a, b = randn(count, seed=seed).double(), randn(count, seed=seed + 1).double()
    together, apart = sketch(a + factor * b), sketch(a).double() + factor * sketch(b).double()
    scale = float(a.norm() + abs(factor) * b.norm())
    assert float((together - apart).norm()) <= 2 * RESOLUTION * scale


def test_differences_of_1e_6_between_float32_of_many_chunks() -> None:
    reference = randn(2_000_000) + 1
    actual = reference + 1e-6 * randn(2_000_000, seed=1)
    truth, found = exact(actual, reference), estimated(actual, reference)
    assert found.rel_l2 == pytest.approx(truth, rel=0.05)
    assert found.low < truth < found.high


@pytest.mark.parametrize("level", [0.0, 1e-10, 1e-8, 3e-8])
@pytest.mark.parametrize("massive", [False, True])
def test_interval_reaches_over_the_rounding(level: float, massive: bool) -> None:
    reference = randn(50_000).double()
    if massive:  # one element that rounds its sums to steps as large as the rest's residual
        reference[7] = 1e5
    actual = reference + level * reference.norm() / 50_000**0.5 * randn(50_000, seed=1).double()
    truth, found = exact(actual, reference), estimated(actual, reference)
    assert found.low <= truth <= found.high
    assert found.rel_l2 == pytest.approx(truth, abs=2 * RESOLUTION)
    assert found.high < level * 1.1 + 4 * RESOLUTION


def test_equal_sketches_are_0_up_to_the_resolution() -> None:
    tensor = randn(5000)
    found = estimated(tensor, tensor.clone())
    assert (found.rel_l2, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(2 * RESOLUTION, rel=0.1)


def test_few_elements_leave_rounding_uncertain_only() -> None:
    actual, reference = randn(SIZE, seed=1), randn(SIZE)
    norm = float(reference.double().norm())
    found = estimate(sketch(actual), sketch(reference), norm=norm, count=SIZE)
    assert found.low == pytest.approx(found.rel_l2, rel=4 * RESOLUTION)
    assert found.high == pytest.approx(found.rel_l2, rel=4 * RESOLUTION)
    assert found.low < exact(actual, reference) < found.high
    more = estimate(sketch(actual), sketch(reference), norm=norm, count=SIZE + 1)
    assert more == estimate(sketch(actual), sketch(reference), norm=norm)


def test_interval_is_that_of_chi_with_1024_degrees() -> None:
    reference = torch.zeros(SIZE)
    actual = torch.ones(SIZE)
    found = estimate(actual, reference, norm=32.0)
    # sqrt(1024 / quantile) of chi squared: 1114.577 at 97.5 %, 937.211 at 2.5 %
    wide = pytest.approx((0.958506, 1.0, 1.045277), abs=2e-6)
    assert (found.low, found.rel_l2, found.high) == wide


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.bool,
    ],
)
@pytest.mark.parametrize("count", [100, 3000, 40_000])
def test_a_dtype_is_its_values(dtype: torch.dtype, count: int) -> None:
    tensor = (randn(count) * 4).abs().to(dtype)
    assert torch.equal(sketch(tensor), sketch(tensor.to(torch.float64)))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape)
    found = sketch(tensor)
    assert (found.shape, found.dtype) == ((SIZE,), torch.float32)
    assert float(found.norm()) == pytest.approx(math.sqrt(tensor.numel()))
    assert torch.equal(found, sketch(tensor.reshape(-1)))


@pytest.mark.parametrize("count", [100, 3000, 40_000])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_counts_what_is_not_finite_as_zero(count: int, value: float) -> None:
    tensor, zeroed = randn(count), randn(count)
    tensor[[3, 50]], zeroed[[3, 50]] = value, 0.0
    assert torch.equal(sketch(tensor), sketch(zeroed))


def test_norms_and_sketches_out_of_range() -> None:
    zero, one = sketch(torch.zeros(9)), sketch(torch.ones(9))
    beyond = sketch(torch.full((9,), 1e200, dtype=torch.float64))
    assert estimate(zero, zero, norm=0.0) == Estimate(0.0, 0.0, 0.0)
    assert estimate(one, zero, norm=0.0) == Estimate(math.inf, math.inf, math.inf)
    for found in (estimate(beyond, beyond, norm=3e200), estimate(one, zero, norm=math.inf)):
        assert math.isnan(found.rel_l2)
        assert (found.low, found.high) == (0.0, math.inf)


def test_errors() -> None:
    good, norm = torch.zeros(SIZE), 1.0
    with pytest.raises(ValueError, match=r"actual is no sketch: shape \(5,\), not \(1024,\)"):
        estimate(torch.zeros(5), good, norm=norm)
    with pytest.raises(ValueError, match=r"reference is no sketch: shape \(1, 1024\)"):
        estimate(good, good[None], norm=norm)
    with pytest.raises(ValueError, match="norm must not be negative: -1"):
        estimate(good, good, norm=-1.0)
    with pytest.raises(ValueError, match="complex tensors have no sketch"):
        sketch(torch.zeros(3, dtype=torch.complex64))
