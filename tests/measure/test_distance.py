"""Metrics against an independent float64 computation, from 1e-13 to sign flips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counting import calls_of
from truestep.measure.distance import CHUNK, distance, distance_to_itself, is_constant, same_bits
from truestep.verdict import Metrics


def exact(actual: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """The metrics from their textbook definitions, in extended precision."""
    a = actual.to(torch.float64).numpy().astype(np.longdouble).ravel()
    r = reference.to(torch.float64).numpy().astype(np.longdouble).ravel()
    norm_a, norm_r = np.sqrt((a * a).sum()), np.sqrt((r * r).sum())
    unit = a / norm_a - r / norm_r
    return {
        "rel_l2": float(np.sqrt(((a - r) ** 2).sum()) / norm_r),
        "max_abs": float(np.abs(a - r).max()),
        "cosine_distance": float((unit * unit).sum() / 2),
        "norm_ratio": float(norm_a / norm_r),
        "gain": float((a * r).sum() / (norm_r * norm_r)),
        "rms_reference": float(norm_r / np.sqrt(len(r))),
    }


def assert_close(found: Metrics, expected: dict[str, float], tolerance: float = 1e-6) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=tolerance, abs=0), name


@pytest.mark.parametrize("noise", [1e-7, 1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("count", [7, CHUNK, 3 * CHUNK + 11])
def test_noise_of_any_size(noise: float, count: int) -> None:
    torch.manual_seed(0)
    reference = torch.randn(count) * 3 + 1
    actual = reference + noise * torch.randn(count)
    assert_close(distance(actual, reference), exact(actual, reference))


def test_differences_of_1e_13_read_1e_13() -> None:
    torch.manual_seed(0)
    reference = torch.randn(1000, dtype=torch.float64)
    actual = reference * (1 + 1e-13)
    assert distance(actual, reference).rel_l2 == pytest.approx(1e-13, rel=0.05)


@pytest.mark.parametrize(("gain", "noise"), [(1.01, 1e-4), (100.0, 1e-3), (-1.0, 1e-3), (0.5, 0)])
def test_gains_do_not_hide_the_angle(gain: float, noise: float) -> None:
    torch.manual_seed(0)
    reference = torch.randn(200_000)
    actual = gain * reference + noise * torch.randn(200_000)
    found, expected = distance(actual, reference), exact(actual, reference)
    if noise == 0:
        assert found.cosine_distance < 1e-13
        del expected["cosine_distance"]
    assert_close(found, expected)


@pytest.mark.parametrize("value", [1.1, -0.3, 1e4])
def test_equal_terms_do_not_drift(value: float) -> None:
    reference = torch.full((300_000,), value)
    actual = reference * 1.001
    assert_close(distance(actual, reference), {"rel_l2": exact(actual, reference)["rel_l2"]})


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-15, 1e15, 1e30, 1e37])
def test_magnitudes_that_overflow_when_squared(scale: float) -> None:
    torch.manual_seed(0)
    reference = torch.randn(5000) * scale
    actual = reference * 1.01
    found = distance(actual, reference)
    assert found.rel_l2 == pytest.approx(exact(actual, reference)["rel_l2"], rel=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    reference, actual = torch.randn(4, 500).to(dtype), torch.randn(4, 500).to(dtype)
    assert_close(distance(actual, reference), exact(actual, reference))


def test_integers_and_booleans_are_exact() -> None:
    reference = torch.tensor([2**53 - 1, 5, 7])
    assert distance(reference + torch.tensor([0, 0, 1]), reference).max_abs == 1
    flags = torch.tensor([True, False, True])
    assert distance(~flags, flags).max_abs == 1


def test_mixed_dtypes_and_views() -> None:
    base = torch.randn(6, 8, 10)
    view = base[:, ::2].transpose(0, 2)
    assert distance(view.to(torch.bfloat16), view).rel_l2 < 4e-3


@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_the_largest_difference_is_located(place: int) -> None:
    reference = torch.randn(3, CHUNK)
    actual = reference.clone()
    actual.view(-1)[place] -= 5
    found = distance(actual, reference)
    assert found.max_abs_index == (place // CHUNK, place % CHUNK)
    assert found.max_abs == pytest.approx(5, rel=1e-5)


@given(st.lists(st.sampled_from([0.5, -1.0, math.nan, math.inf, -math.inf]), min_size=1), st.data())
def test_non_finite_values_are_counted_apart(values: list[float], data: st.DataObject) -> None:
    size = len(values)
    others = data.draw(st.lists(st.sampled_from([0.25, math.nan]), min_size=size, max_size=size))
    actual, reference = torch.tensor(values), torch.tensor(others)
    found = distance(actual, reference)
    fine = torch.isfinite(actual) & torch.isfinite(reference)
    assert found.nonfinite_actual == int((~torch.isfinite(actual)).sum())
    assert found.nonfinite_reference == int((~torch.isfinite(reference)).sum())
    assert found.count == int(fine.sum())
    if fine.any():
        assert found.max_abs == float((actual[fine] - reference[fine]).abs().max())
    else:
        assert math.isnan(found.rel_l2)


def test_one_nan_in_a_million_is_counted() -> None:
    actual = torch.randn(1_000_000)
    reference = actual.clone()
    actual[654_321] = math.nan
    found = distance(actual, reference)
    assert (found.nonfinite_actual, found.rel_l2) == (1, 0.0)


def test_zeros_and_nothing() -> None:
    zeros = torch.zeros(4)
    assert distance(zeros, zeros).rel_l2 == 0
    assert distance(torch.ones(4), zeros).rel_l2 == math.inf
    assert distance(zeros, torch.ones(4)).rel_l2 == 1
    assert distance(zeros, torch.ones(4)).cosine_distance == 1
    assert distance(torch.empty(0), torch.empty(0)).count == 0
    assert distance(torch.tensor(2.0), torch.tensor(1.0)).max_abs_index == ()


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        distance(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="complex"):
        distance(torch.ones(2, dtype=torch.complex64), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 0.0])
@pytest.mark.parametrize("nan", [False, True])
def test_a_tensor_and_itself(dtype: torch.dtype, scale: float, nan: bool) -> None:
    tensor = (torch.randn(3, CHUNK // 2) * scale).to(dtype)
    if nan and dtype.is_floating_point:
        tensor[1, 7] = math.nan
    found, wanted = distance_to_itself(tensor), distance(tensor, tensor.clone())
    assert found.rms_reference == pytest.approx(wanted.rms_reference, rel=1e-6)
    skip = {"rms_reference": 0.0, "max_abs_index": ()}
    assert found.model_copy(update=skip) == wanted.model_copy(update=skip)


def test_bits() -> None:
    nan = torch.tensor([math.nan])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert same_bits(torch.randn(3, 4).t(), torch.randn(3, 4).t()) is False
    x = torch.randn(3, 4)
    assert same_bits(x.t(), x.t().contiguous())


def test_constants() -> None:
    assert is_constant(torch.full((CHUNK + 1,), 3.0))
    late = torch.full((CHUNK + 1,), 3.0)
    late[-1] = 4
    assert not is_constant(late)
    assert not is_constant(torch.tensor([1.0]))
    assert not is_constant(torch.ones(4, dtype=torch.int64))
    assert is_constant(torch.ones(4, dtype=torch.float8_e4m3fn))
    assert not is_constant(torch.tensor([math.nan, math.nan]))


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-170, 1e-160, 1e155, 1e200, 1e300])
def test_float64_whose_squares_leave_float64(scale: float) -> None:
    torch.manual_seed(0)
    reference = torch.randn(1000, dtype=torch.float64) * scale
    actual = reference + 0.01 * scale * torch.randn(1000, dtype=torch.float64)
    assert_close(distance(actual, reference), exact(actual, reference))


@pytest.mark.parametrize("gain", [1e-3, 1e-6, 1e-9])
def test_a_vanishing_actual_keeps_its_norm(gain: float) -> None:
    torch.manual_seed(0)
    reference = torch.randn(200_000)
    actual = gain * (reference + 1e-3 * torch.randn(200_000))
    assert_close(distance(actual, reference), exact(actual, reference))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_64_bit_integers_are_not_rounded(dtype: torch.dtype) -> None:
    reference = torch.tensor([2**62, 7, 2**53], dtype=torch.int64).view(dtype)
    actual = torch.tensor([2**62 + 1, 7, 2**53], dtype=torch.int64).view(dtype)
    assert distance(actual, reference).max_abs == 1
    far = torch.tensor([2**62, -(2**62), 5])
    assert distance(-far, far).max_abs == 2.0**63


@pytest.mark.parametrize("scale", [1e100, 1e119, 1e258])
def test_small_angles_of_large_float64(scale: float) -> None:
    torch.manual_seed(0)
    reference = torch.randn(150_000, dtype=torch.float64) * scale
    actual = 100 * reference + 1e-4 * scale * torch.randn(150_000, dtype=torch.float64)
    assert_close(distance(actual, reference), exact(actual, reference))


@given(
    count=st.sampled_from([2, 5, 1000, CHUNK + 1]),
    gain=st.sampled_from([1.0, -1.0, 1.001, 100.0, 0.01, 1e-4]),
    noise=st.floats(-7, 0.5),
    scale=st.floats(-25, 25),
    kind=st.sampled_from(["normal", "positive", "heavy", "offset", "few values"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_any_pair_is_within_1e_6(
    count: int,
    gain: float,
    noise: float,
    scale: float,
    kind: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    shapes = {"positive": x.abs(), "heavy": (3 * x).exp(), "offset": x + 50, "few values": x.sign()}
    x = shapes.get(kind, x) * 10.0**scale
    jitter = torch.randn(count, generator=generator, dtype=torch.float64)
    y = gain * x + abs(gain) * float(x.abs().mean()) * 10.0**noise * jitter
    actual, reference = y.to(dtype), x.to(dtype)
    expected = exact(actual, reference)
    if expected["cosine_distance"] < 1e-17:  # below what the oracle resolves
        del expected["cosine_distance"]
    assert_close(distance(actual, reference), expected)


@pytest.mark.parametrize("gain", [1.0, 1.01, 0.1, -1.0])
@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_any_number_of_threads_gives_the_same_numbers(gain: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(40 * CHUNK + 5, generator=generator)
    actual = gain * reference + noise * torch.randn(40 * CHUNK + 5, generator=generator)
    torch.set_num_threads(1)
    alone = distance(actual, reference)
    torch.set_num_threads(2)
    assert distance(actual, reference) == alone


def test_a_gain_that_a_sample_does_not_show_is_summed_again() -> None:
    """The sample takes every 256th element: these have a gain of their own."""
    reference = torch.randn(16 * CHUNK, generator=torch.Generator().manual_seed(4))
    actual = reference * 1.5
    actual[::256] = reference[::256] * 3
    assert_close(distance(actual, reference), exact(actual, reference))
    actual = reference * 1.5
    actual[::256] = -reference[::256]
    assert_close(distance(actual, reference), exact(actual, reference))


def test_a_pass_over_a_gain_is_one_pass() -> None:
    """What is left of a gain is summed beside it, not in a second pass over the tensors."""
    reference = torch.randn(16 * CHUNK)
    for actual in (reference * 1.01, reference * 1.01 + 1e-4 * torch.randn(16 * CHUNK), -reference):
        assert calls_of(lambda a=actual: distance(a, reference), "_fast") == 16
        assert calls_of(lambda a=actual: distance(a, reference), "_exact") == 0


def test_views_that_are_lazily_conjugated_or_negated_are_what_they_show() -> None:
    z = torch.complex(torch.arange(4.0), torch.arange(1.0, 5.0))
    lazy, plain = z.conj().imag, -z.imag.clone()
    assert lazy.is_neg()
    assert same_bits(lazy, plain)
    assert same_bits(plain, lazy)
    assert not same_bits(lazy, z.imag)
    assert same_bits(z.conj(), torch.complex(z.real, -z.imag))
    assert not same_bits(z.conj(), z)
    assert distance(lazy, plain).rel_l2 == 0.0
    assert distance(lazy, z.imag).rel_l2 == 2.0
