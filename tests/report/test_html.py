"""The HTML report: self-contained, escaped, complete, from JSON alone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from truestep.errors import WriteError
from truestep.report.curves import curve
from truestep.report.html import render, write_many
from truestep.verdict import (
    Comparison,
    Cost,
    FloorUsed,
    KnownFailure,
    Media,
    Metrics,
    Results,
    Row,
    Rule,
    RuleChange,
    Side,
    Verdict,
)


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
    assert not re.search(r"@import|url\(|https?:", render([drifted]))


def test_the_policy_allows_only_our_own_script(hostile: Comparison) -> None:
    text = render([hostile])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    script = re.search(r"<script>(.*?)</script>", text, re.S)
    assert policy is not None
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert "default-src 'none'" in policy.group(1)
    assert f"script-src 'sha256-{digest}'" in policy.group(1)


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


def test_rendered_from_the_json_alone(drifted: Comparison, hostile: Comparison) -> None:
    extreme = drifted.model_copy(
        update={"rows": tuple(row(i, r) for i, r in enumerate([math.nan, math.inf, 0.5, 3.0]))}
    )
    for comparison in (drifted, hostile, extreme):
        again = Comparison.model_validate_json(comparison.to_json())
        assert render([again]) == render([comparison])


def test_sections_are_in_order(drifted: Comparison) -> None:
    text = render([drifted])
    order = ["sentence", "case", "differences", "failing", "curve", "frames", "gates", "cost"]
    order += ["coverage", "rule", "all", "repeat", "notes"]
    assert re.findall(r'<section class="(\w+)"', text) == order
    assert text.index('class="notes"') < text.index('<script type="application/json"')


def test_failing_cases_come_first(drifted: Comparison, equivalent: Comparison) -> None:
    text = render([equivalent, drifted])
    assert text.index('<article id="c1" class="fail">') < text.index(
        '<article id="c2" class="pass">'
    )
    assert "<h1>2 checks: 1 did not pass, 1 passed (1 drifted, 1 equivalent)</h1>" in text


def test_one_check_has_its_sentence_as_the_heading(drifted: Comparison) -> None:
    text = render([drifted])
    assert text.count("<h1>") == 1
    assert "<h2>" not in text
    assert "(first divergence: <code>step/0000/guided</code>, step 0)" in text


def test_a_bare_comparison_renders() -> None:
    bare = Comparison(
        verdict=Verdict.MISSING,
        sentence="missing: `<b>` has no reference",
        rule=Rule(name="size/1", text="none"),
        actual=Side(label="candidate"),
        reference=Side(label="reference"),
        case={"model": "m"},
        media=(Media(name="v", width=1, height=1, gain=1.0, frames=()),),
        cost=Cost(forwards=0, forwards_generation=0, seconds=math.nan),
    )
    text = render([bare])
    assert "<code>&lt;b&gt;</code> has no reference" in text
    assert "no tensors were compared" in text
    assert "not recorded on both sides" in text
    assert "there was nothing to compare" in render([])


def test_the_numbers_of_other_gates_and_the_cost_are_shown(drifted: Comparison) -> None:
    text = render([drifted])
    assert '<span aria-hidden="true">✓</span> PASS</span>' in text
    assert "full_cosine_distance <b>1.0e-03</b>" in text
    assert "full_cosine <b>0.01</b>" in text
    assert "<b>15 %</b> of a generation: 6 of 40 forwards" in text
    failed = drifted.gates[0].model_copy(update={"passed": False})
    assert "FAIL</span>" in render([drifted.model_copy(update={"gates": (failed,)})])


def test_readable_without_javascript(drifted: Comparison) -> None:
    text = render([drifted])
    assert text.count('<div class="triple small" data-index=') == 9
    assert not re.search(r'<div class="triple[^>]*hidden', text)
    assert '<div class="look" hidden' in text


def test_words_repeat_what_colour_says(drifted: Comparison) -> None:
    text = render([drifted])
    assert '<span class="badge fail"><span aria-hidden="true">✕</span> drifted</span>' in text
    assert "</b> did not pass" in text


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


@pytest.mark.parametrize(
    "ratios",
    [[0.0], [0.5, 3.0], [math.inf, 1e9, 0.0], [math.nan, 1.0], [1.7e308, 5e-324], [0.5] * 60],
)
def test_curves_stay_on_the_paper(ratios: list[float]) -> None:
    found = curve([row(i, ratio) for i, ratio in enumerate(ratios)])
    assert found is not None
    for series in found.series:
        assert len(series.points) == len(ratios)
        for point in series.points:
            assert found.left <= point.x <= found.right
            assert found.top <= point.y <= found.bottom


def test_curves_follow_the_ratio() -> None:
    found = curve([row(i, r) for i, r in enumerate([0.0, 0.5, 1.0, 1.5, 2.0, 3.0])])
    assert found is not None
    heights = [p.y for p in found.series[0].points]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == found.bottom
    assert heights[2] == found.floor_y
    assert found.bounds == ((heights[4], 2.0),)
    assert [p.failed for p in found.series[0].points] == [False] * 3 + [True] * 3


def test_what_could_not_be_measured_is_at_the_top_without_a_line() -> None:
    rows = [row(i, 0.5) for i in range(5)]
    rows[2] = rows[2].model_copy(
        update={"verdict": Verdict.INVALID, "ratio": None, "note": "non-finite values: 3 in actual"}
    )
    found = curve(rows)
    assert found is not None
    series = found.series[0]
    assert series.points[2].y == found.top
    assert series.points[2].failed
    assert "not measured: non-finite values" in series.points[2].title
    assert re.findall("[ML]", series.path) == ["M", "L", "M", "L"]


def test_modules_of_one_step_are_one_point() -> None:
    found = curve([row(s, 0.1 * (m + 1)) for s in range(3) for m in range(40)])
    assert found is not None
    assert [len(s.points) for s in found.series] == [3]
    assert "4 × floor (rel_l2); the worst of 40 tensors" in found.series[0].points[0].title


def test_a_ratio_of_another_metric_says_so() -> None:
    judged = row(0, 3.0).model_copy(update={"ratio_metric": "max_abs"})
    found = curve([judged])
    assert found is not None
    assert "3 × floor (max_abs); rel_l2 3.0e+06 × floor" in found.series[0].points[0].title


def test_no_curve_denies_the_verdict() -> None:
    """What failed has no step, so every line would be within the floor."""
    fine = [row(i, 0.5) for i in range(5)]
    text = Row(name="text/cond", verdict=Verdict.DRIFTED, stage="text")
    assert curve([*fine, text]) is None
    assert curve([*fine, text, row(5, 3.0)]) is not None


def test_no_steps_no_curve() -> None:
    assert curve([Row(name="x", verdict=Verdict.IDENTICAL)]) is None


def test_two_thousand_rows_and_non_finite_values(drifted: Comparison) -> None:
    rows = tuple(row(i, [0.5, math.nan, math.inf][i % 3]) for i in range(2000))
    text = render([drifted.model_copy(update={"rows": rows, "media": ()})])
    assert '<td class="n">NaN</td>' in text
    assert '<td class="n">infinite</td>' in text
    assert "1313 more in the full table" in text
    assert "All 2000 tensors" in text
    assert len(text) < 4_000_000


def test_a_report_that_cannot_be_written(drifted: Comparison, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="the report could not be written"):
        write_many(tmp_path / "file" / "r.html", [drifted])
    write_many(tmp_path / "new" / "r.html", [drifted])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.html"]


def test_a_known_failure_passes_and_says_so(drifted: Comparison) -> None:
    known = KnownFailure(
        name="three",
        outcome="known",
        text="known failure: as stated",
        reason="a kernel",
        since="2026-01-01",
        stage="guidance",
        statistic="rel_l2",
        stated=1e-2,
        measured=1e-2,
        tolerance=2.0,
    )
    page = render([drifted.model_copy(update={"known": known}), drifted])
    assert "2 checks: 1 did not pass, 1 passed (1 drifted, 1 known failure)" in page
    assert page.count("</span> known failure</span>") == 2  # the index and its own section


def test_what_decides_and_was_changed_is_on_the_page(drifted: Comparison) -> None:
    change = RuleChange(kind="case", file="<b>.toml", key="case.a", actual="1", reference="20")
    page = render([drifted.model_copy(update={"rule_changes": (change,), "rules_since": "f" * 40})])
    assert "Changed since ffffffffffff, and decides here" in page
    assert "<td>case: case.a</td><td>1</td><td>20</td><td>&lt;b&gt;.toml</td>" in page
    assert "and decides here" not in render([drifted])


def test_the_verdict_is_said_once_and_the_next_command_stands_below_it(
    drifted: Comparison, equivalent: Comparison
) -> None:
    repeat = "truestep check cat --apply change.py:f"
    first = drifted.first_divergence
    assert first is not None
    inner = first.model_copy(update={"stage": "module", "fqn": "blocks.0", "cause": None})
    deeper = {"repeat": f"{repeat} --depth modules", "first_divergence": inner, "hint": ""}
    text = render([drifted.model_copy(update=deeper)])
    assert f"next: <code>{repeat} --depth cause</code>" in text
    told = drifted.sentence.removeprefix("drifted: ")
    assert told != drifted.sentence
    assert f"drifted</span> {told[:20]}" in text
    assert "drifted</span> drifted" not in text
    advised = drifted.model_copy(update={"hint": "look again"})
    assert "hint: <code>look again</code>" in render([advised])
    assert "next: <code>" not in render([equivalent.model_copy(update={"repeat": repeat})])
