"""Whether a mechanism acted: what ran is counted, not what was asked for."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from truestep.case import Case
from truestep.experiment.arms import Arm, load_arm, run
from truestep.runtime.acting import Counts, quantised_layers, repeated_blocks, watching

CASE = Case(model="builtin:digits", prompt="a red three moving left", steps=3)


def counted(arm: Arm, case: Case = CASE) -> Counts:
    with watching(arm.pipe) as counts:
        run(arm, case)
    return counts


@pytest.fixture
def arm() -> Arm:
    return load_arm("candidate", CASE)


def test_the_plain_model_runs_every_block_in_every_step_and_is_left_as_it_was(arm: Arm) -> None:
    update = arm.pipe.update
    counts = counted(arm)
    blocks = len(repeated_blocks(arm.pipe.transformer))
    assert blocks == len(arm.pipe.transformer.blocks)
    assert counts.blocks == [2 * blocks] * CASE.steps
    assert (counts.forwards, counts.batched, counts.collapsed) == (2 * CASE.steps, 0, 0)
    assert counts.hits == [0] * CASE.steps
    assert arm.pipe.update is update
    assert not any(m._forward_pre_hooks for m in arm.pipe.transformer.modules())


def test_a_hook_that_skips_a_block_is_seen_though_the_block_is_called(arm: Arm) -> None:
    block = arm.pipe.transformer.blocks[2]
    calls: list[int] = []

    def skipping(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return hidden_states

    block.forward = types.MethodType(skipping, block)
    counts = counted(arm)
    assert len(calls) == 2 * CASE.steps
    assert counts.blocks == [2 * (len(arm.pipe.transformer.blocks) - 1)] * CASE.steps


def test_plans_are_counted_by_what_they_did(arm: Arm) -> None:
    cached = counted(arm, CASE.replace(text_cache=True))
    assert cached.hits[0] == 0
    assert all(hits > 0 for hits in cached.hits[1:])
    assert len(set(cached.hits[1:])) == 1
    again = counted(arm, CASE.replace(text_cache=True))
    assert again.hits == cached.hits
    assert counted(arm, CASE.replace(cfg="batched")).batched == CASE.steps
    assert counted(arm, CASE.replace(text_attention="collapsed")).collapsed > 0
    gated = counted(arm, CASE.replace(adaptive_gate=0.5))
    assert gated.forwards == 2 * CASE.steps - 1


class Packed(torch.nn.Module):
    """A layer that keeps its weights behind a method, as torch.ao's quantised ones do."""

    def weight(self) -> torch.Tensor:
        return torch.zeros(2, 2)


def _rounded(weight: torch.Tensor, levels: int) -> torch.Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / levels
    return (weight / scale).round() * scale


def test_quantised_layers_are_told_from_plain_conversions() -> None:
    baseline, candidate = (load_arm("baseline", CASE) for _ in range(2))
    assert quantised_layers(candidate.pipe, baseline.pipe) == 0
    candidate.pipe.transformer.to(torch.bfloat16)
    assert quantised_layers(candidate.pipe, baseline.pipe) == 0
    candidate.pipe.transformer.to(torch.float32)
    block = candidate.pipe.transformer.blocks[0]
    with torch.no_grad():
        block.attn1.to_q.weight.copy_(_rounded(block.attn1.to_q.weight, 7))
    assert quantised_layers(candidate.pipe, baseline.pipe) == 1
    block.attn1.to_k.weight.data = block.attn1.to_k.weight.data.to(torch.float8_e4m3fn)
    assert quantised_layers(candidate.pipe, baseline.pipe) == 2
    block.attn1.to_v = Packed()
    assert quantised_layers(candidate.pipe, baseline.pipe) == 3
