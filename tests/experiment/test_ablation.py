"""Ablation between two profiles: what each control does, alone and together, and what is left."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truestep.case import Case
from truestep.controls import NAMES, Cell, differences
from truestep.errors import CaseError, UsageError
from truestep.experiment import ablation as module
from truestep.experiment.ablation import ablate, compare_profiles, first_difference
from truestep.experiment.ablation_records import (
    Ablation,
    Choice,
    EndDistance,
    EndRun,
    Switch,
)
from truestep.experiment.attribution import (
    ACTS_ON,
    attribute,
    choices,
    leading_controls,
    reason,
    sentence,
    stage_distances,
)
from truestep.keys import FREE_RUN, STAGES
from truestep.replay import floor, variations
from truestep.replay.check import check
from truestep.replay.record import record, record_pipeline
from truestep.verdict import Metrics, Row, Verdict

OFFICIAL, DIFFUSERS = "official@f4b06fb", "diffusers-0.42.1"
FACTS = {"image": None, "dtype": "float32", "clips": 1, "device": "cpu", "same_passes": True}

finite = st.floats(0, 10, allow_nan=False)


# --- the pure part ------------------------------------------------------------------------------


def end(video: float | None, audio: float | None, *controls: str) -> EndRun:
    """A free run at these distances, with a floor of 0.01."""
    ends = tuple(
        EndDistance(
            modality=modality,
            verdict=verdict_of(value),
            rel_l2=value,
            floor=0.01,
            multiple=None if value is None else value / 0.01,
        )
        for modality, value in (("video", video), ("audio", audio))
    )
    return EndRun(controls=controls, verdict=Verdict.worst(e.verdict for e in ends), ends=ends)


def verdict_of(value: float | None) -> Verdict:
    if value is None:
        return Verdict.INVALID
    if value == 0:
        return Verdict.IDENTICAL
    return Verdict.DRIFTED if value > 0.02 else Verdict.EQUIVALENT


def switch(name: str, alone: EndRun, together: EndRun) -> Switch:
    return Switch(
        choice=Choice(
            control=name, stage="", from_value="", from_source="", to_value="", to_source=""
        ),
        stages_verdict=alone.verdict,
        stages_sentence="",
        alone=alone,
        together=together,
    )


def test_every_control_acts_on_a_stage_of_the_run() -> None:
    assert set(ACTS_ON) == set(NAMES)
    assert set(ACTS_ON.values()) <= set(STAGES)
    order = [STAGES.index(stage) for stage in ACTS_ON.values()]
    assert order == sorted(order)


def test_controls_that_the_case_sets_are_named_and_not_switched() -> None:
    found = {
        "mu": (Cell("constant", "a.py"), Cell("tokens", "b.py")),
        "connector": (Cell("separate", "a.py"), Cell("joint", "b.py")),
        "stg_blocks": (Cell((28,), "a.py"), Cell((28, 29), "b.py")),
    }
    switched, kept = choices(found, {"mu": 1.5, "connector": None})
    assert [(c.control, c.stage) for c in switched] == [
        ("connector", "connector"),
        ("stg_blocks", "prediction"),
    ]
    assert (switched[1].from_value, switched[1].to_value) == ("28", "28,29")
    assert [(k.control, k.value, k.from_value, k.to_value) for k in kept] == [
        ("mu", "1.5", "constant", "tokens")
    ]


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=6))
def test_increments_add_up_and_single_switches_leave_a_remainder(
    values: list[tuple[float, float]],
) -> None:
    switches = [
        switch(f"c{at}", end(alone, 0.0), end(after, 0.0))
        for at, (alone, after) in enumerate(values)
    ]
    total = values[-1][1]
    video, audio = attribute(switches, end(total, 0.0))
    assert (video.modality, audio.modality) == ("video", "audio")
    assert sum(s.increment for s in video.shares) == pytest.approx(total)
    assert video.sum_alone == pytest.approx(sum(alone for alone, _ in values))
    assert video.remainder == pytest.approx(total - video.sum_alone)
    assert [s.alone for s in video.shares] == sorted((a for a, _ in values), reverse=True)
    if video.sum_alone:
        assert sum(s.alone_share or 0 for s in video.shares) == pytest.approx(1)
    assert all(s.alone_share is None and s.increment_share is None for s in audio.shares)


def test_a_modality_that_cannot_be_measured_has_no_shares() -> None:
    assert [a.modality for a in attribute([], end(0.1, None))] == ["video"]


def test_the_sentence_names_the_control_that_moves_each_modality_most() -> None:
    switches = [
        switch("mu", end(0.3, 0.01), end(0.3, 0.01)),
        switch("std_scope", end(0.1, 0.2), end(0.4, 0.2)),
        switch("connector", end(0.0, 0.0), end(0.4, 0.2)),
    ]
    whole = end(0.4, 0.2)
    told = sentence("A", "B", switches, whole, attribute(switches, whole), mismatch="")
    assert told == (
        "2 of 3 differences move the end beyond the noise floor, 1 change nothing; "
        "video: mu (30 x floor alone, all together 40); "
        "audio: std_scope (20 x floor alone, all together 20)"
    )
    quiet = [switch("connector", end(0.0, 0.01), end(0.0, 0.01))]
    told = sentence("A", "B", quiet, end(0.0, 0.01), attribute(quiet, end(0.0, 0.01)), mismatch="")
    assert told.startswith("B is equivalent to A in this case: none of 1 differences moves")
    told = sentence("A", "B", quiet, whole, (), mismatch="latent/final")
    assert told.startswith("the controls do not explain the difference: A with every control of B")
    assert sentence("A", "B", [], end(0.0, 0.0), (), mismatch="") == (
        "A and B do the same in this case: no control differs"
    )


def test_what_the_floor_of_the_end_hides_is_said() -> None:
    quiet = switch("std_scope", end(0.01, 0.0), end(0.01, 0.0))
    hidden = quiet.model_copy(update={"stages_verdict": Verdict.DRIFTED})
    assert (quiet.hidden, hidden.hidden) == (False, True)
    told = sentence("A", "B", [hidden], end(0.01, 0.0), (), mismatch="")
    assert told.endswith("; std_scope drifts in its stage, hidden by the floor of the end")
    loud = switch("mu", end(0.3, 0.0), end(0.3, 0.0))
    both = attribute([loud, hidden], end(0.3, 0.0))
    told = sentence("A", "B", [loud, hidden], end(0.3, 0.0), both, mismatch="")
    assert told.endswith("; std_scope drifts in its stage, hidden by the floor of the end")


def row(name: str, verdict: Verdict, *, ratio: float | None, **place: Any) -> Row:
    metrics = Metrics(
        count=1,
        rel_l2=0.5,
        max_abs=0.5,
        max_abs_index=(0,),
        cosine_distance=0.0,
        norm_ratio=1.0,
        gain=1.0,
        rms_reference=1.0,
    )
    return Row(name=name, verdict=verdict, metrics=metrics, ratio=ratio, **place)


def test_the_worst_tensor_of_a_stage_stands_for_it() -> None:
    rows = [
        row("a", Verdict.IDENTICAL, ratio=0.0, stage="text"),
        row("b", Verdict.EQUIVALENT, ratio=0.9, stage="guidance", modality="video"),
        row("c", Verdict.DRIFTED, ratio=7.0, stage="guidance", modality="video"),
        row("d", Verdict.EQUIVALENT, ratio=0.5, stage="guidance", modality="audio"),
        row("e", Verdict.MISSING, ratio=None, stage="prediction"),
        row("samples/prediction", Verdict.EQUIVALENT, ratio=0.2, stage="prediction"),
    ]
    found = {(s.stage, s.modality): (s.name, s.multiple) for s in stage_distances(rows)}
    assert found == {
        ("guidance", "video"): ("c", 7.0),
        ("guidance", "audio"): ("d", 0.5),
        ("prediction", None): ("e", None),
    }


def test_a_reason_is_given_only_where_it_holds() -> None:
    assert reason("std_scope", FACTS).startswith("one clip")
    assert reason("std_scope", {**FACTS, "clips": 2}) == ""
    assert reason("av_adaln", FACTS) == "without an image, sound and video have one sigma"
    assert reason("av_adaln", {**FACTS, "image": "a.png"}) == ""
    assert reason("guidance_dtype", {**FACTS, "dtype": "bfloat16"}) == ""
    assert reason("pass_gating", {**FACTS, "same_passes": False}) == ""
    assert reason("mu", FACTS) == ""


def test_the_leading_control_is_the_one_that_moves_the_end_furthest() -> None:
    found = leading_controls({"mu": end(0.3, 0.0), "std_scope": end(0.1, 0.0)})
    assert found == {"video": "mu 30"}


def test_runs_differ_in_one_bit_in_one_name_or_not_at_all() -> None:
    x = torch.tensor([1.0, 2.0])
    assert first_difference({"a": x, "b": x}, {"a": x, "b": x.clone()}) == ""
    moved = torch.nextafter(x, torch.tensor(9.0))
    assert first_difference({"a": x, "b": moved}, {"a": x, "b": x}) == "b"
    assert first_difference({"a": x}, {"a": x, "b": x}) == "b"
    assert first_difference({"a": x, "c": x}, {"a": x}) == "c"
    assert first_difference({}, {}) == "no tensor was compared"


# --- the running part ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tiny_ltx2: dict[str, Path], ltx2_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_ltx2["2.3"]), **{**ltx2_case, "steps": 3})


@pytest.fixture(scope="module")
def measured(case: Case) -> Ablation:
    """Of one clip, in float32, with a noise floor of three jitter runs."""
    with pytest.MonkeyPatch.context() as patch:
        jitters = [variations.jitter(seed, "float32/float32") for seed in range(3)]
        patch.setattr(floor, "variations", lambda pipe: jitters)
        patch.setattr(floor, "_other_precision", lambda *args, **given: [])
        return ablate(case, reference=OFFICIAL, candidate=DIFFUSERS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record without a measured floor."""

    def unmeasured(pipe: Any, *, case: Case, **given: object) -> Any:
        return record_pipeline(pipe, case=case, floor="none")

    monkeypatch.setattr(module, "record_pipeline", unmeasured)


def by_name(found: Ablation) -> dict[str, Switch]:
    return {s.choice.control: s for s in found.switches}


def test_the_end_of_all_switches_is_the_other_profile(measured: Ablation) -> None:
    assert measured.explained
    assert measured.exit_code == 0
    assert measured.mismatch == ""
    assert measured.compared > 30  # every tensor of the run, frames and waveform among them
    assert set(measured.order) == set(differences(OFFICIAL, DIFFUSERS))
    assert measured.switches[-1].together.ends == measured.whole.ends
    assert measured.floor_runs == 3


def test_mu_is_what_matters_and_is_named_at_the_schedule(measured: Ablation) -> None:
    mu = by_name(measured)["mu"]
    assert (mu.stages_verdict, mu.first_stage) == (Verdict.DRIFTED, "schedule")
    assert [s.stage for s in mu.stages] == ["schedule"]
    for found in measured.attributions:
        assert found.shares[0].control == "mu"
        assert (found.shares[0].alone_share or 0) > 0.99
        assert found.total == pytest.approx(
            sum(share.increment for share in found.shares), rel=1e-12
        )
    assert "video: mu (" in measured.sentence
    assert "audio: mu (" in measured.sentence


@pytest.mark.parametrize(
    ("control", "why"),
    [
        ("av_adaln", "without an image, sound and video have one sigma"),
        ("conditioned_sigma", "without an image, no token is given"),
        ("generator_device", "the run's device is the cpu"),
        ("pass_gating", "the same passes run and perturb the same blocks"),
    ],
)
def test_a_control_that_changes_nothing_is_identical_and_says_why(
    measured: Ablation, control: str, why: str
) -> None:
    found = by_name(measured)[control]
    assert found.alone.verdict is Verdict.IDENTICAL
    assert found.stages_verdict is Verdict.IDENTICAL
    assert found.stages == ()
    assert found.reason == why


def test_prompts_in_other_batches_are_rounding(measured: Ablation) -> None:
    """Kernels of some processors give a row the same bits in any batch, those of others do not."""
    found = by_name(measured)["connector"]
    assert found.alone.verdict.passed
    assert found.stages_verdict is not None
    assert found.stages_verdict.passed
    assert found.reason == "the same prompts, in other batches: rounding only"


def test_the_scope_of_one_clip_is_within_the_floor(measured: Ablation) -> None:
    found = by_name(measured)["std_scope"]
    assert found.alone.verdict in (Verdict.IDENTICAL, Verdict.EQUIVALENT)
    assert found.reason.startswith("one clip: the whole tensor is the sample")


def test_the_distance_of_a_switch_is_that_of_a_check(measured: Ablation, case: Case) -> None:
    base = case.replace(profile=OFFICIAL)
    recording = record(base, floor="none")
    found = check(base, recording, depth="final", settings={"mu": "tokens"})
    own = by_name(measured)["mu"].alone
    assert [e.rel_l2 for e in own.ends] == [
        r.metrics.rel_l2 for r in found.rows if r.metrics and r.name.endswith(FREE_RUN)
    ]


def only(case: Case, *free: str) -> Case:
    """The case with every difference but some set to what the reference profile has."""
    found = differences(OFFICIAL, DIFFUSERS)
    return case.replace(**{name: a.value for name, (a, _) in found.items() if name not in free})


@pytest.mark.usefixtures("quick")
def test_it_is_deterministic(measured: Ablation, case: Case) -> None:
    again = ablate(only(case, "mu", "std_scope"), reference=OFFICIAL, candidate=DIFFUSERS)
    assert again.order == ("mu", "std_scope")
    for name in again.order:
        mine, theirs = by_name(measured)[name].alone, by_name(again)[name].alone
        assert [e.rel_l2 for e in mine.ends] == [e.rel_l2 for e in theirs.ends]


@pytest.mark.usefixtures("quick")
def test_a_difference_that_no_control_has_is_not_explained(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(first: str, second: str) -> Any:
        return {"connector": differences(first, second)["connector"]}

    monkeypatch.setattr(module, "differences", forgetful)
    found = ablate(case, reference=OFFICIAL, candidate=DIFFUSERS)
    assert (found.explained, found.exit_code) == (False, 1)
    assert found.mismatch == "schedule/sigmas"
    assert found.sentence == (
        "the controls do not explain the difference: official@f4b06fb with every control of "
        "diffusers-0.42.1 is not diffusers-0.42.1 (first tensor that differs: `schedule/sigmas`)"
    )


@pytest.mark.usefixtures("quick")
def test_with_two_clips_the_scope_of_the_deviation_matters(case: Case) -> None:
    changed = only(case, "std_scope").replace(videos_per_prompt=2)
    found = ablate(changed, reference=OFFICIAL, candidate=DIFFUSERS)
    scope = by_name(found)["std_scope"]
    assert scope.alone.verdict is Verdict.DRIFTED
    assert scope.reason == ""
    assert scope.first_stage == "guidance"
    assert {s.modality for s in scope.stages} == {"video", "audio"}
    assert "mu" in [k.control for k in found.kept]
    assert found.explained


@pytest.mark.usefixtures("quick")
def test_with_an_image_the_sigma_of_the_modulation_matters(case: Case, tmp_path: Path) -> None:
    from PIL import Image

    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(tmp_path / "a.png")
    changed = only(case, "av_adaln", "conditioned_sigma")
    changed = changed.replace(image=str(tmp_path / "a.png"), image_crf=0)
    found = ablate(changed, reference=OFFICIAL, candidate=DIFFUSERS)
    assert by_name(found)["av_adaln"].first_stage == "prediction"
    assert by_name(found)["av_adaln"].alone.verdict is Verdict.DRIFTED
    assert by_name(found)["conditioned_sigma"].stages_verdict is Verdict.DRIFTED
    assert found.explained


@pytest.mark.usefixtures("quick")
def test_a_case_that_sets_every_difference_has_nothing_to_switch(case: Case) -> None:
    own = {name: b.value for name, (_, b) in differences(OFFICIAL, DIFFUSERS).items()}
    found = ablate(case.replace(**own), reference=OFFICIAL, candidate=DIFFUSERS)
    assert found.switches == ()
    assert found.explained
    assert len(found.kept) == len(own)
    assert found.sentence.endswith("do the same in this case: no control differs")


def test_what_cannot_be_is_said_before_any_forward(
    case: Case,
    tiny_ltx2: dict[str, Path],
    tiny_wan: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "record_pipeline", partial(pytest.fail, "it ran"))
    run = partial(ablate, reference=OFFICIAL)
    with pytest.raises(UsageError, match="both profiles are 'official@f4b06fb'"):
        run(case, candidate=OFFICIAL)
    with pytest.raises(UsageError, match="there is no profile 'official'"):
        run(case, candidate="official")
    older = case.replace(model=str(tiny_ltx2["2.0"]))
    with pytest.raises(CaseError, match=r"the profile sglang-0\.5\.23 is not for LTX-2\.0"):
        run(older, candidate="sglang-0.5.23")
    with pytest.raises(CaseError, match="stg_blocks names block 28"):
        run(case.replace(stg_blocks=None), candidate=DIFFUSERS)
    with pytest.raises(CaseError, match="the model makes video alone"):
        run(case.replace(model=str(tiny_wan["wan21"])), candidate=DIFFUSERS)


@pytest.mark.usefixtures("quick")
def test_every_profile_against_every_other(case: Case) -> None:
    found = compare_profiles(case)
    assert len(found.profiles) == 5
    assert len(found.cells) == 20
    assert found.left_out == {}
    assert found.cell(OFFICIAL, OFFICIAL) is None
    cell = found.cell(OFFICIAL, DIFFUSERS)
    assert cell is not None
    assert cell.run.verdict is Verdict.DRIFTED
    assert cell.leading["video"].startswith("mu ")
    same = found.cell(OFFICIAL, "official@822ce3c")  # float32, one clip, no image
    assert same is not None
    assert same.run.verdict is Verdict.IDENTICAL
    assert same.leading == {}
    assert found.kept == ("stg_blocks", "audio_stg_blocks")


@pytest.mark.usefixtures("quick")
def test_profiles_of_another_model_version_are_left_out(
    case: Case, tiny_ltx2: dict[str, Path]
) -> None:
    found = compare_profiles(case.replace(model=str(tiny_ltx2["2.0"]), steps=2))
    assert found.profiles == (OFFICIAL, "official@822ce3c", DIFFUSERS)
    assert set(found.left_out) == {"sglang-0.5.23", "vllm-omni-0.30"}
    assert found.left_out["sglang-0.5.23"] == "the profile sglang-0.5.23 is not for LTX-2.0"


def test_a_case_that_no_profile_can_run_is_refused(case: Case) -> None:
    with pytest.raises(CaseError, match="num_frames 18 does not fit the model"):
        compare_profiles(case.replace(num_frames=18))
