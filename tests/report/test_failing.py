"""Plots of what failed, where pictures show nothing."""

from __future__ import annotations

import math

import pytest

from tests.report.results_to_show import fault, row
from truestep.explanations import Profile
from truestep.records import FrameTriple, Media
from truestep.report.failing import along, bars, failing
from truestep.report.html import render
from truestep.verdict import Comparison, Divergence, Statistic, Verdict


def structured(*, channel: float = 90.0) -> Comparison:
    """A drift by an offset of a channel that is small beside everything else."""
    rows = []
    for step in range(3):
        statistics = (
            Statistic(name="gain", value=1e-7, floor=1e-6, bound=3.0, ratio=0.1),
            Statistic(
                name="channel_mean", value=channel * 1e-6, floor=1e-6, bound=5.0, ratio=channel
            ),
        )
        failed = channel > 5
        rows.append(
            row(step, 0.5).model_copy(
                update={
                    "statistics": statistics,
                    "verdict": Verdict.DRIFTED if failed else Verdict.EQUIVALENT,
                    "ratio": channel if failed else 0.5,
                    "ratio_metric": "channel_mean" if failed else "rel_l2",
                }
            )
        )
    profile = Profile(
        axis="channel", statistic="channel_mean", values=(1e-7, -channel * 1e-6, 0.0), places=3
    )
    first = Divergence(name=rows[0].name, stage="prediction", step=0, profile=profile)
    pixel = "data:image/png;base64,AAAA"
    same = FrameTriple(index=0, actual=pixel, reference=pixel, difference=pixel)
    return fault().model_copy(
        update={
            "rows": tuple(rows),
            "first_divergence": first,
            "media": (Media(name="video/frames", width=8, height=8, gain=2.0**20, frames=(same,)),),
        }
    )


def test_the_statistic_that_failed_is_told_from_those_that_did_not() -> None:
    found = failing(structured())
    assert found is not None
    assert found.bars is not None
    assert [bar.name for bar in found.bars.bars if bar.failed] == ["channel_mean"]
    shown = {bar.name: bar for bar in found.bars.bars}
    assert shown["gain"].x < found.bars.floor_x < shown["channel_mean"].bound_x
    assert shown["channel_mean"].x > shown["channel_mean"].bound_x
    assert found.statistic == "channel_mean"
    assert found.over is not None
    assert len(found.over.series[0].points) == 3


def test_where_it_lies_is_drawn_with_the_band_of_benign_runs() -> None:
    found = failing(structured())
    assert found is not None
    assert found.along is not None
    assert "furthest is channel 1 with -9.0e-05" in found.along.says
    assert found.along.band is not None
    assert len(found.along.stems) == 3


def test_the_page_says_that_the_pictures_show_nothing() -> None:
    text = render([structured()])
    assert "The pictures below show nothing of it; these numbers do." in text
    assert text.count('class="stem"') == 3
    visible = structured().media[0].model_copy(update={"gain": 1.0})
    loud = structured().model_copy(update={"media": (visible,)})
    assert "show nothing of it" not in render([loud])


def test_what_passed_has_no_such_plot() -> None:
    passed = structured(channel=1.0).model_copy(update={"verdict": Verdict.EQUIVALENT})
    assert failing(passed) is None
    assert '<section class="statistics">' not in render([passed])


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_values_that_are_not_finite_are_not_drawn_as_if_they_were(value: float) -> None:
    bad = Statistic(name="bulk", value=value, floor=1e-6, bound=3.0, ratio=value)
    told = structured().rows[0].model_copy(update={"statistics": (bad,)})
    drawn = bars(told)
    assert drawn is not None
    assert drawn.bars[-1].failed
    assert drawn.bars[-1].x <= drawn.right
    profile = Profile(axis="row", statistic="row_energy", values=(value, 1.0), places=2)
    assert along(profile, told) is None


def test_the_longest_number_of_an_axis_has_room_on_a_phone() -> None:
    drawn = along(
        Profile(axis="channel", statistic="channel_mean", values=(-3.8e-06, 1e-6), places=2),
        row(0, 0.5),
    )
    assert drawn is not None
    longest = max(len(text) for _, text in drawn.ticks)
    letter = 11  # units of a letter at the 20 of narrow screens
    assert longest * letter <= drawn.left - 8
