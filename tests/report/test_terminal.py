"""The terminal report: lines one can grep, the sentence last."""

from __future__ import annotations

import pytest

from truestep.report.terminal import lines, print_results
from truestep.verdict import Comparison, Results, Row, Verdict


def test_failed(drifted: Comparison) -> None:
    text = "\n".join(lines(drifted))
    assert "case         digits-a-red-three-0123456789ab [guidance_scale=3.1]" in text
    assert "environment  library.torch: 2.14 (was 2.13)" in text
    assert "... 15 more failed" in text
    assert "other gate   fastvideo-latent/1: passes" in text
    assert "6 forwards, 15% of a generation's 40" in text
    assert "looked at" in text
    assert "not looked at" in text


def test_passed_says_what_could_have_been_seen(equivalent: Comparison) -> None:
    text = "\n".join(lines(equivalent))
    assert text.startswith("PASSED equivalent: 25 tensors, the worst at ")
    assert "detectable   a relative change of" in text


def test_everything_ends_with_how_to_repeat_it(
    drifted: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    print_results(Results.of([drifted]), report="r.html", verbose=True)
    out = capsys.readouterr().out
    last = out.splitlines()[-2:]
    assert last == ["report: r.html", "repeat: truestep check three --set guidance_scale=3.1"]
    assert out.replace("\n ", "").count(drifted.sentence) == 1
    assert "\x1b" not in out


def test_several_cases(
    drifted: Comparison, equivalent: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    print_results(Results.of([drifted, equivalent, equivalent]))
    assert "3 cases: 1 drifted, 2 equivalent" in capsys.readouterr().out


def test_at_most_twenty_rows(drifted: Comparison) -> None:
    rows = tuple(Row(name=f"t{i}", verdict=Verdict.DRIFTED, stage="") for i in range(500))
    text = list(lines(drifted.model_copy(update={"rows": rows})))
    assert sum(line.startswith("  t") and "drifted" in line for line in text) == 20
    assert "  ... 480 more failed" in text
