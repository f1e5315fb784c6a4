"""State dicts beside each other: pairs with their evidence, conversions, other checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from truestep.errors import FileFormatError, UsageError
from truestep.pairing.checkpoints import compare_checkpoints
from truestep.pairing.conversion import key_lines, pair_keys, side_by_side, skeleton
from truestep.parity.weights import load_state


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.q.weight": (8, 8), "a.k.weight": (8, 8), "a.v.weight": (8, 8)}
    shapes |= {"conv.weight": (4, 3, 5), "out.weight": (6, 8), "out.bias": (6,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def converted(port: dict[str, torch.Tensor], official: dict[str, torch.Tensor]) -> bool:
    names: dict[str, object] = {}
    text = skeleton(pair_keys(port, official), port, official)
    exec(compile(text, "conversion.py", "exec"), names)
    made = names["convert"](official)  # type: ignore[operator]
    return made.keys() == port.keys() and all(torch.equal(made[k], port[k]) for k in port)


def test_renamed_transposed_and_fused_parameters_are_converted() -> None:
    official = state()
    port = {
        "attention.qkv": torch.cat([official[f"a.{letter}.weight"] for letter in "qkv"]),
        "kernel": official["conv.weight"].permute(2, 1, 0).contiguous(),
        "head.weight": official["out.weight"].T.contiguous(),
        "head.bias": official["out.bias"],
    }
    assert converted(port, official)
    back = pair_keys(official, port)
    assert {pair.how for pair in back if pair.port[0].startswith("a.")} == {
        "chunk(3)[0]",
        "chunk(3)[1]",
        "chunk(3)[2]",
    }
    assert converted(official, port)


def test_what_has_no_pair_is_listed_and_raises() -> None:
    official, port = state(), state()
    del port["conv.weight"], official["out.bias"]
    pairs = pair_keys(port, official)
    rows = side_by_side(pairs, port, official)
    assert ("conv.weight", "float32 [4, 3, 5]", "-", "", "unmatched", "") in rows
    assert ("-", "", "out.bias", "float32 [6]", "unmatched", "") in rows
    text = skeleton(pairs, port, official)
    assert 'port["out.bias"] = no_rule("out.bias")  # [6]' in text
    assert '# no rule uses official["conv.weight"]  [4, 3, 5]' in text
    assert "TODO" not in text
    names: dict[str, object] = {}
    exec(compile(text, "conversion.py", "exec"), names)
    with pytest.raises(KeyError, match=r"parameters without a rule: \['conv\.weight'\]"):
        names["convert"](official)  # type: ignore[operator]


def test_equal_values_are_never_guessed() -> None:
    one = torch.ones(4)
    pairs = pair_keys({"x.weight": one, "y.weight": one}, {"a.scale": one, "b.scale": one})
    assert not [pair for pair in pairs if pair.how]


@pytest.mark.parametrize("at_once", [1, 2**22])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_grid_of_a_byte_is_that_of_all_a_row_or_a_column_and_holds_everywhere(
    axis: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("truestep.pairing.checkpoints._AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    official = torch.randn(300, 400, generator=generator)
    official *= torch.logspace(-2, 2, 400) * torch.logspace(-2, 2, 300)[:, None]
    most = official.abs().amax() if axis is None else official.abs().amax(1 - axis, keepdim=True)
    step = most / 127
    port = (official / step).round() * step

    def kind(value: torch.Tensor) -> str:
        pair = {"w": value}, {"w": official}
        return compare_checkpoints(pair_keys(*pair), *pair).rows[0].kind

    assert kind(port) == "int8"
    far = port.clone()
    far[-1, -1] += step.reshape(-1)[-1]  # on the grid, and not the nearest
    assert kind(far) == "other values"
    off = port.clone()
    off[-1, :] += 0.3 * (off[-1, :] - off[-1, :].roll(1)) * torch.rand(400, generator=generator)
    assert kind(off) == "other values"


def test_values_that_are_permuted_are_found_among_others_of_their_size() -> None:
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    values[0, 0, :2] = torch.tensor([0.0, -0.0])
    swapped = values.flatten()[torch.randperm(60)].reshape(3, 4, 5)
    close = values.clone()
    close[1, 1, 1] += 1e-3 * float(close[1, 1, 1].abs())
    official = {"a": values, "b": close}
    port = {"x": values.permute(2, 0, 1).contiguous(), "y": close.permute(1, 2, 0).contiguous()}
    paired = {pair.official: pair.port for pair in pair_keys(port, official) if pair.how}
    assert paired == {("a",): ("x",), ("b",): ("y",)}
    none = pair_keys({"x": swapped, "y": swapped + 1}, official)
    assert not [pair for pair in none if pair.how]


def test_checkpoints() -> None:
    official = state()
    same = {f"model.{name}": tensor for name, tensor in official.items()}
    other = {name: tensor.roll(1) for name, tensor in same.items()}
    narrow = {name: tensor.bfloat16() for name, tensor in same.items()}

    def verdict(port: dict[str, torch.Tensor]) -> tuple[str, str]:
        found = compare_checkpoints(pair_keys(port, official), port, official)
        return found.verdict, found.sentence

    assert verdict(same) == ("same", "the same checkpoint: 6 paired parameters agree bit for bit")
    assert verdict(narrow)[0] == "rounded"
    assert "as bfloat16" in verdict(narrow)[1]
    scaled = {name: (tensor * 1.003).bfloat16() for name, tensor in same.items()}
    assert verdict(scaled)[0] == "another"
    step = {name: tensor.abs().max() / 127 for name, tensor in same.items()}
    bytes_ = {k: (v / step[k]).round() * step[k] for k, v in same.items()}
    assert "as int8" in verdict(bytes_)[1]
    assert verdict({k: v * 1.003 for k, v in bytes_.items()})[0] == "another"
    one = same | {"model.conv.weight": same["model.conv.weight"] * 1.003}
    assert verdict(one)[0] == "changed"
    assert "but for 1 of 6 paired parameters, which hold other values" in verdict(one)[1]
    assert verdict({"z": torch.zeros(3)}) == ("unmatched", "no parameters could be paired")
    shifted = {k.removeprefix("model."): v + 1 for k, v in same.items()}
    assert verdict(shifted)[0] == "another"
    assert verdict(other)[0] in ("another", "unmatched")


def test_weight_files(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    torch.save({"state_dict": state()}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert load_state(tmp_path / name).keys() == state().keys()
    assert key_lines(state())[3] == "conv.weight  float32 [4, 3, 5]"
    (tmp_path / "b.safetensors").write_bytes(b"no")
    (tmp_path / "b.pt").write_bytes(b"no")
    for name, said in (
        ("b.safetensors", "it is not a safetensors file"),
        ("b.pt", "the .pt file cannot be read"),
        ("c.pt", "the .pt file cannot be read"),
    ):
        with pytest.raises(FileFormatError, match=said):
            load_state(tmp_path / name)
    with pytest.raises(UsageError, match=r"\.zip is no kind of weight file"):
        load_state(tmp_path / "a.zip")


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Path}, tmp_path / "a.pt")
    with pytest.raises(
        FileFormatError, match="needs code to be unpickled, which truestep never runs"
    ):
        load_state(tmp_path / "a.pt")
