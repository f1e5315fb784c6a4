"""What a run takes, told without computing it: as many bytes and calls as a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.calls.loops import Loop
from truestep.calls.foretelling import foretold, weight_sizes
from truestep.calls.recorder import recorded
from truestep.calls.subject import subject_of
from truestep.errors import UsageError
from truestep.testing import tiny

CLASSES = ("FluxPipeline", "WanPipeline", "StableDiffusionXLPipeline", "LTX2Pipeline")


@pytest.mark.parametrize("name", CLASSES)
def test_a_foretold_run_has_the_calls_and_the_bytes_of_a_real_one(name: str) -> None:
    pipe = tiny.pipeline(name)
    subject = subject_of(pipe, seed=0, **tiny.example_call(name))
    real = recorded(subject)
    told = foretold(subject)
    places = [(c.stage, c.component, c.method, c.step, c.call) for c in told.calls]
    assert places == [(c.stage, c.component, c.method, c.step, c.call) for c in real.calls]
    assert sum(told.sizes.values()) == sum(real.recording[n].nbytes for n in real.recording)
    models = [at for at, call in enumerate(real.calls) if call.kind == "model"]
    assert sorted(told.works) == models
    for at, work in told.works.items():
        part = pipe.components[told.calls[at].component]
        assert work.weights == sum(p.numel() * p.itemsize for p in part.parameters())
        assert work.flops > 0
        assert work.activations > 0


class Square(torch.nn.Module):
    """Two products, of which one makes a tensor that is gone when the other is made."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = (x @ self.weight).repeat(4, 1)
        narrow = wide[: len(x)].clone()
        del wide
        return narrow @ self.weight


def test_products_and_the_most_that_is_alive_are_counted() -> None:
    told = foretold(subject_of(Square(), torch.ones(8, 64)))
    (work,) = told.works.values()
    assert work.flops == 2 * 2 * 8 * 64 * 64
    row = 8 * 64 * 4
    assert work.activations == (4 + 1) * row  # what was repeated, and its source or its copy
    assert told.weights == {"module": (64 * 64 * 4, 64 * 64 * 4)}


def test_no_weight_is_read_and_nothing_is_left_of_it() -> None:
    pipe = Loop()
    with torch.no_grad():
        for parameter in pipe.net.parameters():
            parameter.fill_(torch.nan)
    before = dict(vars(type(pipe.net)))
    told = foretold(subject_of(pipe))
    assert told.steps
    assert dict(vars(type(pipe.net))) == before
    assert all(type(p) is torch.nn.Parameter for p in pipe.net.parameters())


def test_calls_alike_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    own = Square.forward

    def counted(self: Square, x: torch.Tensor) -> torch.Tensor:
        made.append(tuple(x.shape))
        return own(self, x)

    monkeypatch.setattr(Square, "forward", counted)
    module = Square()

    def run() -> list[torch.Tensor]:
        return [module(torch.ones(rows, 64)) for rows in (2, 2, 4, 2)]

    told = foretold(subject_of(run, components={"module": module}))
    assert made == [(2, 64), (4, 64)]
    assert [work.flops for work in told.works.values()] == [
        2 * 2 * rows * 64 * 64 for rows in (2, 2, 4, 2)
    ]


class Looks(torch.nn.Module):
    """Decides by what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


def test_a_model_that_looks_at_numbers_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        foretold(subject_of(Looks(), torch.ones(3)))
    assert "module.forward cannot be foretold" in str(caught.value)
    assert "depends on the numbers" in str(caught.value)
    assert caught.value.hint == "leave --dry-run out"


def test_what_came_in_lists_is_given_back() -> None:
    class Takes(torch.nn.Module):
        def forward(self, parts: list[torch.Tensor]) -> Any:
            return {"sum": parts[0] + parts[1], "same": parts[0]}

    given = [torch.ones(2), torch.zeros(2)]
    kept = list(given)
    module = Takes()
    outputs: list[Any] = []
    subject = subject_of(lambda: outputs.append(module(given)), components={"module": module})
    foretold(subject)
    assert [a is b for a, b in zip(given, kept, strict=True)] == [True, True]
    assert {name: type(value) for name, value in outputs[0].items()} == {
        "sum": torch.Tensor,
        "same": torch.Tensor,
    }


def test_only_modules_have_weights() -> None:
    assert weight_sizes({"net": Square(2), "scheduler": object()}) == {"net": (16, 16)}
