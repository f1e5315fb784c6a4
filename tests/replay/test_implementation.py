"""What made a reference: quantised weights and patched functions are found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truestep.case import Case
from truestep.recording.manifest import Implementation
from truestep.replay.check import check
from truestep.replay.implementation import examine, rounded_to
from truestep.replay.record import record_pipeline
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline
from truestep.verdict import Verdict


@pytest.fixture
def case(tiny_wan: dict[str, Path], tiny_case: dict[str, Any]) -> Case:
    return Case(model=str(tiny_wan["wan21"]), **tiny_case)


@pytest.fixture
def pipe(case: Case) -> Pipeline:
    return load(case)


@pytest.mark.parametrize("kind", ["wan21", "wan22"])
def test_a_plain_wan_pipeline_is_what_it_goes_by(
    tiny_wan: dict[str, Path], tiny_case: dict[str, Any], kind: str
) -> None:
    for dtype in ("float32", "bfloat16"):
        found = examine(load(Case(model=str(tiny_wan[kind]), **{**tiny_case, "dtype": dtype})))
        assert (found.quantised, found.patched) == ((), ())


def test_plain_pipelines_of_other_families_are_too(
    tiny_cosmos: Path,
    cosmos_case: dict[str, Any],
    tiny_ltx2: dict[str, Path],
    ltx2_case: dict[str, Any],
) -> None:
    for folder, given_case in ((tiny_cosmos, cosmos_case), (tiny_ltx2["2.3"], ltx2_case)):
        assert examine(load(Case(model=str(folder), **given_case))) == Implementation()


def test_truesteps_own_plans_are_no_patches(case: Case) -> None:
    pipe = load(case.replace(text_attention="collapsed", cfg="batched", text_cache=True))
    pipe.prepare(pipe)
    assert examine(pipe).patched == ()


@pytest.mark.parametrize("narrow", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("scale", [1.0, 0.0137])
def test_weights_cast_through_eight_bits_are_found(
    pipe: Pipeline, narrow: str, scale: float
) -> None:
    dtype = getattr(torch, narrow)
    weight = pipe.transformer.blocks[0].attn1.to_q.weight
    largest = float(weight.detach().abs().max()) / torch.finfo(dtype).max if scale != 1.0 else 1.0
    weight.data = (weight.data / largest).to(dtype).to(torch.float32) * largest
    (found,) = examine(pipe).quantised
    assert found.startswith(f"transformer: values of {narrow} in 1 of ")


def test_weights_stored_in_eight_bits_are_found(pipe: Pipeline) -> None:
    weight = pipe.transformer.blocks[0].attn1.to_q.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.float8_e4m3fn)
    assert "transformer: weights in float8_e4m3fn" in examine(pipe).quantised


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_random_weights_are_not_called_rounded(seed: int, dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert not rounded_to(weight, torch.float8_e4m3fn)
    assert rounded_to(weight.to(torch.float8_e4m3fn).to(dtype), torch.float8_e4m3fn)


def test_zeros_and_ones_are_of_any_dtype() -> None:
    assert not rounded_to(torch.eye(64), torch.float8_e4m3fn)


@pytest.fixture
def restored() -> Iterator[None]:
    from diffusers.models.attention import FeedForward

    method, function = FeedForward.forward, torch.nn.functional.silu
    yield
    FeedForward.forward = method
    torch.nn.functional.silu = function


def test_patches_of_classes_instances_functions_and_stages_are_found(
    pipe: Pipeline, restored: None
) -> None:
    from diffusers.models.attention import FeedForward

    original = FeedForward.forward

    def slower(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return original(self, hidden_states)

    FeedForward.forward = slower
    torch.nn.functional.silu = lambda x, inplace=False: x
    pipe.transformer.blocks[1].attn1.forward = lambda *args, **kwargs: None
    pipe.combine = lambda inner, step, cond, uncond: cond
    found = examine(pipe).patched
    assert "diffusers.models.attention.FeedForward.forward" in found
    assert "transformer.blocks.1.attn1.forward" in found
    assert any(text.startswith("torch.nn.functional.silu: ") for text in found)
    assert any(text.startswith("stage combine: ") for text in found)


def test_a_patch_that_wraps_is_found(pipe: Pipeline, restored: None) -> None:
    import functools

    from diffusers.models.attention import FeedForward

    original = FeedForward.forward

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    FeedForward.forward = wrapped
    assert examine(pipe).patched == ("diffusers.models.attention.FeedForward.forward",)


def test_a_patched_reference_is_incomparable_unless_asked_for(case: Case, pipe: Pipeline) -> None:
    combine = pipe.combine
    pipe.combine = lambda *given_values: combine(*given_values)
    recording = record_pipeline(pipe, case=case, floor="none")
    refused = check(case, recording)
    assert refused.verdict is Verdict.INCOMPARABLE
    assert "made by a patched implementation (stage combine: " in refused.sentence
    assert refused.hint is not None
    assert "--accept 'stage combine" in refused.hint
    assert check(case, recording, accept=["stage update"]).verdict is Verdict.INCOMPARABLE
    assert check(case, recording, accept=["stage combine"]).verdict is Verdict.IDENTICAL


def test_a_quantised_reference_is_incomparable_unless_asked_for(case: Case, pipe: Pipeline) -> None:
    for block in pipe.transformer.blocks:
        weight = block.attn1.to_q.weight
        weight.data = weight.data.to(torch.float8_e4m3fn).to(torch.float32)
    recording = record_pipeline(pipe, case=case)
    refused = check(case, recording)
    assert refused.verdict is Verdict.INCOMPARABLE
    assert "quantised implementation (transformer: values of float8_e4m3fn" in refused.sentence
    assert check(case, recording, accept=["float8_e4m3fn"]).verdict is Verdict.DRIFTED
