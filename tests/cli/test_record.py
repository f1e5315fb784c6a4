"""What `record` prints, keeps and refuses, and how `check` finds it again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import Run, runner, write_cases
from truestep.calls import instructions
from truestep.runtime import lent, stored


@pytest.fixture
def run(
    tiny_wan: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """The command line in a folder with two cases."""
    write_cases(tmp_path, tiny_wan["wan21"], "a", "b")
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capsys)


def last_command(out: str) -> list[str]:
    """The words of the last line that is a command."""
    (line,) = re.findall(r"^check: truestep (.*)$", out, re.MULTILINE)
    return shlex.split(line)


SMALL = [
    *("--set", "height=16", "--set", "width=16", "--set", "num_frames=5"),
    *("--set", "max_sequence_length=8", "--set", "steps=2", "--set", "device=cpu"),
]


def test_one_id_and_a_command_that_finds_what_was_recorded(
    run: Run, tiny_wan: dict[str, Path]
) -> None:
    words = [str(tiny_wan["wan21"]), "--prompt", "it's 猫", *SMALL]
    code, out, _ = run("record", *words, "--floor", "none")
    assert code == 0
    (printed,) = re.findall(r"^RECORDED (\S+):", out)
    (stored,) = Path("truestep-references").rglob("*.safetensors")
    assert stored.stem == printed
    assert run(*last_command(out))[0] == 0
    assert run("check", printed)[0] == 0
    assert run("check", "--reference", str(stored))[0] == 0
    code, out, _ = run("check", *words)  # --set is the change under test, and stays that
    assert code == 3
    assert "there is a reference recorded with it" in " ".join(out.split())
    (hint,) = re.findall(r"^next: truestep (.*)$", out, re.MULTILINE)
    assert run(*shlex.split(hint))[0] == 0
    assert run("record", printed, "--runs", "1")[0] == 0


@pytest.mark.parametrize("low", [True, False])
def test_a_floor_without_other_instructions_is_said(
    run: Run, tiny_wan: dict[str, Path], monkeypatch: pytest.MonkeyPatch, low: bool
) -> None:
    monkeypatch.setattr(stored, "LEAST", 1 << 10)
    monkeypatch.setattr(lent, "LEAST", 1 << 10)
    monkeypatch.setattr(instructions, "other_sets", lambda: (("limited to the oldest", {}),))
    words = [str(tiny_wan["wan21"]), "--prompt", "a cat", *SMALL]
    _, out, _ = run("record", *words, *(["--low-memory"] if low else ["--floor", "none"]))
    note = "note: noise floor without other instructions: weights stay in their files"
    assert (note in " ".join(out.split())) is low


def test_the_hint_of_a_missing_reference_has_tier_file_and_folder(run: Run, tmp_path: Path) -> None:
    text = (tmp_path / "truestep.toml").read_text() + "\n[case.b.gold]\nsteps = 1\n[case.a.gold]\n"
    (tmp_path / "my cases.toml").write_text(text)
    words = ["b", "--file", "my cases.toml", "--tier", "gold", "--references", "my refs"]
    code, out, _ = run("check", *words)
    assert code == 3
    (hint,) = re.findall(r"^next: truestep (.*)$", out, re.MULTILINE)
    assert shlex.split(hint)[:2] == ["record", "b"]
    assert run(*shlex.split(hint), "--floor", "none")[0] == 0
    assert run("check", *words)[0] == 0


def test_of_several_cases_those_that_exist_keep_their_reference(run: Run) -> None:
    assert run("record", "a", "--floor", "none")[0] == 0
    (before,) = Path("truestep-references").rglob("*.safetensors")
    content = before.read_bytes()
    code, out, _ = run("record", "--floor", "none")
    assert code == 0
    assert out.startswith("KEPT a: it has a reference\nreference: ")
    assert "RECORDED b: " in out
    assert before.read_bytes() == content
    code, out, _ = run("record")
    assert code == 0
    assert "RECORDED" not in out
    code, _, err = run("record", "a")
    assert code == 2
    assert "hint: truestep record a --update  # replaces it" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("record", "a", "--output", "file/r.safetensors"),
        ("record", "a", "--references", "file"),
        ("check", "a", "--json", "file/r.json"),
        ("check", "a", "--report", "folder"),
        ("run", "a", "--output", "file/out"),
        ("trace", "record", "a", "--output", "file/t.safetensors"),
        ("perf", "record", "a", "--history", "file/h.sqlite"),
        ("ab", "a", "--set", "steps=1", "--output", "file/ab"),
    ],
)
def test_where_a_result_could_not_be_written_nothing_is_run(
    run: Run, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    Path("folder").mkdir()

    def loaded(*given: object, **named: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("truestep.runtime.loading.resolve", loaded)
    code, _, err = run(*arguments)
    assert code == 2
    assert "could not be written" in err


def test_rounds_that_cannot_decide_are_refused_before(run: Run) -> None:
    words = ("ab", "a", "--set", "cfg=batched", "--rounds", "3")
    code, _, err = run(*words, "--expect", "faster")
    assert code == 2
    assert "--rounds 3 cannot decide the speed: 4 are the least" in err
    assert "hint: truestep ab a --set cfg=batched --expect faster --rounds 4\n" in err
    code, _, err = run(*words, "--set", "height=20")
    assert err.startswith("note: --rounds 3 cannot decide the speed: 4 are the least; ")


def test_a_full_disk_is_seen_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truestep.files.ROOM", 2**63)
    code, _, err = run("record", "a")
    assert code == 2
    assert "the disk is full" in err
    assert "hint: df -h .; ls -ld .\n" in err  # the references' folder is not there yet
