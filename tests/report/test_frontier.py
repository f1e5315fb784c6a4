"""The plot of speed against drift and quality: every name can be read."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from truestep.experiment.quality.records import Point, Quality, Standing
from truestep.report.frontier import svg
from truestep.report.quality import frontier_rows

TEXT = re.compile(r'<text x="([\d.-]+)" y="([\d.-]+)">([^<]*)</text>')


def point(name: str, speed: float, drift: float, quality: float) -> Point:
    return Point(
        name=name,
        standing=Standing.DEGRADED,
        speed=speed,
        speed_low=speed * 0.97,
        speed_high=speed * 1.03,
        drift=drift,
        drift_low=drift * 0.9,
        drift_high=drift * 1.1,
        quality=quality,
        quality_low=quality - 0.5,
        quality_high=quality + 0.5,
        metric="m",
    )


PLACES = st.tuples(st.floats(0.5, 9.0), st.floats(1e-5, 3.0), st.floats(-9.0, 3.0))


CROWDED = [
    *((speed, drift, 0.0) for speed, drift in ((3, 1), (6, 1), (6, 0.3125), (6, 0.078125))),
    *((speed, drift, 0.0) for speed, drift in ((7, 2), (7, 1.75), (8, 2), (8, 2))),
]
"""Eight of one quality, fast: there is no room for all names beside their marks."""


@given(st.lists(PLACES, min_size=1, max_size=10))
@example(CROWDED)
def test_no_name_lies_on_another(places: list[tuple[float, float, float]]) -> None:
    points = [point(f"setting {at}", *place) for at, place in enumerate(places)]
    texts = [(float(x), float(y), text) for x, y, text in TEXT.findall(svg(points))]
    named = [each for each in texts if each[2].startswith("setting ")]
    assert len(named) == 2 * len(points)
    for one, other in combinations(named, 2):
        wide = 6.0 * len(one[2] if one[0] < other[0] else other[2])
        assert abs(one[1] - other[1]) >= 12 or abs(one[0] - other[0]) >= wide


def test_a_name_is_escaped() -> None:
    assert "a &lt;b&gt; &amp; c" in svg([point("a <b> & c", 2.0, 0.1, 0.0)])


RANKS = Path(__file__).parents[2] / "bench" / "results" / "quality-ranks.json"


def test_a_candidate_without_a_place_has_a_row_too() -> None:
    found = Quality.model_validate_json(RANKS.read_text())
    placed, *rest = found.candidates
    update = {"point": None, "standing": Standing.UNMET}
    found = found.model_copy(update={"candidates": (placed.model_copy(update=update), *rest)})
    rows = frontier_rows(found)
    assert len(rows) == len(found.candidates)
    assert rows[-1] == (placed.cell.name, "-", "-", "-", "unmet", "-")
