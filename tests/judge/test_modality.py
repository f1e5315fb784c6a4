"""Audio and video in one verdict: which of them drifted, and nothing that is missing passes."""

from __future__ import annotations

import math

import pytest
import torch

import truestep
from truestep.judge.modality import in_seconds, modalities, with_modalities
from truestep.judge.rows import build_comparison, compare_tensors
from truestep.judge.sentence import with_divergence
from truestep.recording.format import Recording
from truestep.recording.manifest import Level, Manifest
from truestep.recording.table import tensor_table
from truestep.verdict import Comparison, Divergence, Row, Side, TensorInfo, Verdict

RATE = 24_000
Tensors = dict[str, torch.Tensor]


def joint(*, steps: int = 3, samples: int = RATE // 2) -> Tensors:
    """The tensors of a tiny audio-video recording."""
    torch.manual_seed(0)
    found = {"text/cond": torch.randn(1, 5, 8), "text/mask/cond": torch.randint(0, 2, (1, 5))}
    found["connector/cond"] = torch.randn(1, 5, 6)
    found["audio/connector/cond"] = torch.randn(1, 5, 4)
    found["connector/mask/cond"] = torch.randint(0, 2, (1, 5))
    found["schedule/sigmas"] = torch.linspace(1, 0, steps + 1)
    video, audio = (1, 16, 8), (1, 10, 4)
    found["latent/initial"] = torch.randn(video)
    found["audio/latent/initial"] = torch.randn(audio)
    for step in range(steps):
        for what in ("latent", "cond", "uncond", "guided"):
            found[f"step/{step:04d}/{what}"] = torch.randn(video)
            found[f"audio/step/{step:04d}/{what}"] = torch.randn(audio)
    found["latent/final"], found["audio/latent/final"] = torch.randn(video), torch.randn(audio)
    found["video/frames"] = torch.rand(1, 3, 5, 8, 8) * 2 - 1
    found["audio/waveform"] = torch.randn(1, 2, samples) * 0.1
    return found


def recording(tensors: Tensors, *, rate: int | None = RATE, level: Level = "full") -> Recording:
    manifest = Manifest(
        tool_version="0",
        created="",
        level=level,
        settings={"sample_rate": rate} if rate else {},
        tensors=tensor_table(tensors),
    )
    return Recording.in_memory(tensors, manifest)


def compare(actual: Tensors, reference: Tensors) -> Comparison:
    return truestep.compare(recording(actual), recording(reference))


def changed(reference: Tensors, **factors: float) -> Tensors:
    """A copy, with the tensors of these prefixes (`__` for `/`) scaled."""
    prefixes = {prefix.replace("__", "/"): factor for prefix, factor in factors.items()}
    return {
        name: tensor
        * next((factor for prefix, factor in prefixes.items() if name.startswith(prefix)), 1)
        for name, tensor in reference.items()
    }


def test_rows_carry_their_modality() -> None:
    rows = {row.name: row.modality for row in compare(joint(), joint()).rows}
    assert all(rows[name] == "audio" for name in rows if name.startswith("audio/"))
    shared = {name for name, modality in rows.items() if modality is None}
    assert shared == {"text/cond", "text/mask/cond", "connector/mask/cond", "schedule/sigmas"}
    assert rows["connector/cond"] == rows["step/0001/cond"] == rows["video/frames"] == "video"


def test_video_alone_has_no_modality() -> None:
    tensors = {name: t for name, t in joint().items() if not name.startswith("audio/")}
    result = compare(changed(tensors, step__0001=1.1), tensors)
    assert {row.modality for row in result.rows} == {None}
    assert result.modalities == ()
    assert result.first_divergence is not None
    assert str(result.first_divergence) == "`step/0001/latent`, step 0"
    assert "video" not in result.sentence


def test_the_mean_over_samples_is_of_neither() -> None:
    rows = [
        Row(name="samples/prediction", verdict=Verdict.IDENTICAL, stage="prediction"),
        Row(name="step/0/cond", verdict=Verdict.IDENTICAL, stage="prediction"),
        Row(name="audio", verdict=Verdict.IDENTICAL, stage="prediction", modality="audio"),
    ]
    assert [row.modality for row in with_modalities(rows)] == [None, "video", "audio"]


def test_audio_alone_drifts() -> None:
    reference = joint()
    actual = changed(reference, audio__step__0002__cond=1.01, audio__latent__final=1.02)
    result = compare(actual, reference)
    assert result.verdict is Verdict.DRIFTED
    first = result.first_divergence
    assert first is not None
    assert (first.stage, first.modality, first.step, first.branch) == (
        "prediction",
        "audio",
        2,
        "cond",
    )
    assert result.sentence.startswith(
        "drifted: 2 of 36 tensors (first divergence: `audio/step/0002/cond`, prediction (audio), "
        "step 2, cond), the worst at "
    )
    assert result.sentence.endswith("x the noise floor; audio only: video is identical")
    video, audio = result.modalities
    assert (video.name, video.verdict, video.tensors, video.failing) == (
        "video",
        Verdict.IDENTICAL,
        16,
        0,
    )
    assert (audio.name, audio.verdict, audio.tensors, audio.failing) == (
        "audio",
        Verdict.DRIFTED,
        16,
        2,
    )
    assert audio.worst == "audio/latent/final"
    assert audio.worst_ratio == max(row.ratio or 0 for row in result.rows)


def test_video_alone_drifts() -> None:
    reference = joint()
    actual = changed(reference, step__0000__guided=1.01, audio__step=1 + 1e-7)
    result = compare(actual, reference)
    assert "`step/0000/guided`, guidance (video), step 0)" in result.sentence
    assert result.sentence.endswith("; video only: audio is equivalent")


def test_both_drift() -> None:
    reference = joint()
    result = compare(changed(reference, step__0001=1.01, audio__step__0001=1.02), reference)
    assert result.sentence.endswith("; both: video is drifted, audio is drifted")
    assert all(item.verdict is Verdict.DRIFTED for item in result.modalities)


def test_what_both_share_drifts() -> None:
    reference = joint()
    result = compare(changed(reference, text__cond=1.01), reference)
    assert "(first divergence: `text/cond`, cond)" in result.sentence
    assert result.sentence.endswith("; video is identical, audio is identical")


def test_equivalent_says_nothing_more() -> None:
    reference = joint()
    result = compare(changed(reference, audio__=1 + 1e-7), reference)
    assert result.verdict is Verdict.EQUIVALENT
    assert "audio" not in result.sentence
    assert [item.verdict.value for item in result.modalities] == ["identical", "equivalent"]


def test_a_nan_in_the_sound_is_invalid() -> None:
    reference = joint()
    actual = joint()
    actual["audio/waveform"][0, 0, 7] = math.nan
    result = compare(actual, reference)
    assert result.verdict is Verdict.INVALID
    assert result.sentence == (
        "invalid: 1 of 36 tensors (first divergence: `audio/waveform`, decoding (audio)): "
        "non-finite values: 1 in actual (of 24,000); audio only: video is identical"
    )
    audio = result.modalities[1]
    assert (audio.verdict, audio.worst_ratio, audio.worst) == (
        Verdict.INVALID,
        None,
        "audio/waveform",
    )
    assert compare(actual, actual).verdict is Verdict.INVALID


def test_a_silent_side_is_invalid_and_two_are_identical() -> None:
    reference, silent = joint(), joint()
    silent["audio/waveform"] = torch.zeros_like(silent["audio/waveform"])
    assert compare(silent, silent).verdict is Verdict.IDENTICAL
    for sides in ((silent, reference), (reference, silent)):
        result = compare(*sides)
        assert result.verdict is Verdict.INVALID
        assert "side holds one value everywhere (0)" in result.sentence


@pytest.mark.parametrize("drop", ["audio/", "audio/waveform", "audio/step/0001/cond"])
def test_missing_parts_never_pass(drop: str) -> None:
    whole = joint()
    less = {name: tensor for name, tensor in whole.items() if not name.startswith(drop)}
    missing = compare(less, whole)
    assert missing.verdict is Verdict.MISSING
    assert missing.sentence.endswith("only the reference has it; audio only: video is identical")
    assert all(name.startswith("audio/") for name in missing.missing)
    unexpected = compare(whole, less)
    assert unexpected.verdict is Verdict.INCOMPARABLE
    assert "unexpected: the reference has no such tensor" in unexpected.sentence


def test_another_length_is_incomparable_in_seconds() -> None:
    result = compare(joint(samples=RATE), joint(samples=2 * RATE))
    assert result.verdict is Verdict.INCOMPARABLE
    assert result.sentence == (
        "incomparable: 1 of 36 tensors: audio/waveform: 1 s of sound against 2 s "
        "(-24,000 samples at 24,000 Hz); audio only: video is identical"
    )


@pytest.mark.parametrize("level", ["stats", "sketch"])
def test_another_length_is_told_at_every_level(level: Level) -> None:
    sides = [recording(joint(samples=n), level=level) for n in (RATE, RATE + 12)]
    row = truestep.compare(*sides).rows[-1]
    assert row.verdict is Verdict.INCOMPARABLE
    assert row.note == "1 s of sound against 1.0005 s (-12 samples at 24,000 Hz)"


def test_other_shapes_and_unknown_rates_are_told_in_numbers() -> None:
    row = Row(
        name="audio/waveform",
        verdict=Verdict.INCOMPARABLE,
        stage="decoding",
        modality="audio",
        actual=TensorInfo(dtype="float32", shape=(1, 2, 10)),
        reference=TensorInfo(dtype="float32", shape=(1, 2, 20)),
        note="shape",
    )
    assert in_seconds(row, 100).note == "0.1 s of sound against 0.2 s (-10 samples at 100 Hz)"
    assert in_seconds(row, None) is row
    mono = row.model_copy(update={"actual": TensorInfo(dtype="float32", shape=(1, 1, 20))})
    assert in_seconds(mono, 100).note == "shape"
    assert in_seconds(row.model_copy(update={"stage": "update"}), 100).note == "shape"
    assert in_seconds(row.model_copy(update={"reference": None}), 100).note == "shape"


def test_two_sample_rates_are_two_cases() -> None:
    tensors = joint()
    result = truestep.compare(recording(tensors), recording(tensors, rate=48_000))
    assert result.verdict is Verdict.INCOMPARABLE
    assert result.sentence.endswith("of different cases (sample_rate differ)")
    assert str(result.case_differences[0].actual) == "24000"
    unknown = truestep.compare(recording(tensors, rate=None), recording(tensors))
    assert unknown.verdict is Verdict.IDENTICAL


def test_the_modality_goes_into_the_model_with_the_divergence() -> None:
    reference = joint()
    result = compare(changed(reference, audio__step__0001__cond=1.01), reference)
    inside = Divergence(name="x", stage="prediction", step=1, branch="cond", fqn="blocks.3")
    opened = with_divergence(result, inside, ())
    assert str(opened.first_divergence) == "`blocks.3`, prediction (audio), step 1, cond"
    assert opened.sentence.endswith("; audio only: video is identical")
    elsewhere = with_divergence(result, inside.model_copy(update={"stage": "text"}), ())
    assert elsewhere.first_divergence is not None
    assert elsewhere.first_divergence.modality is None


def test_sound_without_video_is_not_told_apart() -> None:
    reference = {n: t for n, t in joint().items() if n.startswith("audio/")}
    rows = compare_tensors(changed(reference, audio__step=1.01), reference)
    assert modalities(with_modalities(rows)) == ()
    result = build_comparison(rows, actual=Side(label="a"), reference=Side(label="r"))
    assert "(audio)" in result.sentence
    assert "only" not in result.sentence


def test_results_survive_json() -> None:
    result = compare(changed(joint(), audio__step=1.01), joint())
    assert Comparison.model_validate_json(result.to_json()) == result


@pytest.mark.parametrize(("video", "audio", "named"), [(1.1, 1.3, "audio"), (1.3, 1.1, "video")])
def test_of_what_one_forward_makes_the_part_that_is_further_off_is_named(
    video: float, audio: float, named: str
) -> None:
    reference = joint()
    actual = dict(reference)
    actual["step/0001/cond"] = reference["step/0001/cond"] * video
    actual["audio/step/0001/cond"] = reference["audio/step/0001/cond"] * audio
    actual["audio/step/0002/cond"] = reference["audio/step/0002/cond"] * 9.0
    found = compare(actual, reference)
    assert found.first_divergence is not None
    assert (found.first_divergence.step, found.first_divergence.modality) == (1, named)
    assert f"prediction ({named}), step 1" in found.sentence
