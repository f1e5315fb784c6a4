"""Tables that say the same in another form, and those that do not."""

from __future__ import annotations

import pytest
import torch

from truestep.replay.forms import holds_the_same

ANGLES = torch.arange(12, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 0.01]).double()
COS, SIN = (table.float().repeat_interleave(2, -1) for table in (ANGLES.cos(), ANGLES.sin()))


def test_angles_are_their_cosines_and_sines() -> None:
    assert holds_the_same(ANGLES, [COS[None, :, None], SIN[None, :, None]])
    halves = [torch.cat([table, table], -1) for table in (ANGLES.cos(), ANGLES.sin())]
    assert holds_the_same(ANGLES, halves)
    assert holds_the_same(COS[:, ::2], [COS])
    assert holds_the_same(COS, [COS[:, ::2]])


def test_complex_tables_are_their_parts() -> None:
    turns = torch.polar(torch.ones_like(ANGLES), ANGLES)
    assert holds_the_same(turns, [COS, SIN])
    assert not holds_the_same(turns * 2, [COS, SIN])


@pytest.mark.parametrize(
    "wrong", [ANGLES * 1.001, ANGLES.flip(0), ANGLES + 1, ANGLES.flip(1), ANGLES[:6]]
)
def test_other_angles_are_not(wrong: torch.Tensor) -> None:
    assert not holds_the_same(wrong, [COS, SIN])


def test_rounded_tables_are_not() -> None:
    low = torch.atan2(SIN[:, ::2].bfloat16().float(), COS[:, ::2].bfloat16().float())
    assert not holds_the_same(low, [COS, SIN])


def test_nothing_is_not_the_same() -> None:
    assert not holds_the_same(ANGLES, [])
    assert not holds_the_same(torch.arange(3), [COS])
