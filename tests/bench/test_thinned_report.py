"""The table of thinned recordings: what they miss, silently or not, and places that they move."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# The benchmarks are not installed with the package.
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.verdict_report import place_of, thinned_markdown

SAID = ("guidance and update at steps 1 to 8",)


def judged(stage: str = "", step: int | None = None, unseen: tuple[str, ...] = ()) -> Any:
    verdict = "drifted" if stage else "identical"
    first = f"{stage}, step {step}" if stage else ""
    place = {"stage": stage, "step": step, "branch": None} if stage else {}
    return {"verdict": verdict, "first": first, **place, "unseen": list(unseen)}


def row(whole: Any, thin: Any, family: str = "guidance") -> dict[str, Any]:
    start = {"subject": "digits", "dtype": "float32", "family": family, "kept": [0, 9, 10, 11, 19]}
    return {**start, "entry": "entry", "steps": whole, "thinned": thin}


def test_a_place_is_the_same_later_or_another() -> None:
    early, late = judged("guidance", 1), judged("guidance", 9, SAID)
    assert place_of(row(early, early)) == "same"
    assert place_of(row(early, late)) == "later step"
    assert place_of(row(early, judged("guidance", 9))) == "other"  # it does not say so
    assert place_of(row(judged("guidance", 0), late)) == "other"  # step 0 is kept
    assert place_of(row(early, judged("update", 9, SAID))) == "other"


def test_what_is_missed_is_counted_by_whether_it_is_said() -> None:
    rows = [
        row(judged("guidance", 1), judged("guidance", 9, SAID)),
        row(judged("text"), judged("text", unseen=SAID)),
        row(judged("update", 3), judged(unseen=SAID)),
        row(judged("update", 4), judged()),
        row(judged(), judged()),  # without an effect
        row(judged("update", 18), {**judged("update", 18, SAID), "verdict": "inconclusive"}),
        row(judged(), judged("text"), family="benign"),
        {"subject": "digits", "not_applicable": True},
    ]
    lines = thinned_markdown(rows).splitlines()
    assert lines[4] == (
        "| digits | float32 | 0, 9, 10, 11, 19 | 5 | 2/5 (40%) | 2 | 1 | 1 | 1 | 0 | 0/1 | 1/1 |"
    )
    assert "Otherwise than by a whole one: 5" in lines
    assert "- entry on digits, float32: drifted update, step 4; thinned identical" in lines
