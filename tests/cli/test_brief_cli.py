"""`--brief` of verbs, its errors, and `truestep show RESULT ID`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import Run, runner, write_cases


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in a folder with two files of tensors that differ."""
    monkeypatch.chdir(tmp_path)
    x = torch.linspace(1, 2, 64).reshape(8, 8)
    save_file({"a": x, "b": x.clone()}, "x.safetensors")
    save_file({"a": x, "b": 1.1 * x}, "y.safetensors")
    return runner(monkeypatch, capfd)


COMPARE = ("compare", "y.safetensors", "x.safetensors")


def test_stdout_is_one_line_of_json_alone(run: Run) -> None:
    code, out, err = run(*COMPARE, "--brief")
    assert (code, err) == (1, "")
    assert out.count("\n") == 1
    assert json.loads(out)["verdict"] == "drifted"
    assert json.loads(out)["details"].endswith(" --brief --json truestep-result.json")


def test_details_are_where_the_brief_says(run: Run) -> None:
    _, out, _ = run(*COMPARE, "--json", "my result.json", "--brief", "-")
    brief = json.loads(out)
    assert brief["details"] == "truestep show 'my result.json' ID"
    (proof,) = brief["items"][0]["evidence"]
    code, shown, _ = run("show", "my result.json", proof["id"])
    assert code == 0
    assert "name               b\n" in shown
    assert "verdict            drifted\n" in shown
    data = json.loads(run("show", "my result.json", proof["id"], "--json")[1])
    assert data["metrics"]["rel_l2"] == pytest.approx(0.1)
    assert run("show", "my result.json", "--brief")[1] == out


def test_a_brief_in_a_file_leaves_the_words(run: Run, tmp_path: Path) -> None:
    plain = run(*COMPARE)[1]
    code, out, _ = run(*COMPARE, "--brief", "b.json")
    assert code == 1
    assert out.splitlines()[:-1] == plain.splitlines()[:-1]
    assert json.loads((tmp_path / "b.json").read_text())["exit_code"] == 1


@pytest.mark.parametrize("options", [("--brief", "--json"), ("--json", "--brief")])
@pytest.mark.parametrize("verb", [COMPARE, ("perf", "check", "none")])
def test_stdout_is_for_one_of_both(run: Run, options: Any, verb: Any) -> None:
    code, _, err = run(*verb, *options)
    assert code == 2
    assert "--json and --brief cannot both go to stdout" in err


def test_a_brief_that_could_not_be_written_is_refused_first(run: Run) -> None:
    code, out, err = run(*COMPARE, "--brief", "x.safetensors/b.json")
    assert (code, out) == (2, "")
    assert "the file of --brief" in err


def test_an_error_is_told_in_the_envelope_too(run: Run) -> None:
    code, out, err = run("compare", "none.safetensors", "x.safetensors", "--brief")
    assert code == 2
    assert "the file cannot be read" in err
    found = json.loads(out)
    assert (found["verdict"], found["exit_code"]) == ("error", 2)
    assert found["notes"][0]["text"] == "none.safetensors"


def test_what_no_id_is(run: Run) -> None:
    run(*COMPARE, "--json", "r.json")
    code, out, err = run("show", "r.json", "r9")
    assert (code, out) == (2, "")
    assert "no part of the result is called 'r9'" in err
    assert run("show", "x.safetensors", "r1")[0] == 2
    assert run("show", "--brief", "x.safetensors")[0] == 2


@pytest.fixture
def cased(run: Run, tmp_path: Path, tiny_wan: dict[str, Path]) -> Run:
    """The command line where a case is recorded, with changes to try."""
    write_cases(tmp_path, tiny_wan["wan21"], "a", "b")
    (tmp_path / "change.py").write_text(
        "def worse(pipe):\n"
        "    layer = pipe.transformer.blocks[0].ffn\n"
        "    own = layer.forward\n"
        "    def forward(x):\n"
        "        return own(x) * 1.05\n"
        "    layer.forward = forward\n"
        "def ends(pipe):\n"
        "    raise SystemExit(0)\n"
    )
    assert run("record", "a", "--floor", "none")[0] == 0
    return run


def next_of(run: Run, *arguments: str) -> tuple[dict[str, Any], list[str]]:
    """The brief of a command, and the words of the command that it names, by a real shell."""
    brief = json.loads(run(*arguments, "--brief")[1])
    script = f"set -- {brief['next']}\nprintf '%s\\0' \"$@\""
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    verb, *rest = words.stdout.split("\0")[:-1]
    assert verb == "truestep"
    return brief, rest


def test_what_comes_next_can_be_run_and_leads_to_the_line(cased: Run) -> None:
    brief, words = next_of(cased, "check", "a", "--apply", "change.py:worse")
    assert "file" not in brief["items"][0]["place"]
    code, out, _ = cased(*words)
    assert code == 1
    place = json.loads(out)["items"][0]["place"]
    assert (place["file"], place["line"]) == ("change.py", 5)
    assert place["module"] == "blocks.0.ffn"


def test_of_what_is_missing_the_next_command_makes_it(cased: Run) -> None:
    brief, words = next_of(cased, "check", "b")
    assert (brief["verdict"], brief["exit_code"]) == ("missing", 3)
    assert "to be trusted" in brief["decide"]
    assert words == ["record", "b"]
    assert cased(*words, "--floor", "none")[0] == 0
    assert cased("check", "b")[0] == 0


def test_a_candidate_that_ends_the_process_is_told_in_brief(cased: Run) -> None:
    code, out, _ = cased("check", "a", "--apply", "change.py:ends", "--brief")
    assert code == 1
    assert json.loads(out)["verdict"] == "invalid"
