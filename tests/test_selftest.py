"""The gates' own test: ours lets nothing live, and a gate that cannot fail is told so."""

from __future__ import annotations

import math

import pytest
import torch

from truestep.errors import UsageError
from truestep.selftest import DAMAGES, Gate, parse_gate, score, table, truestep_gate

torch.manual_seed(0)
LATENT = {"latent/final": torch.randn(1, 16, 16, 24, 24)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_lets_nothing_live_even_without_a_measured_floor(dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in LATENT.items()}
    found = score(truestep_gate(None, pair=None), tensors)
    lenient = {"scaled by 1.01", "moved by 1 % of the rms"} if dtype is torch.bfloat16 else set()
    assert {damage for damage, _ in found.survived} <= lenient
    assert found.applied == len(DAMAGES)
    assert found.smallest < (0.05 if dtype is torch.bfloat16 else 2e-5)


def test_the_cosine_gate_lets_live_what_it_cannot_see() -> None:
    found = score(parse_gate("cosine:5e-3,1e-2"), LATENT)
    survived = {damage for damage, _ in found.survived}
    assert {"all NaN", "scaled by 2", "scaled by 1.01", "one patch of one frame"} <= survived
    assert "another seed" not in survived
    assert 0.05 < found.smallest < 0.2


def test_allclose_sees_size() -> None:
    found = score(parse_gate("allclose:1e-4"), LATENT)
    assert found.survived == ()
    assert found.smallest < 1e-3


def test_gates_that_cannot_judge_are_told_so() -> None:
    always = score(Gate("always", lambda *_: True), LATENT)
    assert len(always.survived) == len(DAMAGES)
    assert always.smallest == math.inf
    with pytest.raises(UsageError, match="gate never fails latent/final undamaged"):
        score(Gate("never", lambda *_: False), LATENT)


@pytest.mark.parametrize("text", ["ssim:0.9", "cosine:1", "cosine:2,3", "allclose:x", "allclose:0"])
def test_unknown_gates(text: str) -> None:
    with pytest.raises(UsageError, match="unknown gate"):
        parse_gate(text)


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, 3), torch.randn(1, 2, 1, 4, 4), torch.full((1, 2, 3, 4, 4), math.nan)]
)
def test_tensors_that_cannot_be_damaged(tensor: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="cannot be damaged"):
        score(truestep_gate(None, pair=None), {"x": tensor})


def test_the_table_names_survivors() -> None:
    text = "\n".join(table([score(parse_gate("cosine"), LATENT)]))
    assert "all NaN" in text
    assert "LIVES" in text
    assert "smallest noise seen" in text


def test_every_damage_changes_the_tensor() -> None:
    for tensor in LATENT.values():
        for name, damage in DAMAGES.items():
            assert not torch.equal(damage(tensor), tensor), name
            assert damage(tensor).shape == tensor.shape
