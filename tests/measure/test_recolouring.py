"""Recolourings: each is found with its numbers, and none is in noise or between two contents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import media
from truestep.measure.recolouring import LUMA, recolouring

CLIP = media.moving(frames=3)


def tensor(clip: media.Array) -> torch.Tensor:
    return torch.from_numpy(clip.astype(np.float32)).permute(0, 3, 1, 2)


def found(actual: media.Array, reference: media.Array = CLIP) -> str:
    change = recolouring(tensor(actual), tensor(reference))
    return change.kind if change else ""


def converted(clip: media.Array, written: str, read: str) -> media.Array:
    """RGB by one matrix to Y'CbCr and by another back, by the definition of BT.601 and BT.709."""

    def matrix(name: str) -> media.Array:
        red, blue = LUMA[name]
        luma = np.array([red, 1 - red - blue, blue])
        cb = (np.array([0, 0, 1]) - luma) / (2 * (1 - blue))
        return np.stack([luma, cb, (np.array([1, 0, 0]) - luma) / (2 * (1 - red))])

    return media.levels(clip @ (np.linalg.inv(matrix(read)) @ matrix(written)).T)


@given(st.floats(0.6, 1.3), st.floats(-20, 20))
@settings(max_examples=25, deadline=None)
def test_a_gain_and_levels_are_found_with_their_numbers(gain: float, offset: float) -> None:
    changed = media.levels(CLIP * gain + offset)
    inside = (changed > 4) & (changed < 251)
    assume(inside.mean() > 0.9)
    assume(abs(gain - 1) > 0.05 or abs(offset) > 3)
    change = recolouring(tensor(changed), tensor(CLIP))
    assert change is not None
    if change.kind == "brightness":
        assert change.value == pytest.approx(gain, abs=0.02)
        assert not change.exact
    else:  # 0.859 and 16 are the limited range
        assert change.kind == "colour range"


@given(st.floats(0.5, 2.0))
@settings(max_examples=25, deadline=None)
def test_a_gamma_is_found_with_its_number(power: float) -> None:
    assume(abs(power - 1) > 0.1)
    change = recolouring(tensor(media.levels(255 * (CLIP / 255) ** power)), tensor(CLIP))
    assert change is not None
    assert change.kind == "gamma"
    assert change.value == pytest.approx(power, abs=0.02)


@pytest.mark.parametrize("sides", [("BT.601", "BT.709"), ("BT.709", "BT.601")])
def test_colours_of_another_matrix_are_found(sides: tuple[str, str]) -> None:
    saturated = CLIP.copy()
    saturated[..., 0] = media.levels(CLIP[..., 0] * 1.4 - 30.0)
    saturated[..., 2] = media.levels(CLIP[..., 2] * 0.6 + 10.0)
    change = recolouring(tensor(converted(saturated, *sides)), tensor(saturated))
    assert change is not None
    assert change.kind == "colour matrix"
    assert change.text == f"its colours are those of {sides[0]} read as {sides[1]}"


@given(st.integers(0, 10_000), st.floats(0.5, 40))
@settings(max_examples=30, deadline=None)
def test_noise_and_other_content_are_no_recolouring(seed: int, sigma: float) -> None:
    assert found(media.noisy(CLIP, sigma, seed)) == ""
    assert found(media.moving(seed + 1, frames=3)) == ""


def test_a_dark_and_a_light_scene_are_no_gain_of_each_other() -> None:
    """A fit flattens one to the mean of the other; that leaves all of its content."""
    dark = media.levels(media.moving(5, frames=3) * 0.2)
    light = media.levels(media.moving(6, frames=3) * 0.4 + 150.0)
    assert found(dark, light) == ""
    assert found(light, dark) == ""


def test_a_symmetric_picture_is_not_flipped() -> None:
    mirror = np.concatenate([CLIP, CLIP[:, :, ::-1]], 2)
    assert found(media.noisy(mirror[:, :, ::-1], 3), mirror) == ""


def test_equal_frames_have_none() -> None:
    assert recolouring(tensor(CLIP), tensor(CLIP)) is None
