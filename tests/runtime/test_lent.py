"""Weights that are there while they are used: the same numbers, whatever code does with them."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from truestep.calls.tape import Tape
from truestep.runtime import lent
from truestep.runtime.buffers import Buffers
from truestep.runtime.lent import Lender, active, content_of, lending
from truestep.runtime.precision import converted
from truestep.runtime.weight import cast

F = nn.functional
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_weight_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent, "LEAST", 1)


class Uses(nn.Module):
    """A module that uses its weights in every way that code of models does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.embed = nn.Embedding(8, 8)
        self.table = nn.Parameter(torch.randn(1, 4, 8))
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.proj(x.to(self.proj.weight.dtype)))
        x = self.conv(x.mT[..., None])[..., 0].mT + self.table
        shift, gain, *_ = self.table.chunk(4, dim=1)  # views
        x = x * gain + shift + self.table[:, 0] * self.scale
        x = x + self.lstm(x)[0] + self.attention(x, x, x)[0]
        x = x + self.embed(torch.arange(4))
        x = F.linear(x, self.embed.weight.t() + 0)  # tied, and a view
        return x @ self.proj.weight.to(torch.float64).T.to(x.dtype)


def widened_copies(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(model).to(torch.float32)(x)


@torch.no_grad()
def test_a_widened_model_gives_what_a_widened_copy_gives() -> None:
    model = Uses().to(torch.bfloat16)
    x = torch.randn(1, 4, 8)
    expected = widened_copies(model, x)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    narrow = model(x)

    with converted(model, torch.float32):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.proj.weight.is_contiguous()
        assert model.proj.weight.stride() == (8, 1)
        first, second = model(x), model(x)

    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert not torch.equal(narrow.float(), expected)
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert torch.equal(model(x), narrow)
    assert active() is None


WRITES: list[Callable[[nn.Linear], object]] = [
    lambda m: m.weight.mul_(2),
    lambda m: m.weight.data.mul_(2),
    lambda m: m.weight.detach()[0].add_(1),
    lambda m: m.weight.__setitem__(0, 1.0),
    lambda m: m.weight.view(-1)[3:5].fill_(2),
    lambda m: torch.add(m.weight, 1, out=m.weight.data),
    lambda m: m.weight.chunk(2)[1].zero_(),
    lambda m: m.weight.T.copy_(m.weight + 1),
    lambda m: m.weight.numpy(force=True).fill(0.5),
    lambda m: setattr(m, "weight", nn.Parameter(m.weight * 2)),
    lambda m: m.weight.t_(),
    lambda m: m.weight.data.unsqueeze_(0).mul_(2),
    lambda m: m.weight.data.t_().add_(torch.arange(8.0)),
    lambda m: m.weight.data.storage().__setitem__(3, 9.0),
    lambda m: m.load_state_dict({"weight": torch.ones(8, 8), "bias": torch.ones(8)}),
]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_what_is_written_into_a_weight_is_there(write: Callable[[nn.Linear], object]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8).to(torch.bfloat16)
    x = torch.randn(3, 8)
    plain = copy.deepcopy(model).to(torch.float32)
    untouched = plain(x)
    write(plain)
    expected = plain(x)
    assert not torch.equal(untouched, expected)

    with lending(), converted(model, torch.float32):
        write(model)
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_what_is_read_in_other_ways_is_the_weight() -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16)
    expected = model.weight.float()
    with converted(model, torch.float32):
        weight = model.weight
        assert weight.tolist() == expected.tolist()
        assert torch.equal(copy.deepcopy(weight), expected)
        assert torch.equal(pickle.loads(pickle.dumps(weight.detach().clone())), expected)
        assert torch.equal(torch.stack([weight, weight])[1], expected)
        assert torch.equal(torch.cat((weight, expected))[:8], expected)
        assert torch.equal(model.state_dict()["weight"] + 0, expected)
        assert str(weight.sum().item()) == str(expected.sum().item())
        assert "nan" not in repr(weight)


def test_memory_that_somebody_keeps_is_not_used_again() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16)
    x = torch.randn(3, 8, requires_grad=True)
    widened_copies(model, x).sum().backward()
    expected, x.grad = x.grad, None
    with converted(model, torch.float32):
        out = model(x)  # the graph keeps both weights
        model(x.detach())
        out.sum().backward()
    assert torch.equal(x.grad, expected)


@torch.no_grad()
def test_a_thread_that_is_not_reached_sees_no_number() -> None:
    """What it reads must not pass for a weight."""
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    found: list[torch.Tensor] = []
    lent_now = threading.Event()

    def read() -> None:
        lent_now.wait()
        found.append(model.weight.detach().sum())

    thread = threading.Thread(target=read)
    thread.start()
    with converted(model, torch.float32):
        lent_now.set()
        thread.join()
    assert found[0].isnan()


@torch.no_grad()
def test_threads_that_are_given_work_are_lent_weights() -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16)
    x = torch.randn(64, 3, 8)
    expected = widened_copies(model, x)
    alone = [widened_copies(model, one) for one in x]  # rows of a batch may round otherwise
    found: list[torch.Tensor] = []
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: None, range(4)))  # its threads are there before
        with converted(model, torch.float32):
            thread = threading.Thread(target=lambda: found.append(model(x)))
            thread.start()
            thread.join()
            pooled = list(pool.map(model, x))
        narrow = pool.submit(model, x.bfloat16()).result()
    assert torch.equal(found[0], expected)
    assert all(torch.equal(one, other) for one, other in zip(pooled, alone, strict=True))
    assert torch.equal(narrow, model(x.bfloat16()))


def test_what_reaches_further_is_gone_with_the_last_lender() -> None:
    def held() -> tuple[object, ...]:
        scripted = torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__
        return (threading.Thread.start, ThreadPoolExecutor.submit, *scripted)

    before = held()
    first, second = Lender(), Lender()
    with first:
        during = held()
        assert not any(a is b for a, b in zip(before, during, strict=True))
        with second:
            assert held() == during
        assert held() == during
    assert held() == before


@torch.no_grad()
def test_a_function_of_torchscript_is_given_weights() -> None:
    @torch.jit.script
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    model = nn.Linear(8, 8).to(torch.bfloat16)
    x = torch.randn(3, 8)
    expected = x @ model.weight.float()
    with converted(model, torch.float32):
        assert torch.equal(product(x, model.weight), expected)
    assert torch.equal(product(x, model.weight.float()), expected)


@torch.no_grad()
def test_modes_of_operators_see_those_of_the_model_alone() -> None:
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    x = torch.randn(3, 8)
    with converted(model, torch.float32):
        with Tape() as tape:
            model(x), model(x)
        expected = copy.deepcopy(model.weight)
    names = [operation.name for operation in tape.operations]
    assert names.count("aten::_to_copy") == 2, "a tape holds what a weight is made from, once"
    held = [tensor for tensor in tape.outside.values() if tensor.shape == (8, 8)]
    assert [tensor.dtype for tensor in held] == [torch.bfloat16]
    assert expected.dtype is torch.float32


@torch.no_grad()
def test_a_part_that_was_taken_unseen_is_refused() -> None:
    with Lender() as lender:
        weight = lender.lend(cast(torch.ones(8, 8), torch.float64, CPU, lender.buffers))
        with torch._C.DisableTorchFunction():
            part = weight[:2]
        with pytest.raises(RuntimeError, match="a part was taken of a weight"):
            part + 1


@torch.no_grad()
def test_one_lender_a_thread() -> None:
    with lending() as outer:
        with lending() as inner:
            assert inner is outer
        assert active() is outer
    assert active() is None


@torch.no_grad()
def test_casts_while_loading_stay_lent() -> None:
    with Lender() as lender:
        data = torch.randn(8, 8)
        weight = lender.lend(cast(data, torch.float64, CPU, lender.buffers))
        with lender.loading():
            narrow = nn.Parameter(weight.to(torch.bfloat16).contiguous(), requires_grad=False)
            same = weight.to("cpu", torch.float64)
            copied = weight.clone()
        assert narrow.dtype is torch.bfloat16
        assert all(lender.lent(each) is not None for each in (narrow, same, copied))
        assert torch.equal(narrow + 0, data.double().bfloat16())
        copied.mul_(2)
        assert torch.equal(copied + 0, data.double() * 2)
        assert torch.equal(weight + 0, data.double()), "a copy is another weight"
        assert content_of(weight) is None


@pytest.fixture
def channels_last() -> torch.Tensor:
    return torch.randn(4, 3, 2, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_layout_is_kept(channels_last: torch.Tensor) -> None:
    model = nn.Conv2d(3, 4, 2)
    model.weight.data = channels_last
    with converted(model, torch.float32):
        assert model.weight.stride() == channels_last.stride()
        assert model.weight.is_contiguous(memory_format=torch.channels_last)
        assert not model.weight.is_contiguous()
        assert torch.equal(model.weight + 0, channels_last.float())


@torch.no_grad()
def test_what_must_not_be_lent_is_copied() -> None:
    script = torch.jit.script(nn.Linear(8, 8)).to(torch.bfloat16)
    x = torch.randn(3, 8)
    expected = copy.deepcopy(script).to(torch.float32)(x)
    with converted(script, torch.float32):
        assert torch.equal(script(x), expected)


@pytest.mark.parametrize("parts", [(slice(None), slice(8)), slice(None, None, 2), slice(4, 12)])
@torch.no_grad()
def test_a_weight_that_is_a_part_of_another_is_that_part(parts: Any) -> None:
    model = nn.Linear(8, 8)
    model.weight = nn.Parameter(torch.randn(16, 16).to(torch.bfloat16)[parts][:8, :8])
    x = torch.randn(3, 8)
    expected = widened_copies(model, x)
    with converted(model, torch.float32):
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_a_weight_of_which_many_elements_are_one() -> None:
    model = nn.Linear(8, 8)
    model.weight = nn.Parameter(torch.randn(8).to(torch.bfloat16).expand(8, 8))
    x = torch.randn(3, 8)
    expected = widened_copies(model, x)
    with converted(model, torch.float32):
        assert torch.equal(model(x), expected)


UNUSUAL: list[Callable[[nn.Linear, torch.Tensor], torch.Tensor]] = [
    lambda m, x: torch.sparse.mm(torch.eye(8).to_sparse(), m.weight),
    lambda m, x: torch.eye(8).to_sparse_csr() @ m.weight,
    lambda m, x: torch.vmap(m)(x),
    lambda m, x: torch.func.grad(lambda row: m(row).sin().sum())(x[0]),
    lambda m, x: torch.func.jvp(m, (x,), (x,))[1],
    lambda m, x: torch.cat(NamedTuple("Two", [("a", Any), ("b", Any)])(m.weight, m.weight)),
    lambda m, x: flex_attention(*[m(x).detach()[None, None]] * 3, score_mod=lambda s, *at: s * 2),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", UNUSUAL)
def test_a_weight_beside_unusual_tensors(
    use: Callable[[nn.Linear, torch.Tensor], torch.Tensor],
) -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16)
    x = torch.randn(4, 8)
    expected = use(copy.deepcopy(model).to(torch.float32), x)
    with converted(model, torch.float32):
        assert torch.equal(use(model, x), expected)


def test_parts_of_a_weight_within_a_transform_are_refused() -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16)
    with converted(model, torch.float32), pytest.raises(RuntimeError, match="a part was taken"):
        torch.vmap(lambda row: row * 2)(model.weight)


KEPT: list[Callable[[nn.Linear], torch.Tensor]] = [
    lambda m: m.weight.detach(),
    lambda m: m.weight.data,
    lambda m: m.weight.to(torch.float32),
    lambda m: m.weight[2:],
    lambda m: nn.Parameter(m.weight),
    lambda m: m.state_dict()["weight"],
    lambda m: copy.deepcopy(m).weight,
]


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("keep", KEPT)
@torch.no_grad()
def test_what_code_keeps_of_a_weight_is_the_weight(
    keep: Callable[[nn.Linear], torch.Tensor], outer: bool
) -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16)
    expected = keep(copy.deepcopy(model).to(torch.float32))
    with lending() if outer else nullcontext():
        with converted(model, torch.float32):
            kept = keep(model)
        assert torch.equal(kept, expected)
    assert torch.equal(kept, expected)
    assert kept.stride() == expected.stride()


def test_a_weight_is_written_into_with_gradients_on() -> None:
    """As an adapter is fused."""
    model = nn.Linear(8, 8).to(torch.bfloat16)
    expected = model.weight.detach().float() + 1
    expected[0] *= 2
    with converted(model, torch.float32):
        model.weight.data += 1
        row = model.weight.data[0]
        row.mul_(2)
        assert torch.equal(model.weight.detach() + 0, expected)


@torch.no_grad()
def test_nothing_is_held_of_weights_that_are_narrow_again() -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16)
    with lending() as lender:
        before = lender.lend(cast(torch.ones(8, 8), torch.float64, CPU, lender.buffers))
        for _ in range(3):
            with converted(model, torch.float32):
                model.weight.mul_(1)
                assert len(lender._lent) == 3
            assert len(lender._lent) == 1
        assert torch.equal(before + 0, torch.ones(8, 8, dtype=torch.float64))


def test_who_keeps_a_small_weight_keeps_no_large_memory() -> None:
    buffers = Buffers()
    buffers.give_back(buffers.take(1 << 22))
    small = buffers.take(1 << 20)
    assert small.numel() == 1 << 20
    buffers.give_back(small)
    assert buffers.take(3 << 20).numel() == 1 << 22
    assert buffers.take(1 << 20) is small
