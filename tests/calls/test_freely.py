"""Free runs: nothing is forced, and what they end with is judged by a floor of free runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import truestep
from truestep.calls.check import check_end
from truestep.calls.freely import end_calls, run_freely
from truestep.calls.record import record
from truestep.calls.recording import CallRecording
from truestep.calls.subject import subject_of
from truestep.floors import FREELY
from truestep.runtime.changes import math_kernel
from truestep.testing import tiny
from truestep.verdict import Verdict

FLUX = "FluxPipeline"


def built() -> Any:
    pipe = tiny.pipeline(FLUX)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call() -> dict[str, Any]:
    return {k: v for k, v in tiny.example_call(FLUX).items() if k != "generator"}


@functools.cache
def reference() -> CallRecording:
    return record(subject_of(built(), **call()), end=True)


def checked(change: Callable[[Any], object], **other: Any) -> truestep.Comparison:
    pipe = built()
    change(pipe)
    return check_end(subject_of(pipe, **{**call(), **other}), reference())


def test_the_end_is_the_last_step_and_of_a_run_without_steps_what_it_returns() -> None:
    (last,) = end_calls(reference())
    assert (last.component, last.method, last.step) == ("scheduler", "step", 2)
    linear = torch.nn.Linear(4, 4)
    module = record(subject_of(linear, torch.ones(2, 4)))
    (last,) = end_calls(module)
    assert (last.component, last.method) == ("module", "forward")
    result = check_end(subject_of(linear, torch.ones(2, 4)), module)
    assert result.verdict is Verdict.IDENTICAL


def test_floors_of_free_runs_are_kept_apart_from_those_of_calls() -> None:
    floor, end = reference().floor, reference().end_floor
    assert floor is not None
    assert end is not None
    assert {run.kind for run in end.runs} >= {f"{FREELY}repeat", f"{FREELY}jitter"}
    assert all(
        name.name == "output/run/end/0/out/scheduler.0" for r in end.runs for name in r.tensors
    )
    assert not any(run.kind.startswith(FREELY) for run in floor.runs)
    assert len({m.rel_l2 for run in end.runs for m in run.tensors}) > 2


def test_a_free_run_is_identical_to_the_recorded_one_and_equivalent_under_a_harmless_change() -> (
    None
):
    result = checked(lambda pipe: None)
    assert result.verdict is Verdict.IDENTICAL
    assert result.looked_at == ("what two free runs end with, one after the other",)
    pipe = built()
    with math_kernel():
        result = check_end(subject_of(pipe, **call()), reference())
    assert result.verdict is Verdict.EQUIVALENT
    assert checked(lambda pipe: pipe.transformer.fuse_qkv_projections()).verdict.passed


def test_a_fault_drifts_at_the_end() -> None:
    result = checked(lambda pipe: pipe.transformer.proj_out.weight.data.mul_(1.001))
    assert result.verdict is Verdict.DRIFTED
    assert result.sentence.startswith("drifted: the end differs by ")
    assert ", which prediction at step 0 made (first divergence: " in result.sentence
    assert result.shift is not None
    assert result.shift.outcome == "fault"
    assert [rung.name for rung in result.shift.rungs][-1] == "other seed"
    assert checked(lambda pipe: None, num_inference_steps=2).verdict is Verdict.DRIFTED


def test_what_a_run_leaves_behind_is_seen_in_the_second() -> None:
    def change(pipe: Any) -> None:
        forward = pipe.transformer.forward
        calls = []

        def later(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            output, *others = forward(*args, **kwargs)
            return (output * (1.0 if len(calls) <= 2 else 1.01), *others)

        pipe.transformer.forward = later

    result = checked(change)
    assert result.verdict is Verdict.DRIFTED
    assert "the same input gave another output the second time" in result.sentence


def test_what_a_candidate_raises_or_does_not_do_is_its_outcome() -> None:
    def boom(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such kernel")

    def raising(pipe: Any) -> None:
        pipe.transformer.proj_out.forward = boom

    result = checked(raising)
    assert result.verdict is Verdict.INVALID
    assert "raised ValueError: no such kernel" in result.sentence
    result = checked(lambda pipe: None, height=64)
    assert result.verdict is Verdict.INCOMPARABLE
    assert result.sentence.startswith("incomparable: end of a free run: scheduler.0")


def test_a_run_without_a_step_misses_the_end() -> None:
    class Loop:
        def __init__(self, steps: int) -> None:
            self.steps, self.components = steps, {"scheduler": Steps()}

        def __call__(self) -> torch.Tensor:
            x = torch.arange(8.0)
            for _ in range(self.steps):
                x = self.components["scheduler"].step(x)
            return x

    class Steps:
        def set_timesteps(self, count: int) -> None:
            self.count = count

        def step(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0.9 + 0.1

    recording = record(subject_of(Loop(2)), floor=False)
    result = run_freely(subject_of(Loop(0)), recording)
    assert [(c.component, c.method) for c in result.missing] == [("scheduler", "step")]
    result = check_end(subject_of(Loop(0)), recording)
    assert not result.verdict.passed
    assert "did not come" in result.sentence


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline"])
def test_the_public_check_at_depth_final(name: str) -> None:
    pipe = tiny.pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    given = {k: v for k, v in tiny.example_call(name).items() if k != "generator"}
    recording = truestep.record(pipe, call=given, floor="final")
    result = truestep.check(pipe, recording, depth="final")
    assert result.verdict is Verdict.IDENTICAL
    pipe.unet.conv_out.bias.data.add_(0.05)
    result = truestep.check(pipe, recording, depth="final")
    assert result.verdict is Verdict.DRIFTED
