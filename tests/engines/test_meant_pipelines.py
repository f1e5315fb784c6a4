"""`meant` of plain pipelines: a fault under a quantisation is named, a healthy one is explained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import truestep
from truestep.calls.subject import Subject
from truestep.engines.pipelines import _models
from truestep.errors import UsageError
from truestep.explanations import Meant
from truestep.measure.quantisers import QUANTISERS
from truestep.testing import tiny
from truestep.verdict import Comparison, Verdict

LAYER = "transformer.transformer_blocks.0.ff.net.2"
TEXT = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"

Change = Callable[[Any], None]


def built() -> Any:
    pipe = tiny.pipeline("FluxPipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def trusted() -> tuple[Any, truestep.Recording]:
    pipe = built()
    call = {k: v for k, v in tiny.example_call("FluxPipeline").items() if k != "generator"}
    return pipe, truestep.record(pipe, call=call, floor="steps")


def judged(change: Change, name: str, **options: Any) -> tuple[Comparison, Meant]:
    pipe, reference = trusted()
    candidate = built()
    change(candidate)
    options = {"steps": (0,), "trusted": pipe, **options}
    result = truestep.check(candidate, reference, meant=name, **options)
    assert result.meant is not None
    return result, result.meant


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def int8(pipe: Any, component: str = "transformer") -> None:
    for layer in linears(getattr(pipe, component)).values():
        found = QUANTISERS["int8"](layer.weight.data)
        assert found is not None
        layer.weight.data = found.values


def exchanged(pipe: Any, where: str = LAYER) -> None:
    component, _, fqn = where.partition(".")
    weight = getattr(pipe, component).get_submodule(fqn).weight.data
    weight[[2, 5]] = weight[[5, 2]].clone()


def test_a_healthy_quantisation_is_explained() -> None:
    result, meant = judged(int8, "auto")
    assert result.verdict is Verdict.DRIFTED
    assert (meant.outcome, meant.change, meant.faults) == ("explained", "int8", ())
    assert result.exit_code == 0
    assert "no fault underneath" in result.sentence


def test_two_rows_exchanged_are_named() -> None:
    result, meant = judged(lambda pipe: (int8(pipe), exchanged(pipe))[0], "int8")
    assert [fault.module for fault in meant.faults] == [LAYER]
    assert meant.faults[0].kind == "rows 2, 5: 2 is row 5, 5 is row 2"
    assert result.exit_code == 1
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == LAYER


def test_code_that_is_wrong_beside_it_is_opened_with_the_weights_put_back() -> None:
    def wrong(pipe: Any) -> None:
        int8(pipe)
        pipe.transformer.transformer_blocks[0].ff.net[0].approximate = "none"

    result, meant = judged(wrong, "int8")
    assert (meant.outcome, meant.faults) == ("fault", ())
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "transformer.transformer_blocks.0.ff.net.0"


def test_what_is_between_the_calls_is_no_part_of_it() -> None:
    def wrong(pipe: Any) -> None:
        int8(pipe)
        pipe.vae.register_to_config(shift_factor=0.3)

    result, meant = judged(wrong, "auto")
    assert meant.outcome == "fault"
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "decoding"
    assert result.exit_code == 1


def test_text_encoders_are_judged_as_well() -> None:
    result, meant = judged(lambda pipe: int8(pipe, "text_encoder_2"), "int8")
    assert meant.outcome == "explained"
    assert result.exit_code == 0
    broken = functools.partial(exchanged, where=TEXT)
    both = (functools.partial(int8, component="text_encoder_2"), broken)
    _, meant = judged(lambda pipe: [change(pipe) for change in both] and None, "int8")
    assert [fault.module for fault in meant.faults] == [TEXT]


def rolled(layers: Iterable[torch.nn.Linear]) -> None:
    for layer in layers:
        layer.weight.data = layer.weight.data.roll(1, 0)


@pytest.mark.parametrize("name", ["int8", "auto", "gguf:Q4_0"])
@pytest.mark.parametrize("many", [3, 8, 14])
def test_damage_of_many_layers_is_no_spread(name: str, many: int) -> None:
    kind = "int8" if name == "auto" else name

    def broken(pipe: Any) -> None:
        layers = [*linears(pipe.transformer).values()]
        for layer in layers:
            found = QUANTISERS[kind](layer.weight.data)
            layer.weight.data = layer.weight.data if found is None else found.values
        rolled(layers[::2][:many])

    result, meant = judged(broken, name)
    assert result.exit_code in (1, 4)
    assert meant.outcome != "explained"
    if many == 3:  # of more, another change is as likely
        assert meant.outcome == "fault"
        assert len(meant.faults) == many


def test_siblings_of_which_many_are_damaged_say_nothing() -> None:
    def broken(pipe: Any) -> None:
        int8(pipe)
        rolled([*linears(pipe.transformer).values()][::2][:4])

    result, meant = judged(broken, "siblings")
    assert meant.outcome == "undecided"
    assert "differ too much among themselves" in result.sentence
    assert result.exit_code == 4


def test_a_lora_that_is_left_in_is_no_quantisation() -> None:
    def adapted(pipe: Any) -> None:
        dice = torch.Generator().manual_seed(0)
        int8(pipe)
        for name, layer in linears(pipe.transformer).items():
            if name.endswith(("to_q", "to_k")):
                down, up = (
                    torch.randn(size, generator=dice)
                    for size in ((4, layer.in_features), (layer.out_features, 4))
                )
                layer.weight.data += 0.1 * layer.weight.data.std() * up @ down

    result, meant = judged(adapted, "int8")
    assert meant.outcome == "fault"
    assert {fault.module.rpartition(".")[2] for fault in meant.faults} == {"to_q", "to_k"}
    assert result.exit_code == 1


class Quantised(torch.nn.Module):
    """A layer that keeps codes and scales."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


def wrapped(pipe: Any) -> None:
    for name, layer in linears(pipe.transformer).items():
        if "blocks" in name:
            holder, _, key = name.rpartition(".")
            setattr(pipe.transformer.get_submodule(holder), key, Quantised(layer))


def test_layers_of_another_class_are_judged_by_what_they_do() -> None:
    _, meant = judged(wrapped, "auto")
    assert (meant.outcome, meant.change, meant.unjudged) == ("explained", "int8", ())

    def broken(pipe: Any) -> None:
        wrapped(pipe)
        pipe.transformer.transformer_blocks[0].ff.net[2].scale[3] *= 2

    _, meant = judged(broken, "auto")
    assert [fault.module for fault in meant.faults] == [LAYER]


def test_a_large_bias_hides_no_weight_of_a_layer_of_another_class() -> None:
    def loud(pipe: Any) -> Any:
        norm = pipe.transformer.transformer_blocks[0].norm1.linear
        norm.bias.data += 10
        return pipe.to(torch.bfloat16)

    call = {k: v for k, v in tiny.example_call("FluxPipeline").items() if k != "generator"}
    pipe, candidate = loud(built()), loud(built())
    reference = truestep.record(pipe, call=call, floor="steps")
    wrapped(candidate)
    kept = {name: b.clone() for name, b in candidate.transformer.named_parameters()}
    result = truestep.check(candidate, reference, meant="auto", trusted=pipe, steps=(0,))
    assert result.meant is not None
    assert (result.meant.outcome, result.meant.faults) == ("explained", ())
    assert all(torch.equal(b, kept[name]) for name, b in candidate.transformer.named_parameters())


def test_compiled_components_are_looked_into() -> None:
    def compiled(pipe: Any) -> None:
        int8(pipe)
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")

    def broken(pipe: Any) -> None:
        int8(pipe)
        exchanged(pipe)
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")

    _, meant = judged(compiled, "int8")
    assert meant.outcome == "explained"
    _, meant = judged(broken, "int8")
    assert [fault.module for fault in meant.faults] == [LAYER]


def test_what_is_no_pipeline_is_refused() -> None:
    pipe, reference = trusted()
    with pytest.raises(UsageError, match="returned FluxTransformer2DModel, not a pipeline"):
        truestep.check(
            built(), reference, apply=lambda p: p.transformer, meant="int8", trusted=pipe
        )
    other = built()
    other.register_modules(more=torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="the components of FluxPipeline cannot be told"):
        truestep.check(other, reference)


def test_the_candidate_is_afterwards_what_it_was() -> None:
    pipe, reference = trusted()
    candidate = built()
    int8(candidate)
    before = {k: v.clone() for k, v in candidate.transformer.state_dict().items()}
    theirs = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    truestep.check(candidate, reference, meant="int8", trusted=pipe, steps=(0,))
    for model, kept in ((candidate.transformer, before), (pipe.transformer, theirs)):
        assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_a_case_loads_the_trusted_side_itself(tmp_path: Path) -> None:
    folder = tmp_path / "flux"
    tiny.save("FluxPipeline", folder)
    call = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2}
    case = truestep.CallCase(model=str(folder), call=call)
    reference = truestep.record(case)
    result = truestep.check(case, reference, apply=int8, meant="auto")
    assert result.meant is not None
    assert result.meant.outcome == "explained"
    assert result.actual.label == "apply int8"


def test_a_component_under_two_names_counts_once() -> None:
    layer = torch.nn.Linear(2, 2)
    other = torch.nn.Linear(2, 2)
    subject = Subject(lambda: None, {"text": layer, "again": layer, "unet": other, "tokens": 3})
    assert _models(subject) == {"text": layer, "unet": other}


def test_what_cannot_be_judged_is_refused() -> None:
    pipe, reference = trusted()
    with pytest.raises(UsageError, match="a declared change is judged beside the trusted one"):
        truestep.check(built(), reference, meant="int8")
    with pytest.raises(UsageError, match="a declared change is judged beside the trusted one"):
        truestep.check(pipe, reference, meant="int8", trusted=pipe)
    with pytest.raises(UsageError, match="'int9' is no change that is known"):
        truestep.check(built(), reference, meant="int9", trusted=pipe)
    with pytest.raises(UsageError, match="not at depth 'final'"):
        truestep.check(built(), reference, meant="int8", trusted=pipe, depth="final")


def test_a_change_that_registers_what_no_class_knows_is_refused() -> None:
    _, reference = trusted()

    def more(pipe: Any) -> None:
        pipe.register_modules(more=torch.nn.Linear(2, 2))

    with pytest.raises(UsageError, match="the components of FluxPipeline cannot be told"):
        truestep.check(built(), reference, apply=more)
