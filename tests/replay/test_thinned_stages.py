"""Recordings of truestep's own stages without what no check at default steps reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import truestep
from truestep import Recording
from truestep.case import Case
from truestep.errors import FileFormatError, UsageError
from truestep.judge.compare import compare
from truestep.judge.repeats import UNSTEADY
from truestep.keys import key_of
from truestep.replay.check import check, check_pipeline
from truestep.replay.record import record_pipeline
from truestep.replay.steps import KEPT_STEPS, default_steps, kept_steps, named_steps, require_run
from truestep.replay.thinning import thinned
from truestep.report.answer import answer
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Branch, Pipeline, Step
from truestep.verdict import Comparison, Verdict

Change = Callable[[Pipeline], Any]
STEPS = 12


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **{**tiny_case, "steps": STEPS})


@pytest.fixture(scope="module")
def whole(case: Case) -> Recording:
    return truestep.record(case, keep="all")


@pytest.fixture(scope="module")
def thin(case: Case, whole: Recording, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("thin") / "thin.safetensors"
    thinned(load(case), whole).save(path)
    return Recording.open(path)


def size(recording: Recording) -> int:
    """Bytes of its tensors, without what is decoded of the end."""
    names = (name for name in recording if key_of(name).stage != "decoding")
    return sum(recording[name].nbytes for name in names)


def judged(result: Comparison) -> dict[str, tuple[Verdict, float]]:
    """What is said of each tensor."""
    return {
        row.name: (row.verdict, row.metrics.rel_l2 if row.metrics else 0.0) for row in result.rows
    }


@pytest.mark.parametrize("kind", ["wan21", "cosmos", "ltx2", "digits"])
def test_a_recording_of_fifty_steps_is_small(
    kind: str,
    tiny_wan: dict[str, Path],
    tiny_cosmos: Path,
    tiny_ltx2: dict[str, Path],
    tiny_case: dict[str, Any],
    cosmos_case: dict[str, Any],
    ltx2_case: dict[str, Any],
) -> None:
    cases = {
        "wan21": (tiny_wan["wan21"], tiny_case),
        "cosmos": (tiny_cosmos, cosmos_case),
        "ltx2": (tiny_ltx2["2.3"], ltx2_case),
        "digits": ("builtin:digits", {"prompt": "a red three moving left"}),
    }
    model, values = cases[kind]
    case = Case(model=str(model), **{**values, "steps": 50})
    recording = truestep.record(case, floor="none")
    ends = [name for name in recording if key_of(name).head == "text" or "latent/final" in name]
    assert size(recording) < 25 * sum(recording[name].nbytes for name in ends)
    assert kept_steps(recording) == {0, 24, 25, 26, 49}


def test_what_default_checks_and_floors_read_is_kept(whole: Recording, thin: Recording) -> None:
    kept = kept_steps(thin)
    assert kept == set(default_steps(whole)) == {0, 5, 6, 7, 11}
    assert size(thin) < 0.6 * size(whole)
    assert set(thin) < set(whole)
    assert all(torch.equal(thin[name], whole[name]) for name in thin)
    assert thin.manifest.noise_floor == whole.manifest.noise_floor
    assert {key_of(name).number for name in thin if name.endswith("guided")} == kept
    assert {key_of(name).number for name in thin} - {None} == kept | {1, 8}  # what a step makes
    assert kept_steps(whole) is None


@pytest.fixture(scope="module")
def unipc(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    """Two experts, and a scheduler that corrects what it gave before."""
    settings = {"device": "cpu", "scheduler": "UniPCMultistepScheduler", "flow_shift": 3.0}
    values = {**tiny_case, "steps": 14, "settings": settings}
    return Case(model=str(tiny_wan["wan22"]), **values)


def test_a_scheduler_is_driven_through_what_it_needs(unipc: Case) -> None:
    pipe = load(unipc)
    whole = record_pipeline(pipe, case=unipc, floor="none")
    thin = thinned(pipe, whole)
    assert sum(name.endswith("guided") for name in thin) > len(kept_steps(thin) or ())
    assert check_pipeline(pipe, thin, case=unipc).verdict is Verdict.IDENTICAL
    original = pipe.update

    def update(inner: Pipeline, step: Step, *parts: Any) -> Any:
        made = original(inner, step, *parts)
        return made * 1.01 if step.index == max(default_steps(whole)[:-1]) else made

    pipe.update = update
    wrong = [check_pipeline(pipe, one, case=unipc) for one in (thin, whole)]
    names = [[row.name for row in one.failing] for one in wrong]
    assert names[0] == names[1]
    assert {row.stage for row in wrong[0].failing} == {"update"}


def weights(pipe: Pipeline) -> None:
    next(p for p in pipe.transformer.parameters() if p.ndim > 1).data.mul_(1.01)


def guidance(pipe: Pipeline) -> None:
    original = pipe.combine
    pipe.combine = lambda inner, step, *parts: original(inner, step, *parts) * 1.01


def decoder(pipe: Pipeline) -> None:
    next(p for p in pipe.vae.decoder.parameters() if p.ndim > 1).data.mul_(1.01)


@pytest.mark.parametrize("fault", [None, weights, guidance, decoder])
@pytest.mark.parametrize("depth", ["steps", "modules"])
def test_a_thinned_recording_judges_as_a_whole_one(
    case: Case, whole: Recording, thin: Recording, fault: Change | None, depth: Any
) -> None:
    by_thin, by_whole = (
        check(case, reference, apply=fault, depth=depth) for reference in (thin, whole)
    )
    assert by_thin.verdict is by_whole.verdict
    assert by_thin.verdict is (Verdict.DRIFTED if fault else Verdict.IDENTICAL)
    shared, every = judged(by_thin), judged(by_whole)
    assert shared == {name: every[name] for name in shared}
    assert {key_of(name).step for name in every if name not in shared}.isdisjoint({0, 5, 6, 7, 11})
    if fault is not None and fault is not guidance:
        assert by_thin.first_divergence == by_whole.first_divergence
    assert "update at steps 0, 5, 6, 7 of 12" in by_thin.looked_at


def test_sixteen_bits_are_judged_raised_as_by_a_whole_one(case: Case) -> None:
    narrow = case.replace(dtype="bfloat16")
    pipe = load(narrow)
    whole = record_pipeline(pipe, case=narrow, floor="steps")
    thin = thinned(pipe, whole)

    def gain(inner: Pipeline) -> None:
        inner.transformer.blocks[0].attn1.to_q.weight.data.mul_(1.05)

    for fault in (None, gain):
        results = [check(narrow, reference, apply=fault) for reference in (thin, whole)]
        assert results[0].verdict is results[1].verdict
        raised = [{n: v for n, v in judged(r).items() if key_of(n).precision} for r in results]
        assert raised[0] == raised[1]
    assert any(key_of(row.name).precision for row in results[0].failing)


def test_further_steps_are_kept_where_they_are_named(case: Case) -> None:
    recording = truestep.record(case, floor="none", keep=(2, 9))
    assert kept_steps(recording) == {0, 2, 5, 6, 7, 9, 11}
    assert check(case, recording, steps=(2, 9)).verdict is Verdict.IDENTICAL
    with pytest.raises(UsageError, match="no step 12 in the reference"):
        truestep.record(case, floor="none", keep=(12,))


def test_a_step_that_was_left_out_cannot_be_checked(case: Case, thin: Recording) -> None:
    with pytest.raises(UsageError, match="step 3 was left out of this recording") as caught:
        check(case, thin, steps=(0, 3))
    assert caught.value.measured == "it keeps steps 0, 5, 6, 7, 11 of 12"
    assert caught.value.hint == "truestep record CASE --update --keep 3"


def step_cache(pipe: Pipeline) -> None:
    """Answer an odd step with what the step before it gave."""
    original = pipe.predict
    kept: dict[str, tuple[int, Any]] = {}

    def predict(inner: Pipeline, latent: Any, step: Step, text: Any, branch: Branch) -> Any:
        index, answer = kept.get(branch, (-2, latent))
        if step.index % 2 and index == step.index - 1:
            return answer
        made = original(inner, latent, step, text, branch)
        kept[branch] = step.index, made
        return made

    pipe.predict = predict


def memory(pipe: Pipeline) -> None:
    """Add a little of the last answer, whatever the step: only a whole run gives the same."""
    original = pipe.predict
    kept: dict[str, Any] = {}

    def predict(inner: Pipeline, latent: Any, step: Step, text: Any, branch: Branch) -> Any:
        last = kept.get(branch) if step.index else None
        made = original(inner, latent, step, text, branch)
        made = made if last is None else made + 0.1 * last
        kept[branch] = made
        return made

    pipe.predict = predict


def test_a_model_that_keeps_state_runs_freely_between_kept_steps(
    case: Case, thin: Recording
) -> None:
    cached = check(case, thin, apply=step_cache)
    assert cached.verdict is Verdict.DRIFTED
    said = f"for {UNSTEADY}: it was run at every step from 0 to 11, and is judged at steps 0, 5"
    assert any(said in note for note in cached.notes)
    meant = truestep.record(case, apply=memory)
    accept = meant.manifest.implementation.patched
    assert kept_steps(meant) == {0, 5, 6, 7, 11}
    assert check(case, meant, apply=memory, accept=accept).verdict is Verdict.IDENTICAL
    assert check(case, meant, accept=accept).verdict is Verdict.DRIFTED


def test_what_a_step_skips_is_asked_for(case: Case, thin: Recording) -> None:
    pipe = load(case)
    pipe.skips = lambda inner, index: index == 5
    with pytest.raises(UsageError, match="what step 5 skips was left out of this recording"):
        check_pipeline(pipe, thin, case=case)


def wrong_update(pipe: Pipeline) -> None:
    """One step of the scheduler that a thinned recording does not keep."""
    original = pipe.update
    pipe.update = lambda inner, step, *parts: (
        original(inner, step, *parts) * (1.001 if step.index == 3 else 1)
    )


def test_steps_that_could_not_be_judged_are_said(case: Case, thin: Recording) -> None:
    """A fault of one step that is not kept is not seen: the answer says where it did not look."""
    missed = check(case, thin, apply=wrong_update)
    assert missed.verdict is Verdict.IDENTICAL
    said = "guidance and update at steps 1 to 4, 8 to 10 (not in this recording: --keep all)"
    assert said in missed.not_looked_at
    assert said in " ".join(" ".join(answer(missed)).split())
    assert not any("could not be judged" in note for note in missed.notes)


def late_guidance(pipe: Pipeline) -> None:
    """Guidance that is wrong from a step on that a thinned recording does not keep."""
    original = pipe.combine
    pipe.combine = lambda inner, step, *parts: (
        original(inner, step, *parts) * (1.01 if step.index > 2 else 1)
    )


def test_a_place_that_may_lie_earlier_says_so(
    case: Case, whole: Recording, thin: Recording
) -> None:
    results = [check(case, reference, apply=late_guidance) for reference in (whole, thin)]
    places = [result.first_divergence for result in results]
    assert [place and (place.stage, place.step) for place in places] == [
        ("guidance", 3),
        ("guidance", 5),
    ]
    note = "guidance may fail earlier: steps 1 to 4 could not be judged"
    assert [any(note in text for text in result.notes) for result in results] == [False, True]
    early = check(case, thin, apply=guidance)
    assert early.first_divergence is not None
    assert early.first_divergence.step == 0
    assert not any("may fail earlier" in text for text in early.notes)


def test_steps_in_words() -> None:
    assert named_steps([3]) == "step 3"
    assert named_steps([4, 2, 1, 8]) == "steps 1 to 2, 4, 8"


def test_the_first_latent_is_kept_once(case: Case, whole: Recording, thin: Recording) -> None:
    assert "step/0000/latent" not in thin
    assert torch.equal(thin["latent/initial"], whole["step/0000/latent"])
    other = {**whole, "step/0000/latent": whole["step/0000/latent"] * 2}
    table = whole.manifest
    assert "step/0000/latent" in thinned(load(case), Recording.in_memory(other, table))


def test_the_end_of_a_free_run_is_judged_by_every_step(
    case: Case, whole: Recording, thin: Recording
) -> None:
    assert kept_steps(truestep.record(case, floor="final")) is None
    by_whole = check(case, whole, apply=wrong_update, depth="final")
    assert by_whole.verdict is Verdict.DRIFTED
    assert by_whole.first_divergence is not None
    assert by_whole.first_divergence.step == 3
    by_thin = check(case, thin, apply=wrong_update, depth="final")
    assert by_thin.verdict is Verdict.INCONCLUSIVE
    assert "keeps no models at 7 steps (record it with --keep all)" in by_thin.sentence


def test_what_is_kept_is_said(thin: Recording, whole: Recording) -> None:
    from truestep.cli.contents import kept_text

    assert kept_text(thin.manifest) == "what checks read, models at steps 0, 5, 6, 7, 11 of 12"
    assert kept_text(whole.manifest) == ""
    both = compare(thin, whole)
    assert both.verdict is Verdict.IDENTICAL
    assert any("left out (--keep all)" in text for text in both.not_looked_at)


@pytest.mark.parametrize(
    "kept", ["0, 5", [0, "5"], [[0]], [0, 5, 6, 7, 11, 99], [0, 5, 6, 7], [0, 3, 5, 6, 7, 11]]
)
def test_what_a_hostile_file_says_it_keeps(thin: Recording, kept: Any) -> None:
    settings = {**thin.manifest.settings, KEPT_STEPS: kept}
    manifest = thin.manifest.model_copy(update={"settings": settings})
    other = Recording.in_memory({**thin}, manifest)
    if kept == [0, 5, 6, 7]:  # what it lacks it is not asked for
        require_run(other, where="file")
        return
    with pytest.raises(FileFormatError, match=r"which steps it keeps|not a whole run"):
        require_run(other, where="file")
