"""Hypotheses are accepted only where they explain what was given, and said with their values."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from truestep.explanations import Cause
from truestep.measure.quantisers import QUANTISERS
from truestep.replay.causes import weights
from truestep.replay.causes.finding import MOST_TRIED, causes_of, most_tried
from truestep.replay.causes.weights import relation
from truestep.replay.drill import Subject, drill
from truestep.replay.further import Sides
from truestep.verdict import Divergence

Tensor = torch.Tensor


class Attention(nn.Module):
    """Queries and keys are normalised, as in video transformers."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(size, size) for _ in range(3))
        self.to_out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.norm(self.to_q(x)), self.to_k(x), self.to_v(x)
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value)]
        made = functional.scaled_dot_product_attention(query=split[0], key=split[1], value=split[2])
        out: Tensor = self.to_out(made.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """A block with modulation, attention and a feed-forward."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size, eps=1e-6)
        self.attention = Attention(size, heads)
        self.widen, self.act, self.narrow = (
            nn.Linear(size, 2 * size), nn.GELU(approximate="tanh"), nn.Linear(2 * size, size)
        )  # fmt: skip
        self.table = nn.Parameter(torch.randn(1, 3, size))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale, gate = (self.table + temb).chunk(3, dim=1)
        x = x + self.attention(self.norm(x) * (1 + scale) + shift) * gate
        return x + self.narrow(self.act(self.widen(x)))


class Model(nn.Module):
    """Two blocks."""

    def __init__(self, size: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.gains = (1.0, 2.0)
        self.offset = nn.Parameter(torch.linspace(0.5, 1.5, size))
        self.blocks = nn.ModuleList(Block(size, heads) for _ in range(2))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = x * self.gains[0] + self.offset * self.gains[1]
        for block in self.blocks:
            x = block(x, temb)
        return x


@pytest.fixture(scope="module")
def trusted() -> Model:
    torch.manual_seed(0)
    return Model()


def block(model: Model) -> Any:
    return model.blocks[1]


def found(trusted: Model, change: Callable[[Any], Any]) -> tuple[Divergence, Cause | None]:
    """What is named of a changed copy, and why."""
    candidate = deepcopy(trusted)
    with torch.no_grad():
        change(candidate)
    generator = torch.Generator().manual_seed(1)
    x, temb = (torch.randn(*s, generator=generator) for s in ((2, 6, 32), (2, 3, 32)))
    sides = [Subject(m, lambda m=m: m(x.clone(), temb)) for m in (candidate, trusted)]  # type: ignore[misc]
    before = {name: value.clone() for name, value in trusted.state_dict().items()}
    drilled = drill(*sides, place=(0, "main"), explain=True)
    assert drilled.divergence is not None
    after = trusted.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trusted.modules())
    return drilled.divergence, drilled.divergence.cause


def scaled(module: Any) -> Any:
    module.weight.mul_(1.5)


def swapped_rows(linear: Any) -> None:
    linear.weight.copy_(torch.cat([linear.weight[16:], linear.weight[:16]]))


def gate_left_out(model: Model) -> None:
    def forward(x: Tensor, temb: Tensor) -> Tensor:
        at = block(model)
        shift, scale, _ = (at.table + temb).chunk(3, dim=1)
        x = x + at.attention(at.norm(x) * (1 + scale) + shift)
        out: Tensor = x + at.narrow(at.act(at.widen(x)))
        return out

    block(model).forward = forward


def parts_exchanged(model: Model) -> None:
    def forward(x: Tensor, temb: Tensor) -> Tensor:
        at = block(model)
        scale, shift, gate = (at.table + temb).chunk(3, dim=1)
        x = x + at.attention(at.norm(x) * (1 + scale) + shift) * gate
        out: Tensor = x + at.narrow(at.act(at.widen(x)))
        return out

    block(model).forward = forward


def residual_left_out(model: Model) -> None:
    def forward(x: Tensor, temb: Tensor) -> Tensor:
        at = block(model)
        shift, scale, gate = (at.table + temb).chunk(3, dim=1)
        x = x + at.attention(at.norm(x) * (1 + scale) + shift) * gate
        out: Tensor = at.narrow(at.act(at.widen(x)))
        return out

    block(model).forward = forward


def attention_as(**options: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        at = block(model).attention

        def forward(x: Tensor) -> Tensor:
            query, key, value = at.norm(at.to_q(x)), at.to_k(x), at.to_v(x)
            split = [t.unflatten(-1, (at.heads, -1)).transpose(1, 2) for t in (query, key, value)]
            made = functional.scaled_dot_product_attention(*split, **options)
            out: Tensor = at.to_out(made.transpose(1, 2).flatten(2))
            return out

        at.forward = forward

    return change


ROOT_OF_8 = 8**-0.5
FAULTS: dict[str, tuple[Callable[[Any], Any], str, str, str]] = {
    "epsilon": (
        lambda m: setattr(block(m).norm, "eps", 1e-3), "blocks.1.norm", "epsilon",
        "`blocks.1.norm.eps` is 0.001, the reference's 1e-06"),
    "activation": (
        lambda m: setattr(block(m).act, "approximate", "none"), "blocks.1.act", "activation",
        "`blocks.1.act.approximate` is 'none', the reference's 'tanh'"),
    "another activation": (
        lambda m: setattr(block(m), "act", nn.SiLU()), "blocks.1.act", "activation",
        "`blocks.1.act` is SiLU, the reference's GELU"),
    "a tuple": (
        lambda m: setattr(m, "gains", (1.0, 1.9)), "(root)", "attribute",
        "`gains` is (1.0, 1.9), the reference's (1.0, 2.0)"),
    "of the whole": (
        lambda m: m.offset.mul_(0.97), "(root)", "scaled",
        "`offset` is 0.97 times the reference's"),
    "bias": (
        lambda m: block(m).narrow.bias.zero_(), "blocks.1.narrow", "bias missing",
        "`blocks.1.narrow.bias` is 0 everywhere"),
    "scale": (
        lambda m: scaled(block(m).widen), "blocks.1.widen", "scaled",
        "`blocks.1.widen.weight` is 1.5 times the reference's"),
    "rows": (
        lambda m: swapped_rows(block(m).attention.to_v), "blocks.1.attention.to_v", "permuted",
        "`blocks.1.attention.to_v.weight` has 0-15 and 16-31 exchanged along axis 0"),
    "transposed": (
        lambda m: block(m).attention.to_k.weight.copy_(block(m).attention.to_k.weight.T.clone()),
        "blocks.1.attention.to_k", "transposed", "has its axes 0 and 1 exchanged"),
    "another": (
        lambda m: block(m).attention.to_q.load_state_dict(m.blocks[0].attention.to_q.state_dict()),
        "blocks.1.attention.to_q", "exchanged",
        "`blocks.1.attention.to_q.weight` is the reference's `blocks.0.attention.to_q.weight`"),
    "no norm": (
        lambda m: setattr(block(m).attention.norm, "forward", lambda x: x),
        "blocks.1.attention.norm", "left out", "returns what it is given"),
    "gate": (gate_left_out, "blocks.1", "factor missing", "the second factor is left out: `x = x"),
    "order": (
        parts_exchanged, "blocks.1", "order", "parts 0 and 1 of the split are exchanged: `shift"),
    "residual": (
        residual_left_out, "blocks.1", "addend missing", "the first addend is left out: `return x"),
    "scores": (
        attention_as(scale=1.0), "blocks.1.attention", "attention scale",
        "scores are not divided by the root of the head size"),
    "scores a little": (
        attention_as(scale=1.07 * ROOT_OF_8), "blocks.1.attention", "attention scale",
        "scores are 1.07 times the reference's"),
    "causal": (
        attention_as(is_causal=True), "blocks.1.attention", "causal", "attention is causal"),
    "output": (
        lambda m: block(m).register_forward_hook(lambda mod, a, o: o.bfloat16().float()),
        "blocks.1", "precision", "what `blocks.1` returns is rounded to bfloat16"),
    "places": (
        lambda m: block(m).norm.register_forward_hook(lambda mod, a, o: o[:, [1, 0, 2, 3, 5, 4]]),
        "blocks.1.norm", "order", "has along axis 1 the reference's places 1 0 2 3 5 4"),
    "twice": (
        lambda m: block(m).register_forward_hook(lambda mod, a, o: mod.forward(o, *a[1:])),
        "blocks.1", "repeated", "`blocks.1` runs twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_was_planted_is_said_with_its_values(name: str, trusted: Model) -> None:
    change, fqn, kind, text = FAULTS[name]
    divergence, cause = found(trusted, change)
    assert divergence.fqn == fqn
    assert cause is not None
    assert cause.kind == kind
    assert text in cause.text
    assert cause.error_after <= 0.1 * cause.error_before


@pytest.mark.parametrize(
    "odd",
    [
        lambda output: output + 0.05 * output.sin(),
        lambda output: output * torch.linspace(0.9, 1.1, output.shape[-1]),
        lambda output: output + 0.1 * output.flip(1),
    ],
)
def test_what_nothing_explains_is_not_explained(
    trusted: Model, odd: Callable[[Tensor], Tensor]
) -> None:
    def change(model: Any) -> None:
        block(model).register_forward_hook(lambda m, a, o: odd(o))

    divergence, cause = found(trusted, change)
    assert divergence.fqn == "blocks.1"
    assert cause is None


def test_a_slow_module_is_not_run_a_thousand_times() -> None:
    assert most_tried(1e-3) == MOST_TRIED
    assert most_tried(60.0) == 10
    assert most_tried(1e6) == 1


def test_of_a_large_module_only_its_own_weights_are_compared(
    trusted: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward_and_table(model: Any) -> None:
        block(model).table.mul_(2.0)

    assert found(trusted, forward_and_table)[1].kind == "scaled"  # type: ignore[union-attr]
    monkeypatch.setattr(weights, "LARGEST", 0)
    seen: list[str] = []
    monkeypatch.setattr(weights, "relation", lambda name, *_: seen.append(name) or _SCALED)
    found(trusted, forward_and_table)
    assert seen == ["table"]


_SCALED = weights.Relation("scaled", "is another")


def test_a_place_without_a_module_has_no_cause(trusted: Model) -> None:
    side = Subject(trusted, lambda: None)
    assert causes_of(["nowhere"], Sides(side, side, None, (0, "main"))) == [(None, 0)]


def related(change: Callable[[Tensor], Tensor], *, shape: tuple[int, ...] = (16, 16)) -> str:
    reference = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    other = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    return relation("a.weight", change(reference), reference, {"b.weight": other}).kind


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (torch.zeros_like, "not loaded"),
        (lambda w: -w, "scaled"),
        (lambda w: w + 0.25, "offset"),
        (lambda w: w + torch.eye(16)[0, :, None], "one plus"),
        (lambda w: w.T.clone(), "transposed"),
        (lambda w: w[torch.randperm(16, generator=torch.Generator().manual_seed(0))], "permuted"),
        (lambda w: w.bfloat16().float(), "precision"),
        (lambda w: QUANTISERS["int8"](w).values, "quantised"),
        (lambda w: torch.randn(16, 16, generator=torch.Generator().manual_seed(3)), "exchanged"),
        (lambda w: w + torch.outer(w[0], w[:, 1]), "low rank"),
        (lambda w: QUANTISERS["gguf:Q4_0"](w.reshape(-1, 32)).values.reshape(w.shape), "quantised"),
        (lambda w: w * (torch.arange(16) != 3)[:, None], "some slices"),
        (lambda w: torch.cat([w[:12], w[:4]]), "some slices"),
        (lambda w: torch.cat([w[:, :14], 0.5 * w[:, 14:]], 1), "some slices"),
        (lambda w: w.rot90(1, (0, 1)), "turned"),
        (lambda w: w.rot90(-1, (0, 1)), "turned"),
        (lambda w: w.flip(1), "flipped"),
        (lambda w: w.flip(0, 1), "flipped"),
        (lambda w: w * (w.abs() > w.abs().median()), "zeroed"),
        (
            lambda w: (
                0.5 * w + 0.5 * torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
            ),
            "blended",
        ),
        (lambda w: w + 0.02 * w.sin() * w.flip(0), "another state"),
        (lambda w: w.flip(0).sin() * w.flip(1), "another tensor"),
    ],
)
def test_how_a_weight_follows_from_the_references(
    change: Callable[[Tensor], Tensor], kind: str
) -> None:
    assert related(change) == kind


class Counting(nn.Linear):
    """A module that writes on itself: a counter, a running mean, a table in the precision it is
    asked in."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.calls = 0
        self.table = torch.linspace(0.1, 1.0, 32)
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)  # type: ignore[operator]
        if self.table.dtype != x.dtype:
            self.table = self.table.to(x.dtype)
        return super().forward(x) * self.table

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def test_what_a_module_writes_on_itself_is_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Counting())
    scene_module = model[0]
    from truestep.replay.causes.scene import untouched

    before = scene_module.table.clone()
    with untouched(scene_module), torch.no_grad():
        scene_module.to(torch.bfloat16)(torch.randn(1, 2, 32).bfloat16())
        scene_module.to(torch.float32)
    assert scene_module.calls == 0
    assert scene_module.table.dtype == torch.float32
    assert torch.equal(scene_module.table, before)
    assert not scene_module.mean.any()


def test_code_that_nobody_knows_ends_no_check(trusted: Model) -> None:
    class Odd:
        model = trusted
        before = None

        def forward(self) -> None:
            raise RuntimeError("odd")

    sides: Any = Sides(Odd(), Odd(), None, (0, "main"))  # type: ignore[arg-type]
    assert causes_of(["blocks.0"], sides) == [(None, 0)]
