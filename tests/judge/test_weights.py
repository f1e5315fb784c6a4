"""Two checkpoints under whatever names: right conversions pass, and each fault is named."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from truestep.errors import UsageError
from truestep.judge.weights import compare_weights
from truestep.recording.format import Recording
from truestep.recording.manifest import Manifest
from truestep.recording.table import tensor_table
from truestep.verdict import Comparison, Verdict

State = dict[str, torch.Tensor]
WIDTH, LAYERS = 48, 4
NAMES = (
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)
KEY = "blocks.1.attn1.to_k.weight"
OFFICIAL = "blocks.1.self_attn.k.weight"


def build() -> tuple[State, State]:
    """One model under its official names and under those of diffusers, float32."""
    generator = torch.Generator().manual_seed(0)
    official: State = {}
    port: State = {}
    for layer in range(LAYERS):
        for own, other in NAMES:
            shape = {"ffn.0": (2 * WIDTH, WIDTH), "ffn.2": (WIDTH, 2 * WIDTH)}.get(
                own, (WIDTH, WIDTH)
            )
            weight = torch.randn(shape, generator=generator) * 0.02
            bias = torch.randn(shape[0], generator=generator) * 0.02
            for leaf, tensor in (("weight", weight), ("bias", bias)):
                official[f"blocks.{layer}.{own}.{leaf}"] = tensor
                port[f"blocks.{layer}.{other}.{leaf}"] = tensor.clone()
        for norm in ("norm_q", "norm_k"):
            tensor = 1 + torch.randn(WIDTH, generator=generator) * 0.02
            official[f"blocks.{layer}.self_attn.{norm}.weight"] = tensor
            port[f"blocks.{layer}.attn1.{norm}.weight"] = tensor.clone()
    return port, official


PORT, REFERENCE = build()


def cast(dtype: torch.dtype) -> Callable[[State], State]:
    return lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}


def changed(
    change: Callable[[State], object], base: Callable[[State], State] | None = None
) -> State:
    """The port in bfloat16 with something changed."""
    state = (base or cast(torch.bfloat16))(PORT)
    change(state)
    return state


def fused(state: State, *, heads: int = 0, order: str = "qkv") -> State:
    """Query, key and value in one tensor, one after another or head by head."""
    found: State = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if not stem.endswith(("to_q", "to_k", "to_v")):
            found[name] = tensor
            continue
        around = stem[:-5]
        parts = [state[f"{around}.to_{one}.{leaf}"] for one in order]
        if heads:
            parts = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
            whole = torch.cat(parts, 1).reshape(-1, *tensor.shape[1:])
        else:
            whole = torch.cat(parts)
        found[f"{around}.to_qkv.{leaf}"] = whole.contiguous()
    return found


def permuted(state: State, *, but: str = "") -> State:
    """Rows of queries and keys in another order, as another kind of rotary embedding wants them."""
    order = torch.arange(WIDTH).reshape(2, -1).T.reshape(-1)
    named = ("to_q.", "to_k.", "norm_q.", "norm_k.")
    return {
        name: tensor[order] if any(part in name for part in named) and name != but else tensor
        for name, tensor in state.items()
    }


def quantised(
    state: State, dtype: torch.dtype = torch.float8_e4m3fn, *, rows: bool = True
) -> State:
    """Matrices as codes, with a stored scale a row or for all."""
    largest = float(torch.finfo(dtype).max) if dtype.is_floating_point else 127.0
    found: State = {}
    for name, tensor in state.items():
        if tensor.ndim < 2:
            found[name] = tensor
            continue
        wide = tensor.float()
        scale = (wide.abs().amax(1, keepdim=True) if rows else wide.abs().max()) / largest
        codes = wide / scale
        codes = codes if dtype.is_floating_point else codes.round()
        found[name] = codes.clamp(-largest, largest).to(dtype)
        found[f"{name}_scale" if rows else f"{name[:-6]}scale_weight"] = scale
    return found


RIGHT: Mapping[str, tuple[State, State]] = {
    "renamed": (PORT, REFERENCE),
    "bfloat16": (cast(torch.bfloat16)(PORT), REFERENCE),
    "float16": (cast(torch.float16)(PORT), REFERENCE),
    "widened": (
        cast(torch.float32)(cast(torch.bfloat16)(PORT)),
        cast(torch.bfloat16)(REFERENCE),
    ),
    "fused": (fused(cast(torch.bfloat16)(PORT)), REFERENCE),
    "fused by head": (fused(cast(torch.bfloat16)(PORT), heads=6), REFERENCE),
    "split": (cast(torch.bfloat16)(PORT), fused(PORT)),
    "rotary order": (permuted(cast(torch.bfloat16)(PORT)), REFERENCE),
    "convolutions of size 1": (
        {n: t[:, :, None, None] if t.ndim == 2 else t for n, t in PORT.items()},
        REFERENCE,
    ),
    "transposed": ({n: t.T.contiguous() if t.ndim == 2 else t for n, t in PORT.items()}, REFERENCE),
    "float8, a scale a row": (quantised(PORT), REFERENCE),
    "float8 of bfloat16": (
        quantised(cast(torch.bfloat16)(PORT), rows=False),
        cast(torch.bfloat16)(REFERENCE),
    ),
    "int8": (quantised(PORT, torch.int8), REFERENCE),
    "both in float8": (quantised(PORT), quantised(REFERENCE)),
    "float8, fused": (quantised(fused(PORT)), REFERENCE),
    "numbered from the other end": (
        {f"blocks.{LAYERS - 1 - int(n[7])}{n[8:]}": t for n, t in PORT.items()},
        REFERENCE,
    ),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_right_conversions_pass(kind: str) -> None:
    actual, reference = RIGHT[kind]
    found = compare_weights(actual, reference)
    assert found.verdict.passed, found.sentence
    assert {row.verdict for row in found.rows} <= {Verdict.IDENTICAL, Verdict.EQUIVALENT}
    judged = sum(math.prod(row.actual.shape) for row in found.rows if row.actual)
    assert judged >= sum(tensor.numel() for tensor in PORT.values())


def swap(state: State, one: str, other: str) -> None:
    state[one], state[other] = state[other], state[one]


def swap_layers(state: State) -> None:
    for name in [name for name in state if name.startswith("blocks.1.")]:
        swap(state, name, f"blocks.2.{name[9:]}")


def of_fused(change: Callable[[torch.Tensor], object]) -> State:
    state = fused(cast(torch.bfloat16)(PORT))
    change(state["blocks.1.attn1.to_qkv.weight"])
    return state


def swap_parts(tensor: torch.Tensor) -> None:
    tensor[: 2 * WIDTH] = torch.cat([tensor[WIDTH : 2 * WIDTH], tensor[:WIDTH]])


def truncated(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.view(torch.int32) & -65536).view(torch.float32).bfloat16()


def scaled_codes() -> State:
    state = quantised(PORT)
    state[f"{KEY}_scale"] = state[f"{KEY}_scale"] * 1.01
    return state


def mirrored_codes() -> State:
    state = quantised(PORT)
    state[KEY] = state[KEY].float().flip(0).to(torch.float8_e4m3fn)
    return state


VALUE = "blocks.1.attn1.to_v.weight"
WRONG: Mapping[str, tuple[State, tuple[str, ...], str]] = {
    "truncated": (
        changed(lambda s: s.update({KEY: truncated(PORT[KEY])})),
        (OFFICIAL,),
        "are not the nearest bfloat16",
    ),
    "through float16": (
        changed(lambda s: s.update({KEY: PORT[KEY].half().bfloat16()})),
        (OFFICIAL,),
        "they are of the other side rounded to float16",
    ),
    "key and value swapped": (
        changed(lambda s: swap(s, KEY, VALUE)),
        (OFFICIAL, "blocks.1.self_attn.v.weight"),
        "holds the content of blocks.1.self_attn.v.weight",
    ),
    "biases swapped": (
        changed(lambda s: swap(s, KEY.replace("weight", "bias"), VALUE.replace("weight", "bias"))),
        ("blocks.1.self_attn.k.bias", "blocks.1.self_attn.v.bias"),
        "holds the content of blocks.1.self_attn.v.bias",
    ),
    "a bias dropped": (
        changed(lambda s: s.update({"blocks.1.attn1.to_k.bias": torch.zeros(WIDTH).bfloat16()})),
        ("blocks.1.self_attn.k.bias",),
        f"{WIDTH} of {WIDTH} elements are not the nearest",
    ),
    "transposed": (
        changed(lambda s: s.update({KEY: s[KEY].T.contiguous()})),
        (OFFICIAL,),
        "others of its kind: as it is",
    ),
    "parts swapped": (
        of_fused(swap_parts),
        ("blocks.1.self_attn.q.weight", OFFICIAL),
        "holds the content of blocks.1.self_attn.k.weight",
    ),
    "a row of a part": (
        of_fused(lambda t: t[WIDTH + 3].mul_(1.02)),
        (OFFICIAL,),
        "elements are not the nearest bfloat16",
    ),
    "one layer not permuted": (
        permuted(cast(torch.bfloat16)(PORT), but=KEY),
        (OFFICIAL, "blocks.1.self_attn.k.bias"),
        f"in other layers: [{WIDTH} rows in another order] of the actual side",
    ),
    "a scale": (scaled_codes(), (OFFICIAL,), "are not the nearest float8_e4m3fn with its scale"),
    "codes mirrored": (
        mirrored_codes(),
        (OFFICIAL,),
        "are not the nearest float8_e4m3fn with its scale",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_faults_are_found_and_named(kind: str) -> None:
    actual, names, words = WRONG[kind]
    found = compare_weights(actual, REFERENCE)
    assert found.verdict is Verdict.DRIFTED
    failing = {row.name: row.note for row in found.failing}
    assert sorted(failing) == sorted(names)
    assert words in failing[names[0]]
    assert "in actual: blocks.1.attn1.to_" in failing[names[0]]


def prefixed(state: State) -> State:
    return {f"model.{name}": tensor for name, tensor in state.items()}


def moved(pairs: Mapping[str, str]) -> State:
    """The port with some tensors where others were."""
    return PORT | {name: PORT[other] for name, other in pairs.items()}


def cycle(pattern: str, by: int = 1) -> dict[str, str]:
    """Names of a kind, each to that of a layer further on."""
    return {pattern.format(i): pattern.format((i + by) % LAYERS) for i in range(LAYERS)}


def both(one: str, other: str) -> dict[str, str]:
    return {one: other, other: one}


ELSEWHERE: Mapping[str, tuple[State, str]] = {
    "one kind of two layers": (
        moved(both("blocks.1.attn1.to_k.weight", "blocks.2.attn1.to_k.weight")),
        "holds the content of blocks.",
    ),
    "one kind, a layer off everywhere": (
        moved(cycle("blocks.{}.ffn.net.0.proj.weight") | cycle("blocks.{}.ffn.net.0.proj.bias")),
        "holds the content of blocks.",
    ),
    "biases of two modules": (
        moved(both("blocks.1.attn1.to_q.bias", "blocks.2.attn1.to_v.bias")),
        "blocks.",
    ),
    "biases of two modules in all layers": (
        moved(
            {
                name: other
                for i in range(LAYERS)
                for name, other in both(
                    f"blocks.{i}.attn1.to_q.bias", f"blocks.{i}.attn1.to_k.bias"
                ).items()
            }
        ),
        "would be of two modules",
    ),
    "a weight for a bias": (
        {name.replace("norm_q.weight", "norm_q.bias"): tensor for name, tensor in PORT.items()},
        "a weight is a bias on the other side",
    ),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_content_at_another_place_is_no_conversion(kind: str, dtype: torch.dtype) -> None:
    state, words = ELSEWHERE[kind]
    found = compare_weights(cast(dtype)(state), REFERENCE)
    assert found.verdict is Verdict.DRIFTED, found.sentence
    assert any(words in row.note for row in found.failing)


def listed(state: State) -> State:
    """The port with its norms of queries and keys in lists, beside a second attention's."""
    lists = {".attn1.norm_q.weight": ".attn.1.scale.0", ".attn1.norm_k.weight": ".attn.1.scale.1"}
    second = {old.replace("attn1", "attn2"): new.replace("1", "0", 1) for old, new in lists.items()}
    made = {}
    for name, tensor in state.items():
        for old, new in (lists | second).items():
            name = name.replace(old, new)
        made[name] = tensor
    return made


def test_two_lists_of_parameters_in_a_layer_are_no_fault() -> None:
    """What a name means is told by two numbers together: which attention, queries or keys."""
    generator = torch.Generator().manual_seed(1)
    more = {
        f"blocks.{layer}.attn2.norm_{kind}.weight": 1 + torch.randn(WIDTH, generator=generator)
        for layer in range(LAYERS)
        for kind in "qk"
    }
    port = listed(PORT | more)
    reference = REFERENCE | {n.replace("attn2", "cross_attn"): t for n, t in more.items()}
    assert compare_weights(port, reference).verdict is Verdict.IDENTICAL
    for names in (
        ("blocks.1.attn.1.scale.0", "blocks.1.attn.1.scale.1"),
        ("blocks.1.attn.1.scale.0", "blocks.1.attn.0.scale.0"),
    ):
        swapped = port | {names[0]: port[names[1]], names[1]: port[names[0]]}
        found = compare_weights(swapped, reference)
        assert found.verdict is Verdict.DRIFTED, found.sentence
        assert {row.note.partition("in actual: ")[2] for row in found.failing} >= set(names)


def test_everything_in_another_place_is_no_conversion() -> None:
    """Every tensor where another of its shape was, in the whole model."""
    dice = random.Random(0)
    shapes: dict[torch.Size, list[str]] = {}
    for name, tensor in PORT.items():
        shapes.setdefault(tensor.shape, []).append(name)
    places = {}
    for names in shapes.values():
        places |= dict(zip(names, dice.sample(names, len(names)), strict=True))
    for state in (moved(places), prefixed({n: REFERENCE[n] for n in REFERENCE})):
        found = compare_weights(state, REFERENCE)
        assert found.verdict is (Verdict.DRIFTED if state.keys() == PORT.keys() else found.verdict)
    assert found.verdict is Verdict.IDENTICAL


def swapped_everywhere() -> State:
    """The reference with queries and keys exchanged in all layers, under its own names."""
    names = {
        name: name.replace(".q.", ".?.").replace(".k.", ".q.").replace(".?.", ".k.")
        for name in REFERENCE
    }
    return {name: REFERENCE[other] for name, other in names.items()}


def test_names_decide_where_nearly_all_are_equal() -> None:
    """So also behind a prefix, and where a few others are new."""
    wrong = swapped_everywhere()
    for state, reference in (
        (wrong, REFERENCE),
        (prefixed(wrong), REFERENCE),
        (wrong, prefixed(REFERENCE)),
        (wrong | {"new.bias": torch.ones(7)}, REFERENCE | {"old.bias": torch.ones(7)}),
    ):
        found = compare_weights(state, reference)
        assert found.verdict is Verdict.DRIFTED, found.sentence
        assert len(found.failing) == 4 * LAYERS
    assert compare_weights(prefixed(REFERENCE), REFERENCE).verdict is Verdict.IDENTICAL


def test_an_exchange_in_all_layers_under_other_names_is_noted() -> None:
    """Content cannot tell it; names of another implementation may."""
    names = {
        name: name.replace("norm_q", "?").replace("norm_k", "norm_q").replace("?", "norm_k")
        for name in PORT
    }
    found = compare_weights({name: PORT[other] for name, other in names.items()}, REFERENCE)
    assert found.verdict is Verdict.IDENTICAL
    assert found.notes == (
        "names say otherwise, content cannot: blocks.*.attn1.norm_q.weight is "
        "blocks.*.self_attn.norm_k.weight and blocks.*.attn1.norm_k.weight is "
        "blocks.*.self_attn.norm_q.weight",
    )
    assert compare_weights(PORT, REFERENCE).notes == ()


def test_halves_that_a_format_exchanges_are_found_in_codes() -> None:
    generator = torch.Generator().manual_seed(3)
    last = torch.randn(2 * WIDTH, WIDTH, generator=generator)
    own = quantised(PORT | {"norm_out.linear.weight": last})
    turned = torch.cat([last[WIDTH:], last[:WIDTH]])
    found = compare_weights(own, REFERENCE | {"final_layer.modulation.weight": turned})
    assert found.verdict is Verdict.EQUIVALENT, found.sentence


def test_roles_by_number_and_exceptions_of_a_layer_are_no_faults() -> None:
    """`mlp.0` and `mlp.2` of one shape, and a last layer that has a name of its own."""
    generator = torch.Generator().manual_seed(2)
    own: State = {}
    theirs: State = {}
    for layer in range(LAYERS):
        for role, name in (("0", "linear_1"), ("2", "linear_2")):
            tensor = torch.randn(8, 8, generator=generator)
            theirs[f"layers.{layer}.mlp.{role}.weight"] = tensor
            last = "last_" if layer == LAYERS - 1 and role == "2" else ""
            own[f"blocks.{layer}.{last}{name}.weight"] = tensor.clone()
    assert compare_weights(own, theirs).verdict is Verdict.IDENTICAL


def test_whole_numbers_do_not_wrap() -> None:
    table = torch.arange(8) + 2**32
    found = compare_weights({"a.weight": table.to(torch.int32)}, {"a.weight": table})
    assert found.verdict is Verdict.DRIFTED
    small = torch.arange(8)
    found = compare_weights({"a.weight": small.to(torch.int32)}, {"a.weight": small})
    assert found.verdict is Verdict.EQUIVALENT


def test_a_scale_is_of_the_axis_that_it_is_stored_along() -> None:
    wide = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    wide = wide * torch.logspace(-1, 1, 16)
    scale = wide.abs().amax(0, keepdim=True) / 448
    codes = (wide / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    state = {"a.weight": codes, "a.weight_scale": scale}
    assert compare_weights(state, {"a.weight": wide}).verdict is Verdict.EQUIVALENT
    state["a.weight_scale"] = scale.T.contiguous()
    assert compare_weights(state, {"a.weight": wide}).verdict is Verdict.DRIFTED


def test_empty_tensors_and_scales_of_activations() -> None:
    empty = {"none.weight": torch.empty(0, 3)}
    found = compare_weights(PORT | empty, REFERENCE | empty)
    assert found.verdict is Verdict.IDENTICAL
    state = quantised(PORT) | {f"{KEY.removesuffix('.weight')}.input_scale": torch.tensor(2.0)}
    found = compare_weights(state, REFERENCE)
    assert found.verdict is Verdict.EQUIVALENT
    assert found.not_looked_at == ("scales of activations: 1",)


def test_layers_that_changed_places_are_all_named() -> None:
    found = compare_weights(changed(swap_layers), REFERENCE)
    assert found.verdict is Verdict.DRIFTED
    assert {row.name.split(".")[1] for row in found.failing} in ({"1"}, {"2"})
    assert len(found.failing) == len(REFERENCE) // LAYERS
    assert "out of order" in found.failing[0].note


def test_a_bias_that_is_not_where_its_weight_is() -> None:
    """One layer alone, so that no other says which of both is right."""
    port, official = (
        {name: tensor for name, tensor in state.items() if name.startswith("blocks.1.")}
        for state in (PORT, REFERENCE)
    )
    state = fused(port)
    assert compare_weights(state, official).verdict is Verdict.IDENTICAL
    swap_parts(state["blocks.1.attn1.to_qkv.weight"])
    found = compare_weights(state, official)
    assert found.verdict is Verdict.DRIFTED
    stem = "blocks.1.self_attn"
    assert {row.name for row in found.failing} == {
        f"{stem}.{part}.{leaf}" for part in "qk" for leaf in ("weight", "bias")
    }
    assert found.failing[0].note.startswith(
        f"not in one place of the actual side: {stem}.q.weight at [{WIDTH}:{2 * WIDTH}], "
        f"{stem}.q.bias at [0:{WIDTH}]"
    )


def test_missing_and_extra_are_told() -> None:
    found = compare_weights(changed(lambda s: s.pop("blocks.1.attn1.to_k.bias")), REFERENCE)
    assert found.verdict is Verdict.MISSING
    assert [row.name for row in found.failing] == ["blocks.1.self_attn.k.bias"]
    extra = changed(lambda s: s.update({"head.weight": torch.randn(7, 5)}))
    found = compare_weights(extra, REFERENCE)
    assert found.verdict is Verdict.INCOMPARABLE
    assert [row.name for row in found.failing] == ["head.weight"]
    found = compare_weights(extra, REFERENCE, ignore=["head.*"])
    assert found.verdict is Verdict.EQUIVALENT
    assert found.not_looked_at == ("names to be ignored: 1",)
    with pytest.raises(UsageError, match=r"no name matches 'tail\.\*', which was to be ignored"):
        compare_weights(extra, REFERENCE, ignore=["tail.*"])


def test_nan_is_invalid() -> None:
    def damage(state: State) -> None:
        state[KEY][0, 0] = float("nan")

    found = compare_weights(changed(damage), REFERENCE)
    assert found.verdict is Verdict.INVALID
    assert [(row.name, row.note.partition(";")[0]) for row in found.failing] == [
        (OFFICIAL, "1 NaN in actual")
    ]


def test_equal_tensors_are_interchangeable_but_not_lost() -> None:
    def zeroed(state: State, key: str) -> State:
        return {n: torch.zeros_like(t) if n.endswith(key) else t for n, t in state.items()}

    port, official = zeroed(PORT, "bias"), zeroed(REFERENCE, "bias")
    assert compare_weights(port, official).verdict is Verdict.IDENTICAL
    del port["blocks.1.attn1.to_k.bias"]
    assert compare_weights(port, official).verdict is Verdict.MISSING


def test_equal_names_say_whose_content_they_hold() -> None:
    state = dict(REFERENCE)
    swap(state, OFFICIAL, "blocks.1.self_attn.v.weight")
    found = compare_weights(state, REFERENCE)
    assert [row.name for row in found.failing] == [OFFICIAL, "blocks.1.self_attn.v.weight"]
    assert "it holds the content of blocks.1.self_attn.v.weight" in found.failing[0].note
    assert found.looked_at == (f"{len(REFERENCE)} parameters by name",)


def test_a_rename_map_decides() -> None:
    names = {f"blocks.*.{other}": f"blocks.*.{own}" for own, other in NAMES} | {
        "blocks.*.attn1.norm_q": "blocks.*.self_attn.norm_q",
        "blocks.*.attn1.norm_k": "blocks.*.self_attn.norm_k",
    }
    swapped = changed(lambda s: swap(s, KEY, VALUE))
    found = compare_weights(swapped, REFERENCE, rename=names)
    assert [row.name for row in found.failing] == [OFFICIAL, "blocks.1.self_attn.v.weight"]
    assert found.looked_at == (f"{len(REFERENCE)} parameters: {len(REFERENCE)} by name",)


def sharded(folder: Path, state: State) -> Path:
    """A checkpoint in two files with its index."""
    folder.mkdir()
    names = list(state)
    table = {}
    for at, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name].contiguous() for name in part}, folder / f"m-{at}.safetensors")
        table |= dict.fromkeys(part, f"m-{at}.safetensors")
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def test_sharded_files_are_judged_as_what_is_in_memory(tmp_path: Path) -> None:
    port = sharded(tmp_path / "port", quantised(PORT))
    official = sharded(tmp_path / "official", REFERENCE)

    def told(found: Comparison) -> list[tuple[str, Verdict, str]]:
        return [(row.name, row.verdict, row.note) for row in found.rows]

    order = sorted(REFERENCE)
    in_files, in_memory = (
        compare_weights(port, official),
        compare_weights(quantised(PORT), REFERENCE),
    )
    assert in_files.verdict is in_memory.verdict is Verdict.EQUIVALENT
    assert sorted(told(in_files)) == sorted(told(in_memory))
    assert len(in_files.rows) == len(order)


def test_recordings_and_nothing_are_refused() -> None:
    tensors = {"latent/final": torch.randn(4, 4)}
    manifest = Manifest(tool_version="0", created="", level="full", tensors=tensor_table(tensors))
    recording = Recording.in_memory(tensors, manifest)
    with pytest.raises(UsageError, match="recordings are what models compute"):
        compare_weights(recording, REFERENCE)
    with pytest.raises(UsageError, match="the checkpoint holds no weights"):
        compare_weights({}, REFERENCE)


def test_what_is_laid_out_anew_is_said() -> None:
    found = compare_weights(fused(PORT), REFERENCE)
    count = 6 * LAYERS
    assert found.notes == (
        f"laid out anew: {count} as parts of a tensor, or with its rows in another order; right "
        "where the code that loads them expects it",
    )
    found = compare_weights(*RIGHT["numbered from the other end"])
    assert found.notes == (
        "layers of blocks are those of blocks from the other end: right where the code that loads "
        "them expects it",
    )
