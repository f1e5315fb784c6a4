"""Profiles: every cell has a value that a case takes and a source that can be looked up."""

from __future__ import annotations

import re
import sys
from importlib import resources
from typing import Any

import pytest

from truestep.case import Case
from truestep.controls import NAMES, AudioVideo, differences, find_profile, profiles, resolve
from truestep.errors import CaseError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROFILES = (
    "official@f4b06fb",
    "official@822ce3c",
    "sglang-0.5.23",
    "diffusers-0.42.1",
    "vllm-omni-0.30",
)

AGREED: dict[str, tuple[str, ...]] = {
    "mu": ("constant", "constant", "constant", "tokens", "constant"),
    "guidance_dtype": ("float32", "model", "model", "float32", "float32"),
    "std_scope": ("whole", "whole", "whole", "sample", "sample"),
    "pass_gating": ("per_modality", "per_modality", "shared", "shared_blocks", "per_modality"),
    "pass_batching": ("separate", "separate", "all", "cond_uncond", "all"),
    "connector": ("separate", "separate", "separate", "joint", "separate"),
    "av_adaln": ("own_cross_gate", "cross", "cross", "cross", "own_cross_gate"),
}
"""Choices in which implementations were found to disagree, in the order of `PROFILES`."""


def case(**settings: Any) -> Case:
    return Case(model="x", prompt="p", settings=settings)


def test_the_five_profiles_are_there() -> None:
    assert tuple(profiles()) == PROFILES


@pytest.mark.parametrize("name", PROFILES)
def test_every_control_has_a_value_that_a_case_takes(name: str) -> None:
    profile = find_profile(name)
    assert tuple(profile.cells) == NAMES
    for control, cell in profile.cells.items():
        taken = case(profile=name).replace(**{control: cell.value})
        assert getattr(taken.settings, control) == cell.value, control


@pytest.mark.parametrize("name", PROFILES)
def test_every_source_names_what_decides_and_at_which_commit_or_version(name: str) -> None:
    tables = tomllib.loads(resources.files("truestep").joinpath("profiles.toml").read_text("utf-8"))
    for control, cell in tables["profile"][name]["cells"].items():
        own = name.removeprefix("official@").replace("-", " ")
        own = own.replace("vllm omni", "vllm-omni")
        assert re.search(rf"{re.escape(own)}|since 203d484", cell["source"]), control
        assert re.search(r"\.py\b", cell["source"]), control
    for control, cell in find_profile(name).cells.items():
        assert len(cell.source) > 20, control


def test_the_file_holds_no_control_that_there_is_not() -> None:
    text = resources.files("truestep").joinpath("profiles.toml").read_text("utf-8")
    tables = tomllib.loads(text)
    assert set(tables["shared"]) <= set(NAMES)
    for table in tables["profile"].values():
        assert set(table["cells"]) <= set(NAMES)
        assert set(table["cells"]) | set(tables["shared"]) == set(NAMES)
    assert set(tables["defaults"]) <= set(Case.model_fields)


@pytest.mark.parametrize("control", AGREED)
def test_choices_are_the_agreed_ones(control: str) -> None:
    found = tuple(find_profile(name).cells[control].value for name in PROFILES)
    assert found == AGREED[control]


def test_an_unknown_profile_names_the_near_one() -> None:
    with pytest.raises(UsageError, match=r"there is no profile 'sglang-0\.5\.22'") as raised:
        find_profile("sglang-0.5.22")
    assert "did you mean 'sglang-0.5.23'?" in str(raised.value)
    assert "official@f4b06fb, official@822ce3c" in str(raised.value)
    assert str(raised.value).endswith("hint: truestep show profile")


def test_official_without_a_commit_is_no_reference() -> None:
    with pytest.raises(UsageError, match="no profile 'official'") as raised:
        find_profile("official")
    assert "name a commit" in str(raised.value)
    with pytest.raises(UsageError) as other:
        find_profile("official@1234567")
    assert "name a commit" not in str(other.value)


def test_differences_are_those_that_the_cells_show() -> None:
    for first in PROFILES:
        assert differences(first, first) == {}
        for second in PROFILES:
            found = differences(first, second)
            back = differences(second, first)
            assert found == {name: (a, b) for name, (b, a) in back.items()}
            assert list(found) == [name for name in NAMES if name in found]
            assert all(a.value != b.value for a, b in found.values())
    assert list(differences("official@f4b06fb", "official@822ce3c")) == [
        "guidance_dtype",
        "av_adaln",
    ]
    with pytest.raises(UsageError, match="there is no profile 'x'"):
        differences("official@f4b06fb", "x")


def test_defaults_of_a_profile_are_those_of_a_case_that_says_nothing() -> None:
    bare = case(profile="sglang-0.5.23")
    for key, value in find_profile("sglang-0.5.23").defaults.items():
        assert getattr(bare, key) == value
    own = Case(model="x", prompt="p", steps=7, settings={"profile": "sglang-0.5.23"})
    assert (own.steps, own.height) == (7, 512)
    assert case().steps == Case.model_fields["steps"].default
    assert case(profile="nobody-1.0").steps == Case.model_fields["steps"].default


def test_ids_do_not_know_controls_that_are_not_set() -> None:
    plain = Case(model="x", prompt="p")
    assert not set(plain.canonical()["settings"]) & set(AudioVideo.model_fields)
    assert plain.replace(**dict.fromkeys(AudioVideo.model_fields)).id == plain.id
    profiled = case(profile="sglang-0.5.23")
    assert set(profiled.canonical()["settings"]) & set(AudioVideo.model_fields) == {"profile"}
    # what a profile has is not what the case says: setting it is another case
    assert profiled.replace(mu="constant").id != profiled.id


def test_a_control_of_the_case_goes_before_its_profile() -> None:
    found = resolve(case(profile="diffusers-0.42.1", std_scope="whole", mu=1.5).run_settings())
    assert (found.std_scope, found.mu, found.connector) == ("whole", 1.5, "joint")
    with pytest.raises(UsageError, match="there is no profile 'official'"):
        resolve(case(profile="official").run_settings())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guidance_rescale", -0.1),
        ("audio_guidance_rescale", 1.1),
        ("terminal_sigma", 1.0),
        ("std_scope", "batch"),
        ("stg_blocks", "1,-2"),
        ("mu", "auto"),
        ("image_crf", 52),
    ],
)
def test_a_value_that_cannot_be_is_refused(key: str, value: object) -> None:
    with pytest.raises(CaseError, match=rf"settings\.{key}"):
        case(profile="diffusers-0.42.1").replace(**{key: value})


def test_a_profile_named_later_brings_what_nobody_set() -> None:
    bare = Case(model="x", prompt="p", steps=4, settings={"device": "cpu"})
    named = bare.replace(profile="diffusers-0.42.1")
    assert (named.steps, named.guidance_scale, named.num_frames) == (4, 3.0, 121)
    assert named.settings.text_recipe == "per_branch_connector"
    assert named.settings.device == "cpu"
    again = named.replace(profile="official@f4b06fb")
    assert (again.steps, again.guidance_scale) == (4, 3.0)
    assert again.settings.text_recipe == "per_branch_connector"
    assert bare.replace(profile="diffusers-0.42.1", text_recipe="keep_padding").settings.text_recipe
