"""Which layers a quantisation costs most in: estimates beside the truth, and what a list buys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from tests.commands import CASE, Run, runner
from truestep.case import Case
from truestep.errors import UsageError
from truestep.experiment import sensitivity as module
from truestep.experiment.sensitivity import foremost, score_of, sensitivity, worth_keeping
from truestep.experiment.sensitivity_records import Sensitivity
from truestep.report.sensitivity import keep_list, write_list
from truestep.runtime.loading import load
from truestep.runtime.quantising import instead, layers_of, quantised


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **tiny_case)


@pytest.fixture(scope="module")
def exact(case: Case) -> Sensitivity:
    return sensitivity(case, change="gguf:Q4_0", exact=True)


def test_estimates_rank_layers_as_the_truth_does(
    case: Case, exact: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFINED", 0)
    found = sensitivity(case, change="gguf:Q4_0", probes=16)
    assert not any(layer.exact for layer in found.layers)
    own = {layer.name: layer.score for layer in found.layers}
    truth = {layer.name: layer.score for layer in exact.layers}
    assert own.keys() == truth.keys()
    assert spearmanr([own[n] for n in own], [truth[n] for n in own]).statistic > 0.8


def test_the_list_is_within_its_share_and_was_run(exact: Sensitivity) -> None:
    assert exact.kept
    assert exact.kept_bytes <= exact.budget * exact.total_bytes
    assert exact.list_kept.final < exact.nothing_kept.final
    assert exact.exit_code == 0
    assert all(layer.exact for layer in exact.layers)
    assert [layer.score for layer in exact.layers] == sorted(
        (layer.score for layer in exact.layers), reverse=True
    )
    assert {layer.name for layer in exact.layers if layer.kept} == set(exact.kept)


def test_a_function_is_a_change_too_and_what_else_it_does_is_told(case: Case) -> None:
    def change(pipe: Any) -> None:
        pipe.transformer.blocks[0].attn1.to_q.weight.data *= 1.01
        pipe.transformer.proj_out.weight.data *= 1.02
        pipe.transformer.proj_out.bias.data += 1

    found = sensitivity(case, change=change, steps=(0,), budget=0.5, probes=2)
    assert {layer.name for layer in found.layers} == {
        "transformer.blocks.0.attn1.to_q",
        "transformer.proj_out",
    }
    assert found.left_out == ("transformer.proj_out.bias: of no layer of a denoiser",)


def quantised_with(what: Callable[[Any], None]) -> Callable[[Any], None]:
    """A change of one layer's weight, and something else."""

    def change(pipe: Any) -> None:
        pipe.transformer.blocks[0].attn1.to_q.weight.data *= 1.01
        what(pipe)

    return change


def of_class(module: Any, forward: Callable[..., Any]) -> None:
    module.__class__ = type("Other", (type(module),), {"forward": forward})


CODE: dict[str, Callable[[Any], None]] = {
    "a class": lambda pipe: of_class(
        pipe.transformer.patch_embedding, lambda self, x: 1.3 * torch.nn.Conv3d.forward(self, x)
    ),
    "a hook": lambda pipe: pipe.transformer.blocks[0].attn1.to_v.register_forward_hook(
        lambda module, given, made: 1.5 * made
    ),
}


@pytest.mark.parametrize("name", CODE)
def test_code_that_a_change_alters_beside_weights_is_told(name: str, case: Case) -> None:
    change = quantised_with(CODE[name])
    found = sensitivity(case, change=change, steps=(0,), budget=0.5, probes=1)
    assert len(found.left_out) == 1
    assert found.left_out[0].startswith("with every weight put back the end is still")
    twin = quantised_with(lambda pipe: None)
    assert sensitivity(case, change=twin, steps=(0,), budget=0.5, probes=1).left_out == ()


def test_a_layer_of_another_make_is_put_back_too(case: Case) -> None:
    class Packed(torch.nn.Module):
        def __init__(self, of: Any) -> None:
            super().__init__()
            self.register_buffer("packed", (of.weight.detach() * 64).round().clamp(-127, 127))
            self.bias = of.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.packed / 64, self.bias)

    def change(pipe: Any) -> None:
        attention = pipe.transformer.blocks[0].attn1
        attention.to_q = Packed(attention.to_q)

    found = sensitivity(case, change=change, steps=(0,), budget=0.5, probes=1)
    assert [layer.name for layer in found.layers] == ["transformer.blocks.0.attn1.to_q"]
    assert found.left_out == ()


def test_a_change_of_code_that_all_models_share_is_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared(pipe: Any) -> None:
        kind = type(pipe.transformer.blocks[0].attn1.norm_q)
        own = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: 1.1 * own(self, x))

    with pytest.raises(UsageError, match="reaches the trusted model, too"):
        sensitivity(case, change=quantised_with(shared), steps=(0,), budget=0.5, probes=1)


def test_a_layer_of_values_that_are_not_finite_is_named(case: Case) -> None:
    def nan(pipe: Any) -> None:
        pipe.transformer.proj_out.weight.data[0] = float("nan")

    with pytest.raises(UsageError, match="not finite") as raised:
        sensitivity(case, change=quantised_with(nan), steps=(0,), budget=0.5, probes=1)
    assert "transformer.proj_out" in str(raised.value)
    assert "to_q" not in str(raised.value)

    def huge(pipe: Any) -> None:
        pipe.transformer.proj_out.weight.data.fill_(3e38)

    with pytest.raises(UsageError, match="ends in values that are not finite") as raised:
        sensitivity(case, change=quantised_with(huge), steps=(0,), budget=0.5, probes=1)
    assert "transformer.proj_out" in str(raised.value)
    assert "to_q" not in str(raised.value)


def test_what_cannot_be_ranked_is_refused(case: Case) -> None:
    with pytest.raises(UsageError, match="changes no weight"):
        sensitivity(case, change=lambda pipe: None)
    with pytest.raises(UsageError, match="no change 'int9'"):
        sensitivity(case, change="int9")
    with pytest.raises(UsageError, match="no step 9"):
        sensitivity(case, change="int8", steps=(9,))
    with pytest.raises(UsageError, match="between 0 and 1"):
        sensitivity(case, change="int8", budget=1.0)


def test_weights_are_lent_and_given_back(case: Case) -> None:
    pipe = load(case)
    layers = layers_of(pipe)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    made = quantised(layers.values(), "int8")

    def stopped() -> None:
        with instead(layers, made):
            assert any(not torch.equal(before[n], layers[n].weight) for n in layers)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert all(torch.equal(before[n], layers[n].weight) for n in layers)


@given(st.integers(0, 1000), st.floats(0, 40))
def test_a_list_never_takes_more_than_there_is_room_and_never_makes_it_worse(
    seed: int, most: float
) -> None:
    dice = torch.Generator().manual_seed(seed)
    ends = {str(i): torch.randn(6, generator=dice, dtype=torch.float64) for i in range(8)}
    sizes = {name: 1 + i for i, name in enumerate(ends)}
    whole = sum(ends.values(), torch.zeros(6, dtype=torch.float64))
    kept = worth_keeping(whole, ends, sizes, most)
    assert sum(sizes[name] for name in kept) <= most
    left = whole - sum((ends[name] for name in kept), torch.zeros(6, dtype=torch.float64))
    assert float(left.norm()) <= float(whole.norm()) + 1e-9


def test_layers_that_cancel_are_not_kept() -> None:
    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    other = torch.tensor([0.0, 0.5], dtype=torch.float64)
    ends = {"a": 5 * one, "b": -5 * one, "c": other}
    assert worth_keeping(other, ends, {"a": 1, "b": 1, "c": 1}, 1.0) == {"c"}
    assert worth_keeping(other, {"a": 5 * one}, {"a": 1}, 1.0) == frozenset()


def test_the_foremost_are_the_sensitive_and_those_that_are_small() -> None:
    scores = {"large": 1.0, "small": 0.5, "rest": 0.1}
    sizes = {"large": 1000, "small": 1, "rest": 1000}
    assert foremost(scores, sizes, 2) == ["small", "large"]
    assert foremost(scores, sizes, 0) == []


def test_a_score_is_of_all_steps() -> None:
    assert score_of((0.1, 0.2), (1.0, 0.5), 2) == pytest.approx(0.2)
    assert score_of((0.1,), (1.0,), 4) == pytest.approx(0.4)


@pytest.mark.parametrize("name", ["keep.json", "keep.toml"])
def test_the_list_is_written_for_other_tools(exact: Sensitivity, tmp_path: Path, name: str) -> None:
    write_list(exact, tmp_path / name)
    text = (tmp_path / name).read_text()
    found = tomllib.loads(text) if name.endswith("toml") else json.loads(text)
    assert found == keep_list(exact)
    names = found["modules_to_not_convert"]["transformer"]
    assert [f"transformer.{fqn}" for fqn in names] == list(exact.kept)


def test_the_command_line_ranks_and_refuses(
    tiny_wan: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = CASE.format(name="a", model=tiny_wan["wan21"], seed=0)
    (tmp_path / "truestep.toml").write_text(text)
    run: Run = runner(monkeypatch, capsys, "sensitivity")
    words = ("a", "--change", "gguf:Q4_0", "--keep", "20%", "--probes", "2")
    code, out, err = run(*words, "--output", "keep.json", "--json", "found.json")
    assert code in (0, 4), (out, err)
    assert out.startswith(("RANKED gguf:Q4_0: ", "UNDECIDED gguf:Q4_0: "))
    assert "list: keep.json" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["schema_version"] == 1
    for wrong in (("--keep", "2"), ("--keep", "much"), ("--change", "int9")):
        assert run("a", "--change", "int8", *wrong)[0] == 2
