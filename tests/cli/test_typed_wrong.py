"""What is typed wrongly is answered with what is right."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import Captured, Run, runner
from truestep.case import setting_names
from truestep.cli.words import spell_out
from truestep.environment import command_line


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.py").write_text(
        "import math\n\ndef one():\n    pass\n\nclass Step:\n    pass\n\nMANY = 3\n"
    )
    return runner(monkeypatch, capsys)


def test_a_setting_is_answered_with_the_nearest_and_where_all_are(run: Run) -> None:
    words = ("ab", "builtin:digits", "--prompt", "a red three", "--set", "guidence=3")
    code, _, err = run(*words)
    assert code == 2
    assert "the nearest are guidance_scale, " in err
    assert "stg_blocks" not in err
    assert err.splitlines()[-1] == "hint: truestep show settings  # lists all of them"
    code, out, _ = run("show", "settings")
    assert code == 0
    assert set(setting_names()) <= set(out.replace(",", " ").split())
    assert run("show", "settings", "--json")[0] == 0
    Path("settings").mkdir()
    assert "settings of a case" not in run("show", "settings")[1]  # a folder of that name is shown


def test_a_folder_that_is_not_there_is_said_before_its_settings(run: Run) -> None:
    for model in ("fluxx", "./fluxx"):
        words = ("record", model, "--prompt", "a cat", "--set", "num_inference_steps=3")
        code, _, err = run(*words)
        assert code == 2
        assert "the model folder does not exist" in err
        assert "num_inference_steps" not in err


def test_a_file_without_a_function_is_answered_with_those_that_it_has(run: Run) -> None:
    code, _, err = run("training", "record", "steps.py")
    assert code == 2
    assert "the training step needs FILE.py:FUNCTION, got 'steps.py'" in err
    assert "measured steps.py has one, Step" in err
    code, _, err = run("training", "record", "steps.py:nope")
    assert (code, "no function 'nope'" in err) == (2, True)
    assert "measured steps.py has one, Step" in err
    code, _, err = run("training", "record", "none.py")
    assert (code, " has " in err) == (2, False)
    code, _, err = run("trace", "replay", "trace", "steps.py")
    assert (code, "the port needs FILE.py:FUNCTION" in err) == (2, True)


def test_help_of_replay_says_what_each_option_is(run: Run) -> None:
    code, out, _ = run("trace", "replay", "--help")
    said = " ".join(out.split())
    assert code == 0
    assert "What modules of the port are called in the trace" in said
    assert "Steps of the trace to replay" in said


def test_gate_names_the_verb_that_judges_a_function(run: Run) -> None:
    code, _, err = run("gate", "cat", "dog", "--apply", "steps.py:one")
    assert code == 2
    assert "gate judges the working tree against --baseline, and takes no --apply" in err
    assert err.splitlines()[-1] == "hint: truestep check --apply steps.py:one"
    code, _, err = run("gate", "cat", "--apply", "steps.py:one", "--baseline", "HEAD")
    assert err.splitlines()[-1] == "hint: truestep check cat --apply steps.py:one"
    assert "--apply" not in run("gate", "against", "--help")[1]


@pytest.mark.parametrize(
    ("words", "hint", "said"),
    [
        (
            "bisect --good HEAD --bad=v1 --probes 9 -- run --good x",
            "--good v1 --bad HEAD",
            "truestep bisect --probes 9 --good v1 --bad HEAD -- run --good x",
        ),
        ("ab a --rounds 3", "--rounds 4", "truestep ab a --rounds 4"),
        ("ab a --set steps=1", "--set steps=2", "truestep ab a --set steps=1 --set steps=2"),
        ("ab a", "--rounds 4  # it's more", "truestep ab a --rounds 4  # it's more"),
        ("perf record CASE-A", "truestep perf record CASE-A", "truestep perf record CASE-A"),
        (
            "perf check a --history h --runs 1",
            "truestep perf record CASE",
            "truestep perf record a --history h",
        ),
    ],
)
def test_a_hint_takes_the_place_of_what_was_given(
    words: str, hint: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["truestep", *shlex.split(words)])
    assert command_line() == f"truestep {words}"
    assert spell_out(hint) == said


def test_runs_of_engines_that_part_say_what_judges_them(run: Run) -> None:
    for name, value in (("x", 1.0), ("y", 2.0)):
        latent = torch.full((1, 4, 8, 8), value)
        tensors = {"latent/initial": latent, "latent/final": latent.clone()}
        save_file(tensors, f"{name}.safetensors")
    code, out, _ = run("engine", "compare", "x.safetensors", "y.safetensors")
    assert code == 1, out
    assert "judge it by the trusted model: truestep engine check x.safetensors --model" in out
    code, out, _ = run("engine", "compare", "x.safetensors", "x.safetensors")
    assert (code, "hint: " in out) == (0, False)


def test_a_scaffold_says_how_its_test_finds_the_official_repository(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACME_OFFICIAL_REF_DIR", raising=False)
    Path("official").mkdir()
    words = ("--kind", "generic", "--official-dir", "official")
    code, out, _ = run("parity", "new", "acme", "mixer", *words)
    assert code == 0
    assert out.splitlines()[-1] == (
        "next: ACME_OFFICIAL_REF_DIR=official truestep parity run test_parity_acme_mixer.py"
    )
    monkeypatch.setenv("ACME_OFFICIAL_REF_DIR", "official")
    out = run("parity", "new", "acme", "other", *words)[1]
    assert out.splitlines()[-1] == "next: truestep parity run test_parity_acme_other.py"
