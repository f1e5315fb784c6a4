"""Recordings without what no check reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig

from tests.calls.conftest import TINY
from tests.calls.loops import Loop, Scheduler
from truestep.calls.check import check
from truestep.calls.keys import key_of
from truestep.calls.record import record
from truestep.calls.recorder import recorded
from truestep.calls.recording import CallRecording, holds_tensors, read
from truestep.calls.subject import Subject, subject_of
from truestep.calls.thinning import thinned
from truestep.calls.values import leaves
from truestep.errors import UsageError
from truestep.judge.compare import compare
from truestep.measure.distance import same_bits
from truestep.verdict import Verdict

STEPS = 12


def kept(reference: CallRecording, component: str, argument: str) -> list[int | None]:
    """Steps at which an argument of a component is kept."""
    return [
        call.step
        for call in reference.calls
        if call.component == component
        and any(leaf.kind == "tensor" for _, leaf in leaves(call.arguments.get(argument)))
    ]


@pytest.fixture(scope="module")
def whole() -> CallRecording:
    return record(TINY["wan"].subject(num_inference_steps=STEPS))


@pytest.fixture(scope="module")
def thin(whole: CallRecording, tmp_path_factory: pytest.TempPathFactory) -> CallRecording:
    subject = TINY["wan"].subject(num_inference_steps=STEPS)
    path = tmp_path_factory.mktemp("thin") / "thin.safetensors"
    thinned(subject, whole, [6, 11]).write(path)
    return read(path)


def test_models_keep_chosen_steps_and_schedulers_what_they_need(
    whole: CallRecording, thin: CallRecording
) -> None:
    assert kept(thin, "transformer", "hidden_states") == [6, 6, 11, 11]
    # a solver that corrects its last sample goes back to the first
    assert kept(thin, "scheduler", "model_output") == [*range(STEPS)]
    outputs = [c.step for c in thin.by_method["transformer", "forward"] if holds_tensors(c)]
    assert outputs == [6, 6, 11, 11]
    sizes = [sum(r.recording[name].nbytes for name in r.recording) for r in (thin, whole)]
    assert sizes[0] < 0.9 * sizes[1]  # latents and outputs are as large as each other here
    assert len(thin.calls) == len(whole.calls)


@pytest.mark.parametrize("fault", [None, "weights", "guidance", "step"])
def test_a_thinned_recording_judges_as_a_whole_one(
    whole: CallRecording, thin: CallRecording, fault: str | None
) -> None:
    def change(pipeline: Any) -> None:
        if fault == "weights":
            next(p for p in pipeline.transformer.parameters() if p.ndim > 1).data.mul_(1.01)
        if fault == "step":
            original = pipeline.scheduler.step
            pipeline.scheduler.step = lambda *a, **k: (original(*a, **k)[0] * 1.001,)

    call = {"num_inference_steps": STEPS}
    if fault == "guidance":
        call["guidance_scale"] = 4.1  # type: ignore[assignment]
    results = [
        check(TINY["wan"].subject(change, **call), reference, steps=[6, 11])
        for reference in (thin, whole)
    ]
    assert results[0].verdict is results[1].verdict
    assert results[0].verdict is (Verdict.DRIFTED if fault else Verdict.IDENTICAL)
    if fault:
        places = [result.first_divergence for result in results]
        names = [(p.fqn or "").partition(" at step")[0] for p in places if p is not None]
        assert names[0] == names[1]


def test_a_step_that_was_left_out_cannot_be_checked(thin: CallRecording) -> None:
    subject = TINY["wan"].subject(num_inference_steps=STEPS)
    with pytest.raises(UsageError, match="step 3 was left out of this recording"):
        check(subject, thin, steps=[3])
    assert "models run at steps 6, 11" in check(subject, thin).looked_at


def test_what_nothing_reads_of_an_encoder_is_left_out(tmp_path: Path) -> None:
    reference = thinned(subject_of(Loop()), recorded(subject_of(Loop())))
    (first, _) = reference.by_method["encoder", "forward"]
    kinds = {path[0]: leaf.kind for path, leaf in leaves(first.output)}
    assert kinds == {"last": "tensor", "unread": "dropped"}
    assert check(subject_of(Loop()), reference).verdict is Verdict.IDENTICAL
    pipeline = Loop()
    pipeline.encoder.embed.weight.data *= 1.01
    result = check(subject_of(pipeline), reference)
    assert result.sentence.startswith("drifted: encoder.forward: output last")


def test_noise_inside_steps_survives_thinning() -> None:
    def build() -> Loop:
        pipeline = Loop(Scheduler(noise=0.1))
        pipeline.steps = 9
        return pipeline

    reference = record(subject_of(build()), floor=False, steps=[4], keep=())
    assert kept(reference, "net", "x") == [4, 4]
    assert kept(reference, "scheduler", "velocity") == [3, 4]
    assert check(subject_of(build()), reference).verdict is Verdict.IDENTICAL
    other = build()
    other.scale = 3.1
    result = check(subject_of(other), reference)
    assert result.verdict is Verdict.DRIFTED
    assert "scheduler.step" in result.sentence


def test_a_run_without_steps_is_thinned_to_itself() -> None:
    net = torch.nn.Linear(3, 3)
    subject = subject_of(net, torch.randn(2, 3))
    reference = record(subject, keep=())
    assert check(subject, reference).verdict is Verdict.IDENTICAL


def test_what_is_raised_is_kept_of_what_is_kept() -> None:
    """In 16 bits: once for every tensor that is kept, and not where only its dtype is another."""

    def flux(change: Callable[[Any], None] = lambda pipeline: None) -> Subject:
        def other(pipeline: Any) -> None:
            pipeline.to(torch.bfloat16)
            change(pipeline)

        return TINY["flux"].subject(other, num_inference_steps=STEPS)

    subject = flux()
    whole, thin = record(subject, keep="all"), record(subject, keep=())
    raised = {name for name in whole.recording if name.startswith("float32/")}
    kept = {name for name in thin.recording if name.startswith("float32/")}
    assert kept < raised
    steps = {key_of(name).step for name in kept}
    assert not steps.intersection(range(1, 3))
    assert all(
        "/prediction/" not in name or key_of(name).step in thin.judged_steps for name in kept
    )  # type: ignore[operator]
    plain = {name: thin.recording[name] for name in thin.recording if name not in kept}
    widened = [tensor.float() for tensor in plain.values() if tensor.is_floating_point()]
    for name in kept:
        assert not any(same_bits(thin.recording[name], tensor) for tensor in widened)

    def half_percent(pipeline: Any) -> None:
        next(p for p in pipeline.transformer.parameters() if p.ndim > 1).data.mul_(1.005)

    for reference in (whole, thin):
        again = check(subject, reference)
        assert again.verdict is Verdict.IDENTICAL
        assert any(row.name.startswith("float32/") for row in again.rows)
        fault = check(flux(half_percent), reference)
        assert fault.verdict is Verdict.DRIFTED


def test_models_are_judged_raised_only_where_they_were_recorded_so() -> None:
    """At steps beside those of the floor: a healthy candidate passes, a fault never does."""

    def flux(factor: float = 1.0) -> Subject:
        def change(pipeline: Any) -> None:
            pipeline.to(torch.bfloat16)
            next(p for p in pipeline.transformer.parameters() if p.ndim > 1).data.mul_(factor)

        return TINY["flux"].subject(change, num_inference_steps=STEPS)

    asked = record(flux(), keep=(1,))
    assert any(key_of(name).step == 1 for name in asked.recording if name.startswith("float32/"))
    for steps in (None, [1]):
        assert check(flux(), asked, steps=steps).verdict is Verdict.IDENTICAL
        assert check(flux(1.005), asked, steps=steps).verdict is Verdict.DRIFTED

    whole = record(flux(), keep="all")
    result = check(flux(), whole, steps=[1])
    assert result.verdict is Verdict.IDENTICAL
    assert "models not judged in float32 at steps 1: not recorded so" in result.notes
    result = check(flux(1.005), whole, steps=[1])
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "record it with --keep 1" in result.sentence


def test_a_cache_is_said_to_be_judged_where_it_is() -> None:
    """It may act anywhere: a whole recording shows that, a thinned one says what it leaves out."""

    def flux(*, cached: bool) -> Subject:
        def change(pipeline: Any) -> None:
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(700, 950),  # steps 1 to 3
                current_timestep_callback=lambda: pipeline._current_timestep,
            )
            pipeline.transformer.enable_cache(config)

        return TINY["flux"].subject(change if cached else None, num_inference_steps=STEPS)

    whole = record(flux(cached=False), keep="all")
    thin = thinned(flux(cached=False), whole)
    found = check(flux(cached=True), whole)
    assert found.verdict is Verdict.DRIFTED
    assert "at step 1" in found.sentence
    assert "transformer keeps something between calls: run at every step" in found.notes
    passed = check(flux(cached=True), thin)
    assert passed.verdict is Verdict.IDENTICAL
    assert any("judged at steps 0, 5, 6, 7, 11: the recording" in note for note in passed.notes)


def test_thinned_recordings_are_compared_by_what_both_keep(
    whole: CallRecording, thin: CallRecording
) -> None:
    def other(pipeline: Any) -> None:
        next(p for p in pipeline.transformer.parameters() if p.ndim > 1).data.mul_(1.01)

    subject = TINY["wan"].subject(other, num_inference_steps=STEPS)
    changed = recorded(subject)
    sides = [(thin, whole), (whole, thin), (thin, thin)]
    for actual, reference in sides:
        result = compare(actual.recording, reference.recording)
        assert result.verdict is Verdict.IDENTICAL
        left_out = any("left out (--keep all)" in text for text in result.not_looked_at)
        assert left_out is (actual is not reference)
    for actual, reference in ((changed, thin), (thinned(subject, changed, [6, 11]), whole)):
        assert compare(actual.recording, reference.recording).verdict is Verdict.DRIFTED
    manifest = thin.recording.manifest
    fewer = manifest.model_copy(update={"tensors": manifest.tensors[:-1]})  # it was not left out
    lacking = compare(thin.with_manifest(fewer).recording, whole.recording)
    assert lacking.verdict is Verdict.MISSING
