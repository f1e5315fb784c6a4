"""LTX-2 under test: what drifts is named by stage and modality, and what is harmless is not."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The benchmarks are not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.bench_verdict import _place
from bench.faults.registry import BENIGN, FAULTS, Fault
from truestep.calls.instructions import Elsewhere
from truestep.case import Case
from truestep.joint import Joint
from truestep.recording.format import Recording
from truestep.replay import floor as replay_floor
from truestep.replay.check import check_pipeline
from truestep.replay.locating import locate_module
from truestep.replay.raised import raised
from truestep.replay.record import FloorChoice, record_pipeline
from truestep.replay.stages import replay
from truestep.replay.variations import variations
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Comparison, Verdict

OWN = [name for name, entry in FAULTS.items() if entry.family == "joint"]

# An image, several clips, contexts of one width, as many tokens of video as of sound.
ELSEWHERE = {
    "token-sigma-lost",
    "token-sigma-lost-in-x0",
    "cross-sigma-of-tokens",
    "std-scope-changed",
    "contexts-swapped",
    "predictions-swapped",
}

HEADS = {
    "profile": "official@f4b06fb",
    "pass_batching": "separate",
    "stg_blocks": [1],
    "audio_stg_blocks": [2],
    "audio_guidance_rescale": 0.5,
    "fps": 16,
    "device": "cpu",
}


class Subject:
    """A tiny model, recorded once; candidates are copies of it."""

    def __init__(
        self,
        folder: Path,
        dtype: str = "float32",
        floor: FloorChoice = "steps",
        steps: int = 3,
        **settings: Any,
    ) -> None:
        self.case = Case(
            model=str(folder),
            prompt="a red three moving left",
            negative_prompt="a blue one",
            steps=steps,
            guidance_scale=3.0,
            height=64,
            width=64,
            num_frames=9,
            max_sequence_length=16,
            seed=7,
            dtype=dtype,  # type: ignore[arg-type]
            settings={**HEADS, **settings},
        )
        self.plain = load(self.case)
        self.recording: Recording = record_pipeline(
            copy.deepcopy(self.plain), case=self.case, floor=floor
        )

    def changed(self, entry: Fault | None) -> Pipeline:
        pipe = copy.deepcopy(self.plain)
        if entry is not None:
            entry.apply(pipe)
        return pipe

    def check(self, entry: Fault | None, tolerance: float | None = None) -> Comparison:
        pipe = self.changed(entry)
        return check_pipeline(pipe, self.recording, case=self.case, tolerance=tolerance)


@pytest.fixture(scope="module")
def one(tiny_ltx2: dict[str, Path]) -> Subject:
    return Subject(tiny_ltx2["2.3"])


@pytest.fixture(scope="module")
def narrow(tiny_ltx2: dict[str, Path]) -> Subject:
    return Subject(tiny_ltx2["2.3"], dtype="bfloat16", floor="none")


@pytest.fixture(scope="module")
def clips(tiny_ltx2: dict[str, Path]) -> Subject:
    return Subject(tiny_ltx2["2.3"], floor="none", videos_per_prompt=2)


def test_a_floor_of_16_bits_is_of_what_is_recorded(
    tiny_ltx2: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated run predicts at a neighbouring step too, of which nothing raised is recorded."""
    monkeypatch.setattr(replay_floor, "variations", lambda pipe: variations(pipe)[:1])
    monkeypatch.setattr(Elsewhere, "start", lambda self, again, recorded: again())
    subject = Subject(tiny_ltx2["2.3"], dtype="bfloat16", steps=6)
    floor = subject.recording.manifest.noise_floor
    assert floor is not None
    raised = [run for run in floor.runs if run.pair == "float32/float32"]
    measured = {one.name for run in raised for one in run.tensors}
    assert "float32/audio/step/0003/cond" in measured
    assert measured <= set(subject.recording)
    assert subject.check(None).verdict is Verdict.IDENTICAL


def named(comparison: Comparison) -> tuple[Any, ...]:
    """Stage, branch and modality where it first failed."""
    place = _place(comparison)
    return place.get("stage"), place.get("branch"), place.get("modality")


def expected(entry: Fault, found: tuple[Any, ...]) -> tuple[Any, ...]:
    """As declared; where a fault is in every branch or both modalities, the found one will do."""
    _, branch, modality = found
    return entry.stage, entry.branch or branch, entry.modality or modality


@pytest.mark.parametrize("name", [name for name in OWN if name not in ELSEWHERE])
def test_a_fault_is_named_by_stage_and_modality(one: Subject, name: str) -> None:
    entry = FAULTS[name]
    result = one.check(entry)
    assert result.verdict is Verdict.DRIFTED, result.sentence
    assert named(result) == expected(entry, named(result)), result.sentence


def test_deviations_of_each_clip_drift_in_guidance(clips: Subject) -> None:
    result = clips.check(FAULTS["std-scope-changed"])
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "guidance"
    assert {item.name: item.verdict for item in result.modalities} == {
        "video": Verdict.DRIFTED,
        "audio": Verdict.DRIFTED,
    }


def test_an_unchanged_model_is_identical_also_in_16_bits(
    one: Subject, narrow: Subject, clips: Subject
) -> None:
    for subject in (one, narrow, clips):
        result = subject.check(None)
        assert result.verdict is Verdict.IDENTICAL, result.sentence


@pytest.mark.parametrize("name", [name for name, entry in BENIGN.items() if entry.bits])
def test_what_changes_no_bit_is_identical(one: Subject, name: str) -> None:
    assert one.check(BENIGN[name]).verdict is Verdict.IDENTICAL


def test_scale_factors_of_the_cross_attention_are_a_no_op_in_16_bits_too(narrow: Subject) -> None:
    result = narrow.check(BENIGN["cross-rope-scale-factors"])
    assert result.verdict is Verdict.IDENTICAL


@pytest.mark.parametrize(
    "name",
    [
        "connector-joint",
        "passes-all-in-one",
        "passes-in-pairs",
        "std-scope-of-one-clip",
        "av-adaln-without-image",
        "joint-guidance-in-float64",
    ],
)
def test_a_harmless_twin_passes(one: Subject, name: str) -> None:
    result = one.check(BENIGN[name])
    assert result.verdict.passed, result.sentence


def test_a_joint_connector_in_16_bits_is_rounding_unless_a_tolerance_is_set(
    narrow: Subject,
) -> None:
    entry = BENIGN["connector-joint"]
    verdict = narrow.check(entry).verdict
    if verdict is Verdict.IDENTICAL:
        pytest.skip("this processor's instructions round rows of a batch as they do one row")
    assert verdict is Verdict.EQUIVALENT
    strict = narrow.check(entry, tolerance=1e-3)
    assert strict.verdict is Verdict.DRIFTED
    assert strict.first_divergence is not None
    assert strict.first_divergence.stage == "connector"
    assert {item.name: item.verdict for item in strict.modalities} == {
        "video": Verdict.DRIFTED,
        "audio": Verdict.DRIFTED,
    }
    assert narrow.check(None, tolerance=1e-3).verdict is Verdict.IDENTICAL


# --- replay ------------------------------------------------------------------------------------


def test_a_connector_that_raises_is_not_a_fault_of_the_text(one: Subject) -> None:
    def broken(inner: Any, texts: Any) -> Any:
        raise ValueError("no mask")

    pipe = one.changed(None)
    pipe.connect = broken
    result = check_pipeline(pipe, one.recording, case=one.case)
    assert result.verdict is Verdict.INVALID
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "connector"


def test_tokens_are_replayed_in_the_order_in_memory_that_they_were_made_in(one: Subject) -> None:
    seen: list[Joint] = []
    pipe = one.changed(None)
    original = pipe.predict

    def predict(inner: Any, latent: Any, *rest: Any) -> Any:
        seen.append(latent)
        return original(inner, latent, *rest)

    pipe.predict = predict
    replay(pipe, one.recording, steps=(0,))
    pipe.prepare(pipe)
    made = pipe.make_latent(pipe)
    assert seen[0].video.stride() == made.video.stride()
    assert torch.equal(seen[0].video, made.video)


def test_stages_in_16_bits_can_be_raised_on_what_was_recorded_in_16(narrow: Subject) -> None:
    pipe = narrow.changed(None)
    with raised(pipe, "float32") as lifted:
        only = ("connector", "prediction", "decoding")
        found = replay(lifted, narrow.recording, steps=(0,), only=only)
    assert found.failures == {}
    assert found.outputs["audio/connector/cond"].dtype is torch.float32


# --- modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("sound-attention-bias-dropped", "transformer_blocks.1.audio_attn1.to_out.0"),
        ("sound-shift-scale-swapped", "transformer_blocks.1"),
        ("sound-gelu-exact", "transformer_blocks.0.audio_ff.net.0"),
        ("v2a-skipped", "transformer_blocks.0.video_to_audio_attn"),
        ("vocoder-bias-dropped", "vocoder.vocoder.conv_in"),
    ],
)
def test_a_fault_is_named_down_to_the_module(one: Subject, name: str, module: str) -> None:
    pipe = one.changed(FAULTS[name])
    result = check_pipeline(pipe, one.recording, case=one.case)
    found = locate_module(pipe, copy.deepcopy(one.plain), one.recording, result)
    assert found.first_divergence is not None
    assert found.first_divergence.fqn == module, found.sentence
    assert found.first_divergence.modality == "audio"


def test_a_fault_of_one_pass_is_opened_in_that_pass(one: Subject) -> None:
    pipe = one.changed(None)
    block = pipe.transformer.transformer_blocks[1]

    def scaled(module: Any, args: Any, keywords: dict[str, Any], output: Any) -> Any:
        return output * 1.1 if keywords.get("all_perturbed") else output

    block.attn1.register_forward_hook(scaled, with_kwargs=True)
    result = check_pipeline(pipe, one.recording, case=one.case)
    found = locate_module(pipe, copy.deepcopy(one.plain), one.recording, result)
    assert found.first_divergence is not None
    assert found.first_divergence.branch == "perturbed"
    assert found.first_divergence.fqn == "transformer_blocks.1.attn1"


def test_a_fault_in_the_connector_is_opened_there(one: Subject) -> None:
    pipe = one.changed(None)
    pipe.connectors.audio_connector.transformer_blocks[0].ff.net[2].bias.data.zero_()
    result = check_pipeline(pipe, one.recording, case=one.case)
    found = locate_module(pipe, copy.deepcopy(one.plain), one.recording, result)
    assert found.first_divergence is not None
    assert found.first_divergence.fqn == "audio_connector.transformer_blocks.0.ff.net.2"
    assert found.first_divergence.modality == "audio"
