"""Where along an axis a residual lies."""

from __future__ import annotations

import math

import pytest
import torch

from truestep.measure.profile import MOST, profile


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randn(1, 6, 5, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_offset_of_a_channel_is_at_that_channel(video: torch.Tensor) -> None:
    moved = video.clone()
    moved[:, 4] += 0.5
    found = profile(moved, video)
    assert found is not None
    assert (found.axis, found.statistic, found.places) == ("channel", "channel_mean", 6)
    rms = float(video.square().mean().sqrt())
    assert found.values[4] == pytest.approx(0.5 / rms, rel=1e-3)
    assert max(map(abs, (*found.values[:4], found.values[5]))) < 1e-5


def test_a_gain_of_a_channel(video: torch.Tensor) -> None:
    scaled = video.clone()
    scaled[:, 2] *= 1.03
    found = profile(scaled, video)
    assert found is not None
    assert (found.axis, found.statistic) == ("channel", "gain")
    assert max(range(6), key=lambda at: abs(found.values[at])) == 2


@pytest.mark.parametrize(("axis", "at"), [("frame", 3), ("row", 6), ("column", 1)])
def test_a_place_of_its_own(video: torch.Tensor, axis: str, at: int) -> None:
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    dim = {"frame": 2, "row": 3, "column": 4}[axis]
    apart = torch.zeros_like(video)
    apart.select(dim, at).copy_(noise.select(dim, at))
    found = profile(video + apart, video)
    assert found is not None
    assert (found.axis, found.statistic) == (axis, f"{axis}_energy")
    assert max(range(found.places), key=lambda place: found.values[place]) == at


def test_many_places_share_their_largest() -> None:
    tokens = torch.randn(1, 1000, 8, generator=torch.Generator().manual_seed(0))
    moved = tokens.clone()
    moved[0, 777] *= -1
    found = profile(moved, tokens)
    assert found is not None
    assert found.axis == "token"
    assert found.places == 1000
    assert len(found.values) <= MOST
    group = math.ceil(1000 / MOST)
    assert max(range(len(found.values)), key=lambda at: found.values[at]) == 777 // group


@pytest.mark.parametrize("fault", ["equal", "shape", "nan", "scalar"])
def test_nothing_to_be_drawn(video: torch.Tensor, fault: str) -> None:
    other = {
        "equal": video.clone(),
        "shape": video[:, :3],
        "nan": video * math.nan,
        "scalar": torch.tensor(1.0),
    }[fault]
    assert profile(other, torch.tensor(2.0) if fault == "scalar" else video) is None
