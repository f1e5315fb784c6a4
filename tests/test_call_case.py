"""Cases of any pipeline: what is in them, what their id is of, and what is refused."""

from __future__ import annotations

import datetime
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from truestep.call_case import CallCase, Lora, is_call_case
from truestep.case import Case, case_from, read_cases
from truestep.errors import CaseError

FILE = """
[case.cat]
model = "./flux"
seed = 3
scheduler = "EulerDiscreteScheduler"
scheduler_settings = { shift = 2.0 }
lora = ["style.safetensors:0.8", "sub/other.safetensors"]
prepare = "port.py:fuse"

[case.cat.call]
prompt = "a cat"
height = 32

[case.cat.input]
image = "cat.png"
frames = ["one.png", "two.png"]

[case.cat.large.call]
height = 64
"""


def case(**fields: Any) -> CallCase:
    return CallCase(**{"model": "./flux", "call": {"prompt": "a cat"}, **fields})


def test_a_case_file_and_its_tier(tmp_path: Path) -> None:
    path = tmp_path / "truestep.toml"
    path.write_text(FILE)
    read = read_cases(path)["cat"]
    assert isinstance(read, CallCase)
    assert read.prompt == "a cat"
    assert read.model_path == tmp_path / "flux"
    assert read.files("frames") == [tmp_path / "one.png", tmp_path / "two.png"]
    assert read.loras == (Lora("style.safetensors", 0.8), Lora("sub/other.safetensors", 1.0))
    assert read.prepared == (
        "port.py:fuse, lora style.safetensors x 0.8, lora sub/other.safetensors x 1"
    )
    assert list(read.sources()) == [
        "input.image",
        "input.frames",
        "lora.style.safetensors",
        "lora.sub/other.safetensors",
        "prepare",
    ]
    large = read_cases(path, tier="large")["cat"]
    assert isinstance(large, CallCase)
    assert large.call == {"prompt": "a cat", "height": 64}
    assert large.id != read.id
    assert case_from(read.canonical()).canonical() == read.canonical()
    assert pickle.loads(pickle.dumps(read)).model_path == read.model_path


def test_content_leaves_out_what_is_not_said() -> None:
    assert case(device="cpu").canonical() == {
        "model": "./flux",
        "subject": "diffusers",
        "seed": 0,
        "dtype": "float32",
        "call": {"prompt": "a cat"},
    }
    assert case().id == "flux-a-cat-" + case(device="cpu").id[-12:]
    assert is_call_case(case().canonical())
    assert not is_call_case(Case(model="builtin:digits", prompt="a red three").canonical())


def test_hashes_are_of_content_and_no_part_of_the_id(tmp_path: Path) -> None:
    for name in ("cat.png", "copy.png", "dog.png"):
        (tmp_path / name).write_bytes(name[0].encode() * 3)
    written = case(input={"image": "cat.png", "mask": "none.png"}).counted_from(tmp_path)
    read = written.with_hashes()
    assert list(read.sha256) == ["input.image"]  # what is not there has none
    assert len(read.sha256["input.image"]) == 16
    assert read.id == written.id
    assert read.files("image") == written.files("image")
    copy = case(input={"image": "copy.png"}).counted_from(tmp_path).with_hashes()
    dog = case(input={"image": "dog.png"}).counted_from(tmp_path).with_hashes()
    assert copy.sha256 == read.sha256
    assert dog.sha256 != read.sha256
    assert read.replace(seed=1).sha256 == {}
    both = case(input={"image": ("cat.png", "dog.png")}).counted_from(tmp_path).with_hashes()
    swapped = case(input={"image": ("dog.png", "cat.png")}).counted_from(tmp_path).with_hashes()
    assert both.sha256 != swapped.sha256


def test_a_hash_of_one_side_only_is_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"cat")
    written = case(input={"image": str(path)})
    recorded = written.with_hashes().canonical()
    assert written.differences(recorded) == ()
    assert written.with_hashes().differences(written.canonical()) == ()
    path.write_bytes(b"dog")
    (difference,) = written.with_hashes().differences(recorded)
    assert difference.key == "sha256.input.image"
    assert written.differences({**recorded, "sha256": 3}) == ()


def test_values_are_replaced_where_they_belong() -> None:
    read = case(input={"image": "cat.png"}, scheduler_settings={"shift": 1.0})
    changed = read.replace(seed=2, height=32, **{"scheduler.shift": 2.0, "call.width": 64})
    assert changed.seed == 2
    assert changed.call == {"prompt": "a cat", "height": 32, "width": 64}
    assert changed.scheduler_settings == {"shift": 2.0}
    assert read.replace(image="no file").input == {}
    assert read.replace(lora="a.safetensors:0.5").lora == ("a.safetensors:0.5",)
    assert read.replace(lora="a.safetensors").replace(lora=None).lora == ()


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("style.safetensors", Lora("style.safetensors", 1.0)),
        ("./style.safetensors:1", Lora("style.safetensors", 1.0)),
        ("a:b.safetensors:-0.25", Lora("a:b.safetensors", -0.25)),
        ("a:b.safetensors", Lora("a:b.safetensors", 1.0)),
    ],
)
def test_loras_have_a_path_and_a_scale(text: str, lora: Lora) -> None:
    assert Lora.of(text) == lora
    assert Lora.of(str(lora)) == lora
    assert case(lora=[text]).loras == (lora,)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"shceduler": "X"}, "shceduler: unknown key"),
    "argument": ({"height": 3}, "height: unknown key"),
    "twice": ({"input": {"prompt": "a.txt"}}, "prompt is given twice: as a value and as a file"),
    "number": ({"call": {"scale": math.inf}}, "scale is not a finite number"),
    "date": ({"call": {"day": [datetime.date(2020, 1, 1)]}}, "day[0] is a date: give text"),
    "nested": ({"call": {"a": {"b": math.nan}}}, "a.b is not a finite number"),
    "unnamed": ({"input": {"image": ""}}, "a file has no name"),
    "seed": ({"seed": -1}, "greater than or equal to 0"),
    "device": ({"device": "tpu"}, "device = 'tpu'"),
    "scale": ({"lora": ["a.safetensors:inf"]}, "a LoRA is given as PATH:SCALE"),
    "no path": ({"lora": [":0.5"]}, "a LoRA is given as PATH:SCALE, not ':0.5'"),
    "loras": ({"lora": [3]}, "give a list of PATH:SCALE"),
    "prepare": ({"prepare": "port.py"}, "it is given as FILE.py:FUNCTION"),
    "no file": ({"prepare": ":fuse"}, "it is given as FILE.py:FUNCTION"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_is_not_valid_is_named(name: str) -> None:
    fields, what = BAD[name]
    with pytest.raises(CaseError) as caught:
        case(**fields)
    assert what in caught.value.what


def test_the_nearest_key_or_the_place_of_arguments_is_named() -> None:
    with pytest.raises(CaseError) as caught:
        case(shceduler="X")
    assert caught.value.likely == "did you mean 'scheduler'?"
    with pytest.raises(CaseError) as caught:
        case(zoom=3)
    assert caught.value.likely == "arguments of the pipeline's call stand in [case.NAME.call]"


def test_cases_of_the_runtime_are_not_prepared() -> None:
    with pytest.raises(CaseError, match="lora: unknown key") as caught:
        case_from({"model": "builtin:digits", "prompt": "a three", "lora": ["a.safetensors"]})
    assert caught.value.likely == (
        'lora is of a plain pipeline: subject = "diffusers", and a table [case.NAME.call]'
    )
    own = Case(model="builtin:digits", prompt="a red three")
    with pytest.raises(CaseError, match="truestep's own stages take no prepare") as caught:
        own.replace(prepare="port.py:fuse")
    assert caught.value.hint == "--subject diffusers"
