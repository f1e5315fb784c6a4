"""What is not ours cannot act on a terminal, begin a line of its own, or hide."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truestep.errors import FileFormatError, TruestepError
from truestep.text import nearest, pasteable, say, visible, visible_json

EVIL = "a\x1b[31m\u202e\x9b2J\u200b\r\nPASSED identical [red]x[/red]"


def test_what_acts_is_shown_as_its_escape() -> None:
    shown = "a\\x1b[31m\\u202e\\x9b2J\\u200b\\r\\nPASSED identical [red]x[/red]"
    assert visible(EVIL) == shown
    assert visible(shown) == shown


@pytest.mark.parametrize(
    "text", ["一只猫在跑", "ein Bär läuft", "γάτα", "قطة تجري", "кот", "🐈 runs", "a  b"]
)
def test_letters_of_any_script_stay(text: str) -> None:
    assert visible(text) == text


@given(st.text())
def test_nothing_of_these_categories_is_left(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(c) for c in shown} & {
        "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "BN"
    }  # fmt: skip
    assert len(shown.splitlines()) <= 1
    shown.encode()


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_json_stays_the_same_json(text: str) -> None:
    written = json.dumps({"a": text}, ensure_ascii=False, indent=2)
    assert json.loads(visible_json(written)) == {"a": text}
    assert "\u202e" not in visible_json(written)


def test_lines_are_kept_only_where_they_are_ours(capsys: pytest.CaptureFixture[str]) -> None:
    say(EVIL)
    say("one\ntwo\x1b", lines=True)
    out, _ = capsys.readouterr()
    assert out == visible(EVIL) + "\none\ntwo\\x1b\n"


@pytest.mark.parametrize("part", ["what", "where", "measured", "likely", "hint"])
def test_an_error_shows_all_its_parts_so(part: str) -> None:
    parts = {"what": "w", part: EVIL}
    text = str(TruestepError(parts.pop("what"), **parts))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not any(line.startswith("PASSED") for line in text.split("\n"))
    table = str(FileFormatError("w", measured="a  b\nc\x1b  d"))
    assert table.endswith("  a  b\n  c\\x1b  d")


def test_a_reader_that_leaves_does_not_change_the_exit_code() -> None:
    code = (
        "import sys; from truestep.text import say\n"
        "for line in range(100_000): say(f'line {line}')\n"
        "sys.exit(3)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 3


@pytest.mark.parametrize(
    "word", ["a\nb", "it's \x1b[2J", "back\\slash\n", "\u202eright", "plain", ""]
)
def test_what_a_hint_says_is_what_a_shell_reads(word: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    line = visible(pasteable(["printf", "%s", word]))
    run = subprocess.run([bash, "-c", line], capture_output=True, env={"LC_ALL": "C.UTF-8"})
    assert run.stdout.decode() == word


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("num_inference_steps", "steps"),
        ("scale", "guidance_scale"),
        ("heigth", "height"),
        ("x", ""),
    ],
)
def test_a_name_that_there_is_not_is_asked_about(key: str, near: str) -> None:
    names = ["height", "guidance_scale", "steps"]
    assert nearest(key, names) == (f"did you mean {near!r}?" if near else "")
