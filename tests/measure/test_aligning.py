"""Orders of frames: any shift, swap and jump is found; none is where content differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests import media
from truestep.measure.aligning import (
    BETWEEN,
    Order,
    between,
    emptied,
    explains,
    order_of,
    reduced,
    squares,
    steps,
    straight,
    uniform,
)
from truestep.recording.clips import read_clip

CLIP = media.moving(frames=16)
VARIANCE = float(reduced(torch.from_numpy(CLIP)).flatten(2).var(2, correction=0).mean())


def found(actual: media.Array, reference: media.Array = CLIP, sigma: float = 2.0) -> Order | None:
    """The order of two clips with noise."""
    sides = (media.noisy(actual, sigma, 1), media.noisy(reference, sigma, 2))
    a, r = (reduced(torch.from_numpy(side)) for side in sides)
    return order_of(squares(a, r), VARIANCE, steps(a))


@given(st.integers(-7, 7))
@settings(max_examples=15, deadline=None)
def test_a_shift_is_found_and_only_a_shift(shift: int) -> None:
    order = found(np.roll(CLIP, -shift, 0))
    if not shift:
        assert order is None
    elif abs(shift) <= 3:  # more frames come round from the other end: another order
        assert order is not None
        assert (order.kind, order.value) == ("frame shift", shift)
    else:
        assert order is not None
        assert all(
            order.partners[at] == (at + shift) % 16 for at in range(16) if order.partners[at] >= 0
        )


@given(st.integers(0, 15), st.integers(0, 15))
@settings(max_examples=25, deadline=None)
def test_any_two_swapped_frames_are_found(first: int, second: int) -> None:
    changed = CLIP.copy()
    changed[[first, second]] = changed[[second, first]]
    order = found(changed)
    if first == second:
        assert order is None
    else:
        assert order is not None
        assert order.kind == "swapped frames"
        assert order.frames == tuple(sorted((first, second)))


@given(st.integers(2, 12), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_lost_frames_are_found_where_they_are_lost(at: int, count: int) -> None:
    assume(at + count <= 14)  # two frames at least come after them
    order = found(np.delete(CLIP, range(at, at + count), 0))
    assert order is not None
    assert (order.kind, order.value, order.frames[0]) == ("lost frames", count, at)


@given(st.integers(0, 10_000), st.floats(0.5, 20))
@settings(max_examples=30, deadline=None)
def test_noise_and_other_content_have_no_order(seed: int, sigma: float) -> None:
    assert found(media.noisy(CLIP, sigma, seed), sigma=sigma) is None
    assert found(media.moving(seed + 1, frames=16)) is None


@pytest.mark.parametrize("first", [10.5, 10.8, 10.9, 11.2])
def test_motion_ahead_by_a_part_of_a_frame_lies_between_frames(first: float) -> None:
    reference, actual = media.panned(10), media.panned(first)
    assert offset(actual, reference) > BETWEEN
    assert offset(media.panned(11), reference) < BETWEEN / 2


@pytest.mark.parametrize("step", [0.8, 0.9, 1.1, 1.25])
def test_faster_or_slower_motion_lies_between_frames(step: float) -> None:
    assert offset(media.panned(10, step=step), media.panned(10)) > BETWEEN


@pytest.mark.parametrize("crf", [12, 24, 36])
def test_orders_beneath_an_encoder_do_not_lie_between_frames(crf: int, tmp_path: Path) -> None:
    reference = read_clip(media.write_mp4(tmp_path / "r.mp4", media.moving()))
    for at, (kind, _, change) in enumerate(media.PLANTED.values()):
        if kind not in ORDERS:
            continue
        clip = read_clip(media.write_mp4(tmp_path / f"{at}.mp4", change(media.moving()), crf=crf))
        assert clip.frames is not None
        assert reference.frames is not None
        assert offset(clip.frames.numpy(), reference.frames.numpy()) < BETWEEN


ORDERS = ("frame shift", "swapped frames", "reversed", "other order", "lost frames", "added frames")


def offset(actual: media.Array, reference: media.Array) -> float:
    """How far frames lie between those of the order that explains them, or of their numbers."""
    a, r = (reduced(torch.from_numpy(side.copy())) for side in (actual, reference))
    order = order_of(squares(a, r), VARIANCE, steps(a))
    return between(a, r, order.partners if order else straight(len(a), len(r)))


def test_two_frames_one_later_are_not_called_a_repeat() -> None:
    assert found(CLIP[:2], CLIP[1:3]) is None
    order = found(CLIP[1::-1], CLIP[:2])
    assert order is not None
    assert order.kind == "swapped frames"


def test_a_repeat_is_one_only_where_the_reference_moves() -> None:
    order = found(media.frozen(CLIP))
    assert order is not None
    assert (order.kind, order.frames) == ("repeated frames", (5, 6, 7))
    assert found(media.frozen(CLIP), media.frozen(CLIP)) is None


def test_squares_are_mean_squares_of_levels() -> None:
    a, r = torch.full((2, 3, 4, 4), 10.0), torch.full((3, 3, 4, 4), 13.0)
    assert squares(a, r).tolist() == [[9.0] * 3] * 2
    assert straight(3, 2) == (0, 1, -1)


def test_what_explains_leaves_a_quarter_and_a_tenth_of_the_content() -> None:
    assert explains(100, 25, 1000)
    assert not explains(100, 26, 1000)
    assert not explains(1000, 150, 1000)
    assert not explains(0, 0, 1000)


def test_a_uniform_frame_stays_uniform_beneath_an_encoder(tmp_path: Path) -> None:
    grey = np.full((6, 48, 64, 3), 90, np.uint8)
    grey[:, :, :, 1] = 140
    for crf in (12, 35):
        clip = read_clip(media.write_mp4(tmp_path / f"{crf}.mp4", grey, crf=crf))
        assert clip.frames is not None
        assert max(uniform(clip.frames)) < 1


def test_an_empty_frame_needs_content_beside_it() -> None:
    assert emptied([0.0, 0.0, 9.0, 1.0], [30.0, 3.0, 30.0, 8.0]) == (0, 3)
