"""Small pairs measured at once say what each says by itself, bit for bit; and cost less."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pytest
import torch

from tests.counting import calls_inside
from truestep.judge.rows import compare_tensors
from truestep.measure import batches
from truestep.measure.batches import Found, is_small, measured_together
from truestep.measure.distance import distance, distance_to_itself, is_constant, same_bits
from truestep.measure.structure import bulk
from truestep.verdict import Row

Pair = tuple[torch.Tensor, torch.Tensor]
DICE = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=DICE)


def changed(r: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a candidate may make of a tensor."""
    noise = normal(*r.shape)
    yield r.clone()
    yield r * (1 + 1e-7 * noise)
    yield r * 1.01
    yield r * 1.01 + 1e-9 * noise
    yield -r
    yield r.flip(-1)
    yield 1e-3 * r
    yield r + 100 * noise
    yield r.double() * (1 + 1e-13)
    yield r.bfloat16()
    yield torch.zeros_like(r)
    yield torch.full_like(r, 3.0)
    for value in (math.nan, math.inf, -math.inf, 1e30, -0.0):
        other = r.clone()
        other.view(-1)[0] = value
        yield other


def references(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    for scale in (1.0, 1e-20, 1e18, 1e-38):
        yield normal(*shape) * scale
    yield normal(*shape).round()  # zeros, ties
    yield normal(*shape).half()
    yield normal(*shape).bfloat16()
    yield normal(*shape).double() * 1e-170
    yield torch.zeros(shape)
    yield torch.ones(shape)
    yield torch.where(normal(*shape) > 1, torch.tensor(1e9), normal(*shape))


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    every = []
    for shape in ((2,), (7,), (3, 5), (64,), (2, 3, 4, 5), (1031,)):
        for r in references(shape):
            for a in changed(r):
                every += [(a, r), (a.to(r.dtype), r), (r, a)]
    return every


def by_itself(a: torch.Tensor, r: torch.Tensor) -> Found:
    same = same_bits(a, r)
    metrics = distance_to_itself(r) if same else distance(a, r)
    return Found(same, metrics, (is_constant(a), is_constant(r)), None if same else bulk(a, r))


def test_what_was_measured_at_once_agrees_bit_for_bit(pairs: list[Pair]) -> None:
    every = [pair for pair in pairs if is_small(pair)] * batches.FEW
    together = measured_together(every, bulk=True)
    for (a, r), found in zip(every, together, strict=True):
        if found is not None:
            assert repr(found) == repr(by_itself(a, r)), (a, r)
    assert sum(found is not None for found in together) > len(every) / 4


def test_what_is_not_plain_is_left_to_be_measured_by_itself() -> None:
    r = normal(8)
    odd = [r * math.nan, r * math.inf, r * 1e-30 * 1e-30, r * 1.01]
    assert measured_together([(a, a + 0) for a in odd[:2]] * 9, bulk=True) == [None] * 18
    found = measured_together([(odd[3].double(), r.double())] * 9, bulk=True)
    assert found == [None] * 9  # nothing but a gain: what is left of it cancels


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1),
        torch.zeros(0),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(4).to(torch.float8_e4m3fn),
        torch.zeros(4, device="meta"),
        torch.eye(4).to_sparse(),
        torch.zeros(batches.SMALL + 1),
    ],
)
def test_others_are_not_small(tensor: torch.Tensor) -> None:
    assert not is_small((tensor, tensor))


def test_rows_do_not_depend_on_what_is_compared_beside_them(pairs: list[Pair]) -> None:
    some = pairs[::7]
    names = [f"w{at}" for at in range(len(some))]
    sides = [{n: p[side] for n, p in zip(names, some, strict=True)} for side in (0, 1)]
    sides[0].pop(names[3])
    sides[1].pop(names[5])
    sides[0][names[8]] = normal(3, 3, 3)

    def alone(name: str) -> Row:
        return compare_tensors(*({n: t for n, t in s.items() if n == name} for s in sides))[0]

    rows = compare_tensors(*sides)
    assert len(rows) == len(names)
    for row in rows:
        assert repr(row) == repr(alone(row.name))


def many(count: int) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    reference = {f"w{at}": normal(16) for at in range(count)}
    return {name: t * (1 + 1e-7 * normal(16)) for name, t in reference.items()}, reference


def test_a_small_tensor_costs_a_bounded_number_of_calls() -> None:
    few, lots = many(100), many(1100)
    compare_tensors(*few)
    counts = [
        calls_inside(lambda s=sides: compare_tensors(*s), "truestep") for sides in (few, lots)
    ]
    assert (counts[1] - counts[0]) / 1000 < 60, counts
