"""Comments and summaries: golden, bounded, and nothing of a result acts in them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.experiment.test_table import Made
from tests.report import results_to_show as results
from tests.report.golden_files import GOLDEN, LINK, texts
from truestep.records import RuleChange
from truestep.report.markdown import MOST_COMMENT, Frame, code, comment, marker, summary
from truestep.text import visible
from truestep.verdict import Results


class Page(HTMLParser):
    """Tags with their attributes, and the text that is in code and that is not."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.code: list[str] = []
        self.prose = ""
        self._deep = 0
        self.feed(
            MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
        )

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))
        if tag == "code":
            self._deep += 1
            self.code.append("")

    def handle_endtag(self, tag: str) -> None:
        self._deep -= tag == "code"

    def handle_data(self, data: str) -> None:
        if self._deep:
            self.code[-1] += data
        else:
            self.prose += data


@pytest.mark.parametrize("name", texts())
def test_golden(name: str) -> None:
    assert texts()[name] == (GOLDEN / name).read_text("utf-8")


def test_a_comment_begins_with_its_marker_and_says_whose_claim_it_is() -> None:
    text = comment(results.everything(), Frame(key="a/b --> c", claimed_by="f" * 40))
    assert text.startswith("<!-- truestep:ab--c -->\n")
    assert marker("a") != marker("b")
    page = Page(text)
    assert "could have written anything" in page.prose
    assert "f" * 40 in page.code
    assert "could have written anything" not in comment(results.everything(), Frame())


@pytest.mark.parametrize("render", [comment, summary])
def test_nothing_of_a_result_acts(render: type) -> None:
    """The same elements as of a result without any of it; all of the text is there, as code."""
    plain = Page(render(Results.of([results.fault()]), Frame(link=LINK)))
    text = render(Results.of([results.hostile()]), Frame(link=LINK))
    page = Page(text)
    kinds = {tag for tag, _ in plain.tags}
    assert {tag for tag, _ in page.tags} <= kinds
    assert [a for _, a in page.tags if a] == [a for _, a in plain.tags if a]
    assert not {"img", "a"} & kinds - {"a"}
    for tag in ("table", "details", "tr", "h3", "summary", "sub"):
        assert [t for t, _ in page.tags].count(tag) == [t for t, _ in plain.tags].count(tag), tag
    assert any("<img src=x onerror=alert(1)>" in part for part in page.code)
    shown = visible(results.HOSTILE)
    assert any(part == shown for part in page.code)
    for word in ("@", "#12", "GH-3", "http:", "www.", "$x$", ":smile:"):
        assert word not in page.prose.replace(LINK, ""), word
    raw = re.sub(r"</?code>", "", text)
    assert "@" not in raw
    assert "\x1b" not in text
    assert not [line for line in text.split("\n") if line.startswith("::")]


def test_what_stands_between_words_of_any_script_stays() -> None:
    assert code("a red three, 猫 (2.5 %)") == "<code>a red three, 猫 (2.5 %)</code>"
    assert Page(code("a_b*c")).code == ["a_b*c"]
    assert code("x" * 900).count("x") == 499
    assert Page(code("")).code == [" "]


def test_the_ladder_pictures_and_steps_are_told() -> None:
    text = comment(results.everything(), Frame(link=LINK))
    assert "| 3.5 | **actual** | <code>candidate.mp4</code> |" in text
    assert f"frames 3: both sides and their difference, in [the report]({LINK})" in text
    assert "**steps** 0 to 3: ▁▁▅▆ (largest at step 3: 500 x" in text
    assert "data:" not in text
    assert "in the report of the run" in comment(results.everything(), Frame())


def test_a_comment_has_room_at_github(tmp_path: Path) -> None:
    many = Results.of([results.hostile() for _ in range(150)])
    text = comment(many, Frame(link=LINK))
    assert len(text) <= MOST_COMMENT
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("details") >= 1
    found = re.search(r"Details of (\d+) more are in the results", page.prose)
    assert found
    assert tags.count("details") + int(found[1]) == 150
    assert "truestep" in text.splitlines()[-1]


def test_an_experiment_is_rendered_too(tmp_path: Path) -> None:
    found = Made(tmp_path / "r").time(20, candidate=0.8).check(off=0.01).result()
    text = comment(found, Frame())
    assert f"truestep: ✕ {found.verdict.value}" in text
    assert json.dumps(found.cells[0].verdict.value)[1:-1] in text


def test_what_decides_and_was_changed_stands_above_what_passes_by_it() -> None:
    change = RuleChange(
        kind="threshold", file="limits.json", key="ssim", actual="0.5", reference="0.95"
    )
    passed = results.passed().model_copy(update={"rule_changes": (change,)})
    text = comment(Results.of([passed, passed]), Frame())
    told = "<code>threshold ssim&#58; 0.5 (was 0.95), in limits.json</code>"
    assert text.count(told) == 1
    assert text.index(told) < text.index("| | case |")
    assert "What decides" not in comment(Results.of([results.passed()]), Frame())
