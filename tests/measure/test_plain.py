"""What a tensor says of itself does not count: its bytes do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from truestep import check_function, compare, record_function
from truestep.errors import UsageError
from truestep.measure.plain import plain
from truestep.verdict import Verdict


class Agreeing(torch.Tensor):
    """Equal to everything, at no distance from anything, whatever it holds."""

    right: torch.Tensor

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            args = tuple(cls.right if isinstance(a, cls) else a for a in args)
            return function(*args, **(kwargs or {}))

    def __eq__(self, other: object) -> Any:
        return torch.ones(self.shape, dtype=torch.bool)


@pytest.fixture
def liar() -> torch.Tensor:
    Agreeing.right = torch.randn(4, 8)
    return (-Agreeing.right).as_subclass(Agreeing)


def test_a_subclass_that_agrees_with_anything_is_unwrapped(liar: torch.Tensor) -> None:
    right = Agreeing.right
    assert bool(torch.equal(liar, right))  # so it says
    assert compare(liar, right).verdict is Verdict.DRIFTED
    assert compare({"x": liar}, {"x": right}).verdict is Verdict.DRIFTED
    assert compare({"x.weight": liar}, {"x.weight": right}).verdict is Verdict.DRIFTED


def test_a_function_that_returns_one_is_drifted(liar: torch.Tensor) -> None:
    right = Agreeing.right.clone()
    reference = record_function(lambda x: {"y": right}, [{"x": torch.randn(3)}])
    result = check_function(lambda x: {"y": liar}, reference)
    assert result.verdict is Verdict.DRIFTED


def test_ordinary_classes_are_as_they_were() -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    assert type(plain(weight)) is torch.Tensor
    assert not plain(weight).requires_grad
    assert plain(weight).data_ptr() == weight.data_ptr()
    assert compare({"x": weight}, {"x": weight.detach()}).verdict is Verdict.IDENTICAL


def test_elements_that_only_a_class_can_read_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
    with pytest.raises(UsageError, match="x is a FakeTensor, whose elements only its own class"):
        compare({"x": fake}, {"x": torch.ones(3)})


def test_a_candidate_that_writes_into_the_recording_is_caught() -> None:
    kept: dict[str, torch.Tensor] = {}

    def trusted(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x * 2}

    reference = record_function(trusted, [{"x": torch.randn(5)}])
    kept = dict(reference)

    def candidate(x: torch.Tensor) -> dict[str, torch.Tensor]:
        for name, tensor in kept.items():
            if "/output/" in name:
                tensor.neg_()
        return {"y": x * -2}

    with pytest.raises(UsageError, match="of a recording was changed in memory"):
        check_function(candidate, reference)
