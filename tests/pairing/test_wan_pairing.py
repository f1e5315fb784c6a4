"""diffusers' Wan transformer against the independent port: all is paired, a fault stands out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.parity.wan_port.convert import convert
from examples.parity.wan_port.port import ported
from truestep.measure.sketch import sketch
from truestep.models import digits
from truestep.pairing import Evidence, Pairing, pair_activations, pair_modules

Tensor = torch.Tensor
State = dict[str, Tensor]


@pytest.fixture(scope="module", params=["wan21", "digits"])
def models(request: pytest.FixtureRequest, tiny_wan: dict[str, Path]) -> tuple[Any, Any]:
    """The port and diffusers' transformer."""
    return loaded(request.param, tiny_wan)


@pytest.fixture(scope="module")
def right(models: tuple[Any, Any]) -> dict[bool, set[tuple[object, object]]]:
    """Names of the pairs of the unchanged models, by whether the port is the actual side."""
    sides = [model.state_dict() for model in models]
    found = {way: pair_modules(*(sides if way else sides[::-1])) for way in (True, False)}
    return {way: {(p.actual, p.reference) for p in found[way].pairs} for way in found}


def loaded(kind: str, tiny_wan: dict[str, Path]) -> tuple[Any, Any]:
    from diffusers import WanTransformer3DModel

    folder = digits.path() if kind == "digits" else tiny_wan[kind]
    model = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").eval()
    return ported(model), model


def named(pairing: Pairing, side: str) -> set[str]:
    return {name for pair in pairing.pairs for name in getattr(pair, side)}


def test_everything_with_parameters_is_paired(models: tuple[Any, Any]) -> None:
    port, model = models
    pairing = pair_modules(port, model)
    assert not pairing.ambiguous
    assert not pairing.odd
    for side, module in (("actual", port), ("reference", model)):
        wanted = {name for name, _ in module.named_parameters()}
        wanted |= {n or "" for n, m in module.named_modules() if list(m.parameters())}
        assert wanted <= named(pairing, side)
    bare = pair_modules(port.state_dict(), model.state_dict())
    assert bare.complete
    assert bare.of("parameter") == pairing.of("parameter")


@pytest.mark.parametrize("kind", ["wan22", "wan22-ti2v"])
def test_other_kinds(kind: str, tiny_wan: dict[str, Path]) -> None:
    port, model = loaded(kind, tiny_wan)
    pairing = pair_modules(port.state_dict(), model.state_dict())
    assert pairing.complete
    assert not pairing.odd


def test_the_pairs_are_the_right_ones(models: tuple[Any, Any]) -> None:
    port, model = models
    pairing = pair_modules(port, model)
    found = {pair.actual: pair for pair in pairing.pairs}
    width = port.config.width
    fused = found[("layers.1.self_attn.qkv.weight",)]
    assert fused.reference == tuple(f"blocks.1.attn1.to_{x}.weight" for x in "qkv")
    assert fused.parts == tuple(f"{i * width}:{(i + 1) * width}" for i in range(3))
    assert fused.evidence is Evidence.FUSED
    assert fused.rel_l2 == 0
    assert found[("patch_in.weight",)].evidence is Evidence.RESHAPED
    assert found[("head",)].reference == ("proj_out", "scale_shift_table")
    rename = pairing.rename()
    for i in range(port.config.num_layers):
        assert rename[f"layers.{i}"] == f"blocks.{i}"
        assert rename[f"layers.{i}.self_attn"] == f"blocks.{i}.attn1"
        assert rename[f"layers.{i}.self_attn.out"] == f"blocks.{i}.attn1.to_out.0"
        assert rename[f"layers.{i}.cross"] == f"blocks.{i}.attn2"
        assert rename[f"layers.{i}.mlp.up"] == f"blocks.{i}.ffn.net.0.proj"
        assert rename[f"layers.{i}.norm_in"] == f"blocks.{i}.norm1"  # by its position
    assert rename["text_mlp.act"] == "condition_embedder.text_embedder.act_1"


def test_the_other_way_round(models: tuple[Any, Any]) -> None:
    port, model = models
    forth, back = pair_modules(port, model), pair_modules(model, port)
    assert not back.ambiguous
    assert not back.odd
    links = {(a, r) for p in forth.of("parameter") for a in p.actual for r in p.reference}
    assert links == {(a, r) for p in back.of("parameter") for r in p.actual for a in p.reference}


def part(state: State, name: str, index: int, of: int) -> Tensor:
    return state[name].chunk(of)[index]


def zeroed_bias(state: State) -> None:
    state["layers.1.self_attn.out.bias"].zero_()


def zeroed_part(state: State) -> None:
    part(state, "layers.1.self_attn.qkv.bias", 1, 3).zero_()


def scaled_weight(state: State) -> None:
    state["layers.1.mlp.up.weight"].mul_(1.01)


def scaled_part(state: State) -> None:
    part(state, "layers.1.cross.kv.weight", 0, 2).mul_(1.01)


def transposed(state: State) -> None:
    weight = state["layers.1.self_attn.out.weight"]
    weight.copy_(weight.T.clone())


def transposed_part(state: State) -> None:
    weight = part(state, "layers.1.self_attn.qkv.weight", 0, 3)
    weight.copy_(weight.T.clone())


def transposed_outside(state: State) -> None:
    weight = state["time_mlp.down.weight"]
    weight.copy_(weight.T.clone())


def swapped_weights(state: State) -> None:
    q, k, v = state["layers.1.self_attn.qkv.weight"].chunk(3)
    state["layers.1.self_attn.qkv.weight"].copy_(torch.cat((k, q, v)))


def other_checkpoint(name: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        generator = torch.Generator().manual_seed(3)
        old = state[name]
        old.copy_(torch.randn(old.shape, generator=generator) * old.std() + old.mean())

    change.__name__ = name
    return change


FAULTS: dict[Callable[[State], None], tuple[str, str]] = {
    zeroed_bias: ("layers.1.self_attn.out.bias", "by exclusion, content differs: rel_l2 1"),
    zeroed_part: ("layers.1.self_attn.qkv.bias", "by exclusion, content differs: rel_l2 1"),
    scaled_weight: ("layers.1.mlp.up.weight", "scaled: rel_l2 0.01; x 1.01"),
    scaled_part: ("layers.1.cross.kv.weight", "scaled: rel_l2 0.01; x 1.01"),
    transposed: ("layers.1.self_attn.out.weight", "transposed; axes 1 0"),
    transposed_part: ("layers.1.self_attn.qkv.weight", "axes 1 and 0 exchanged"),
    transposed_outside: ("time_mlp.down.weight", "transposed; axes 1 0"),
    swapped_weights: ("layers.1.self_attn.qkv.weight", "by exclusion, content differs: rel_l2 1"),
    **{
        other_checkpoint(name): (name, "by exclusion, content differs: rel_l2")
        for name in (
            "patch_in.weight",
            "layers.0.modulation",
            "layers.1.self_attn.qkv.weight",
            "layers.1.self_attn.q_norm.scale",
            "layers.1.cross_norm.gain",
            "layers.0.cross.kv.bias",
            "time_modulation.bias",
            "head.modulation",
        )
    },
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", ["port is actual", "port is reference"])
def test_one_fault_is_the_odd_one_out(
    models: tuple[Any, Any],
    right: dict[bool, set[tuple[object, object]]],
    fault: Callable[[State], None],
    way: str,
) -> None:
    port, model = models
    good, theirs = port.state_dict(), model.state_dict()
    bad = {name: tensor.clone() for name, tensor in good.items()}
    fault(bad)
    name, words = FAULTS[fault]
    forward = way == "port is actual"
    found = pair_modules(bad, theirs) if forward else pair_modules(theirs, bad)
    side = "actual" if forward else "reference"
    assert [getattr(pair, side) for pair in found.odd] == [(name,)]
    # The other way round the numbers are of the other side: a zero reference, a factor below one.
    assert (words if forward else words.split()[0]) in found.odd[0].text()
    assert found.complete
    # Nothing else is led astray.
    assert {(p.actual, p.reference) for p in found.pairs} == right[forward]
    modules = [p for p in found.of("module") if p.odd]
    assert name.rpartition(".")[0] in {n for p in modules for n in getattr(p, side)}


def test_queries_and_keys_swapped_with_their_biases(models: tuple[Any, Any]) -> None:
    port, model = models
    bad = {name: tensor.clone() for name, tensor in port.state_dict().items()}
    for kind in ("weight", "bias"):
        q, k, v = bad[f"layers.1.self_attn.qkv.{kind}"].chunk(3)
        bad[f"layers.1.self_attn.qkv.{kind}"] = torch.cat((k, q, v))
    found = pair_modules(bad, model)
    assert [pair.actual[0] for pair in found.odd] == [
        "layers.1.self_attn.qkv.weight",
        "layers.1.self_attn.qkv.bias",
    ]
    assert found.odd[0].reference == tuple(f"blocks.1.attn1.to_{x}.weight" for x in "qkv")
    assert "ODD" in found.table().splitlines()[1]


def test_layers_in_another_order(models: tuple[Any, Any]) -> None:
    """The content of whole layers says which is which, whatever their numbers."""
    port, model = models
    numbers = {"0": "1", "1": "0"}
    bad = {}
    for name, tensor in port.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = numbers.get(parts[1], parts[1])
        bad[".".join(parts)] = tensor
    found = pair_modules(bad, model.state_dict())
    assert found.complete
    assert not found.odd
    assert found.rename()["layers.0.cross"] == "blocks.1.attn2"


def test_a_lost_layer_is_listed_and_its_block_still_pairs(models: tuple[Any, Any]) -> None:
    port, model = models
    state = port.state_dict()
    bad = {n: t for n, t in state.items() if not n.startswith("layers.1.mlp.down.")}
    bad["layers.1.gate.weight"] = torch.eye(5)
    found = pair_modules(bad, model.state_dict())
    assert found.unmatched_actual == ("layers.1.gate.weight", "layers.1.gate")
    lost = "blocks.1.ffn.net.2"
    assert set(found.unmatched_reference) >= {f"{lost}.weight", f"{lost}.bias", lost}
    block = next(p for p in found.of("module") if p.actual == ("layers.1",))
    assert block.reference == ("blocks.1",)
    assert (block.evidence, block.odd) == (Evidence.STRUCTURE, True)
    assert found.rename()[""] == ""


def test_equal_names_win_over_contents_that_changed_places(models: tuple[Any, Any]) -> None:
    state = models[1].state_dict()
    bad = dict(state)
    first, second = "blocks.1.attn1.to_q.weight", "blocks.1.attn1.to_k.weight"
    bad[first], bad[second] = state[second], state[first]
    found = pair_modules(bad, state)
    assert found.complete
    assert [(p.actual, p.reference) for p in found.odd] == [
        ((first,), (first,)),
        ((second,), (second,)),
    ]
    assert all(p.evidence is Evidence.NAME for p in found.of("parameter"))
    assert f"holds the content of {second}" in found.odd[0].note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_lower_precision(models: tuple[Any, Any], dtype: torch.dtype) -> None:
    port, model = models
    low = {n: t.to(dtype) if t.ndim == 2 else t for n, t in port.state_dict().items()}
    found = pair_modules(low, model.state_dict())
    assert found.complete
    assert not [pair for pair in found.odd if "modulation" not in pair.actual[0]]
    pair = next(p for p in found.pairs if p.actual == ("head.proj.weight",))
    if torch.equal(low["head.proj.weight"].float(), model.proj_out.weight):
        assert pair.evidence is Evidence.EQUAL  # the digits model is stored in float16
    else:
        assert pair.evidence is Evidence.PRECISION
        assert 0 < (pair.rel_l2 or 0) < 0.05


def traced(model: Any, *, sketched: bool) -> State:
    """Outputs of every module in one forward."""
    found: State = {}
    handles = []
    for name, module in model.named_modules():

        def keep(_m: Any, _a: Any, output: Any, *, name: str = name) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor):
                value = sketch(tensor) if sketched else tensor.detach().clone()
                prefix = "sketch/" if sketched else ""
                found[f"{prefix}module/{name}/0/cond/out.0"] = value

        handles.append(module.register_forward_hook(keep))
    generator = torch.Generator().manual_seed(1)
    config = model.config
    with torch.no_grad():
        model(
            hidden_states=torch.randn(1, config.in_channels, 3, 8, 8, generator=generator),
            timestep=torch.tensor([731.0]),
            encoder_hidden_states=torch.randn(1, 9, config.text_dim, generator=generator),
            return_dict=False,
        )
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("sketched", [False, True])
def test_activations_pair_what_has_no_parameters(models: tuple[Any, Any], sketched: bool) -> None:
    port, model = models
    before = pair_modules(port, model)
    traces = (traced(port, sketched=sketched), traced(model, sketched=sketched))
    pairing = pair_activations(before, *traces)
    assert not pairing.unmatched_actual
    assert not pairing.ambiguous
    rename = pairing.rename()
    last = port.config.num_layers - 1
    assert rename[f"layers.{last}.norm_mlp"] == f"blocks.{last}.norm3"
    assert rename["head.norm"] == "norm_out"
    assert rename["layers.0.mlp.act"] == "blocks.0.ffn.net.0"
    assert rename["layers.0.mlp.up"] == before.rename()["layers.0.mlp.up"]


def test_activations_alone(models: tuple[Any, Any]) -> None:
    port, model = models
    traces = (traced(port, sketched=False), traced(model, sketched=False))
    pairing = pair_activations(Pairing(), *traces)
    found = {pair.actual: pair for pair in pairing.pairs}
    # `b c f h w` from a convolution against `b l c` from a linear layer.
    assert found[("patch_in",)].reference == ("patch_embedding",)
    fused = found[("layers.1.self_attn.qkv",)]
    assert fused.reference == tuple(f"blocks.1.attn1.to_{x}" for x in "qkv")
    assert fused.note == "concatenated"
    # What returns the same as its own child is not told apart without parameters.
    groups = {name for group in pairing.ambiguous for name in group.actual}
    assert {"layers.0.mlp", "layers.0.mlp.down"} <= groups
    assert not pairing.unmatched_actual


def big_model(layers: int, width: int) -> State:
    """Names and kinds of tensors of a 14B model, with few numbers in each."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    state = {
        "patch_embedding.weight": make(width, 16, 1, 2, 2),
        "patch_embedding.bias": make(width),
    }
    for embedder, first in (("time", 32), ("text", 40)):
        for index, inward in ((1, first), (2, width)):
            name = f"condition_embedder.{embedder}_embedder.linear_{index}"
            state |= {f"{name}.weight": make(width, inward), f"{name}.bias": make(width)}
    state["condition_embedder.time_proj.weight"] = make(6 * width, width)
    state["condition_embedder.time_proj.bias"] = make(6 * width)
    for i in range(layers):
        block = f"blocks.{i}."
        state[f"{block}scale_shift_table"] = make(1, 6, width)
        for attention in ("attn1", "attn2"):
            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                state[f"{block}{attention}.{layer}.weight"] = make(width, width)
                state[f"{block}{attention}.{layer}.bias"] = make(width)
            for norm in ("norm_q", "norm_k"):
                state[f"{block}{attention}.{norm}.weight"] = 1 + 0.1 * make(width)
        state[f"{block}norm2.weight"] = 1 + 0.1 * make(width)
        state[f"{block}norm2.bias"] = 0.1 * make(width)
        for layer, shape in (("0.proj", (3 * width, width)), ("2", (width, 3 * width))):
            state[f"{block}ffn.net.{layer}.weight"] = make(*shape)
            state[f"{block}ffn.net.{layer}.bias"] = make(shape[0])
    state |= {"proj_out.weight": make(64, width), "proj_out.bias": make(64)}
    state["scale_shift_table"] = make(1, 2, width)
    return state


def test_as_many_tensors_as_a_14b_model() -> None:
    reference = big_model(40, 48)
    assert len(reference) == 1095
    low = {n: t.to(torch.bfloat16) for n, t in convert(reference).items()}
    pairing = pair_modules(low, reference)
    assert pairing.complete
    assert not pairing.odd
    assert pairing.rename()["layers.39.mlp.down"] == "blocks.39.ffn.net.2"


def test_untrained_weights_are_not_guessed() -> None:
    reference = big_model(3, 32)
    for name, tensor in reference.items():
        if tensor.ndim == 1:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    pairing = pair_modules(convert(reference), reference)
    # Zero biases and the norm before cross-attention follow their siblings; the norms of queries
    # and keys are equal and side by side: nothing decides.
    assert not pairing.odd
    groups = {group.actual: group.reference for group in pairing.ambiguous}
    assert groups == {
        (f"layers.{i}.{own}.k_norm.scale", f"layers.{i}.{own}.q_norm.scale"): (
            f"blocks.{i}.{theirs}.norm_k.weight",
            f"blocks.{i}.{theirs}.norm_q.weight",
        )
        for i in range(3)
        for own, theirs in (("self_attn", "attn1"), ("cross", "attn2"))
    }
    bias = next(p for p in pairing.pairs if p.actual == ("layers.2.mlp.up.bias",))
    assert bias.reference == ("blocks.2.ffn.net.0.proj.bias",)
    assert bias.evidence is Evidence.STRUCTURE
    assert pairing.rename()["layers.1.self_attn"] == "blocks.1.attn1"
    assert "layers.1.self_attn.q_norm" in pairing.unmatched_actual
    mapped = pair_modules(
        convert(reference),
        reference,
        rename={
            "layers.*.self_attn.q_norm.scale": "blocks.*.attn1.norm_q.weight",
            "layers.*.cross.q_norm.scale": "blocks.*.attn2.norm_q.weight",
        },
    )
    assert mapped.complete
