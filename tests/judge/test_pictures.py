"""What pictures of 8 bits tell without a measured floor."""

from __future__ import annotations

import pytest
import torch

from truestep.judge.pictures import UNSEEN, compare_pictures
from truestep.verdict import Verdict

PICTURE = torch.randint(0, 255, (3, 32, 32), generator=torch.Generator().manual_seed(0))


def changed(by: int, count: int) -> torch.Tensor:
    other = PICTURE.clone().flatten()
    other[:count] = (other[:count] + by).clamp(0, 255)
    return other.view_as(PICTURE)


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (PICTURE, Verdict.IDENTICAL),
        (changed(1, 1), Verdict.INCONCLUSIVE),
        (changed(1, 10**6), Verdict.INCONCLUSIVE),
        (changed(2, 10**6), Verdict.INCONCLUSIVE),
        (255 - PICTURE, Verdict.INCONCLUSIVE),
        (torch.zeros_like(PICTURE), Verdict.INCONCLUSIVE),
    ],
    ids=["equal", "one level", "all one level", "two levels", "negated", "black"],
)
def test_a_picture_says_no_more_than_it_shows(other: torch.Tensor, verdict: Verdict) -> None:
    result = compare_pictures([PICTURE, other], [PICTURE, PICTURE], labels=("a", "b"))
    assert [row.verdict for row in result.rows] == [Verdict.IDENTICAL, verdict]
    assert result.verdict is verdict
    assert (result.actual.label, result.reference.label) == ("a", "b")
    assert result.looked_at == ("2 pictures of 8 bits",)
    assert result.not_looked_at == (UNSEEN,)
    if verdict is Verdict.INCONCLUSIVE:
        assert "of 255 levels at most" in result.sentence


def test_another_number_or_size_is_incomparable() -> None:
    assert compare_pictures([PICTURE], [PICTURE, PICTURE]).verdict.exit_code == 3
    assert compare_pictures([PICTURE[:, :8]], [PICTURE]).verdict is Verdict.INCOMPARABLE
