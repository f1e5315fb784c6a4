"""State that a model keeps: over steps, over calls and over generations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truestep.case import Case
from truestep.judge.repeats import UNSTEADY
from truestep.recording.format import Recording
from truestep.replay.check import check, check_pipeline
from truestep.replay.record import record
from truestep.replay.steps import default_steps
from truestep.runtime.applying import Apply
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Branch, Pipeline, Step
from truestep.verdict import Verdict


@pytest.fixture(scope="module")
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **{**tiny_case, "steps": 10})


@pytest.fixture(scope="module")
def reference(case: Case) -> Recording:
    return record(case)


Predict = Callable[[Pipeline, torch.Tensor, Step, torch.Tensor, Branch], torch.Tensor]


def step_cache(pipe: Pipeline, *, forgets: bool = True) -> None:
    """Answer an odd step with what the step before it gave."""
    original: Predict = pipe.predict  # type: ignore[assignment]
    kept: dict[str, tuple[int, torch.Tensor]] = {}

    def predict(
        inner: Pipeline, latent: torch.Tensor, step: Step, text: torch.Tensor, branch: Branch
    ) -> torch.Tensor:
        index, answer = kept.get(branch, (-2, latent))
        if step.index % 2 and index == step.index - 1:
            return answer
        made = original(inner, latent, step, text, branch)
        kept[branch] = step.index, made
        return made

    pipe.predict = predict


def residual_cache(pipe: Pipeline) -> None:
    """Keep what the transformer adds to its input, and add it again while inputs are similar."""
    original: Predict = pipe.predict  # type: ignore[assignment]
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def predict(
        inner: Pipeline, latent: torch.Tensor, step: Step, text: torch.Tensor, branch: Branch
    ) -> torch.Tensor:
        if branch in kept:
            before, added = kept[branch]
            if float((latent - before).norm() / before.norm()) < 0.3:
                return latent + added
        made = original(inner, latent, step, text, branch)
        kept[branch] = latent.clone(), made - latent
        return made

    pipe.predict = predict


def first_call_wrong(pipe: Pipeline) -> None:
    original: Predict = pipe.predict  # type: ignore[assignment]
    calls: list[int] = []

    def predict(*args: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args) * (1.01 if len(calls) == 1 else 1.0)

    pipe.predict = predict


def every_third_wrong(pipe: Pipeline) -> None:
    original: Predict = pipe.predict  # type: ignore[assignment]
    calls: list[int] = []

    def predict(*args: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args) * (1.01 if len(calls) % 3 == 0 else 1.0)

    pipe.predict = predict


def noisy(pipe: Pipeline) -> None:
    original: Predict = pipe.predict  # type: ignore[assignment]
    pipe.predict = lambda *args: original(*args) + 1e-3 * torch.randn_like(args[1])


def test_neighbouring_steps_are_chosen(reference: Recording) -> None:
    chosen = default_steps(reference)
    assert chosen == (0, 4, 5, 6, 9)


@pytest.mark.parametrize("change", [step_cache, residual_cache])
def test_a_cache_that_the_reference_has_not_is_seen(
    change: Apply, case: Case, reference: Recording
) -> None:
    result = check(case, reference, apply=change)
    assert result.verdict is Verdict.DRIFTED
    assert {row.stage for row in result.failing} == {"prediction"}
    assert any(UNSTEADY in note for note in result.notes)
    assert "at every step from 0 to 9" in " ".join(result.notes)


def test_a_cache_that_is_meant_is_followed_through_every_step_and_not_accused(case: Case) -> None:
    cached = record(case, apply=step_cache)
    result = check(case, cached, apply=step_cache, accept=("stage predict",))
    assert result.verdict is Verdict.IDENTICAL, str(result)
    assert "prediction at every step" in " ".join(result.looked_at)
    without = check(case, cached, accept=("stage predict",))
    assert without.verdict is Verdict.DRIFTED


def first_block_cache(pipe: Pipeline) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))


def test_a_cache_of_diffusers_is_followed_and_begins_each_run_anew(case: Case) -> None:
    cached = record(case, apply=first_block_cache)
    accept = cached.manifest.implementation.patched
    result = check(case, cached, apply=first_block_cache, accept=accept)
    assert result.verdict is Verdict.IDENTICAL, str(result)
    assert check(case, cached, accept=accept).verdict is Verdict.DRIFTED
    final = check(case, cached, apply=first_block_cache, accept=accept, depth="final")
    assert final.verdict is Verdict.IDENTICAL, str(final)


@pytest.mark.parametrize("change", [first_call_wrong, every_third_wrong, noisy])
def test_an_answer_that_is_not_given_again_is_told_as_such(
    change: Apply, case: Case, reference: Recording
) -> None:
    result = check(case, reference, apply=change)
    assert result.verdict is Verdict.DRIFTED
    assert UNSTEADY in result.sentence, result.sentence


def test_a_steady_fault_is_not_called_unsteady(case: Case, reference: Recording) -> None:
    def scaled(pipe: Pipeline) -> None:
        original: Predict = pipe.predict  # type: ignore[assignment]
        pipe.predict = lambda *args: original(*args) * 1.01

    result = check(case, reference, apply=scaled)
    assert result.verdict is Verdict.DRIFTED
    assert UNSTEADY not in str(result)


def test_a_text_encoder_that_answers_otherwise_the_second_time(
    case: Case, reference: Recording
) -> None:
    def change(pipe: Pipeline) -> None:
        original = pipe.encode_text
        calls: list[int] = []

        def encode_text(*args: Any) -> Any:
            calls.append(1)
            return original(*args) * (1.01 if len(calls) > 2 else 1.0)

        pipe.encode_text = encode_text

    result = check(case, reference, apply=change)
    assert result.verdict is Verdict.DRIFTED
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "text"
    assert UNSTEADY in result.sentence


def test_state_over_generations_shows_in_the_second_of_two(
    case: Case, reference: Recording
) -> None:
    def dirty(pipe: Pipeline) -> None:
        original = pipe.make_latent
        runs: list[int] = []

        def make_latent(inner: Pipeline) -> Any:
            runs.append(1)
            return original(inner) * (1.01 if len(runs) > 1 else 1.0)

        pipe.make_latent = make_latent

    result = check(case, reference, apply=dirty, depth="final")
    assert result.verdict is not Verdict.IDENTICAL
    assert not result.verdict.passed
    assert UNSTEADY in str(result)
    assert check(case, reference, depth="final").verdict is Verdict.IDENTICAL


def test_a_model_that_is_wrong_in_one_way_twice_is_not_called_unsteady(
    case: Case, reference: Recording
) -> None:
    def scaled(pipe: Pipeline) -> None:
        with torch.no_grad():
            next(pipe.expert(1).parameters()).mul_(1.1)

    result = check(case, reference, apply=scaled, depth="final")
    assert result.verdict is Verdict.DRIFTED
    assert UNSTEADY not in str(result)
    assert not any(UNSTEADY in row.note for row in result.failing)


def test_a_check_costs_less_than_a_fifth_of_a_generation_of_50_steps(
    tiny_wan: dict[str, Path], tiny_case: dict[str, Any]
) -> None:
    for kind, share in (("wan21", 0.12), ("wan22", 0.20)):
        case = Case(model=str(tiny_wan[kind]), **{**tiny_case, "steps": 50})
        pipe = load(case)
        recording = record(case, floor="none")
        cost = check_pipeline(pipe, recording, case=case).cost
        assert cost is not None
        assert cost.share <= share


def leaks_between_samples(pipe: Pipeline) -> None:
    """From two samples on, each is given a little of the others."""
    original: Predict = pipe.predict  # type: ignore[assignment]

    def predict(
        inner: Pipeline, latent: torch.Tensor, step: Step, text: torch.Tensor, branch: Branch
    ) -> torch.Tensor:
        made = original(inner, latent, step, text, branch)
        return made + 0.01 * (made.mean(0, keepdim=True) - made)

    pipe.predict = predict


def test_a_fault_that_acts_from_two_samples_on_needs_a_case_of_two(
    case: Case, reference: Recording
) -> None:
    alone = check(case, reference, apply=leaks_between_samples)
    assert alone.verdict is Verdict.IDENTICAL
    assert "batches (one sample only)" in alone.not_looked_at
    assert "other sizes than 16x16x5" in alone.not_looked_at
    two = case.replace(videos_per_prompt=2)
    both = record(two)
    assert both["latent/final"].shape[0] == 2
    assert check(two, both).verdict is Verdict.IDENTICAL
    result = check(two, both, apply=leaks_between_samples)
    assert result.verdict is Verdict.DRIFTED
    assert {row.stage for row in result.failing} == {"prediction"}
    assert "other batches than 2 samples" in result.not_looked_at
