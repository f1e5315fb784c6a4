"""The parts of which a training step's check is made: nests, anchors, graphs, hypotheses."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands import runner
from tests.documents import BLOCK, ROOT
from truestep.training.anchors import anchored, anchors_of
from truestep.training.locating import holders
from truestep.training.names import call_name, recorded_calls
from truestep.training.nests import Arguments, exchanged, matched, outputs
from truestep.training.optimizers import Steps, explained
from truestep.training.pulling import nodes_of
from truestep.training.step import said_otherwise
from truestep.training.unchecked import without_checkpointing

Tensor = torch.Tensor
Pair = namedtuple("Pair", "first second")


@dataclass
class Held:
    sample: Tensor
    text: str = "kept"


NESTS = st.recursive(
    st.integers(1, 3).map(torch.ones),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["a", "b.c", "d/e"]), inner, min_size=1),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        inner.map(lambda value: Held(value)),
        inner.map(lambda value: OrderedDict(x=value, y=None)),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(NESTS)
def test_a_nest_with_other_tensors_has_the_same_make_and_paths(nest: Any) -> None:
    before = outputs(nest)
    other = exchanged(nest, lambda path, tensor: tensor + len(path))
    after = outputs(other)
    assert list(after) == list(before)
    assert type(other) is type(nest)
    for path, tensor in before.items():
        assert torch.equal(after[path], tensor + len(path))
        assert torch.equal(tensor, torch.ones_like(tensor)), "the nest itself is as it was"


def test_arguments_have_the_names_of_the_forward_however_they_are_given() -> None:
    class Module(torch.nn.Module):
        def forward(self, hidden: Tensor, scale: Tensor, flag: bool = False) -> Tensor:
            return hidden * scale

    one, two = torch.ones(2), torch.full((2,), 2.0)
    module = Module()
    for given_as in (
        Arguments(module, (one, two), {}),
        Arguments(module, (one,), {"scale": two}),
        Arguments(module, (), {"scale": two, "hidden": one, "flag": True}),
    ):
        assert sorted(given_as.tensors()) == ["in.hidden", "in.scale"]
        moved = given_as.exchanged(lambda path, tensor: 3 * tensor)
        assert torch.equal(moved.call(module), torch.full((2,), 18.0))


def test_paths_are_paired_by_name_then_by_order_and_shape() -> None:
    own = {"in.x": torch.ones(2), "in.t": torch.ones(1), "in.more": torch.ones(5)}
    recorded = {"in.input": torch.ones(2), "in.t": torch.ones(1)}
    assert matched(own, recorded) == {"in.t": "in.t", "in.x": "in.input"}


def test_what_is_noise_is_judged_beside_its_neighbours() -> None:
    name = "module/a/0/backward/w.bias"
    other = "module/a/0/backward/w.weight"
    recorded = {other: torch.randn(8), name: 1e-8 * torch.randn(8)}
    benign = {other: recorded[other] * (1 + 1e-7), name: 1e-8 * torch.randn(8)}
    anchors = anchors_of(recorded, [benign])
    assert list(anchors) == [name]
    assert anchors[name] == pytest.approx(float(recorded[other].square().mean().sqrt()))
    judged = anchored(recorded, recorded, anchors)
    assert judged[name].shape == (16,)
    assert judged[other].shape == (10,)
    odd = anchored({name: torch.ones(3)}, recorded, anchors)
    assert odd[name].shape == (3,), "another shape stays as it is, and is told"


def test_calls_are_read_as_they_are_named() -> None:
    key = ("blocks.0", 1)
    tensors = {
        call_name("given", key, "in.x"): torch.ones(1),
        call_name("pulled", key, "out.0"): torch.ones(2),
        call_name("random", key): torch.ones(3),
    }
    found = recorded_calls(tensors, {"blocks.0/1": ["in.x"], "out/0": []})
    assert set(found) == {key, ("out", 0)}
    assert found[key].wants == {"in.x"}
    assert found[key].random is not None
    assert not found["out", 0].given


def test_modules_around_a_module_are_all_that_may_be_called() -> None:
    assert holders("blocks.0.feed.1") == ["blocks.0.feed", "blocks.0", "blocks", "(root)"]
    assert holders("(root)") == []


def test_the_kinds_of_a_graph_and_where_an_own_one_is_written() -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    x = torch.ones(2, requires_grad=True)
    counts, custom = nodes_of([Own.apply(x.exp()) + x.exp()])
    assert counts == {"AddBackward0": 1, "OwnBackward": 1, "ExpBackward0": 2}
    assert custom["OwnBackward"].startswith("test_training_parts.py:")


def test_checkpointing_is_left_out_and_put_back() -> None:
    from torch.utils.checkpoint import checkpoint

    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp()

    def backward(reentrant: bool) -> int:
        calls.clear()
        x = torch.ones(2, requires_grad=True)
        checkpoint(function, x, use_reentrant=reentrant).sum().backward()
        assert x.grad is not None
        return len(calls)

    for reentrant in (True, False):
        with without_checkpointing():
            assert backward(reentrant) == 1
        assert backward(reentrant) == 2


ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def stepped(seed: int, step: Callable[..., Any], count: int = 4) -> Steps:
    """Steps of an optimiser from an empty state, beside AdamW's.

    Args:
        step: Called with a weight, a gradient, a state and the step's number; changes the weight.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 8, generator=generator).double()
    sizes = 10.0 ** (-6 * torch.rand(count, 8, 8, generator=generator, dtype=torch.float64))
    gradients = [*(torch.randn(8, 8, generator=generator, dtype=torch.float64) * s for s in sizes)]
    sides = []
    for how in (step, adam()):
        held, state, added = weight.clone(), {}, []
        for number, gradient in enumerate(gradients, start=1):
            before = held.clone()
            how(held, gradient.clone(), state, number)
            added.append(held - before)
        sides.append(added)
    return Steps(weight, gradients, *sides)


def adam(**changes: Any) -> Callable[..., Any]:
    """A step of AdamW as it is often written by hand, one line of it exchanged."""
    o = {**ADAM, "coupled": 0, "late": 0, "unscaled": 0, "outside": 0, "nesterov": 0, **changes}

    def step(w: Tensor, g: Tensor, state: dict[str, Tensor], number: int) -> None:
        (b1, b2), lr, decay = o["betas"], o["lr"], o["weight_decay"]
        g = g + decay * w if o["coupled"] else g
        m = b1 * state.get("m", torch.zeros_like(w)) + (1 - b1) * g
        v = b2 * state.get("v", torch.zeros_like(w)) + (1 - b2) * g * g
        kept = o.get("state", torch.float64)
        state["m"], state["v"] = m.to(kept).double(), v.to(kept).double()
        m, v = state["m"], state["v"]
        c1, c2 = 1 - b1**number, 1 - b2**number
        m = b1 * m + (1 - b1) * g if o["nesterov"] else m
        eps = o["eps"] / c2**0.5 if o["outside"] else o["eps"]
        factor = 1 - decay * (1 if o["unscaled"] else lr)
        if not o["late"] and not o["coupled"]:
            w.mul_(factor)
        w.sub_(lr * (m / c1) / ((v / c2).sqrt() + eps))
        if o["late"]:
            w.mul_(factor)

    return step


SAID = {"optimizer": "AdamW", **{key: str(value) for key, value in ADAM.items()}}

PLANTED = [
    ({"lr": 2e-3}, "learning rate 0.002 (was 0.001)"),
    ({"lr": 1.37e-3}, "learning rate 0.00137 (was 0.001)"),
    ({"weight_decay": 0.0}, "no weight decay"),
    ({"late": 1}, "weight decay is of the weight after the step"),
    ({"unscaled": 1}, "weight decay is not multiplied by the learning rate"),
    ({"coupled": 1}, "weight decay goes through the moments (L2), and should not"),
    ({"outside": 1}, "epsilon beside the root before its bias correction"),
    ({"nesterov": 1}, "Nesterov's look ahead"),
    ({"state": torch.bfloat16}, "moments kept in bfloat16"),
    ({"betas": (0.9, 0.95)}, "betas (0.9, 0.95) (was (0.9, 0.99))"),
    ({"eps": 1e-6}, "epsilon 1e-06 (was 1e-08)"),
]


@pytest.mark.parametrize(("changes", "text"), PLANTED)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_what_an_optimiser_does_not_say_is_found_in_its_steps(
    changes: dict[str, Any], text: str, seed: int
) -> None:
    assert explained({"w": stepped(seed, adam(**changes))}, SAID) == [text]


def test_a_change_as_small_as_rounding_is_explained_where_the_formula_is_as_near() -> None:
    def rounded(step: Callable[..., Any]) -> Callable[..., Any]:
        def kept(w: Tensor, g: Tensor, state: dict[str, Tensor], number: int) -> None:
            narrow = w.float()
            step(narrow, g, state, number)
            w.copy_(narrow)

        return kept

    def planted(**changes: Any) -> Steps:
        own = stepped(1, rounded(adam(**changes)))
        right = stepped(1, rounded(adam()))
        return replace(own, recorded=right.own, dtype=torch.float32)

    late = explained({"w": planted(late=1)}, SAID)
    assert late == ["weight decay is of the weight after the step"]
    assert explained({"w": planted()}, SAID) == [], "rounding alone is no cause"


def test_steps_that_nothing_explains_are_not_explained() -> None:
    def signs(w: Tensor, g: Tensor, state: object, number: int) -> None:
        w.sub_(1e-3 * g.sign() * torch.arange(8))

    assert explained({"w": stepped(0, signs)}, SAID) == []
    right = stepped(0, adam(lr=2e-3))
    assert explained({"w": right}, {"optimizer": "SGD", "lr": "0.1"}) == []
    assert explained({"w": right}, None) == []
    assert explained({}, SAID) == []
    other = {**SAID, "lr": "0.5"}
    assert explained({"w": right}, other) == [], "what was recorded is not by what it says"


def test_hyper_parameters_that_one_side_does_not_say_are_not_compared() -> None:
    own = [{"optimizer": "Own", "lr": "0.1"}]
    theirs = [{"optimizer": "AdamW", "lr": "0.2", "eps": "1e-8"}]
    assert list(said_otherwise(own, theirs)) == [
        ("optimizer", "Own", "AdamW"),
        ("lr", "0.1", "0.2"),
    ]
    assert list(said_otherwise(own, [])) == [("parameter groups", "1", "0")]


def test_the_verb_records_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = runner(monkeypatch, capfd)
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    code = next(block["text"] for block in BLOCK.finditer(text) if block["language"] == "python")
    (tmp_path / "steps.py").write_text(code)
    assert run("training", "record", "steps.py:trusted")[0] == 0
    ended, out, _ = run("training", "check", "steps.py:trusted")
    assert ended == 0
    assert out.startswith("PASSED identical")
    ended, out, _ = run("training", "check", "steps.py:fused", "--json")
    assert ended == 1
    first = json.loads(out)["comparisons"][0]["first_divergence"]
    assert (first["stage"], first["fqn"]) == ("backward", "1")
    ended, out, _ = run("training", "check", "steps.py:fused", "--brief", "--json", "all.json")
    assert ended == 1
    assert json.loads(out)["verdict"] == "drifted"
    ended, out, _ = run("training", "check", "steps.py:fused", "--report", "report.html", "-v")
    assert ended == 1
    assert "FusedNormBackward (steps.py:" in out
    assert (tmp_path / "report.html").stat().st_size > 0
    ended, _, err = run("training", "check", "steps.py:fused", "nosuch.safetensors")
    assert ended == 2
    assert "nosuch.safetensors" in err
