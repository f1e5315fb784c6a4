"""What the arms of an experiment left behind: video and sound, the worse of both counts."""

from __future__ import annotations

import torch

from truestep.experiment.judging import final_row
from truestep.verdict import Verdict

VIDEO, SOUND = "latent/final", "audio/latent/final"


def latents(*, sound: float = 0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {VIDEO: torch.randn(1, 6, 8), SOUND: torch.randn(1, 4, 8) * (1 + sound)}


def test_a_sound_that_drifted_alone_is_the_row() -> None:
    row = final_row(latents(sound=0.01), latents(), floor=None, pair=None)
    assert row is not None
    assert (row.name, row.verdict) == (SOUND, Verdict.DRIFTED)


def test_a_sound_that_is_gone_is_missing() -> None:
    video_alone = {VIDEO: latents()[VIDEO]}
    row = final_row(video_alone, latents(), floor=None, pair=None)
    assert row is not None
    assert (row.name, row.verdict) == (SOUND, Verdict.MISSING)


def test_equal_arms_are_identical_and_absent_ones_nothing() -> None:
    row = final_row(latents(), latents(), floor=None, pair=None)
    assert row is not None
    assert row.verdict is Verdict.IDENTICAL
    assert final_row({}, latents(), floor=None, pair=None) is None
