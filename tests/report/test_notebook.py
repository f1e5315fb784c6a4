"""What Python and a notebook show of the public objects."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import truestep
from tests.experiment.test_table import Made
from tests.report.conftest import make
from tests.report.results_to_show import HOSTILE, everything, fault, hostile
from truestep.recording.format import Recording
from truestep.recording.manifest import Manifest
from truestep.report import notebook
from truestep.text import visible
from truestep.verdict import Comparison

ACTING = {"script", "iframe", "object", "embed", "link", "meta", "base", "form"}


class Page(HTMLParser):
    """Elements that are open and shut, what they do, and what is read of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("img", "path", "line", "rect", "circle"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.sources.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(value: object) -> Page:
    """Its HTML: small, whole, loading and running nothing."""
    text = value._repr_html_()  # type: ignore[attr-defined]
    assert text is not None
    assert len(text.encode()) < 100_000
    page = Page(text)
    assert page.open == []
    assert not ACTING & {*page.tags}
    assert page.handlers == []
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"@import|url\(", text)
    return page


def test_a_comparison_is_its_answer_with_curve_and_frames() -> None:
    found = make(prompt="a <b>cat</b>")
    page = read(found)
    assert found.sentence.split("`")[0] in page.text
    assert "a <b>cat</b>" in page.text
    assert "svg" in page.tags
    assert page.tags.count("img") == 9
    assert len(page.text) < 8000
    told = found._repr_markdown_()
    assert told is not None
    assert "drifted" in told.splitlines()[0]
    assert "| tensor | verdict |" in told


def test_what_passed_has_no_table_of_failures() -> None:
    page = read(make(drifted=False))
    assert "what did not pass" not in page.text
    assert "✓ equivalent" in page.text


def test_results_and_an_experiment(tmp_path: Path) -> None:
    page = read(everything())
    assert page.text.count("drifted") >= 2
    experiment = Made(tmp_path / "r").time(20, candidate=0.8).check(off=0.01).result()
    assert experiment.sentence in read(experiment).text
    assert len(repr(experiment)) < 300
    assert "| cell |" in str(experiment._repr_markdown_())


def test_a_recording_and_a_case() -> None:
    case = truestep.Case(model="builtin:digits", prompt=HOSTILE)
    tensors = {f"step/{at:04d}/cond": torch.zeros(2, 3) for at in range(20)}
    recording = Recording(bare(), tensors=tensors)
    assert "20 tensors" in read(recording).text
    assert len(repr(recording)) < 300
    assert "builtin:digits" in read(case).text
    assert len(repr(case)) < 300


def bare() -> Manifest:
    """A manifest of nothing."""
    return Manifest(
        tool_version="0", created="2026-01-01", level="full", case={"prompt": HOSTILE}, tensors=()
    )


def test_nothing_acts_in_hostile_texts() -> None:
    page = read(hostile())
    assert "onerror" in page.text
    told = hostile()._repr_markdown_()
    assert told is not None
    assert "<img" not in told
    assert "\x1b" not in told + repr(hostile())
    assert "\n" not in repr(hostile())


def test_a_large_comparison_stays_small() -> None:
    picture = "data:image/png;base64," + "A" * 300_000
    frames = (
        fault()
        .media[0]
        .frames[0]
        .model_copy(update={"actual": picture, "reference": picture, "difference": picture})
    )
    row = fault().rows[3]
    rows = tuple(row.model_copy(update={"name": f"n{at}", "step": at}) for at in range(3000))
    large = fault().model_copy(
        update={
            "media": (fault().media[0].model_copy(update={"frames": (frames,)}),),
            "rows": rows,
            "sentence": "s" * 100_000,
            "notes": ("n" * 100_000,) * 3,
        }
    )
    read(Comparison.model_validate_json(large.to_json()))
    assert len(str(large._repr_markdown_())) < 100_000


def test_a_record_that_is_no_result_has_its_line_alone() -> None:
    assert notebook.html(fault().rows[0]) is None
    assert repr(fault().rows[0]).startswith("Row(")


def test_the_answer_is_in_the_line() -> None:
    line = repr(fault())
    assert line.startswith(
        "Comparison(verdict=drifted, sentence='drifted: 2 of 4 tensors, the worst at 500 x"
    )
    assert "case_id='red-three-0123'" in line


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=3000))
def test_no_name_makes_a_line_long(text: str) -> None:
    found = hostile().model_copy(
        update={"sentence": text, "case_id": text, "repeat": text, "hint": text}
    )
    environment = truestep.Environment({text: text, "library.torch": text * 3})
    values = (found, found.rows, found.rows[0], found.actual, environment)
    for value in (*values, everything(), found.rule, found.media[0]):
        line = repr(value)
        assert len(line) < 300
        assert visible(line) == line


def test_the_verdicts_load_no_page() -> None:
    code = (
        "import sys, truestep.verdict, truestep.case; "
        "bad = [m for m in ('torch', 'jinja2', 'truestep.report') if m in sys.modules]; "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", truestep.__all__)
def test_public_names_have_short_lines(name: str) -> None:
    assert len(repr(getattr(truestep, name))) < 300
