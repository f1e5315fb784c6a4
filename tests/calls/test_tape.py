"""A tape plays what a function did, bit for bit, without the function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.counting import calls_inside
from truestep.calls.instructions import PARTS
from truestep.calls.tape import PROBES, Tape, play, products, save

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
SIGMAS = torch.linspace(0.1, 1, 8)
Function = Callable[[torch.Tensor], torch.Tensor]


def written(x: torch.Tensor) -> torch.Tensor:
    x[1:, ::2] += 1
    x.mul_(2).t()[0].zero_()
    return x.clone()


def seeded(x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(x.shape, generator=generator)
    return x + first + torch.empty_like(x).normal_(generator=generator)


def unseeded(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x) + torch.nn.functional.dropout(x, 0.5)


def branching(x: torch.Tensor) -> torch.Tensor:
    parts = x.split(2) if float(x.sum()) != 0 else x.split(1)
    return torch.cat([*parts, torch.stack(parts).amax(0)], dim=0)


def complexes(x: torch.Tensor) -> torch.Tensor:
    turn = torch.polar(torch.ones(4, 4), x[:, :4])
    return torch.view_as_real(torch.view_as_complex(x.reshape(4, 4, 2)) * turn * (1 + 2j)).clone()


class Stateful(torch.nn.Module):
    """Changes a buffer of its own in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += x.sum(0)
        return x * self.total


def copied(x: torch.Tensor) -> torch.Tensor:
    return x * copy.deepcopy(SIGMAS) + x.sum()


def seen_twice(x: torch.Tensor) -> torch.Tensor:
    return x * SIGMAS + SIGMAS.view(torch.int32)


def conv(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv1d(1, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.GELU()
    )
    values = net(x[:, None])
    return torch.nn.functional.scaled_dot_product_attention(values, values, values)


FUNCTIONS: dict[str, Function] = {
    function.__name__: function
    for function in (written, seeded, unseeded, branching, complexes, copied, seen_twice, conv)
}
FUNCTIONS["narrow"] = lambda x: (x.bfloat16() @ x.bfloat16().T).float() * float("inf")
FUNCTIONS["scripted"] = torch.jit.trace(lambda x: torch.softmax(x * 2, -1) @ x.t(), X)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_was_taped_is_played_bit_for_bit(name: str, tmp_path: Path) -> None:
    outputs = {}
    with torch.no_grad(), Tape() as tape:
        outputs["out"] = FUNCTIONS[name](X.clone())
    number = tape.number(outputs["out"])
    assert number is not None
    assert not tape.problem
    save(tape, {"out": number}, tmp_path / "tape", flags={})
    played = play(torch.load(tmp_path / "tape", weights_only=True))
    assert torch.equal(played["out"], outputs["out"]), name
    assert played["out"].stride() == outputs["out"].stride()


WIDE = torch.randn(3, 8, 200, generator=torch.Generator().manual_seed(1))
ROW = WIDE[0, 0]
PRODUCTS: dict[str, Function] = {
    "mm": lambda x: x[0] @ x[1].t(),
    "bmm": lambda x: x @ x.transpose(1, 2),
    "mv": lambda x: x[0] @ ROW.to(x.dtype),
    "dot": lambda x: torch.stack([row @ x[1, 0] for row in x[0]]),
    "addmm": lambda x: torch.addmm(x[0, :, :8], x[0], x[1].t(), beta=0.5, alpha=2),
    "baddbmm": lambda x: torch.baddbmm(x[..., :8], x, x.transpose(1, 2), beta=0.5, alpha=2),
    "addmv": lambda x: torch.addmv(x[0, :, 0], x[0], ROW.to(x.dtype), beta=0.5, alpha=2),
    "linear": lambda x: torch.nn.functional.linear(x, x[0], x[0, :, 0]),
    "taps": lambda x: torch.conv1d(x[:, :1], x[:2, :1, :64], x[0, :2, 0], stride=7, padding=3),
    "channels": lambda x: torch.conv1d(x, x[..., :9], x[0, :3, 0]),
    "groups": lambda x: torch.conv1d(x, x[:2, :4, :20].reshape(8, 1, 20), groups=8),
    "transposed": lambda x: torch.conv_transpose1d(x, x[0, :, None, :16], x[0, :1, 0], stride=2),
}


@pytest.mark.parametrize("parts", sorted(set(PARTS.values())))
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_in_parts_is_the_same_sum_in_another_order(name: str, parts: int) -> None:
    function = PRODUCTS[name]
    truth = function(WIDE.double())
    for dtype, least in ((torch.float32, 1e-8), (torch.float64, 1e-17)):
        with torch.no_grad(), Tape() as tape:
            plain = function(WIDE.to(dtype))
        content = taped(tape, plain)
        assert torch.equal(play(content)["out"], plain)
        made = play(content, parts=parts)["out"]
        assert made.shape == plain.shape
        assert made.dtype == dtype
        gap = float((made - plain).norm() / plain.norm())
        assert least < gap < 10 * torch.finfo(dtype).eps
        assert float((made - truth).norm() / truth.norm()) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("terms", [0, 1])
def test_a_product_of_fewer_terms_than_parts_is_what_it_was(terms: int) -> None:
    with torch.no_grad(), Tape() as tape:
        plain = torch.addmm(X[:, :1], X[:, :terms], X[:terms, :8])
    assert torch.equal(play(taped(tape, plain), parts=3)["out"], plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_what_is_no_wide_product_has_no_parts(dtype: torch.dtype) -> None:
    given = (4 * WIDE[0]).to(dtype)
    with torch.no_grad(), Tape() as tape:
        plain = torch.softmax((given @ given.t()).float() + ROW[:8].exp(), -1)
    assert torch.equal(play(taped(tape, plain), parts=3)["out"], plain)


def test_products_are_the_same_each_time_and_of_every_probe() -> None:
    found = products()
    assert found == products()
    assert len(set(found)) == len(PROBES)


def taped(tape: Tape, made: torch.Tensor) -> dict[str, object]:
    number = tape.number(made)
    assert number is not None
    assert not tape.problem
    return {"operations": tape.operations, "outside": tape.outside, "outputs": {"out": number}}


def test_a_tensor_from_outside_is_kept_as_it_was_when_it_was_taken() -> None:
    model = Stateful()
    with torch.no_grad(), Tape() as tape:
        made = model(X)
    assert float(model.total.norm()) > 0
    number = tape.number(made)
    assert number is not None
    kept = {n: tensor.clone() for n, tensor in tape.outside.items()}
    content = {"operations": tape.operations, "outside": kept, "outputs": {"out": number}}
    assert torch.equal(play(content)["out"], made)


def test_what_pytorch_did_not_make_has_no_number() -> None:
    with torch.no_grad(), Tape() as tape:
        other = torch.from_numpy(X.numpy() * 2)
        tape_made = X * 2
    assert tape.number(other) is None
    assert tape.number(X) is None
    assert tape.number(tape_made) is not None


def test_memory_that_is_shared_and_changed_is_said() -> None:
    base = torch.zeros(4)
    first, second = base[:2], base[2:]
    with torch.no_grad(), Tape() as tape:
        (first + second).add_(1)
        assert not tape.problem
        first.add_(second)
    assert tape.problem == "tensors that share memory are changed in place"


def test_a_tensor_elsewhere_is_said() -> None:
    with torch.no_grad(), Tape() as tape:
        torch.ones(3, device="meta") + 1
    assert tape.problem == "a tensor on meta (torch.strided)"


def test_a_tape_that_cannot_be_played_keeps_nothing_more() -> None:
    with torch.no_grad(), Tape() as tape:
        far = torch.ones(3, device="meta")
        count, held = len(tape.operations), len(tape.outside)
        made = far.add_(1) + X[0, 0]
    assert made.device.type == "meta"
    assert (len(tape.operations), len(tape.outside)) == (count, held)
    assert tape.number(made) is None


def test_a_dead_tensors_place_is_another_tensors() -> None:
    """Numbers go by where an object is, and a place is given again."""
    with torch.no_grad(), Tape() as tape:
        total = torch.zeros(8)
        for factor in range(200):
            total = total + X[0] * factor  # the product dies here
    content = {"operations": tape.operations, "outside": tape.outside, "outputs": {}}
    number = tape.number(total)
    assert number is not None
    assert torch.equal(play({**content, "outputs": {"out": number}})["out"], total)


def test_what_an_operation_costs_does_not_grow_with_the_tape() -> None:
    """Changes in place look for what shares their memory: once among all would be quadratic."""
    inputs = [torch.full((2,), float(at)) for at in range(400)]

    def run(count: int) -> int:
        def changed() -> None:
            with torch.no_grad(), Tape():
                for tensor in inputs[:count]:
                    (tensor + 1).add_(1)

        return calls_inside(changed, "truestep")

    run(10)
    assert run(400) <= 40 * run(10)
