"""Which module answers to which: fused and split layers, exchanged weights, rename maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.parity.wan_port.port import ported
from tests.replay.models import diffusers_wan, exchanged_wan, wan_inputs
from truestep.errors import UsageError
from truestep.models import digits
from truestep.pairing.partners import Part, Partners, check_rename, partners_of
from truestep.replay.drill import Subject, drill


@pytest.fixture(scope="module")
def wan(tiny_wan: dict[str, Path]) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(tiny_wan["wan21"], subfolder="transformer").eval()


def test_models_of_the_same_names_need_no_solver(wan: Any) -> None:
    assert partners_of(wan, wan) is None


def test_a_fused_layer_answers_to_several(wan: Any) -> None:
    found = partners_of(ported(wan), wan)
    assert found is not None
    width = 32
    assert found.candidate("layers.1.self_attn.qkv") == tuple(
        Part(f"blocks.1.attn1.to_{name}", tuple(range(i * width, (i + 1) * width)))
        for i, name in enumerate("qkv")
    )
    assert found.candidate("layers.1.self_attn") == (Part("blocks.1.attn1"),)
    assert found.candidate("patch_in") == (Part("patch_embedding"),)
    assert found.candidate("head") == ()
    assert "rope" in found.unmatched
    assert "norm_out" in found.unmatched
    assert "blocks.0.attn1.to_q" not in found.unmatched
    assert found.note().startswith(f"paired {found.paired} of ")
    assert found.note().endswith(f"and {len(found.unmatched) - 4} more")


def test_a_fused_trusted_layer_is_cut(wan: Any) -> None:
    found = partners_of(wan, ported(wan))
    assert found is not None
    parts = found.trusted("layers.0.cross.kv")
    assert [part.fqn for part in parts] == [
        "layers.0.cross.kv[0:32]",
        "layers.0.cross.kv[32:64]",
    ]
    assert found.candidate("blocks.0.attn2.to_k") == (Part("layers.0.cross.kv[0:32]"),)
    assert found.candidate("blocks.0.attn2.to_v") == (Part("layers.0.cross.kv[32:64]"),)
    assert "layers.0.cross.kv" not in found.unmatched


def test_weights_in_the_wrong_place_do_not_lead_astray(wan: Any) -> None:
    right = partners_of(ported(wan), wan)
    assert right is not None

    def exchanged(first: torch.Tensor, second: torch.Tensor) -> None:
        kept = first.data.clone()
        first.data.copy_(second.data)
        second.data.copy_(kept)

    port = ported(wan)
    port.load_state_dict({k: v.clone() for k, v in port.state_dict().items()}, assign=True)
    a, b = (port.layers[i].self_attn.qkv.weight.data[:32] for i in (0, 1))
    exchanged(a, b)  # the queries of two layers
    found = partners_of(port, wan)
    assert found is not None
    lost = {name for name, parts in right.own.items() if found.candidate(name) != parts}
    assert lost == {"layers.0.norm_in", "layers.1.norm_in"}  # without weights, paired by place
    values = port.layers[1].self_attn.qkv.weight.data[64:]
    values.copy_(values.flip(0))  # rows in another order
    found = partners_of(port, wan)
    assert found is not None
    assert found.own["layers.1.self_attn.qkv"] == right.own["layers.1.self_attn.qkv"]


def test_a_map_goes_before_the_solver(wan: Any) -> None:
    rename = {"layers.*.norm_mlp": "blocks.*.norm3", "head.norm": "norm_out"}
    port = ported(wan)
    check_rename(rename, candidate=[port, None], trusted=[wan])
    found = partners_of(port, wan, rename=rename)
    assert found is not None
    assert found.candidate("layers.1.norm_mlp") == (Part("blocks.1.norm3"),)
    assert found.candidate("head.norm") == (Part("norm_out"),)
    assert "norm_out" not in found.unmatched
    moved = partners_of(port, wan, rename={"layers.0.self_attn.q_norm": "blocks.0.attn1.norm_k"})
    assert moved is not None
    assert moved.candidate("layers.0.self_attn.q_norm") == (Part("blocks.0.attn1.norm_k"),)
    assert moved.candidate("layers.0.self_attn.k_norm") == ()


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"layers.*.norm_mpl": "blocks.*.norm3"}, "matches no module of the candidate"),
        ({"layers.*.norm_mlp": "blocks.*.norm4"}, "leads to no module of the trusted model"),
    ],
)
def test_a_map_of_names_that_there_are_not_is_refused(
    wan: Any, rename: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_rename(rename, candidate=[ported(wan)], trusted=[wan])
    assert "the closest: " in str(caught.value)


def test_a_part_is_a_slice_of_the_last_axis() -> None:
    x = torch.arange(12.0).view(1, 2, 6)
    assert torch.equal(Part("k", (2, 3)).of(x), x[..., 2:4])
    assert Part("k").of(x) is x
    assert Part("k", (6, 7)).of(x) is x


def test_a_complete_pairing_lists_nothing() -> None:
    assert Partners(paired=3).note() == "paired 3 of 3 modules of the trusted model"


def test_heads_side_by_side_in_a_fused_layer_are_found() -> None:
    class Apart(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.Module()
            for name in "qkv":
                setattr(self.attn, name, torch.nn.Linear(16, 16))
            self.attn.norm = torch.nn.LayerNorm(16)
            self.attn.out = torch.nn.Linear(16, 16)
            for parameter in self.parameters():
                torch.nn.init.normal_(parameter)

    class Fused(torch.nn.Module):
        def __init__(self, source: Any) -> None:
            super().__init__()
            self.mix = torch.nn.Module()
            self.mix.all = torch.nn.Linear(16, 48)
            parts = [getattr(source.attn, name) for name in "qkv"]
            for kind in ("weight", "bias"):  # q k v of head 0, then those of head 1
                rows = [getattr(part, kind).data.unflatten(0, (2, 8)) for part in parts]
                getattr(self.mix.all, kind).data = torch.stack(rows, dim=1).flatten(0, 2)
            self.mix.scaling = torch.nn.LayerNorm(16)
            self.mix.scaling.load_state_dict(source.attn.norm.state_dict())
            self.mix.last = torch.nn.Linear(16, 16)
            self.mix.last.load_state_dict(source.attn.out.state_dict())

    torch.manual_seed(0)
    apart = Apart()
    found = partners_of(Fused(apart), apart)
    assert found is not None
    keys = next(part for part in found.candidate("mix.all") if part.fqn == "attn.k")
    assert keys.rows == (*range(8, 16), *range(32, 40))


def test_digits_is_paired_but_for_what_the_port_computes_inline() -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(digits.path(), subfolder="transformer").eval()
    found = partners_of(ported(model), model)
    assert found is not None
    inline = {name.rpartition(".")[2] for name in found.unmatched}
    # `1`: dropout; `0`: the layer and its activation in one, which the port has apart.
    assert inline == {
        *("rope", "condition_embedder", "timesteps_proj", "act_fn", "norm_out", "norm3", "0", "1")
    }


def test_namesakes_that_mean_other_modules_are_told_by_their_weights() -> None:
    found = partners_of(exchanged_wan(), diffusers_wan())
    assert found is not None
    for layer in range(3):
        assert found.candidate(f"blocks.{layer}.norm3") == (Part(f"blocks.{layer}.norm2"),)
        assert found.candidate(f"blocks.{layer}.norm2") == (Part(f"blocks.{layer}.norm3"),)
        assert found.candidate(f"blocks.{layer}.attn1.to_q") == (
            Part(f"blocks.{layer}.attn1.to_q"),
        )
    assert not found.unmatched


def test_weights_that_one_layer_has_exchanged_are_not_a_name() -> None:
    ours = diffusers_wan()
    attention: Any = ours.blocks[1].attn1  # type: ignore[union-attr]
    attention.to_q, attention.to_k = attention.to_k, attention.to_q
    assert partners_of(ours, diffusers_wan()) is None
    other = exchanged_wan()
    attention = other.blocks[1].attn1  # type: ignore[union-attr]
    attention.to_q, attention.to_k = attention.to_k, attention.to_q
    found = partners_of(other, diffusers_wan())
    assert found is not None
    assert found.candidate("blocks.1.attn1.to_q") == (Part("blocks.1.attn1.to_q"),)


@pytest.mark.parametrize("fault", [False, True])
def test_a_port_whose_names_mean_other_modules_is_opened_rightly(fault: bool) -> None:
    ours, theirs = exchanged_wan(), diffusers_wan()
    if fault:
        ours.blocks[1].norm3.bias.data.add_(0.3)  # type: ignore[union-attr, operator]
    given = wan_inputs()
    drilled = drill(
        Subject(ours, lambda: ours(*given)),
        Subject(theirs, lambda: theirs(*given)),
        place=(0, "main"),
        partners=partners_of(ours, theirs),
    )
    place = drilled.divergence
    assert (place.fqn if place else None) == ("blocks.1.norm2" if fault else None)
