"""Modules on the reference's inputs: faults are found where they are made, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep import Recording, check, record
from truestep.case import Case
from truestep.errors import UsageError
from truestep.pairing.naming import named_modules
from truestep.replay.drill import Subject, drill
from truestep.replay.isolation import flow
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Verdict


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](self.norm(x))
        return x + self.layers[1](torch.nn.functional.gelu(hidden))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))


def found(change: Callable[[Net], Any]) -> tuple[str | None, str | None]:
    ours, theirs = Net(), Net()
    change(ours)
    drilled = drill(
        Subject(ours, lambda: ours(X)), Subject(theirs, lambda: theirs(X)), place=(0, "main")
    )
    place = drilled.divergence
    return (place.fqn, place.kind) if place else (None, None)


def test_flow_keeps_what_modules_receive_and_return_in_order() -> None:
    net = Net()
    seen = flow(net, lambda: net(X), place=(2, "cond"))
    assert seen.calls[:4] == ["(root)", "blocks.0", "blocks.0.norm", "blocks.0.layers.0"]
    names = list(seen.tensors)
    assert names[0] == "module/(root)/2/cond/in.0"
    assert names[-1] == "module/(root)/2/cond/out.0"
    assert names.index("module/blocks.0.norm/2/cond/out.0") < names.index(
        "module/blocks.0/2/cond/out.0"
    )
    assert not net._forward_hooks
    assert not net.blocks[0]._forward_pre_hooks


def test_a_leaf_is_named_with_its_kind() -> None:
    def bias(net: Net) -> None:
        net.blocks[1].layers[0].bias.data.add_(1)  # type: ignore[union-attr, operator]

    assert found(bias) == ("blocks.1.layers.0", "constant offset 1")


def test_code_between_modules_is_named_as_the_module_around_it() -> None:
    class Other(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.layers[0](self.norm(x))
            return x + self.layers[1](torch.relu(hidden))

    def relu(net: Net) -> None:
        net.blocks[2].__class__ = Other

    assert found(relu) == ("blocks.2", "before blocks.2.layers.1")


def test_a_block_that_is_left_out_is_named() -> None:
    def drop(net: Net) -> None:
        net.blocks[1].forward = lambda x: x  # type: ignore[assignment]

    assert found(drop)[0] == "blocks.1"


def test_nothing_is_named_without_a_fault_or_for_a_block_built_in_another_way() -> None:
    assert found(lambda net: None) == (None, None)

    def reordered(net: Net) -> None:
        order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
        first, second = net.blocks[1].layers  # type: ignore[union-attr, misc]
        first.weight.data, first.bias.data = first.weight[order].data, first.bias[order].data
        second.weight.data = second.weight[:, order].data

    assert found(reordered) == (None, None)


def test_an_exchange_in_a_list_names_the_first_that_is_out_of_order() -> None:
    def exchanged(net: Net) -> None:
        first, second = net.blocks[1], net.blocks[2]
        net.forward = lambda x: second(first(net.blocks[0](x)))  # type: ignore[assignment]

    def wrong(net: Net) -> None:
        first, second = net.blocks[1], net.blocks[2]
        net.forward = lambda x: first(second(net.blocks[0](x)))  # type: ignore[assignment]

    assert found(exchanged) == (None, None)
    name, kind = found(wrong)
    assert name == "blocks.1"
    assert (kind or "").startswith("called in another order: `blocks.2` in its place")


def test_what_a_run_does_before_is_done_before_every_look() -> None:
    ours, theirs = Net(), Net()
    kept: list[torch.Tensor] = []

    def stale(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output)
        return kept[-2] if len(kept) > 1 else output

    ours.blocks[1].register_forward_hook(stale)

    def before() -> None:
        kept.clear()
        ours(X + 1)

    drilled = drill(
        Subject(ours, lambda: ours(X), before),
        Subject(theirs, lambda: theirs(X)),
        place=(0, "main"),
    )
    assert drilled.divergence is not None
    assert drilled.divergence.fqn == "blocks.1"


def test_levels_are_measured_once_for_several_candidates() -> None:
    theirs, known = Net(), {}  # type: ignore[var-annotated]
    for block in (0, 0, 2):
        ours = Net()
        ours.blocks[block].layers[1].bias.data.add_(1)  # type: ignore[union-attr, index, operator]
        drilled = drill(
            Subject(ours, lambda ours=ours: ours(X)),  # type: ignore[misc]
            Subject(theirs, lambda: theirs(X)),
            place=(0, "main"),
            known=known,
        )
        assert drilled.divergence is not None
        assert drilled.divergence.fqn == f"blocks.{block}.layers.1"
    assert len(known) == 3  # the model, and two blocks


def test_wrappers_leave_no_mark_in_names() -> None:
    checkpointed = torch.nn.Module()
    checkpointed.add_module("_checkpoint_wrapped_module", torch.nn.ModuleDict({"attn1": Block()}))
    inner = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([checkpointed])})
    compiled = torch.nn.Module()
    compiled.add_module("_orig_mod", inner)
    assert "blocks.0.attn1" in named_modules(compiled).modules
    assert "blocks.0" in named_modules(torch.nn.DataParallel(inner)).modules


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **tiny_case)


@pytest.fixture(scope="module")
def reference(case: Case) -> Recording:
    return record(case)


def test_check_names_the_module(case: Case, reference: Recording) -> None:
    def fault(pipe: Pipeline) -> None:
        pipe.transformer.blocks[1].attn2.to_k.weight.data.mul_(1.01)

    result = check(case, reference, apply=fault, depth="modules")
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "blocks.1.attn2.to_k"
    assert "`blocks.1.attn2.to_k`, step 0, cond" in result.sentence
    assert any(row.fqn == "blocks.1.attn2.to_k" and not row.verdict.passed for row in result.rows)
    assert any("modules" in text for text in result.looked_at)
    listed = result.causes
    assert listed[0].name == "module/blocks.1.attn2.to_k/0/cond/out.0"
    assert not any("/in." in row.name for row in listed)
    assert "inherited" in result.uncounted(len(listed))


def test_check_names_the_module_that_makes_nan(case: Case, reference: Recording) -> None:
    def fault(pipe: Pipeline) -> None:
        pipe.transformer.blocks[1].attn1.to_q.bias.data[0] = float("nan")

    result = check(case, reference, apply=fault, depth="modules")
    assert result.verdict is Verdict.INVALID
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == "blocks.1.attn1.to_q"
    assert "(first divergence: `blocks.1.attn1.to_q`, step 0, cond)" in result.sentence
    assert "non-finite values: " in result.sentence
    assert "the second time" not in "".join((result.sentence, *result.notes))  # NaN is one answer
    assert "values that are not finite" in (result.first_divergence.operator or "")


def test_check_opens_the_model_of_the_stage_that_failed(case: Case, reference: Recording) -> None:
    def text(pipe: Pipeline) -> None:
        pipe.text_encoder.encoder.final_layer_norm.weight.data.mul_(1.1)

    def decoder(pipe: Pipeline) -> None:
        pipe.vae.post_quant_conv.bias.data.add_(0.1)

    found = check(case, reference, apply=text, depth="modules").first_divergence
    assert found is not None
    assert found.fqn == "encoder.final_layer_norm"
    assert found.kind == "scaled by 1.1"
    found = check(case, reference, apply=decoder, depth="modules").first_divergence
    assert found is not None
    assert found.fqn == "post_quant_conv"


def test_layers_that_were_fused_are_not_missed(case: Case, reference: Recording) -> None:
    def fault(pipe: Pipeline) -> None:
        pipe.transformer.fuse_qkv_projections()
        pipe.transformer.blocks[1].attn1.norm_k.weight.data.mul_(1.01)

    found = check(case, reference, apply=fault, depth="modules").first_divergence
    assert found is not None
    assert found.fqn == "blocks.1.attn1.norm_k"


def test_a_fault_around_the_model_names_no_module(case: Case, reference: Recording) -> None:
    result = check(case, reference, settings={"guidance_scale": 5.0}, depth="modules")
    assert not result.verdict.passed
    assert result.first_divergence is not None
    assert result.first_divergence.fqn is None


def port_with(*names: str) -> Callable[[Pipeline], Any]:
    """The port in the place of every transformer, with faults of the corpus."""
    from bench.faults.port import PORTED
    from examples.parity.wan_port.port import use

    return PORTED[names[0]].apply if names else use


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("keys-values-exchanged", "blocks.1.attn1.to_k"),  # a slice of a fused layer
        ("heads-exchanged", "blocks.1.attn1.to_v"),  # rows of one that are in another order
        ("layers-of-two-blocks-exchanged", "blocks.0.attn1.to_q"),
        ("blocks-exchanged", "blocks.0"),
        ("input-kernel-transposed", "patch_embedding"),  # of another layout
        ("text-projection-gelu-exact", "condition_embedder.text_embedder.act_1"),
        ("gelu-exact", "blocks.0.ffn"),  # the port has no such module: what is around it
        ("rope-theta", "rope"),  # computed inline, and handed on in another form
        ("softmax-in-bfloat16", "blocks.0.attn1"),
        ("attention-scale-larger", "blocks.0.attn1"),  # all that are given what cannot be compared
        ("modulation-in-bfloat16", "blocks.0"),
    ],
)
def test_a_renamed_and_fused_port_is_named_in_the_references_words(
    case: Case, reference: Recording, name: str, module: str
) -> None:
    result = check(case, reference, apply=port_with(name), depth="modules")
    assert result.first_divergence is not None
    assert result.first_divergence.fqn == module
    assert any(note.startswith("paired ") for note in result.notes)
    assert any(note.startswith("left out, ") and "in.3.0" in note for note in result.notes)


def test_the_unchanged_port_is_the_same_model(case: Case, reference: Recording) -> None:
    result = check(case, reference, apply=port_with(), depth="modules")
    assert result.verdict.passed
    assert result.first_divergence is None


def test_opened_all_the_same_the_unchanged_port_names_nothing(
    case: Case, reference: Recording
) -> None:
    from truestep.pairing.partners import partners_of
    from truestep.replay.locating import Place, drill_stage
    from truestep.runtime.loading import load

    pipe, trusted = load(case), load(case)
    port_with()(pipe)
    partners = partners_of(pipe.transformer, trusted.transformer)
    assert partners is not None
    place = Place("prediction", 0, "cond")
    drilled = drill_stage(pipe, trusted, reference, place, partners=partners)
    assert drilled.divergence is None
    # The other way round, the trusted model is the fused one.
    partners = partners_of(trusted.transformer, pipe.transformer)
    drilled = drill_stage(trusted, pipe, reference, place, partners=partners)
    assert drilled.divergence is None
    trusted.transformer.blocks[1].attn2.to_v.bias.data.add_(0.1)
    drilled = drill_stage(trusted, pipe, reference, place, partners=partners)
    assert drilled.divergence is not None
    assert drilled.divergence.fqn == "layers.1.cross.kv[32:64]"


def test_a_rename_map_gives_modules_their_names(case: Case, reference: Recording) -> None:
    rename = {"layers.*.norm_mlp": "blocks.*.norm3"}

    def fault(pipe: Pipeline) -> None:
        port_with()(pipe)
        pipe.transformer.layers[1].norm_mlp.eps = 1e-3

    without = check(case, reference, apply=fault, depth="modules").first_divergence
    named = check(case, reference, apply=fault, depth="modules", rename=rename).first_divergence
    assert without is not None
    assert without.fqn == "blocks.1"
    assert named is not None
    assert named.fqn == "blocks.1.norm3"


def test_a_rename_map_must_name_what_there_is(case: Case, reference: Recording) -> None:
    with pytest.raises(UsageError, match="matches no module of the candidate"):
        check(case, reference, apply=port_with(), depth="modules", rename={"layer.*": "blocks.*"})
    with pytest.raises(UsageError, match="of no use at depth 'steps'"):
        check(case, reference, rename={"layers.*": "blocks.*"})


class Masked(torch.nn.Module):
    """A block that is handed a mask with infinities, as causal attention is."""

    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.query(x) @ x.transpose(1, 2) + mask, -1) @ x


class Causal(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Masked()

    def forward(self, x: torch.Tensor, *, sees: int = 0) -> torch.Tensor:
        mask = torch.full((5, 5), float("-inf")).triu(1 + sees)
        return self.block(x, mask)


def test_infinities_of_a_mask_that_both_sides_are_given_are_no_fault() -> None:
    def place(change: Callable[[Causal], Any], **options: int) -> tuple[str | None, str | None]:
        ours, theirs = Causal(), Causal()
        change(ours)
        drilled = drill(
            Subject(ours, lambda: ours(X, **options)),
            Subject(theirs, lambda: theirs(X)),
            place=(0, "main"),
        )
        at = drilled.divergence
        return (at.fqn, at.operator) if at else (None, None)

    assert place(lambda net: None) == (None, None)
    fqn, operator = place(lambda net: net.block.query.weight.data.mul_(1.05))
    assert fqn == "block.query"
    assert "weight differs by 0.05" in (operator or "")
    assert place(lambda net: None, sees=1)[0] == "(root)"
