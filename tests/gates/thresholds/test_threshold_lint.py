"""The linter: vacuous gates are found by trying, and a calibrated file passes."""

from __future__ import annotations

import math

import pytest
import torch

from tests.gates.thresholds.samples import FRAMES, OTHER_FRAMES, VACUOUS, WAVEFORM
from truestep.gates.thresholds.file import Thresholds
from truestep.gates.thresholds.linting import Finding, Kind, Lint, lint

PROVENANCE = {
    "date": "2026-11-01T00:00:00+00:00",
    "runs": 9,
    "environment": {"device.class": "h100"},
    "reference": {"case_id": "a", "created": "2026-11-01", "weights": "f00", "commit": "abc"},
    "measured": {"ssim": [1.0], "psnr_db": ["inf"], "mad": [0.0]},
    "rule": "measured",
}
TIGHT = {
    "ssim_threshold": 0.999,
    "psnr_threshold": 60.0,
    "mean_abs_diff_threshold": 0.02,
    "truestep": PROVENANCE,
}
TIGHT_SOUND = {"audio_waveform_correlation_threshold": 0.9999, "audio_rms_db_diff_threshold": 0.01}
VIDEO = {"video/frames": FRAMES}


def linted(entry: dict[str, object], **others: object) -> Lint:
    thresholds = Thresholds("x.json", {"cases": {"a": entry}, **others})
    return lint(thresholds, VIDEO, tried_on="here", other={"video/frames": OTHER_FRAMES})


def of(found: Lint, kind: Kind) -> list[Finding]:
    return [finding for finding in found.findings if finding.kind is kind]


def test_the_shipped_vacuous_gate_is_found_by_trying() -> None:
    found = linted({**VACUOUS, "truestep": PROVENANCE})
    assert {f.kind for f in found.findings} == {Kind.VACUOUS}
    gain = next(f for f in found.findings if f.damage == "10 % gain")
    assert gain.text.startswith("10 % gain passes: ssim 0.9")
    assert ">= 0.29" in gain.text
    assert gain.text.endswith("(not judged: clip)")
    assert gain.measured["ssim"] > gain.limits["ssim"] == 0.29
    assert found.sentence == "x.json: of 1 case: 1 vacuous"


def test_a_calibrated_file_passes() -> None:
    found = linted(TIGHT)
    assert found.findings == ()
    assert found.sentence == "x.json: 1 case, nothing wrong found"
    assert {"another seed", "10 % gain", "10 % noise", "all NaN"} <= set(found.tried)
    assert found.not_tried == ()


def test_another_seed_alone_makes_a_gate_vacuous() -> None:
    near = FRAMES + 0.02 * torch.randn(FRAMES.shape, generator=torch.Generator().manual_seed(0))
    thresholds = Thresholds("x", {"cases": {"a": {**TIGHT, "psnr_threshold": 36.0}}})
    loose = thresholds.with_case("a", {"truestep": PROVENANCE, "psnr_threshold": 36.0})
    found = lint(loose, VIDEO, tried_on="here", other={"video/frames": near})
    assert [f.damage for f in of(found, Kind.VACUOUS)] == ["another seed"]
    tight = lint(thresholds, VIDEO, tried_on="here", other={"video/frames": near})
    assert of(tight, Kind.VACUOUS) == []


def test_without_another_seed_it_is_said() -> None:
    found = lint(Thresholds("x", {"cases": {"a": TIGHT}}), VIDEO, tried_on="here", fine=False)
    assert "another seed" not in found.tried
    assert "10 % gain" not in found.tried
    assert found.not_tried == (
        "another seed: there is none",
        "a gain and noise of 10 %: they need the case's own reference",
    )


def test_damaged_sound_that_passes_is_found() -> None:
    both = {**VIDEO, "audio/waveform": WAVEFORM}
    other = {"video/frames": OTHER_FRAMES, "audio/waveform": WAVEFORM.roll(7, -1)}

    def of_sound(entry: dict[str, object]) -> list[str]:
        thresholds = Thresholds("x", {"cases": {"a": entry}})
        found = lint(thresholds, both, tried_on="here", other=other, sample_rate=16_000)
        return [finding.text for finding in found.findings]

    gain, noise = of_sound(TIGHT)  # by the constants of SGLang's reader
    assert gain.startswith("10 % gain in the sound passes: audio_spectral 1 >= 0.95, audio_corr")
    assert gain.endswith("audio_rms_db 0.8279 <= 2, audio_duration_s 0 <= 0.1")
    assert noise.startswith("10 % noise in the sound passes: audio_spectral 0.99")
    assert of_sound({**TIGHT, **TIGHT_SOUND}) == []
    loose = {**TIGHT, **TIGHT_SOUND, "audio_rms_db_diff_threshold": 1.0}
    assert of_sound(loose) == [
        "10 % gain in the sound passes: audio_spectral 1 >= 0.95, audio_correlation 1 >= 0.9999, "
        "audio_rms_db 0.8279 <= 1, audio_duration_s 0 <= 0.1"
    ]


@pytest.mark.parametrize(
    ("key", "value", "kind", "text"),
    [
        ("ssim_threshold", 1.2, Kind.IMPOSSIBLE, "ssim is never >= 1.2; its best is 1"),
        ("mean_abs_diff_threshold", -1, Kind.IMPOSSIBLE, "mad is never <= -1"),
        ("psnr_threshold", 200, Kind.IMPOSSIBLE, "psnr_db is never >= 200"),
        ("mean_abs_diff_threshold", 255, Kind.VACUOUS, "mad is always <= 255"),
        ("ssim_threshold", -1.5, Kind.VACUOUS, "ssim is always >= -1.5"),
        ("psnr_threshold", 0.0, Kind.VACUOUS, "psnr_db is always >= 0"),
        ("ssim_threshold", math.nan, Kind.NOT_A_NUMBER, "ssim_threshold is nan"),
        ("ssim_threshold", "0.9", Kind.NOT_A_NUMBER, "is '0.9'"),
        ("ssim_treshold", 0.9, Kind.UNKNOWN_KEY, "did you mean ssim_threshold?"),
    ],
)
def test_a_single_key(key: str, value: object, kind: Kind, text: str) -> None:
    found = [f for f in of(linted({**TIGHT, key: value}), kind) if not f.damage]
    assert len(found) == 1
    assert text in found[0].text
    default = f"default_{key}_video"
    found = of(linted(TIGHT, **{default: value}), kind)
    assert any(f.case in ("(file)", "(defaults, video)") for f in found)


def test_the_keys_that_sglang_reads_are_known() -> None:
    defaults = {
        "default_clip_threshold_image": 0.92,
        "default_mean_abs_diff_threshold_video": 0.02,
        "default_audio_spectral_similarity_threshold": 0.95,
        "default_audio_waveform_correlation_threshold": 0.9,
        "default_audio_rms_db_diff_threshold": 2.0,
        "default_audio_duration_diff_threshold": 0.1,
    }
    assert of(linted(TIGHT, **defaults), Kind.UNKNOWN_KEY) == []
    (found,) = of(linted(TIGHT, default_audio_rms_db_diff_threshold_video=2), Kind.UNKNOWN_KEY)
    assert found.text.endswith("did you mean default_audio_rms_db_diff_threshold?")


def test_a_file_without_cases_says_that_nothing_was_tried() -> None:
    found = lint(Thresholds("b200.json", {"cases": {}}), VIDEO, tried_on="here")
    assert (found.findings, found.tried) == ((), ())
    text = "b200.json: no case and no default: laid over another file, it changes nothing"
    assert found.sentence == text


def test_comments_and_our_own_key_are_no_unknown_keys() -> None:
    assert linted({**TIGHT, "_comment": "x"}, _comment="y").findings == ()


def test_limits_without_provenance() -> None:
    bare = {key: value for key, value in TIGHT.items() if key != "truestep"}
    (found,) = linted(bare).findings
    assert found.kind is Kind.NO_PROVENANCE
    part = {key: value for key, value in PROVENANCE.items() if key not in ("runs", "date")}
    (found,) = linted({**TIGHT, "truestep": part}).findings
    assert found.text == "truestep is incomplete: date, runs"
    (found,) = linted({**TIGHT, "truestep": "yes"}).findings
    assert found.text == "truestep is incomplete: truestep"
    assert linted({"truestep": {}}).findings != ()  # the reader's constants are tried all the same
    defaults = linted(TIGHT, default_ssim_threshold_video=0.9999)
    assert [f.kind for f in defaults.findings if f.case == "(file)"] == [Kind.NO_PROVENANCE]


def test_a_reference_without_a_commit() -> None:
    source = {key: v for key, v in PROVENANCE["reference"].items() if key != "commit"}
    (found,) = linted({**TIGHT, "truestep": {**PROVENANCE, "reference": source}}).findings
    assert found.kind is Kind.NO_COMMIT
    assert "neither a commit nor released versions" in found.text
    released = {**source, "implementation": "diffusers 0.42.1"}
    assert linted({**TIGHT, "truestep": {**PROVENANCE, "reference": released}}).findings == ()
    weights = {**released, "weights": ""}
    (found,) = linted({**TIGHT, "truestep": {**PROVENANCE, "reference": weights}}).findings
    assert found.text == "the reference names no weights"


def test_results_survive_json() -> None:
    found = linted(VACUOUS)
    assert Lint.model_validate_json(found.model_dump_json()) == found
