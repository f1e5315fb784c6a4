"""`truestep show profile`: the list, one profile, two of them, and what cannot be shown."""

from __future__ import annotations

import json

import pytest

from tests.commands import Run, runner
from truestep.controls import NAMES, differences, profiles


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `truestep show`."""
    return runner(monkeypatch, capsys, "show")


def test_no_name_lists_the_profiles_a_line_each(show: Run) -> None:
    code, out, _ = show("profile")
    lines = out.splitlines()
    assert code == 0
    for name, line in zip(profiles(), lines, strict=False):
        assert line.startswith(f"{name} ")
        assert profiles()[name].about in line
    assert lines[len(profiles())] == ""


def test_one_name_prints_every_control_with_value_and_source(show: Run) -> None:
    code, out, _ = show("profile", "diffusers-0.42.1")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("diffusers-0.42.1: diffusers 0.42.1, LTX2Pipeline")
    for name in NAMES:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name
    flat = " ".join(out.split())
    for cell in profiles()["diffusers-0.42.1"].cells.values():
        assert " ".join(cell.source.split()) in flat
    assert not [line for line in lines if line != line.rstrip() or len(line) > 120]


def test_two_names_print_the_differences_alone(show: Run) -> None:
    first, second = "official@f4b06fb", "official@822ce3c"
    code, out, _ = show("profile", first, second)
    assert code == 0
    assert out.splitlines()[:6] == [
        "official@f4b06fb and official@822ce3c differ in 2 of 26 controls",
        "",
        "  guidance_dtype",
        "    official@f4b06fb: float32",
        "      ltx_core/components/guiders.py, MultiModalGuider.calculate: .float() since f4b06fb",
        "    official@822ce3c: model",
    ]
    assert "std_scope" not in out
    same = show("profile", first, first)[1]
    assert same == "official@f4b06fb and official@f4b06fb agree in all 26 controls\n"


def test_json_has_the_same(show: Run) -> None:
    every = json.loads(show("profile", "--json")[1])["profiles"]
    assert list(every) == list(profiles())
    one = json.loads(show("profile", "sglang-0.5.23", "--json")[1])["profiles"]
    assert one == {"sglang-0.5.23": every["sglang-0.5.23"]}
    assert one["sglang-0.5.23"]["controls"]["stg_blocks"]["value"] == [28]
    two = json.loads(show("profile", "sglang-0.5.23", "vllm-omni-0.30", "--json")[1])
    assert list(two["differences"]) == list(differences("sglang-0.5.23", "vllm-omni-0.30"))
    assert two["differences"]["std_scope"]["vllm-omni-0.30"]["value"] == "sample"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["profile", "official"], "there is no profile 'official'"),
        (["profile", "sglang-0.5.23", "difusers-0.42.1"], "did you mean 'diffusers-0.42.1'?"),
        (["profile", "a", "b", "c"], "show profile takes two names at most"),
        (["a.safetensors", "b.safetensors"], "show takes one file"),
    ],
)
def test_what_cannot_be_shown_is_said(show: Run, arguments: list[str], said: str) -> None:
    code, out, err = show(*arguments)
    assert (code, out) == (2, "")
    assert said in err
