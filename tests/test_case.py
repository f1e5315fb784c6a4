"""Cases, case files and ids."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truestep.case import Case, Generation, Settings, load_cases
from truestep.errors import CaseError

DIGITS = {"model": "builtin:digits", "prompt": "a red three moving left"}


def test_id_is_readable_and_ends_in_a_hash() -> None:
    slug, digest = Case(**DIGITS).id.rsplit("-", 1)
    assert slug == "digits-a-red-three-moving-left"
    assert len(digest) == 12
    assert int(digest, 16) >= 0


def test_id_ignores_order_device_and_backend_but_nothing_else() -> None:
    case = Case(**DIGITS)
    assert Case(prompt=DIGITS["prompt"], model="builtin:digits").id == case.id
    assert case.replace(device="cpu", attention_backend="native").id == case.id
    changed: dict[str, Any] = {
        "prompt": "a red three moving left ",
        "negative_prompt": "blur",
        "seed": 1,
        "steps": 24,
        "guidance_scale": 3.1,
        "guidance_scale_2": 2.0,
        "height": 48,
        "width": 48,
        "num_frames": 5,
        "max_sequence_length": 9,
        "dtype": "bfloat16",
        "model": "some/other",
        "revision": "abc",
        "scheduler": "UniPCMultistepScheduler",
        "flow_shift": 3.0,
    }
    ids = {case.replace(**{key: value}).id for key, value in changed.items()}
    assert len(ids) == len(changed)
    assert case.id not in ids


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_ids_are_safe_file_names_and_do_not_collide(first: str, second: str) -> None:
    one = Case(model="builtin:digits", prompt=first)
    two = Case(model="builtin:digits", prompt=second)
    assert (one.id == two.id) == (first == second)
    assert len(one.id.encode()) <= 200
    assert not set(one.id) & set('/\\:*?"<>|\0\n ')
    assert not one.id.startswith((".", "-"))


@pytest.mark.parametrize("prompt", ["up/down ../..", "赤い三が左へ動く", "x" * 10_000])
def test_unusual_prompts_have_ids(prompt: str, tmp_path: Path) -> None:
    case = Case(model="builtin:digits", prompt=prompt)
    (tmp_path / case.id).touch()
    assert (tmp_path / case.id).exists()


def test_builtin_defaults_come_from_its_model_card() -> None:
    case = Case(**DIGITS)
    assert (case.height, case.width, case.num_frames, case.steps) == (32, 32, 9, 25)
    assert (case.guidance_scale, case.max_sequence_length) == (3.0, 8)


def test_other_defaults_are_those_of_diffusers() -> None:
    from diffusers import WanPipeline

    theirs = inspect.signature(WanPipeline.__call__).parameters
    ours = {name: field.default for name, field in Generation.model_fields.items()}
    names = {"steps": "num_inference_steps"}
    for name in ("steps", "guidance_scale", "height", "width", "num_frames", "max_sequence_length"):
        assert ours[name] == theirs[names.get(name, name)].default


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "the case is not valid: steps = 0: input should be greater than or equal"),
        ({"stepz": 3}, "the case is not valid: stepz: unknown key"),
        ({"prompt": ""}, "prompt = ''"),
        ({"seed": -1}, "seed = -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"model": "builtin:nope"}, "unknown builtin model; there is builtin:digits"),
        ({"settings": {"flow_shift": 0}}, "settings.flow_shift = 0"),
        ({"settings": {"cfgs": "batched"}}, "settings.cfgs: unknown key"),
        ({"settings": {"cfg": "both"}}, "settings.cfg = 'both'"),
    ],
)
def test_bad_values_say_what_and_where(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CaseError) as caught:
        Case(**{**DIGITS, **changes})
    assert message in str(caught.value)
    assert "where    case" in str(caught.value)


def test_an_unknown_key_names_the_closest() -> None:
    with pytest.raises(CaseError, match="did you mean 'guidance_scale'"):
        Case(**DIGITS, guidance_scal=3)
    with pytest.raises(CaseError, match="unknown setting 'guidance'"):
        Case(**DIGITS).replace(guidance=3)


def test_replace_takes_text_from_a_command_line() -> None:
    case = Case(**DIGITS).replace(guidance_scale="3.5", steps="7", flow_shift="2")
    assert (case.guidance_scale, case.steps, case.settings.flow_shift) == (3.5, 7, 2.0)


def test_run_settings_hold_every_control() -> None:
    fields = set(Case(**DIGITS).run_settings().model_dump())
    assert fields == {*Generation.model_fields, *Settings.model_fields}


def test_cases_pickle() -> None:
    case = Case(**DIGITS)
    assert pickle.loads(pickle.dumps(case)) == case


FILE = """
[case.three]
model = "builtin:digits"
prompt = "a red three moving left"
steps = 20
settings = { device = "cpu" }

[case.three.full]
steps = 50
settings = { flow_shift = 3.0 }

[case.local]
model = "./weights"
prompt = "x"
"""


def test_case_file_with_tiers(tmp_path: Path) -> None:
    path = tmp_path / "truestep.toml"
    path.write_text(FILE)
    cases = load_cases(path)
    assert list(cases) == ["three", "local"]
    assert cases["three"].steps == 20
    local = cases["local"]
    assert (local.model, local.model_path) == ("./weights", tmp_path / "weights")
    assert local.replace(seed=3).model_path == tmp_path / "weights"
    assert local.replace(model="./other").model_path == Path("other")
    path.write_text(FILE.replace('[case.local]\nmodel = "./weights"\nprompt = "x"', ""))
    full = load_cases(path, tier="full")["three"]
    assert (full.steps, full.settings.flow_shift, full.settings.device) == (50, 3.0, "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no case in the file"),
        ("[cases.a]\nprompt='x'", "unknown table 'cases'"),
        ("[case]\na = 3", "a case must be a table"),
        ("[case.a]\nmodel='builtin:digits'\nprompt='x'\nstep=3", "[case.a]"),
        ("[case.a", "the case file cannot be read"),
        ("[case.a]\nx = " + "[" * 3000, "nested more than 100 deep"),
        ("[case.a]\nsettings = 3", "settings must be a table"),
        ("[case.a]\nsteps = 0x" + "f" * 5000, "an integer of 20000 bits"),
    ],
)
def test_bad_case_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "truestep.toml"
    path.write_text(text)
    with pytest.raises(CaseError) as caught:
        load_cases(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_tier_lists_the_tiers(tmp_path: Path) -> None:
    path = tmp_path / "truestep.toml"
    path.write_text(FILE)
    with pytest.raises(CaseError, match="no tier 'fast'") as caught:
        load_cases(path, tier="fast")
    assert "tiers: default, full" in str(caught.value)


def test_a_missing_case_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="cannot be read") as caught:
        load_cases(tmp_path / "none.toml")
    assert "[case.NAME]" in str(caught.value)
