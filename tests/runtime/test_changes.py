"""Harmless changes of torch: what they move, and what they leave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from truestep.runtime.changes import ELEMENTARY, OtherFunctions, one_rounding

X = torch.rand(12_000, generator=torch.Generator().manual_seed(0)) + 0.1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_moves_a_twelfth_of_the_numbers_to_a_neighbour(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(12_000).to(dtype)
    tensor[:3] = torch.tensor([0.0, torch.inf, -torch.inf])
    moved = one_rounding(tensor, generator())
    assert torch.equal(moved[:3], tensor[:3])
    gap = (moved[3:].double() - tensor[3:].double()).abs() / tensor[3:].double().abs()
    assert 800 < int((gap > 0).sum()) < 1200
    assert (gap <= torch.finfo(dtype).eps * 1.01).all()


@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        torch.sin,
        torch.rsqrt,
        torch.nn.functional.silu,
        lambda x: x**0.3,
        lambda x: x**x,
        torch.exp_,
    ],
    ids=["exp", "sin", "rsqrt", "silu", "pow", "tensor", "in-place"],
)
def test_what_a_function_gives_is_one_unit_off_up_or_down(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    plain = function(X.clone())
    given = X.clone()
    with OtherFunctions():
        made = function(given)
    if function is torch.exp_:
        assert made is given
    moved = (made.double() - plain.double()) / plain.double().abs()
    assert (moved != 0).all()
    assert 5_400 < int((moved > 0).sum()) < 6_600
    assert (moved.abs() <= torch.finfo(torch.float32).eps * 1.01).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_sigmoid_is_one_unit_of_one_half_off(dtype: torch.dtype) -> None:
    """As one half and a part of tanh give it; of exp by itself it would be a unit of its own."""
    unit = torch.finfo(dtype).eps / 4
    given = torch.linspace(-14, 0, 12_000, dtype=dtype)[:-1]
    plain = torch.sigmoid(given)
    by_tanh = 0.5 + 0.5 * torch.tanh(given / 2)
    assert 0.1 * unit < float((by_tanh - plain).abs().max()) < 4 * unit
    with OtherFunctions():
        made = torch.sigmoid(given)
        written = given.clone().sigmoid_()
        alone = torch.exp(given)
    assert torch.equal(written, made)
    moved = (made - plain) / unit
    assert 5_400 < int((moved > 0).sum()) < 6_600
    assert ((moved.abs() > 0.7) & (moved.abs() < 1.6)).all()
    assert (((alone - given.exp()) / given.exp()).abs() <= 4.04 * unit).all()


def test_a_sigmoid_of_nearly_nothing_stays_above_it() -> None:
    given = torch.tensor([-torch.inf, -200.0, -80.0, -40.0, -17.0, 30.0, torch.inf, torch.nan])
    plain = torch.sigmoid(given)
    with OtherFunctions():
        made = torch.sigmoid(given)
    assert torch.equal(made[:2], plain[:2])  # zeros
    assert (made[2:5] >= plain[2:5] / 2).all()
    assert torch.equal(made[5:7], plain[5:7])  # ones
    assert made[7].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_question_has_one_answer_and_another_seed_another(dtype: torch.dtype) -> None:
    given = X.to(dtype)
    with OtherFunctions(3):
        once, again = torch.exp(given), torch.exp(given.flip(0)[::2]).flip(0)
    assert torch.equal(once[1::2], again)
    with OtherFunctions(4):
        other = torch.exp(given)
    assert 5_400 < int((once != other).sum()) < 6_600


def test_what_is_written_into_a_tensor_that_is_given_is_moved_there() -> None:
    written = torch.empty(12_000)
    with OtherFunctions():
        torch.exp(X, out=written)
        returned = torch.exp(X)
    assert torch.equal(written, returned)
    assert not torch.equal(written, torch.exp(X))


def test_what_every_library_gives_exactly_stays() -> None:
    cases = [(torch.exp, 0.0), (torch.cos, 0.0), (torch.sin, 0.0), (torch.tanh, -50.0)]
    for function, at in cases:
        given = torch.full((100,), at)
        plain = function(given)
        with OtherFunctions():
            assert torch.equal(function(given), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "function",
    [
        torch.exp,
        lambda x: x[:, None] @ x[None, :2],
        lambda x: torch.nn.functional.layer_norm(x.view(-1, 8), (8,)),
    ],
    ids=["exp", "product", "norm"],
)
def test_narrow_results_are_rounded_once_more(
    function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    given = X.to(dtype)
    plain = function(given)
    with OtherFunctions():
        made = function(given)
    assert made.dtype == dtype
    gap = (made.double() - plain.double()).abs() / plain.double().abs().clamp(min=1e-30)
    share = float((gap > 0).double().mean())
    assert 0.9 / 12 < share < 1.1 / 12
    assert (gap <= torch.finfo(dtype).eps * 1.01).all()


def test_what_is_no_number_stays_and_a_large_tensor_moves_too() -> None:
    odd = torch.tensor([0.0, -torch.inf, torch.inf, torch.nan, 88.7])
    for dtype in (torch.float32, torch.float64):
        given = torch.cat([odd.to(dtype), torch.rand(200_000, dtype=dtype)])
        plain = torch.exp(given)
        with OtherFunctions(1):
            made = torch.exp(given)
        assert torch.equal(made[1:3], plain[1:3])
        assert made[3].isnan()
        assert made[4].isfinite()
        assert int((made[5:] != plain[5:]).sum()) > 199_990  # exp of 0 is 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 + x.sum(),
        lambda x: x[None] @ x[:, None],
        torch.log,
        lambda x: torch.pow(x.long(), 2),
        lambda x: x**2 + torch.pow(x, 0.5),
    ],
    ids=["arithmetic", "product", "log", "whole", "square"],
)
def test_what_is_rounded_to_nearest_stays(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    plain = function(X)
    with OtherFunctions():
        assert torch.equal(function(X), plain)


def test_the_embedding_of_a_timestep_moves_by_more_than_its_rounding() -> None:
    def embedding(t: float) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(64) / 64 * torch.log(torch.tensor(10_000.0)))
        return torch.sin(t * frequencies)

    sizes = []
    for t in (1.0, 1000.0):
        plain = embedding(t)
        with OtherFunctions():
            sizes.append(float((embedding(t) - plain).norm() / plain.norm()))
    assert sizes[0] < 2e-7
    assert sizes[1] > 20 * sizes[0]


def test_the_names_of_elementary_functions_are_operators() -> None:
    assert all(hasattr(torch.ops.aten, name) for name in ELEMENTARY)
