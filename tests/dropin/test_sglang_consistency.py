"""SGLang-Diffusion's consistency check by one changed import."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.dropin.conftest import embedding
from truestep.dropin import sglang as ours
from truestep.verdict import Verdict

RANDOM = np.random.default_rng(0)
PICTURES = [RANDOM.integers(0, 256, (40, 48, 3), dtype=np.uint8) for _ in range(3)]
SOUND = RANDOM.normal(0, 0.1, 16_000).astype(np.float32)
LOOSE = ours.ConsistencyThresholds(-1.0, -1.0, 0.0, 255.0)
TIGHT = ours.ConsistencyThresholds(0.92, 0.95, 28.0, 8.0)
SOUNDS = ours.AudioConsistencyThresholds(0.95, 0.9, 2.0, 0.1)

FUNCTIONS = {
    "get_consistency_platform": "()",
    "get_consistency_threshold_path": "(platform=None)",
    "get_consistency_thresholds": "(case_id, is_video, metadata=None)",
    "get_audio_consistency_thresholds": "(case_id, metadata=None)",
    "compute_ssim": "(image, gt_image)",
    "compute_psnr": "(image, gt_image)",
    "compute_mean_abs_diff": "(image, gt_image)",
    "compute_clip_similarity": "(emb1, emb2)",
    "compare_with_gt": "(output_frames, gt_data, thresholds, case_id)",
    "compare_audio_with_gt": "(output_audio, gt_audio, thresholds, sample_rate=16000)",
}
CLASSES = {
    "ConsistencyThresholds": "clip_threshold ssim_threshold psnr_threshold mean_abs_diff_threshold",
    "AudioConsistencyThresholds": "spectral_similarity_threshold waveform_correlation_threshold "
    "rms_db_diff_threshold duration_diff_threshold",
    "AudioConsistencyResult": "passed spectral_similarity waveform_correlation rms_db_diff "
    "duration_diff thresholds",
    "FrameConsistencyMetrics": "frame_index clip_similarity ssim psnr mean_abs_diff clip_passed "
    "ssim_passed psnr_passed mean_abs_diff_passed",
    "ConsistencyResult": "case_id passed similarity_scores min_similarity threshold min_ssim "
    "min_psnr max_mean_abs_diff thresholds frame_metrics",
    "LoadedConsistencyGT": "images embeddings",
}


def signature(function: Any) -> str:
    """Names and defaults of a function's parameters."""
    own = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in own.parameters.values()]
    return str(own.replace(parameters=plain, return_annotation=own.empty))


def fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_those_of_sglang(name: str) -> None:
    assert signature(getattr(ours, name)) == FUNCTIONS[name]


@pytest.mark.parametrize("name", CLASSES)
def test_fields_are_those_of_sglang_and_our_verdict(name: str) -> None:
    ours_too = ["comparison"] if name.endswith("Result") else []
    assert fields(getattr(ours, name)) == CLASSES[name].split() + ours_too


def test_importing_it_imports_no_torch_and_no_numpy() -> None:
    code = "import truestep.dropin.sglang, sys; assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def gt(pictures: list[Any]) -> ours.LoadedConsistencyGT:
    return ours.LoadedConsistencyGT(pictures, [embedding(picture) for picture in pictures])


def noisy(pictures: list[Any], size: int) -> list[Any]:
    return [
        np.clip(p.astype(int) + RANDOM.integers(-size, size + 1, p.shape), 0, 255).astype(np.uint8)
        for p in pictures
    ]


def test_equal_frames_pass_and_are_identical(
    sglang: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ours.compare_with_gt(PICTURES, gt(PICTURES), TIGHT, "case")
    assert result.passed
    assert result.comparison is not None
    assert result.comparison.verdict is Verdict.IDENTICAL
    assert [f.psnr for f in result.frame_metrics] == [math.inf] * 3
    assert result.min_ssim == pytest.approx(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[Consistency Check] case: PASSED"
    assert sum(line.startswith("  frame ") for line in lines) == 3
    assert lines[-1] == "  truestep identical: 3 tensors agree bit for bit"


def test_what_fails_says_which_metric(sglang: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = [*PICTURES[:2], 255 - PICTURES[2]]
    result = ours.compare_with_gt(other, gt(PICTURES), TIGHT, "case")
    assert not result.passed
    assert [frame.passed for frame in result.frame_metrics] == [True, True, False]
    assert not result.frame_metrics[2].ssim_passed
    assert result.comparison is not None
    assert result.comparison.verdict is Verdict.INCONCLUSIVE
    assert "[Consistency Check] case: FAILED" in capsys.readouterr().out


def test_what_its_limits_let_pass_is_not_called_equivalent(sglang: Path) -> None:
    result = ours.compare_with_gt(noisy(PICTURES, 8), gt(PICTURES), TIGHT, "case")
    assert result.passed
    assert result.comparison is not None
    assert result.comparison.verdict is Verdict.INCONCLUSIVE
    little = [np.where(p < 255, p + 1, p).astype(np.uint8) for p in PICTURES]
    result = ours.compare_with_gt(little, gt(PICTURES), TIGHT, "case")
    assert result.comparison is not None
    assert result.comparison.verdict is Verdict.INCONCLUSIVE


def test_what_a_case_is_called_cannot_act(sglang: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours.compare_with_gt(PICTURES[:1], gt(PICTURES[:1]), TIGHT, "a\x1b[31m\nPASSED")
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "frames",
    [PICTURES[:2], [p[:8] for p in PICTURES], [p[..., :2] for p in PICTURES], PICTURES * 2],
    ids=["fewer", "smaller", "two channels", "more"],
)
def test_what_cannot_be_compared_is_a_value_error(frames: list[Any], sglang: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        ours.compare_with_gt(frames, gt(PICTURES), LOOSE, "case")


def test_without_sglang_there_is_no_clip_and_no_file() -> None:
    with pytest.raises(ImportError, match="sglang"):
        ours.compare_with_gt(PICTURES, gt(PICTURES), LOOSE, "case")
    with pytest.raises(ImportError, match="sglang is not installed"):
        ours.get_consistency_thresholds("case", True)


def test_other_names_are_handed_on(sglang: Path) -> None:
    from truestep.dropin.sglang import other

    assert other is sys.modules["sglang.multimodal_gen.test.test_utils"].other
    with pytest.raises(AttributeError):
        ours.nothing  # noqa: B018


METADATA: dict[str, Any] = {
    "cases": {"a": {"ssim_threshold": 0.5, "audio_rms_db_diff_threshold": "3"}},
    "default_psnr_threshold_video": 20,
    "default_psnr_threshold_image": 25,
    "default_audio_duration_diff_threshold": 0.5,
}


def test_a_limit_is_the_cases_then_the_files_then_sglangs() -> None:
    given = ours.get_consistency_thresholds("a", True, METADATA)
    assert dataclasses.astuple(given) == (0.90, 0.5, 20.0, 10.0)
    given = ours.get_consistency_thresholds("b", is_video=False, metadata=METADATA)
    assert dataclasses.astuple(given) == (0.92, 0.95, 25.0, 8.0)
    sound = ours.get_audio_consistency_thresholds("a", METADATA)
    assert dataclasses.astuple(sound) == (0.95, 0.9, 3.0, 0.5)
    with pytest.raises(ValueError, match="could not convert"):
        ours.get_consistency_thresholds("a", True, {"cases": {"a": {"clip_threshold": "high"}}})


def test_the_installed_files_are_read(sglang: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ours.get_consistency_thresholds("a", True).ssim_threshold == 0.92
    (sglang / "h100.json").write_text(json.dumps(METADATA))
    assert ours.get_consistency_threshold_path() == sglang / "h100.json"
    assert ours.get_consistency_thresholds("a", True).ssim_threshold == 0.5
    (sglang / "5090.json").write_text('{"cases": {"a": {"clip_threshold": 0.1}}}')
    for name in ("rtx-5090", "SM_120", "5090"):
        monkeypatch.setenv("SGLANG_DIFFUSION_CONSISTENCY_PLATFORM", name)
        assert ours.get_consistency_platform() == "5090"
        over = ours.get_consistency_thresholds("a", True)
        assert dataclasses.astuple(over) == (0.1, 0.92, 20.0, 10.0)
    with pytest.raises(ValueError, match="no platform is called 'a100'"):
        ours.get_consistency_threshold_path("a100")


def test_sounds_are_judged_and_our_verdict_stands_beside() -> None:
    same = ours.compare_audio_with_gt(SOUND, SOUND, SOUNDS)
    assert same.passed
    assert same.comparison is not None
    assert same.comparison.verdict is Verdict.IDENTICAL
    louder = ours.compare_audio_with_gt(SOUND * 1.1, SOUND, SOUNDS)
    assert louder.passed
    assert louder.comparison is not None
    assert louder.comparison.verdict is Verdict.DRIFTED
    shorter = ours.compare_audio_with_gt(SOUND[:8000], SOUND, SOUNDS, sample_rate=8000)
    assert not shorter.passed
    assert shorter.duration_diff == 1.0
    for bad in (SOUND[:0], SOUND * math.nan):
        with pytest.raises(ValueError, match="empty or not finite"):
            ours.compare_audio_with_gt(bad, SOUND, SOUNDS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_of_the_original(name: str, original_sglang: ModuleType) -> None:
    assert signature(getattr(original_sglang, name)) == FUNCTIONS[name]


@pytest.mark.parametrize("name", CLASSES)
def test_fields_of_the_original(name: str, original_sglang: ModuleType) -> None:
    assert fields(getattr(original_sglang, name)) == CLASSES[name].split()


SIDES = {
    "equal": PICTURES,
    "noise": noisy(PICTURES, 8),
    "much noise": noisy(PICTURES, 60),
    "negated": [255 - picture for picture in PICTURES],
    "black": [0 * picture for picture in PICTURES],
    "floats": [picture * 1.1 - 5 for picture in PICTURES],
    "fewer": PICTURES[:2],
    "cut": [picture[:20] for picture in PICTURES],
}


@pytest.mark.parametrize("side", SIDES)
def test_outcomes_of_the_original_on_pictures(side: str, original_sglang: ModuleType) -> None:
    found: list[Any] = []
    with np.errstate(divide="ignore"):
        for module in (original_sglang, ours):
            try:
                found.append(module.compare_with_gt(SIDES[side], gt(PICTURES), TIGHT, "case"))
            except ValueError:
                found.append(ValueError)
    if found[0] is ValueError:
        assert found[1] is ValueError
    else:
        theirs, own = map(flat, found)
        assert [*theirs] == [*own]
        assert theirs == pytest.approx(own, abs=1e-6)


def flat(result: Any) -> dict[str, float]:
    """Numbers and outcomes of a result, by where they stand in it."""
    names = set(CLASSES["ConsistencyResult"].split()) - {"case_id", "thresholds"}
    named = {name: getattr(result, name) for name in sorted(names)}
    frames, scores = named.pop("frame_metrics"), named.pop("similarity_scores")
    named |= {f"scores {i}": score for i, score in enumerate(scores)}
    for frame in frames:
        named |= {f"{frame.frame_index} {k}": v for k, v in dataclasses.asdict(frame).items()}
    return named


HEARD = {
    "equal": SOUND,
    "louder": 1.2 * SOUND,
    "shorter": SOUND[:9000],
    "noisy": SOUND + RANDOM.normal(0, 0.02, SOUND.shape).astype(np.float32),
    "another": RANDOM.normal(0, 0.1, SOUND.shape).astype(np.float32),
    "silent": 0 * SOUND,
    "short": SOUND[:100],
    "two channels": SOUND.reshape(-1, 2),
    "empty": SOUND[:0],
    "nan": SOUND * math.nan,
}


@pytest.mark.parametrize("side", HEARD)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_outcomes_of_the_original_on_sounds(
    side: str, rate: int, original_sglang: ModuleType
) -> None:
    found: list[Any] = []
    for module in (original_sglang, ours):
        try:
            result = module.compare_audio_with_gt(HEARD[side], SOUND, SOUNDS, sample_rate=rate)
        except ValueError:
            found.append(ValueError)
        else:
            found.append([getattr(result, n) for n in CLASSES["AudioConsistencyResult"].split()])
    if found[0] is ValueError:
        assert found[1] is ValueError
    else:
        assert found[0][0] == found[1][0]
        assert found[0][1:-1] == pytest.approx(found[1][1:-1], abs=1e-5)


CASES = ("nothing", "wan_2_1_t2v_1.3b", "qwen_image_t2i", "flux_image_t2i")


@pytest.mark.parametrize("platform", ["h100", "5090", "b200", "intel_xpu_b60"])
def test_limits_of_the_original(
    platform: str, original_sglang: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_CONSISTENCY_PLATFORM", platform)
    monkeypatch.setattr(ours, "_folder", lambda: original_sglang.CONSISTENCY_THRESHOLD_DIR)
    path = original_sglang.get_consistency_threshold_path()
    assert ours.get_consistency_threshold_path() == path
    cases = {*CASES, *json.loads(path.read_text()).get("cases", {})}
    for case in cases:
        for video in (True, False):
            pair = [m.get_consistency_thresholds(case, video) for m in (original_sglang, ours)]
            assert dataclasses.astuple(pair[0]) == dataclasses.astuple(pair[1])
        sound = [m.get_audio_consistency_thresholds(case) for m in (original_sglang, ours)]
        assert dataclasses.astuple(sound[0]) == dataclasses.astuple(sound[1])


OWN_TESTS = (
    "test_pixel_metrics_identical_image",
    "test_pixel_metrics_detect_different_image",
    "test_compare_with_gt_passes_for_identical_image",
    "test_compare_with_gt_uses_worst_frame_for_video",
    "test_save_consistency_failure_artifact",
    "test_audio_consistency_rejects_wrong_audio",
    "test_audio_consistency_wav_round_trip_passes",
)


@pytest.mark.parametrize("name", OWN_TESTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_their_own_tests_pass_with_one_changed_import(
    name: str, original_sglang: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Path(original_sglang.__file__ or "").parent / "unit" / "test_consistency_metrics.py"
    text, line = path.read_text("utf-8"), f"from {ours.ORIGINAL} import ("
    assert text.count(line) == 1
    namespace: dict[str, Any] = {"__name__": "own_tests"}
    exec(compile(text.replace(line, f"from {ours.__name__} import ("), path, "exec"), namespace)
    assert namespace["compare_with_gt"] is ours.compare_with_gt
    fixtures = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    monkeypatch.setattr(original_sglang, "compare_audio_with_gt", ours.compare_audio_with_gt)
    wanted = inspect.signature(namespace[name]).parameters
    namespace[name](**{key: fixtures[key] for key in wanted})
