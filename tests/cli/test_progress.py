"""Long work says how far it is: by steps, by runs, and now and then by a line in a pipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import truestep
from truestep.cli.common import Lines, progress_bar
from truestep.testing import tiny

CALL = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 4}


def test_a_plain_pipeline_tells_every_step_and_every_benign_run(tmp_path: Path) -> None:
    tiny.save("FluxPipeline", tmp_path / "flux")
    case = truestep.CallCase(model=str(tmp_path / "flux"), call=CALL)
    told: list[tuple[str, int, int]] = []

    def progress(*words: Any) -> None:
        told.append(words)

    recording = truestep.record(case, progress=progress)
    assert [t for t in told if t[0] == "record"] == [("record", i, 4) for i in (1, 2, 3, 4)]
    floor = [t for t in told if t[0] == "noise floor"]
    assert floor[0][1] == 0
    assert floor[-1][1] == floor[-1][2] > 5

    told.clear()
    truestep.check(case, recording, progress=progress)
    assert told[0][:2] == ("check", 0)
    assert [t[1] for t in told] == list(range(told[0][2])), "every call of a model that is made"


def test_in_a_pipe_a_line_says_pace_time_left_and_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress_bar() as tell:
        assert isinstance(tell, Lines)
        for done in range(100):
            now[0] += 4.0
            tell("record", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12, "one in 32 of 400 seconds"
    assert re.fullmatch(
        r"record: 7 of 100, 4\.0 s each, 6 min left, at most \d+\.\d GB of memory", lines[0]
    )
    assert lines[-1].startswith("record: 95 of 100, 4.0 s each, 20 s left")


def test_a_line_says_what_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress_bar() as tell:
        for done, size in enumerate((0, 3 * 10**6, 2**20)):
            (tmp_path / "written").write_bytes(bytes(size))
            now[0] += 31.0
            tell("record", done, 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" of memory")[2] for line in lines] == [
        "",
        ", 3 MB written",
        ", 4 MB written",
    ]


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as tell:
        for done in range(5):
            tell("check", done, 5)
    assert capsys.readouterr().err == ""


def test_words_of_others_cannot_write_into_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress_bar() as tell:
        now[0] = 31.0
        tell("\x1b[31mred", 0, 2)
    assert "\x1b" not in capsys.readouterr().err
