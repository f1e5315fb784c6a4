"""The file format: look-up, overlay, round trip, and refusals."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gates.thresholds.samples import VACUOUS
from truestep.case import Case
from truestep.errors import FileFormatError, UsageError, WriteError
from truestep.gates.thresholds.file import METRICS, Thresholds, limits_of, read, write

Save = Callable[..., Path]

KEYS = [m.key for m in METRICS] + [m.default_key(video=True) for m in METRICS]
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def test_constants_are_the_sources() -> None:
    nothing = Thresholds("x", {"cases": {}})
    image = {"clip": 0.92, "ssim": 0.95, "psnr_db": 28.0, "mad": 8.0}
    video = {"clip": 0.90, "ssim": 0.92, "psnr_db": 24.0, "mad": 10.0}
    assert nothing.limits("a", video=False).values == image
    assert nothing.limits("a", video=True).values == video
    assert set(nothing.limits("a", video=True).source.values()) == {"constant"}
    sound = {
        "audio_spectral": 0.95,
        "audio_correlation": 0.90,
        "audio_rms_db": 2.0,
        "audio_duration_s": 0.10,
    }
    assert nothing.limits("a", video=True, sound=True).values == {**video, **sound}
    assert nothing.limits("a", video=False, sound=True).values == {**image, **sound}


def test_case_goes_before_default_before_constant() -> None:
    data = {
        "cases": {"a": {"ssim_threshold": 0.5, "audio_rms_db_diff_threshold": 1}},
        "default_ssim_threshold_video": 0.6,
        "default_psnr_threshold_video": 20,
        "default_psnr_threshold_image": 99,
    }
    limits = Thresholds("h100.json", data).limits("a", video=True)
    assert limits.rule == "sglang h100.json [a]"
    expected = {"clip": 0.9, "ssim": 0.5, "psnr_db": 20.0, "mad": 10.0, "audio_rms_db": 1.0}
    assert limits.values == expected
    assert limits.source["ssim"] == limits.source["audio_rms_db"] == "case"
    assert (limits.source["psnr_db"], limits.source["mad"]) == ("file", "constant")


def test_defaults_of_the_sound_have_no_suffix() -> None:
    data = {
        "cases": {"a": {"audio_rms_db_diff_threshold": 1.5}},
        "default_audio_spectral_similarity_threshold": 0.8,
        "default_audio_waveform_correlation_threshold": 0.7,
        "default_audio_rms_db_diff_threshold": 3.0,
        "default_audio_duration_diff_threshold": 0.2,
        "default_audio_duration_diff_threshold_video": 9.0,
    }
    for video in (True, False):
        limits = Thresholds("x", data).limits("a", video=video, sound=True)
        found = {key: value for key, value in limits.values.items() if key.startswith("audio_")}
        assert found == {
            "audio_spectral": 0.8,
            "audio_correlation": 0.7,
            "audio_rms_db": 1.5,
            "audio_duration_s": 0.2,
        }
        assert limits.source["audio_rms_db"] == "case"
    silent = Thresholds("x", data).limits("b", video=True)
    assert not any(name.startswith("audio_") for name in silent.values)


def test_a_case_is_found_by_name_and_by_id_and_its_absence_is_said() -> None:
    case = Case(model="builtin:digits", prompt="a red three", num_frames=1)
    named = Thresholds("x", {"cases": {"three": {"ssim_threshold": 0.1}}})
    by_id = Thresholds("x", {"cases": {case.id: {"ssim_threshold": 0.2}}})
    assert limits_of(named, "three", case, sound=False)[0].values["ssim"] == 0.1
    assert limits_of(by_id, "three", case, sound=False)[0].values["ssim"] == 0.2
    limits, note = limits_of(by_id.with_case(case.id, {}), "three", case, sound=False)
    assert (limits.values["ssim"], note) == (0.95, "")  # one frame is an image
    assert (
        limits_of(named, "four", case, sound=False)[1] == "x has no case 'four': its defaults judge"
    )


def test_a_platform_lies_over_the_base_case_by_case(save: Save) -> None:
    base = save({"a": VACUOUS, "b": {"psnr_threshold": 9}}, default_ssim_threshold_video=0.7)
    save({"a": {"psnr_threshold": 30.0}, "c": {}}, name="b200.json", _comment="x")
    found = read(base, platform="b200")
    assert found.label == "h100.json + b200.json"
    assert found.cases["a"] == {"psnr_threshold": 30.0}  # as SGLang's reader: not key by key
    assert found.limits("a", video=True).values["ssim"] == 0.7
    assert (found.cases["b"], found.cases["c"]) == ({"psnr_threshold": 9}, {})
    assert found.data["default_ssim_threshold_video"] == 0.7
    assert read(base, platform="h100") == read(base)
    with pytest.raises(UsageError, match="no thresholds of platform 'mi300'") as caught:
        read(base, platform="mi300")
    assert "there is: b200" in str(caught.value)


def test_a_platform_is_found_in_the_folder_beside_a_single_file(save: Save) -> None:
    base = save({"a": VACUOUS}, name="consistency_threshold.json")
    save({"a": {"ssim_threshold": 0.9}}, name="consistency_thresholds/5090.json")
    assert read(base, platform="5090").limits("a", video=True).values["ssim"] == 0.9


def test_a_platform_without_cases_changes_nothing(save: Save) -> None:
    base = save({"a": VACUOUS}, default_ssim_threshold_video=0.7)
    alone = read(save({}, name="b200.json"))
    assert alone.cases == {}
    found = read(base, platform="b200")
    assert found.data == read(base).data


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), PLAIN, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.dictionaries(st.text(max_size=8).filter(lambda key: key != "cases"), PLAIN, max_size=3),
)
def test_what_is_written_is_read_back_unknown_keys_included(
    tmp_path_factory: pytest.TempPathFactory, cases: dict, others: dict
) -> None:
    path = tmp_path_factory.mktemp("file") / "x.json"
    written = Thresholds("x.json", {**others, "cases": cases})
    write(path, written)
    assert read(path) == written
    assert json.loads(path.read_text("utf-8")) == written.data  # as SGLang-Diffusion reads it


@settings(deadline=None)
@given(st.sampled_from(METRICS), NUMBERS)
def test_a_number_survives_as_the_limit_it_is(
    tmp_path_factory: pytest.TempPathFactory, metric: object, number: float
) -> None:
    path = tmp_path_factory.mktemp("file") / "x.json"
    write(path, Thresholds("x", {"cases": {}}).with_case("a", {metric.key: number}))  # type: ignore[attr-defined]
    assert read(path).limits("a", video=True).values[metric.name] == number  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("[]", "a list instead of an object"),
        ("{}", "neither cases nor a default"),
        ('{"cases": []}', "cases is a list instead of an object"),
        ('{"cases": {"a": 3}}', "case 'a' is a int instead of an object"),
        ('{"cases": {"a": {}, "a": {}}}', "key 'a' is there twice"),
        ("[" * 100_000, ""),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match="the threshold file cannot be used") as caught:
        read(path)
    assert why in str(caught.value)


def test_absent_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be used"):
        read(tmp_path / "absent.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError, match="cannot be used"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("value", ["0.9", None, True, math.nan, math.inf, []])
def test_a_limit_that_cannot_judge_is_refused(save: Save, value: object) -> None:
    found = read(save({"a": {"ssim_threshold": value}, "b": {}}))
    with pytest.raises(FileFormatError, match="not a number that can judge") as caught:
        found.limits("a", video=True)
    assert "h100.json: a: ssim_threshold" in str(caught.value)
    assert found.limits("b", video=True).values["ssim"] == 0.92


def test_a_failed_write_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write(path, Thresholds("x", {"cases": {"a": {}}}))
    before = path.read_bytes()

    def broken(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(WriteError, match="the threshold file could not be written"):
        write(path, Thresholds("x", {"cases": {"b": {}}}))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
