"""What is wrong beside the first module, why, and whether that is all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from truestep.pairing.partners import Partners, partners_of
from truestep.replay import further
from truestep.replay.drill import Subject, drill
from truestep.verdict import Divergence

X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def found(change: Callable[[Any], Any], *, ours: Any = None, blocks: int = 4) -> Divergence:
    ours, theirs = ours or Net(blocks), Net(blocks)
    change(ours)
    drilled = drill(
        Subject(ours, lambda: ours(X)),
        Subject(theirs, lambda: theirs(X)),
        place=(0, "main"),
        explain=True,
    )
    assert drilled.divergence is not None
    assert not any(m._forward_hooks for m in [*ours.modules(), *theirs.modules()])
    return drilled.divergence


def two(net: Net) -> None:
    net.blocks[1].down.bias.data.zero_()
    net.blocks[3].norm.eps = 1e-1


def test_a_second_fault_is_found_and_explained_and_both_are_all() -> None:
    place = found(two)
    assert place.fqn == "blocks.1.down"
    assert [each.fqn for each in place.also] == ["blocks.3.norm"]
    cause = place.also[0].cause
    assert cause is not None
    assert "0.1" in cause.text
    assert place.recheck is not None
    assert (place.recheck.passed, place.recheck.modules) == (True, 2)
    assert place.recheck.error_after < place.recheck.error_before


def test_one_fault_in_every_block_is_one_cause() -> None:
    def eps(net: Net) -> None:
        for block in net.blocks:
            block.norm.eps = 1e-2  # type: ignore[union-attr, assignment]

    place = found(eps)
    assert place.cause is not None
    assert [each.fqn for each in place.also] == [f"blocks.{at}.norm" for at in (1, 2, 3)]
    assert {each.cause.kind for each in place.also if each.cause} == {place.cause.kind}
    assert all(each.cause is not None for each in place.also)
    assert place.recheck is not None
    assert place.recheck.passed


def test_a_fault_alone_has_nothing_beside_it() -> None:
    def one(net: Net) -> None:
        net.blocks[2].up.weight.data.mul_(1.5)  # type: ignore[union-attr, operator]

    place = found(one)
    assert place.also == ()
    assert place.recheck is not None
    assert (place.recheck.passed, place.recheck.modules) == (True, 1)


def test_what_is_wrong_between_modules_too_is_not_all() -> None:
    def between(net: Net) -> None:
        net.blocks[0].up.weight.data.mul_(1.5)  # type: ignore[union-attr, operator]
        plain = net.blocks[3].forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            return plain(x) + 0.1 * net.blocks[2].norm(x)

        net.forward = lambda x: net.out(1.5 * blocks(net, x))  # type: ignore[assignment]

    def blocks(net: Net, x: torch.Tensor) -> torch.Tensor:
        for block in net.blocks:
            x = block(x)
        return x

    place = found(between)
    assert place.fqn == "blocks.0.up"
    assert place.recheck is not None
    assert not place.recheck.passed
    assert place.recheck.error_after > 0.1
    assert place.recheck.ratio is not None
    assert place.recheck.ratio > 100


def test_a_module_that_runs_twice_is_answered_call_by_call() -> None:
    class Twice(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.blocks[0](self.blocks[1](self.blocks[0](x))))

    ours, theirs = Twice(2), Twice(2)
    ours.blocks[0].down.weight.data.mul_(1.5)
    drilled = drill(
        Subject(ours, lambda: ours(X)),
        Subject(theirs, lambda: theirs(X)),
        place=(0, "main"),
        explain=True,
    )
    assert drilled.divergence is not None
    assert drilled.divergence.fqn == "blocks.0.down"
    assert drilled.divergence.also == ()
    assert drilled.divergence.recheck is not None
    assert drilled.divergence.recheck.error_after == 0.0


class Attention(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(8, 24)
        else:
            self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Attending(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.attn, self.other = Attention(fused=fused), Attention(fused=fused)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.attn(x))


def pair() -> tuple[Attending, Attending, Partners]:
    torch.manual_seed(3)
    theirs, ours = Attending(fused=False), Attending(fused=True)
    for name in ("attn", "other"):
        apart, together = getattr(theirs, name), getattr(ours, name)
        parts = [apart.to_q, apart.to_k, apart.to_v]
        together.qkv.weight.data = torch.cat([p.weight.data for p in parts])
        together.qkv.bias.data = torch.cat([p.bias.data for p in parts])
    partners = partners_of(ours, theirs)
    assert partners is not None
    return ours, theirs, partners


@pytest.mark.parametrize("rows", [slice(8, 16), slice(0, 24)], ids=["one part", "all parts"])
def test_a_part_of_a_fused_module_is_answered_for(rows: slice) -> None:
    ours, theirs, partners = pair()
    ours.other.qkv.weight.data[rows] *= 1.5
    drilled = drill(
        Subject(ours, lambda: ours(X)),
        Subject(theirs, lambda: theirs(X)),
        place=(0, "main"),
        partners=partners,
        explain=True,
    )
    assert drilled.divergence is not None
    recheck = drilled.divergence.recheck
    assert recheck is not None
    assert recheck.passed
    assert recheck.modules == (1 if rows.start else 3)


def test_of_many_only_some_are_opened_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(further, "MOST_OPENED", 2)
    forwards = 0

    def eps(net: Net) -> None:
        def count(*_: Any) -> None:
            nonlocal forwards
            forwards += 1

        net.register_forward_pre_hook(count)
        for block in net.blocks:
            block.norm.eps = 1e-2  # type: ignore[union-attr, assignment]

    ours = Net(8)
    place = found(eps, ours=ours, blocks=8)
    names = [each.fqn for each in place.also]
    assert names == ["blocks.1.norm", "blocks.2.norm", *(f"blocks.{at}" for at in range(3, 8))]
    assert [each.cause is not None for each in place.also] == [True] * 2 + [False] * 5
    assert place.recheck is not None
    assert place.recheck.passed
    assert forwards <= 12


def test_a_module_that_is_not_called_has_no_recheck() -> None:
    def skipped(net: Net) -> None:
        net.forward = lambda x: net.out(net.blocks[0](net.blocks[2](x)))  # type: ignore[assignment]

    place = found(skipped)
    assert place.recheck is None
    assert place.also == ()


class Timed(nn.Module):
    """Adds waves of a time to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        waves = t * (torch.arange(8.0) + 1)
        return self.up(x + waves.sin())


class Quartered(Timed):
    """A port that quarters the time: of a time of 4, that is as if there were none."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x, t / 4)


def test_a_cause_has_to_hold_at_another_step_too() -> None:
    ours, theirs = Quartered(), Timed()

    def sides(t: float) -> tuple[Subject, Subject]:
        time = torch.tensor(t)
        return Subject(ours, lambda: ours(X, time)), Subject(theirs, lambda: theirs(X, time))

    def told(other: float | None) -> str:
        again = (lambda: (*sides(other), (1, "main"))) if other is not None else None
        drilled = drill(*sides(4.0), place=(0, "main"), explain=True, again=again)
        assert drilled.divergence is not None
        cause = drilled.divergence.cause
        return cause.text if cause is not None else ""

    assert told(None).startswith("the first factor is left out: `waves = t")
    assert told(4.0) == told(None)
    assert told(3.0) == ""


def test_a_leaf_inside_of_a_block_whose_own_code_is_wrong_is_told_too() -> None:
    class Other(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    def both(net: Net) -> None:
        net.blocks[2].__class__ = Other
        net.blocks[2].up.bias.data += 0.3  # type: ignore[union-attr, operator]

    place = found(both)
    assert "blocks.2" in (place.fqn or "")
    names = {place.fqn, *(each.fqn for each in place.also)}
    assert "blocks.2.up" in names
    if place.fqn == "blocks.2":
        assert place.recheck is not None
        assert place.recheck.whole == ("blocks.2",)


def test_a_fault_of_a_later_step_alone_is_not_rechecked_away() -> None:
    class Late(Net):
        late = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1.1 if self.late else 1.0)

    ours, theirs = Late(), Net()
    ours.blocks[1].up.weight.data.mul_(1.5)

    def sides(late: bool) -> tuple[Subject, Subject]:
        def run() -> None:
            ours.late = late
            ours(X)

        return Subject(ours, run), Subject(theirs, lambda: theirs(X))

    drilled = drill(
        *sides(False),
        place=(0, "main"),
        explain=True,
        again=lambda: (*sides(True), (1, "main")),
    )
    assert drilled.divergence is not None
    assert drilled.divergence.recheck is not None
    assert not drilled.divergence.recheck.passed


def test_what_hangs_on_the_forward_before_is_not_rechecked() -> None:
    class Cached(nn.Linear):
        kept: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = super().forward(x)
            before, self.kept = self.kept, made
            return made if before is None else before

    def cached(net: Net) -> None:
        net.blocks[1].up.__class__ = Cached  # type: ignore[union-attr]

    ours, theirs = Net(), Net()
    cached(ours)
    drilled = drill(
        Subject(ours, lambda: ours(X)),
        Subject(theirs, lambda: theirs(X)),
        place=(0, "main"),
        explain=True,
    )
    recheck = drilled.divergence.recheck if drilled.divergence is not None else None
    assert recheck is None or recheck.error_before > 0


def test_a_weight_that_is_wrong_at_both_steps_is_told_as_at_one() -> None:
    def zeroed(net: Net) -> None:
        net.blocks[1].down.bias.data.zero_()  # type: ignore[union-attr, operator]

    ours, theirs = Net(), Net()
    zeroed(ours)

    def sides(x: torch.Tensor) -> tuple[Subject, Subject]:
        return Subject(ours, lambda: ours(x)), Subject(theirs, lambda: theirs(x))

    def told(again: bool) -> str:
        other = (lambda: (*sides(2 * X), (1, "main"))) if again else None
        drilled = drill(*sides(X), place=(0, "main"), explain=True, again=other)
        assert drilled.divergence is not None
        assert drilled.divergence.cause is not None
        return drilled.divergence.cause.text

    assert "is 0 everywhere" in told(False)
    assert told(True) == told(False)
