"""Pairing of random state dicts: what was done to them is recovered, with the right evidence."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truestep.errors import FileFormatError, UsageError
from truestep.pairing import Evidence, Pair, Pairing, files, pair_modules
from truestep.pairing.rename import renamed, wildcards

Tensor = torch.Tensor
State = dict[str, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameter(pairing: Pairing, name: str) -> Pair:
    return next(p for p in pairing.of("parameter") if name in p.actual)


def quantised(tensor: Tensor) -> Tensor:
    step = tensor.abs().max() / 127
    return (tensor / step).round() * step


CHANGES = {
    "equal": (lambda t: t.clone(), Evidence.EQUAL),
    "transposed": (lambda t: t.permute(*reversed(range(t.ndim))).contiguous(), Evidence.TRANSPOSED),
    "flat": (lambda t: t.reshape(-1), Evidence.RESHAPED),
    "extra axis": (lambda t: t[None, ..., None], Evidence.RESHAPED),
    "bfloat16": (lambda t: t.bfloat16(), Evidence.PRECISION),
    "float16": (lambda t: t.half(), Evidence.PRECISION),
    "float8 e4m3": (lambda t: t.to(torch.float8_e4m3fn), Evidence.PRECISION),
    "float8 e5m2": (lambda t: t.to(torch.float8_e5m2), Evidence.PRECISION),
    "int8": (quantised, Evidence.PRECISION),
    "scaled": (lambda t: t * 1.01, Evidence.SCALED),
    "negated": (lambda t: t * -3.0, Evidence.SCALED),
    "scaled in bfloat16": (lambda t: (t * 0.125 * 1.1).bfloat16(), Evidence.SCALED),
    "transposed int8": (lambda t: quantised(t).mT.contiguous(), Evidence.PRECISION),
}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_changes_are_recovered(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**31), label="seed")
    shapes = st.sampled_from([(12, 16), (16, 12), (16, 16), (8, 4, 2, 2), (4, 8, 3), (5, 3, 3, 6)])
    reference, actual, wanted = {}, {}, {}
    count = data.draw(st.integers(1, 14), label="tensors")
    for index in range(count):
        change = data.draw(st.sampled_from(sorted(CHANGES)), label="change")
        tensor = normal(*data.draw(shapes, label="shape"), seed=seed + index)
        if change == "transposed int8" and tensor.ndim != 2:
            change = "int8"
        made, evidence = CHANGES[change]
        reference[f"r{index}.weight"] = tensor
        actual[f"a{index}.weight"] = made(tensor)
        wanted[f"a{index}.weight"] = (f"r{index}.weight", evidence)
    names = list(actual)
    random.Random(seed).shuffle(names)
    pairing = pair_modules({name: actual[name] for name in names}, reference)
    assert pairing.complete
    found = {p.actual[0]: (p.reference[0], p.evidence) for p in pairing.of("parameter")}
    assert found == wanted


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_fusions_are_recovered(data: st.DataObject) -> None:
    """Any number of matrices in any order along either axis, whole or head by head."""
    seed = data.draw(st.integers(0, 2**31), label="seed")
    heads, head, width = 4, data.draw(st.sampled_from([2, 4])), 10
    parts = data.draw(st.integers(2, 4), label="parts")
    rows = [data.draw(st.sampled_from([1, 2])) * heads * head for _ in range(parts)]
    interleaved = data.draw(st.booleans(), label="interleaved")
    transposed = data.draw(st.booleans(), label="transposed")
    backwards = data.draw(st.booleans(), label="the reference is fused")
    separate = {
        f"p{i}.weight": normal(size, width, seed=seed + i) for i, size in enumerate(rows)
    } | {f"p{i}.bias": normal(size, seed=seed + 50 + i) for i, size in enumerate(rows)}
    order = data.draw(st.permutations(range(parts)), label="order")

    def fuse(kind: str) -> Tensor:
        tensors = [separate[f"p{i}.{kind}"] for i in order]
        if not interleaved:
            return torch.cat(tensors)
        cut = [t.unflatten(0, (heads, -1)) for t in tensors]
        return torch.cat(cut, dim=1).flatten(0, 1)

    weight = fuse("weight")
    fused = {"x.w": weight.T.contiguous() if transposed else weight, "x.b": fuse("bias")}
    fused["other"] = normal(7, width, seed=seed + 99)
    separate["another"] = fused["other"].clone()
    pairing = pair_modules(separate, fused) if backwards else pair_modules(fused, separate)
    assert pairing.complete
    assert not pairing.odd
    assert [pair.rel_l2 for pair in pairing.of("parameter")] == [0.0] * 3
    for name, kind in (("x.w", "weight"), ("x.b", "bias")):
        pair = next(p for p in pairing.pairs if name in (*p.actual, *p.reference))
        assert pair.evidence is Evidence.FUSED
        names = pair.actual if backwards else pair.reference
        assert names == tuple(f"p{i}.{kind}" for i in order)
        assert len(pair.parts) == parts
        assert ("of every" in pair.parts[0]) is interleaved


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 12), st.sampled_from([(3,), (6,), (4, 4), (2, 2, 2)]))
def test_what_is_unrelated_is_never_claimed(seed: int, count: int, shape: tuple[int, ...]) -> None:
    """Small tensors come close by chance; that is no evidence."""
    actual = {f"a{i}.weight": normal(*shape, seed=seed + i) for i in range(count)}
    reference = {f"r{i}.weight": normal(*shape, seed=seed + 1000 + i) for i in range(count)}
    pairing = pair_modules(actual, reference)
    assert not pairing.of("parameter")
    assert not pairing.ambiguous
    assert set(actual) <= set(pairing.unmatched_actual)
    assert set(reference) <= set(pairing.unmatched_reference)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(6,), (4, 4), (3, 5), (8, 2, 2)]))
def test_shuffled_numbers_are_not_the_same_tensor(seed: int, shape: tuple[int, ...]) -> None:
    """Every statistic that no layout changes agrees; the numbers do not."""
    first, second = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    order = torch.randperm(first.numel(), generator=torch.Generator().manual_seed(seed))
    shuffled = first.reshape(-1)[order].reshape(shape)
    if any(torch.equal(shuffled, t) for t in (first, first.T if len(shape) == 2 else first)):
        return
    pairing = pair_modules({"a": shuffled, "b": second.clone()}, {"x": first, "y": second})
    assert parameter(pairing, "b").evidence is Evidence.EQUAL
    left = parameter(pairing, "a")  # the last one on either side
    assert (left.evidence, left.odd) == (Evidence.EXCLUSION, True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8))
def test_a_mix_of_twins_and_strangers(seed: int, count: int) -> None:
    """Tensors that occur twice are listed; others keep their own partner."""
    reference = {f"r{i}": normal(6, 9, seed=seed + i) for i in range(count)}
    actual = {f"a{i}": tensor.clone() for i, tensor in enumerate(reference.values())}
    reference["r-twin"], actual["a-twin"] = reference["r0"].clone(), actual["a0"].clone()
    pairing = pair_modules(actual, reference)
    assert {(p.actual[0], p.reference[0]) for p in pairing.of("parameter")} == {
        (f"a{i}", f"r{i}") for i in range(1, count)
    }
    (group,) = pairing.ambiguous
    assert group.actual == ("a-twin", "a0")
    assert group.reference == ("r-twin", "r0")


def test_kernel_axes() -> None:
    """HWIO against OIHW, and a linear layer against a convolution of patches."""
    kernel, patch = normal(3, 3, 5, 8, seed=1), normal(16, 4, 1, 2, 2, seed=2)
    reference = {"conv.kernel": kernel, "patch.weight": patch, "one.weight": normal(6, 5, 1, 1)}
    actual = {
        "c.weight": kernel.permute(3, 2, 0, 1).contiguous(),
        "p.weight": patch.flatten(1),
        "q.weight": normal(6, 5, 1, 1)[:, :, 0, 0],
    }
    pairing = pair_modules(actual, reference)
    assert parameter(pairing, "c.weight").layout == "axes 3 2 0 1 of the reference"
    assert parameter(pairing, "p.weight").evidence is Evidence.RESHAPED
    assert parameter(pairing, "q.weight").reference == ("one.weight",)
    jax = {"p.kernel": patch.permute(2, 3, 4, 1, 0).reshape(1, 2, 2, 4, 16).contiguous()}
    flat = pair_modules({"p.weight": patch.permute(0, 2, 3, 4, 1).flatten(1)}, jax)
    assert parameter(flat, "p.weight").layout == "axes 4 1 2 3 of the reference"


def test_rows_in_another_order_are_found_inside() -> None:
    """Rotary halves against neighbours: the rows of one head are permuted."""
    weight = normal(8, 6)
    other = torch.cat((weight, normal(8, 6, seed=1)))
    halves = weight[[0, 2, 4, 6, 1, 3, 5, 7]].contiguous()
    pairing = pair_modules({"both": other}, {"q": halves, "k": other[8:].clone()})
    pair = parameter(pairing, "both")
    assert pair.reference == ("q", "k")
    assert pair.parts == ("1 of every 2 from 0", "8:16") or "another order" in pair.parts[0]


def test_tied_weights_are_one() -> None:
    shared = normal(10, 4)
    reference = {"embed.weight": shared, "out.weight": shared, "mlp.weight": normal(4, 4)}
    actual = {"tokens.weight": shared.clone(), "up.weight": normal(4, 4)}
    pairing = pair_modules(actual, reference)
    assert pairing.complete
    pair = parameter(pairing, "tokens.weight")
    assert pair.reference == ("embed.weight", "out.weight")
    assert pair.note == "tied: out.weight"


def test_equal_names_need_no_content() -> None:
    state = {"a.weight": normal(4, 4), "a.bias": torch.zeros(4), "b.bias": torch.zeros(4)}
    pairing = pair_modules(state, {n: t.clone() for n, t in state.items()})
    assert pairing.complete
    assert {p.evidence for p in pairing.of("parameter")} == {Evidence.NAME}
    other = {**state, "a.weight": normal(4, 4, seed=7)}
    pairing = pair_modules(other, state)
    assert [p.actual for p in pairing.odd] == [("a.weight",)]


def test_a_rename_map_is_believed_and_checked() -> None:
    reference = {"blocks.0.ffn.net.0.proj.weight": normal(4, 6), "x": normal(3, 3)}
    actual = {"layers.0.mlp.up.weight": normal(4, 6, seed=2), "y": normal(3, 3)}
    rename = {"layers.*.mlp.up": "blocks.*.ffn.net.0.proj"}
    pair = parameter(pair_modules(actual, reference, rename=rename), "layers.0.mlp.up.weight")
    assert pair.evidence is Evidence.RENAME
    assert pair.odd
    assert pair.note == "content differs"
    actual["layers.0.mlp.up.weight"] = reference["blocks.0.ffn.net.0.proj.weight"].clone()
    pair = parameter(pair_modules(actual, reference, rename=rename), "layers.0.mlp.up.weight")
    assert (pair.evidence, pair.odd) == (Evidence.RENAME, False)


def test_rename_rules() -> None:
    rules = {"layers.*.mlp": "blocks.*.ffn", "layers.*.mlp.up": "blocks.*.ffn.0", "a": "b"}
    assert renamed("layers.3.mlp.up.weight", rules) == "blocks.3.ffn.0.weight"
    assert renamed("layers.3.mlp.down", rules) == "blocks.3.ffn.down"
    assert renamed("ab.weight", rules) is None
    with pytest.raises(UsageError, match="wildcard that nothing fills"):
        renamed("x", {"x": "blocks.*"})
    assert wildcards({"l.0.a": "b.0.c", "l.1.a": "b.1.c", "l.2.a": "b.7.c", "x": "y"}) == {
        "l.*.a": "b.*.c",
        "l.2.a": "b.7.c",
        "x": "y",
    }


def layered() -> tuple[State, State]:
    reference, actual = {}, {}
    for i in range(3):
        for new, old, shape in (("q", "to_q", (6, 6)), ("up", "net.0", (9, 6))):
            tensor = normal(*shape, seed=10 * i + len(new))
            reference[f"blocks.{i}.{old}.weight"] = tensor
            actual[f"layers.{i}.{new}.weight"] = tensor.clone()
    return actual, reference


def test_written_and_read(tmp_path: Path) -> None:
    actual, reference = layered()
    pairing = pair_modules(actual, reference)
    path = tmp_path / "map.toml"
    pairing.write(str(path))
    rules = Pairing.read(str(path))
    assert rules["layers.*.q"] == "blocks.*.to_q"
    again = pair_modules(actual, reference, rename=rules)
    assert {(p.actual, p.reference) for p in again.pairs} == {
        (p.actual, p.reference) for p in pairing.pairs
    }
    assert Pairing.model_validate_json(pairing.model_dump_json()) == pairing
    with pytest.raises(FileFormatError, match="cannot be read"):
        files.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("rename = 3")
    with pytest.raises(FileFormatError, match="holds no rename map"):
        files.read(tmp_path / "bad.toml")


def test_not_finite_numbers_survive_json() -> None:
    actual, reference = layered()
    reference["blocks.1.to_q.weight"].zero_()
    pairing = pair_modules(actual, reference)
    (odd,) = pairing.odd
    assert odd.rel_l2 == float("inf")
    assert odd.evidence is Evidence.EXCLUSION
    assert Pairing.model_validate_json(pairing.model_dump_json()) == pairing


def test_the_table_accounts_for_everything() -> None:
    actual, reference = layered()
    actual["layers.1.q.weight"] *= 1.01
    actual["extra.weight"] = normal(2, 5)
    pairing = pair_modules(actual, reference)
    lines = pairing.table().splitlines()
    assert lines[1].startswith("ODD  layers.1.q.weight")
    assert "scaled: rel_l2 0.01; x 1.01; others of its kind have no factor" in lines[1]
    assert any(re.match(r"-\s+extra\.weight\s+unmatched", line) for line in lines)
    assert lines[-1] == pairing.sentence()
    assert "6 parameters" in pairing.sentence()


def test_a_stranger_is_not_paired_for_lack_of_others() -> None:
    """One parameter left on each side, of which neither is in a module that is paired."""
    actual, reference = layered()
    actual["new.gate"], actual["new.bias"] = normal(5), normal(5, seed=1)
    reference["old.table"] = normal(5, seed=2)
    pairing = pair_modules(actual, reference)
    assert set(pairing.unmatched_actual) >= {"new.gate", "new.bias"}
    assert "old.table" in pairing.unmatched_reference


def test_not_a_number_is_no_evidence() -> None:
    broken = normal(4, 4)
    broken[0, 0] = float("nan")
    pairing = pair_modules({"a": broken, "b": normal(2, 3)}, {"x": broken.clone(), "y": normal(9)})
    assert not pairing.of("parameter")


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(UsageError, match="the actual side has no tensors"):
        pair_modules({}, {"a": normal(2)})
    with pytest.raises(UsageError, match="holds no numbers"):
        pair_modules({"a": normal(2)}, {"a": torch.empty(2, device="meta")})
