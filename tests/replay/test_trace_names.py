"""Two traces pair by what modules do: names are where to look first, and no proof."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples.parity.wan_port.port import ported
from tests.replay.models import (
    WIDTH,
    OfficialWan,
    diffusers_wan,
    exchanged_wan,
    official_wan,
    wan_inputs,
)
from truestep import capture
from truestep.recording.format import Recording
from truestep.recording.manifest import Manifest
from truestep.recording.table import tensor_table
from truestep.replay.trace_names import Names, match_inputs
from truestep.replay.traces import compare_traces
from truestep.verdict import Comparison, Verdict

Change = Callable[[Any], Any]


def unchanged(model: Any) -> None:
    """The benign twin of every fault."""


def official(change: Change = unchanged, **options: Any) -> Recording:
    model = official_wan()
    latent, timestep, text = wan_inputs()
    with torch.no_grad():
        change(model)
        with capture(model, **{"level": "full", "inputs": True, **options}) as trace:
            model([latent[0]], timestep, text)
    assert trace.recording is not None
    return trace.recording


def diffusers(
    change: Change = unchanged,
    *,
    model: nn.Module | None = None,
    steps: Any = (999.0,),
    **options: Any,
) -> Recording:
    model = diffusers_wan() if model is None else model
    with torch.no_grad():
        change(model)
        with capture(model, **{"level": "full", "inputs": True, **options}) as trace:
            for step in steps:
                latent, timestep, text = wan_inputs(step)
                model(latent.repeat(2, 1, 1, 1, 1), timestep.repeat(2), text.repeat(2, 1, 1))
    assert trace.recording is not None
    return trace.recording


def one(change: Change = unchanged, **options: Any) -> Recording:
    """diffusers' side of the same single sample that the official side is given."""
    model = diffusers_wan()
    with torch.no_grad():
        change(model)
        with capture(model, **{"level": "full", "inputs": True, **options}) as trace:
            model(*wan_inputs())
    assert trace.recording is not None
    return trace.recording


def named(result: Comparison) -> tuple[str, str]:
    assert result.first_divergence is not None, result.sentence
    return result.first_divergence.fqn or "", result.first_divergence.kind or ""


def swap(first: nn.Module, second: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    first.load_state_dict(second.state_dict())
    second.load_state_dict(state)


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("level", ["full", "sketch"])
def test_a_right_port_passes_whose_names_mean_other_modules(level: str, inputs: bool) -> None:
    options: dict[str, Any] = {"level": level, "inputs": inputs}
    result = compare_traces(official(**options), one(**options))
    assert result.verdict.passed, result.sentence
    assert any("blocks.0.norm3 = blocks.0.norm2" in note for note in result.notes)
    looked = {row.fqn for row in result.rows}
    assert {"blocks.2.norm2", "blocks.2.norm3", "blocks.1.attn1.to_out"} <= looked


def test_moments_alone_pair_it_and_decide_nothing() -> None:
    result = compare_traces(official(level="stats"), one(level="stats"))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert {row.verdict for row in result.rows} == {Verdict.INCONCLUSIVE}


FAULTS: dict[str, tuple[Change, str, str]] = {
    "modulation shifted": (
        lambda m: m.blocks[1].modulation[3].add_(0.5),
        "blocks.1",
        "before blocks.1.ffn; constant offset 0.5",
    ),
    "modulation of the first attention": (
        lambda m: m.blocks[0].modulation[0].add_(0.5),
        "blocks.0",
        "before blocks.0.attn1; constant offset 0.5",
    ),
    "a learned norm lost": (lambda m: m.blocks[1].norm3.weight.fill_(1.0), "blocks.1.norm2", ""),
    "norms of two blocks exchanged": (
        lambda m: swap(m.blocks[0].norm3, m.blocks[1].norm3),
        "blocks.0.norm2",
        "",
    ),
    "queries and keys exchanged": (
        lambda m: swap(m.blocks[1].self_attn.q, m.blocks[1].self_attn.k),
        "blocks.1.attn1.to_q",
        "",
    ),
    "a bias of the last layer": (
        lambda m: m.blocks[2].ffn[2].bias.add_(1e-3),
        "blocks.2.ffn.2",
        "constant offset 0.001",
    ),
    "the timestep's embedding": (
        lambda m: m.time_projection.bias.add_(0.1),
        "time_embedder",
        "constant offset 0.1",
    ),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_in_such_a_port_is_named(name: str) -> None:
    change, fqn, kind = FAULTS[name]
    result = compare_traces(official(change), one())
    assert result.verdict is Verdict.DRIFTED
    assert named(result) == (fqn, kind)


def test_equal_names_are_exchanged_where_outputs_and_order_say_so() -> None:
    right = compare_traces(diffusers(model=exchanged_wan()), diffusers())
    assert right.verdict.passed, right.sentence
    wrong = compare_traces(
        diffusers(lambda m: m.blocks[1].norm3.bias.add_(0.3), model=exchanged_wan()), diffusers()
    )
    assert named(wrong) == ("blocks.1.norm2", "constant offset 0.3")


def test_exchanged_weights_under_equal_names_are_a_fault() -> None:
    """Each returns what the other should: nothing but the order in which they run tells."""
    result = compare_traces(
        diffusers(lambda m: swap(m.blocks[1].attn1.to_q, m.blocks[1].attn1.to_k)), diffusers()
    )
    assert result.verdict is Verdict.DRIFTED
    assert named(result)[0] == "blocks.1.attn1.to_q"


def learned(model: Any) -> None:
    for block in model.blocks:
        block.norm3 = nn.LayerNorm(WIDTH)
        block.norm3.weight.copy_(torch.linspace(0.5, 2.0, WIDTH))


def test_norms_that_have_exchanged_their_weights_are_a_fault() -> None:
    def fault(model: Any) -> None:
        learned(model)
        swap(model.blocks[1].norm2, model.blocks[1].norm3)

    assert compare_traces(diffusers(learned), diffusers(learned)).verdict.passed
    result = compare_traces(diffusers(fault), diffusers(learned))
    assert named(result)[0] == "blocks.1.norm2"


def test_nobody_is_accused_below_a_module_that_agrees() -> None:
    class Folded(nn.Module):
        """Its norm returns a multiple, which the next layer takes back."""

        def __init__(self, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.up, self.factor = nn.LayerNorm(8), nn.Linear(8, 8), factor
            self.norm.weight.data.mul_(factor)

        def forward(self, x: torch.Tensor) -> Any:
            return self.up(self.norm(x) / self.factor)

    def traced(factor: float, bias: float = 0.0) -> Recording:
        model = Folded(factor)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), capture(model, level="full", inputs=True) as trace:
            model.up.bias.add_(bias)
            model(x)
        assert trace.recording is not None
        return trace.recording

    result = compare_traces(traced(4.0), traced(1.0))
    assert result.verdict.passed
    assert any("inside of modules that agree" in note and "norm" in note for note in result.notes)
    wrong = compare_traces(traced(4.0, bias=0.1), traced(1.0))
    assert wrong.verdict is Verdict.DRIFTED


def test_an_error_that_the_sum_around_it_hides_decides_nothing() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> Any:
            return x + self.inner(x / 1e4)

    def traced(bias: float) -> Recording:
        model = Residual()
        x = 1e4 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), capture(model, level="full") as trace:
            model.inner.bias.add_(bias)
            model(x)
        assert trace.recording is not None
        return trace.recording

    result = compare_traces(traced(1e-3), traced(0.0))
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "too small in (root), which agrees, to be seen there" in result.sentence


def test_a_side_that_was_traced_at_its_root_is_judged_by_it() -> None:
    model = diffusers_wan()
    latent, timestep, text = wan_inputs()
    compiled: Any = torch.compile(model, backend="eager")
    for sides in ((compiled, model), (model, compiled)):
        traces = []
        for side in sides:
            with torch.no_grad(), capture(side, level="full", inputs=True) as trace:
                side(latent, timestep, text)
            traces.append(trace.recording)
        result = compare_traces(*traces)  # type: ignore[arg-type]
        assert result.verdict.passed, result.sentence
        assert any("opened what is around them" in text for text in result.not_looked_at)
    wrong = compare_traces(one(lambda m: m.proj_out.bias.add_(1.0)), traces[1])  # type: ignore[arg-type]
    assert wrong.verdict is Verdict.DRIFTED
    assert named(wrong)[0] == "(root)"


@pytest.mark.parametrize("level", ["full", "sketch"])
def test_a_timestep_of_every_sample_is_judged_by_its_value(level: str) -> None:
    right = compare_traces(diffusers(level=level), diffusers(level=level))
    assert right.verdict.passed
    wrong = compare_traces(diffusers(steps=(998.0,), level=level), diffusers(level=level))
    assert wrong.verdict is Verdict.DRIFTED
    assert named(wrong)[0] == "(root)"


def test_official_wan_takes_what_the_test_says() -> None:
    latent, timestep, text = wan_inputs()
    with torch.no_grad():
        made = OfficialWan.forward(official_wan(), [latent[0]], timestep, text)
        assert torch.allclose(made[0], diffusers_wan()(latent, timestep, text)[0][0], atol=1e-5)


def test_the_schedule_is_judged_before_what_follows_from_it() -> None:
    """The latent of the second step is further off than the timestep, and follows from it."""

    def traced(steps: tuple[float, float], gain: float) -> Recording:
        model = diffusers_wan()
        with torch.no_grad(), capture(model, level="full", inputs=True) as trace:
            for index, step in enumerate(steps):
                latent, timestep, text = wan_inputs(step)
                model(latent * gain**index, timestep, text)
        assert trace.recording is not None
        return trace.recording

    result = compare_traces(traced((999.0, 624.0), 1.01), traced((999.0, 625.0), 1.0))
    assert named(result) == ("(root)", "given another input: `in.1` is 624 (was 625)")
    assert result.first_divergence is not None
    assert result.first_divergence.step == 1
    assert result.causes[0].name == "module/(root)/1/main/in.1"
    assert result.uncounted(len(result.causes)).endswith("inherited")
    other = compare_traces(traced((999.0, 625.0), 1.01), traced((999.0, 625.0), 1.0))
    assert named(other) == ("(root)", "given another input; scaled by 1.01")


def test_the_renamed_and_fused_port_passes_and_its_fault_is_named(
    tiny_wan: dict[str, Path],
) -> None:
    from diffusers import WanTransformer3DModel

    wan = WanTransformer3DModel.from_pretrained(tiny_wan["wan21"], subfolder="transformer").eval()

    def traced(model: nn.Module) -> Recording:
        generator = torch.Generator().manual_seed(0)
        given = {
            "hidden_states": torch.randn(1, wan.config.in_channels, 2, 4, 4, generator=generator),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 8, wan.config.text_dim, generator=generator),
        }
        with torch.no_grad(), capture(model, level="full", inputs=True) as trace:
            model(**given, return_dict=False)
        assert trace.recording is not None
        return trace.recording

    port: Any = copy.deepcopy(ported(wan))
    right = compare_traces(traced(port), traced(wan))
    assert right.verdict.passed, right.sentence
    port.layers[1].mlp.up.bias.data.add_(0.01)
    wrong = compare_traces(traced(port), traced(wan))
    assert named(wrong) == ("blocks.1.ffn.net.0.proj", "constant offset 0.01")
    assert "`blocks.1.ffn.net.0.proj` is `layers.1.mlp.up` in the actual trace" in wrong.notes
    assert [row.name for row in wrong.causes] == ["module/blocks.1.ffn.net.0.proj/0/main/out.0"]


def test_a_name_that_reads_as_another_one_is_no_crash() -> None:
    """A module without a name, as a damaged file may have one."""

    def trace(size: int) -> Recording:
        tensors = {f"module//0/cond/in.{slot}": torch.arange(size + slot) / 7 for slot in range(2)}
        table = tensor_table(tensors)
        manifest = Manifest(tool_version="0", created="", level="full", tensors=table)
        return Recording.in_memory(tensors, manifest)

    ours, theirs = trace(3), trace(9)
    names = Names((name, name) for name in ours)
    assert dict(match_inputs(names, ours, theirs).pairs()) == dict(names.pairs())
