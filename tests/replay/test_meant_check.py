"""`check --meant`: a fault under a quantisation is named, a healthy quantisation is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Run, runner
from truestep.case import Case
from truestep.errors import UsageError
from truestep.explanations import Meant
from truestep.measure.quantisers import QUANTISERS
from truestep.recording.format import Recording
from truestep.replay.check import check
from truestep.replay.record import record_pipeline
from truestep.report.answer import headline
from truestep.runtime.loading import load
from truestep.runtime.quantising import layers_of, quantise
from truestep.verdict import Comparison, Verdict

LAYER = "transformer.blocks.1.ffn.net.2"

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **{**tiny_case, "steps": 2})


@pytest.fixture(scope="module")
def recording(case: Case) -> Recording:
    return record_pipeline(load(case), case=case, floor="steps")


def judged(case: Case, recording: Recording, change: Change, name: str) -> tuple[Comparison, Meant]:
    result = check(case, recording, apply=change, meant=name, steps=(0,))
    assert result.meant is not None
    return result, result.meant


def int8(pipe: Any) -> None:
    quantise(pipe, "int8")


def test_a_healthy_quantisation_is_explained(case: Case, recording: Recording) -> None:
    result, meant = judged(case, recording, int8, "auto")
    assert result.verdict is Verdict.DRIFTED
    assert (meant.outcome, meant.change, meant.faults) == ("explained", "int8", ())
    assert meant.layers > 10
    assert result.exit_code == 0
    assert result.sentence.startswith("drifted, as meant: each of ")
    assert "no fault underneath" in result.sentence


@pytest.mark.parametrize("name", ["int8", "auto"])
def test_two_rows_exchanged_are_named(case: Case, recording: Recording, name: str) -> None:
    def broken(pipe: Any) -> None:
        int8(pipe)
        weight = layers_of(pipe)[LAYER].weight.data
        weight[[2, 5]] = weight[[5, 2]].clone()

    result, meant = judged(case, recording, broken, name)
    assert meant.outcome == "fault"
    assert [fault.module for fault in meant.faults] == [LAYER]
    assert meant.faults[0].kind == "rows 2, 5: 2 is row 5, 5 is row 2"
    assert meant.faults[0].ratio > 10
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == LAYER
    assert result.exit_code == 1
    assert LAYER in result.sentence


def test_a_stale_bias_is_named(case: Case, recording: Recording) -> None:
    def broken(pipe: Any) -> None:
        int8(pipe)
        pipe.transformer.blocks[0].attn1.to_q.bias.data += 0.3

    _, meant = judged(case, recording, broken, "int8")
    fault = meant.faults[0]
    assert (fault.module, fault.tensor) == ("transformer.blocks.0.attn1.to_q", "bias")


def test_a_cast_of_biases_is_no_fault(case: Case, recording: Recording) -> None:
    def cast(pipe: Any) -> None:
        int8(pipe)
        for parameter in pipe.transformer.parameters():
            if parameter.ndim == 1:
                parameter.data = parameter.data.bfloat16().float()

    _, meant = judged(case, recording, cast, "int8")
    assert not meant.faults
    assert meant.outcome == "explained"


def test_code_that_is_wrong_beside_it_is_found_with_the_weights_put_back(
    case: Case, recording: Recording
) -> None:
    def wrong(pipe: Any) -> None:
        int8(pipe)
        pipe.transformer.blocks[1].ffn.net[0].approximate = "none"

    result, meant = judged(case, recording, wrong, "int8")
    assert (meant.outcome, meant.faults) == ("fault", ())
    assert result.first_divergence is not None
    assert (result.first_divergence.fqn or "").startswith("blocks.1.ffn.net.0")
    assert result.exit_code == 1


def test_a_weight_that_is_no_number_is_named(case: Case, recording: Recording) -> None:
    def nan(pipe: Any) -> None:
        int8(pipe)
        layers_of(pipe)[LAYER].weight.data[0, 0] = float("nan")

    result, meant = judged(case, recording, nan, "int8")
    assert meant.faults[0].module == LAYER
    assert result.verdict is Verdict.INVALID
    assert result.exit_code == 1


def test_another_quantiser_than_the_declared_one_is_undecided(
    case: Case, recording: Recording
) -> None:
    result, meant = judged(case, recording, lambda p: quantise(p, "gguf:Q4_0") and None, "int8")
    assert (meant.outcome, meant.faults) == ("undecided", ())
    assert "another change" in meant.text
    assert result.exit_code == 4
    assert headline(result).startswith(
        "UNDECIDED whether as meant: drifted, and a fault in any of "
        f"{meant.layers} changed weights would not have been seen: most of "
    )
    assert result.hint == "truestep check CASE --meant auto"


def test_a_change_that_changed_no_weight_is_undecided(case: Case, recording: Recording) -> None:
    result, meant = judged(case, recording, lambda pipe: None, "int8")
    assert (meant.outcome, meant.layers) == ("undecided", 0)
    assert result.exit_code == 4
    assert headline(result) == (
        "UNDECIDED whether as meant: identical, no weight differs from the trusted one: there is "
        "nothing that a change explains"
    )
    assert result.hint == "truestep check CASE --depth modules"


class Quantised(torch.nn.Module):
    """A layer that keeps codes and scales, and quantises each token that it is given."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
        x = (x / step).round() * step
        return torch.nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def wrapped(pipe: Any) -> None:
    for name, module in [*pipe.transformer.named_modules()]:
        if isinstance(module, torch.nn.Linear) and "blocks" in name:
            holder, _, key = name.rpartition(".")
            setattr(pipe.transformer.get_submodule(holder), key, Quantised(module))


def test_layers_of_another_class_are_judged_by_what_they_do(
    case: Case, recording: Recording
) -> None:
    _, meant = judged(case, recording, wrapped, "auto")
    assert (meant.outcome, meant.change, meant.unjudged) == ("explained", "int8", ())

    def broken(pipe: Any) -> None:
        wrapped(pipe)
        pipe.transformer.blocks[1].ffn.net[2].scale[3] *= 2

    _, meant = judged(case, recording, broken, "auto")
    assert [fault.module for fault in meant.faults] == [LAYER]
    assert meant.faults[0].kind == "row 3: scaled by 2"


class Backwards(Quantised):
    """Its tokens in the other order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = super().forward(x)
        return made.flip(-2) if x.ndim > 2 else made


def test_a_layer_of_another_class_is_given_tokens_too(case: Case, recording: Recording) -> None:
    def broken(pipe: Any) -> None:
        wrapped(pipe)
        net = pipe.transformer.blocks[1].ffn.net
        net[2].__class__ = Backwards

    _, meant = judged(case, recording, broken, "int8")
    assert [fault.module for fault in meant.faults] == [LAYER]
    assert meant.faults[0].kind.startswith("what it makes of the tokens it is given: ")


class InBfloat16(Quantised):
    """It computes, and returns, in 16 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).bfloat16()


class BackwardsInBfloat16(InBfloat16):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = super().forward(x)
        return made.flip(-2) if x.ndim > 2 else made


def test_a_layer_that_returns_another_precision_is_given_tokens_too(
    case: Case, recording: Recording
) -> None:
    def packed(pipe: Any, cls: type) -> None:
        wrapped(pipe)
        pipe.transformer.blocks[1].ffn.net[2].__class__ = cls

    _, meant = judged(case, recording, lambda pipe: packed(pipe, InBfloat16), "int8")
    assert not [fault for fault in meant.faults if "tokens" in fault.kind]
    _, meant = judged(case, recording, lambda pipe: packed(pipe, BackwardsInBfloat16), "int8")
    assert [f.module for f in meant.faults if "tokens" in f.kind] == [LAYER]


class Static(Quantised):
    """Its tokens are quantised by one scale, that was calibrated."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x / 0.004).round().clamp(-127, 127) * 0.004
        return torch.nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def test_a_range_of_tokens_that_was_calibrated_is_no_fault(
    case: Case, recording: Recording
) -> None:
    layer = layer_of(load(case))
    static = Static(layer)
    from truestep.replay.meant_weights import _probed

    read = _probed(static, layer)["weight"]
    weight = layer.weight.detach()
    assert torch.allclose(read, weight, atol=0.03 * float(weight.abs().max()))


def test_a_bias_that_the_trusted_layer_lacks_is_a_fault(case: Case, recording: Recording) -> None:
    layer = torch.nn.Linear(16, 16, bias=False)
    own = Quantised(layer)
    own.bias = torch.nn.Parameter(torch.full((16,), 0.3))
    from truestep.replay.meant_weights import Weights, _compare

    found = Weights()
    _compare(found, "transformer", "x", own, layer)
    assert found.added == [("transformer.x", "bias")]
    found = Weights()
    _compare(found, "transformer", "x", Quantised(layer), layer)
    assert found.added == []


@pytest.mark.parametrize("coarse", [1, 16])
def test_a_declared_quantiser_excuses_no_coarser_one(
    case: Case, recording: Recording, coarse: int
) -> None:
    def mixed(pipe: Any) -> None:
        for at, layer in enumerate(layers_of(pipe).values()):
            made = QUANTISERS["int4" if 5 <= at < 5 + coarse else "int8"](layer.weight.data)
            assert made is not None
            layer.weight.data = made.values

    result, meant = judged(case, recording, mixed, "int8")
    assert meant.outcome == ("fault" if coarse == 1 else "undecided")
    assert result.exit_code != 0


class Halved(torch.nn.Conv3d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


def layer_of(pipe: Any) -> Any:
    return pipe.transformer.get_submodule(LAYER.partition(".")[2])


def relu(pipe: Any) -> None:
    pipe.transformer.condition_embedder.time_embedder.act = torch.nn.ReLU()


def hooked(pipe: Any) -> None:
    layer_of(pipe).register_forward_hook(lambda module, args, output: output * 1.5)


def patched(pipe: Any) -> None:
    layer = layer_of(pipe)
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 1.5  # type: ignore[method-assign]


def subclassed(pipe: Any) -> None:
    pipe.transformer.patch_embedding.__class__ = Halved


@pytest.mark.parametrize("wrong", [relu, hooked, patched, subclassed], ids=lambda f: f.__name__)
def test_code_is_not_put_back_with_the_weights(
    case: Case, recording: Recording, wrong: Change
) -> None:
    def broken(pipe: Any) -> None:
        int8(pipe)
        wrong(pipe)

    result, meant = judged(case, recording, broken, "int8")
    assert meant.outcome == "fault"
    assert meant.text.startswith("with the trusted weights put back it still differs")
    assert result.exit_code == 1


def each(pipe: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for layer in layers_of(pipe).values():
        layer.weight.data = change(layer.weight.data)


def adapted(pipe: Any) -> None:
    def low_rank(w: torch.Tensor) -> torch.Tensor:
        flat = w.flatten(1)
        delta = flat[:, :1] @ flat[:1]
        return w + (0.05 * flat.norm() / delta.norm() * delta).reshape(w.shape)

    each(pipe, low_rank)


@pytest.mark.parametrize(
    "change",
    [
        adapted,
        lambda pipe: each(pipe, lambda w: 1.01 * w),
        lambda pipe: each(pipe, lambda w: w + 0.03 * w.std() * w.sin().roll(7)),
    ],
    ids=["an adapter", "a factor", "noise"],
)
@pytest.mark.parametrize("name", ["auto", "int4"])
def test_what_is_on_no_grid_is_no_quantisation(
    case: Case, recording: Recording, change: Change, name: str
) -> None:
    result, meant = judged(case, recording, change, name)
    assert (meant.outcome, meant.faults) == ("undecided", ())
    assert "lie on no grid" in meant.text
    assert result.exit_code == 4
    assert result.hint == "truestep check CASE --depth modules"  # no other name explains them


def test_a_zero_point_that_is_off_in_all_layers_is_not_explained(
    case: Case, recording: Recording
) -> None:
    def shifted(pipe: Any) -> None:
        def one_more(w: torch.Tensor) -> torch.Tensor:
            flat = w.flatten(1)
            step = flat.abs().amax(1, keepdim=True) / 127
            return (((flat / step).round() + 1) * step).reshape(w.shape)

        each(pipe, one_more)

    result, meant = judged(case, recording, shifted, "int8")
    assert meant.outcome == "undecided"
    assert result.exit_code == 4


def test_a_layer_that_alone_is_not_what_the_quantiser_makes_is_named(
    case: Case, recording: Recording
) -> None:
    def nudged(pipe: Any) -> None:
        int8(pipe)
        weight = layer_of(pipe).weight.data
        codes = (weight[3] / (weight[3].abs().amax() / 127)).round()
        weight[3] = codes * (weight[3].abs().amax() / 127 * 1.001)

    result, meant = judged(case, recording, nudged, "int8")
    assert [fault.module for fault in meant.faults] == [LAYER]
    assert meant.faults[0].kind == ("not what int8 makes of it, as all other layers are: rows 3")
    assert f"`{LAYER}.weight` is not what int8 makes of it" in result.sentence
    assert result.exit_code == 1


def test_two_quantisers_beside_each_other(case: Case, recording: Recording) -> None:
    def mixed(pipe: Any) -> None:
        for at, layer in enumerate(layers_of(pipe).values()):
            made = QUANTISERS["fp8" if at % 3 == 0 else "int8"](layer.weight.data)
            assert made is not None
            layer.weight.data = made.values

    _, meant = judged(case, recording, mixed, "int8")
    assert (meant.outcome, meant.faults) == ("explained", ())
    assert "what another quantiser makes of it" in meant.text
    assert meant.layers == len(layers_of(load(case)))


def test_norms_that_are_a_little_larger_are_no_cast(case: Case, recording: Recording) -> None:
    def larger(pipe: Any) -> None:
        int8(pipe)
        for name, parameter in pipe.transformer.named_parameters():
            if parameter.ndim == 1 and "norm" in name and "weight" in name:
                parameter.data = (parameter.data + 0.5 * (parameter.data == 0)) * 1.0075

    _, meant = judged(case, recording, larger, "int8")
    assert meant.outcome == "fault"
    assert all("norm" in fault.module for fault in meant.faults)
    assert meant.faults


def test_a_bias_that_is_gone_is_missing(case: Case, recording: Recording) -> None:
    def dropped(pipe: Any) -> None:
        int8(pipe)
        layer_of(pipe).bias = None

    _, meant = judged(case, recording, dropped, "int8")
    assert (meant.faults[0].module, meant.faults[0].tensor) == (LAYER, "bias")
    assert meant.faults[0].kind == "it is missing"
    assert meant.outcome == "fault"


def test_the_candidate_is_afterwards_what_it_was(case: Case, recording: Recording) -> None:
    from truestep.replay.meant_weights import compared, put_back
    from truestep.runtime.pipeline import models_of

    pipe, trusted = load(case), load(case)
    wrapped(pipe)
    layers_of(trusted)  # what is put back is taken away again
    pipe.transformer.blocks[0].attn1.norm_q.weight.data += 1
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    modules = [*pipe.transformer.modules()]
    models, trusted_models = models_of(pipe), models_of(trusted)
    with put_back(models, trusted_models, compared(models, trusted_models)) as acted:
        assert len(acted) > 10
        assert isinstance(pipe.transformer.blocks[1].ffn.net[2], torch.nn.Linear)
    assert [*pipe.transformer.modules()] == modules
    after = pipe.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not any(m._forward_hooks for m in trusted.transformer.modules())


def test_what_cannot_be_judged_is_refused(case: Case, recording: Recording) -> None:
    with pytest.raises(UsageError, match="'int9' is no change that is known"):
        check(case, recording, meant="int9")
    with pytest.raises(UsageError, match="not at depth 'final'"):
        check(case, recording, meant="int8", depth="final")


@pytest.mark.parametrize("name", sorted(QUANTISERS))
def test_every_quantiser_is_applied_in_place(case: Case, name: str) -> None:
    pipe, trusted = load(case), load(case)
    quantise(pipe, name)
    own, was = layers_of(pipe), layers_of(trusted)
    assert sum(not torch.equal(own[k].weight, was[k].weight) for k in own) > 10
    with pytest.raises(UsageError, match="no quantiser"):
        quantise(pipe, "int9")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys, "check")


def test_the_command_line_says_it(
    case: Case, recording: Recording, run: Run, tmp_path: Path
) -> None:
    recording.save(tmp_path / "a.safetensors")
    (tmp_path / "quant.py").write_text(
        "from truestep.runtime.quantising import quantise\n\n\n"
        "def int8(pipe):\n    quantise(pipe, 'int8')\n"
    )
    words = ("--reference", "a.safetensors", "--apply", "quant.py:int8", "--steps", "0")
    code, out, err = run(*words, "--meant", "int8", "--json", "result.json")
    assert code == 0, (out, err)
    assert out.startswith("PASSED drifted, as meant")
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["exit_code"] == 0
    assert found["comparisons"][0]["meant"]["outcome"] == "explained"
    code, out, err = run(*words, "--meant", "int7")
    assert code == 2
    assert "is no change that is known" in err
