"""The HTML report: self-contained, escaped, complete, from JSON alone."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from truestep.errors import WriteError
from truestep.report.html import curve, render, write_many
from truestep.verdict import Comparison, FloorUsed, Metrics, Results, Row, Verdict


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "action"}:
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)


def test_no_external_address(drifted: Comparison) -> None:
    page = Page(render([drifted]))
    outside = [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert outside == []
    assert not re.search(r"@import|url\(\s*['\"]?http", render([drifted]))


def test_prompts_are_escaped(hostile: Comparison) -> None:
    text = render([hostile])
    page = Page(text)
    assert page.tags.count("script") == 2  # the data and our own
    assert page.handlers == []
    assert "&lt;script&gt;alert(1)" in text


def test_the_embedded_json_is_the_result(hostile: Comparison) -> None:
    text = render([hostile])
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    results = Results.model_validate(json.loads(found.group(1)))
    assert results.comparisons[0].case == hostile.case
    assert results.verdict is hostile.verdict


def test_rendered_from_the_json_alone(drifted: Comparison) -> None:
    again = Comparison.model_validate_json(drifted.to_json())
    assert render([again]) == render([drifted])


def test_sections_are_in_order(drifted: Comparison) -> None:
    text = render([drifted])
    order = ["sentence", "differences", "failing", "curve", "frames", "gates", "coverage", "all"]
    places = [text.index(f'<section class="{name}"') for name in order]
    assert places == sorted(places)


def test_failing_cases_come_first(drifted: Comparison, equivalent: Comparison) -> None:
    text = render([equivalent, drifted])
    assert text.index('<article id="c1" class="fail">') < text.index(
        '<article id="c2" class="pass">'
    )
    assert "2 checks: 1 did not pass, 1 passed" in text


def test_readable_without_javascript(drifted: Comparison) -> None:
    text = render([drifted])
    assert text.count('<div class="triple"') == 9
    assert '<div class="triple" hidden' not in text
    assert '<div class="scrub" hidden>' in text


def test_words_repeat_what_colour_says(drifted: Comparison) -> None:
    text = render([drifted])
    assert '<span class="badge fail">drifted</span>' in text
    assert "× did not pass" in text


def row(step: int, ratio: float) -> Row:
    return Row(
        name=f"step/{step:04d}/cond",
        verdict=Verdict.DRIFTED if not ratio <= 1 else Verdict.EQUIVALENT,
        stage="prediction",
        step=step,
        branch="cond",
        metrics=Metrics(
            count=1,
            rel_l2=ratio,
            max_abs=math.inf,
            max_abs_index=(),
            cosine_distance=math.nan,
            norm_ratio=1.0,
            gain=1.0,
            rms_reference=1.0,
        ),
        floor=FloorUsed(
            rel_l2=1e-6, max_abs=1e-5, bound=2.0, source="measured", pair="float32/float32"
        ),
        ratio=ratio,
    )


@pytest.mark.parametrize("ratios", [[0.0], [0.5, 3.0], [math.inf, 1e9, 0.0], [math.nan, 1.0]])
def test_curves_stay_on_the_paper(ratios: list[float]) -> None:
    found = curve([row(i, ratio) for i, ratio in enumerate(ratios)])
    assert found is not None
    for series in found.series:
        for point in series.points:
            assert 0 <= point.x <= found.width
            assert 0 <= point.y <= found.height


def test_no_steps_no_curve() -> None:
    assert curve([Row(name="x", verdict=Verdict.IDENTICAL)]) is None


def test_two_thousand_rows_and_non_finite_values(drifted: Comparison) -> None:
    rows = tuple(row(i, [0.5, math.nan, math.inf][i % 3]) for i in range(2000))
    text = render([drifted.model_copy(update={"rows": rows, "media": ()})])
    assert "not a number" in text
    assert "infinite" in text
    assert "All 2000 tensors" in text
    assert len(text) < 4_000_000


def test_a_report_that_cannot_be_written(drifted: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="the report could not be written"):
        write_many(tmp_path / "file" / "r.html", [drifted])
    write_many(tmp_path / "new" / "r.html", [drifted])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.html"]
