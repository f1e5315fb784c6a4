"""What of a failing comparison is to be seen."""

from __future__ import annotations

import base64

import pytest
import torch

from truestep import compare
from truestep.judge.seen import SIDE, STEPS
from truestep.measure.pictures import pixels
from truestep.verdict import Comparison

Tensors = dict[str, torch.Tensor]


def run(steps: int = 4, shape: tuple[int, ...] = (1, 4, 8, 8)) -> Tensors:
    drawn = torch.Generator().manual_seed(0)
    return {f"step/{step:04d}/cond": torch.randn(shape, generator=drawn) for step in range(steps)}


def broken(reference: Tensors, *, at: int = 2) -> Tensors:
    """The run with an offset in one corner from one step on."""
    actual = {name: tensor.clone() for name, tensor in reference.items()}
    for step, tensor in enumerate(actual.values()):
        if step >= at and tensor.ndim == 4:
            tensor[:, :, :2, :2] += 0.5
        elif step >= at:
            tensor[:, 0] += 0.5
    return actual


def picture(uri: str) -> torch.Tensor:
    return pixels(base64.b64decode(uri.partition(",")[2]))


def test_every_step_is_seen_and_the_difference_is_where_it_is() -> None:
    reference = run()
    found = compare(broken(reference), reference)
    (media,) = found.media
    assert media.axis == "step"
    assert [frame.index for frame in media.frames] == [0, 1, 2, 3]
    assert media.frames[0].actual == media.frames[0].reference
    assert int(picture(media.frames[0].difference).max()) == 0
    difference = picture(media.frames[2].difference)
    assert int(difference[:2, :2].min()) > 100
    assert int(difference[2:].max()) == 0
    assert found.first_divergence is not None
    assert found.first_divergence.profile is not None


def test_it_survives_the_json() -> None:
    reference = run()
    found = compare(broken(reference), reference)
    assert Comparison.model_validate_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 64, 16), (8, 8)), ((1, 4, 3, 8, 12), (8, 12)), ((1, 4, 200, 100), None)],
)
def test_tokens_of_a_square_videos_and_large_latents(
    shape: tuple[int, ...], size: tuple[int, int] | None
) -> None:
    reference = run(2, shape)
    (media,) = compare(broken(reference, at=1), reference).media
    if size is None:
        assert max(media.height, media.width) <= SIDE
    else:
        assert (media.height, media.width) == size


@pytest.mark.parametrize("shape", [(1, 60, 16), (1, 2, 8, 8), (16, 16)])
def test_what_is_no_picture_is_not_shown(shape: tuple[int, ...]) -> None:
    reference = run(3, shape)
    assert compare({n: t + 0.5 for n, t in reference.items()}, reference).media == ()


def test_a_run_that_passes_shows_nothing() -> None:
    reference = run()
    assert compare({n: t.clone() for n, t in reference.items()}, reference).media == ()


def test_long_runs_show_some_steps_and_nan_is_seen() -> None:
    reference = run(40)
    actual = broken(reference)
    actual["step/0039/cond"] = actual["step/0039/cond"] * float("nan")
    (media,) = compare(actual, reference).media
    steps = [frame.index for frame in media.frames]
    assert len(steps) == STEPS
    assert (steps[0], steps[-1]) == (0, 39)
    assert picture(media.frames[-1].difference)[0, 0].tolist() == [255, 0, 255]
