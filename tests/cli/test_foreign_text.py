"""Names, prompts, paths and exceptions that are not ours, through every verb that prints them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.commands import Run, runner
from truestep import assert_equivalent, cli, report
from truestep.judge.compare import compare
from truestep.text import visible

EVIL = "x\x1b]0;t\x07\u202e\x9b2J\nPASSED identical"
SHOWN = visible(EVIL)
FORGED = re.compile(r"^PASSED identical", re.MULTILINE)


def harmless(*texts: str) -> None:
    """Nothing acts, nothing is forged."""
    for text in texts:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e]", text)
        assert not FORGED.search(text)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capfd)


def test_every_print_goes_through_one_function() -> None:
    for package in (cli, report):
        for path in Path(str(package.__file__)).parent.glob("*.py"):
            calls = [
                ast.unparse(node.func)
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Call)
            ]
            assert not {"print", "click.echo", "click.secho", "sys.stdout.write"} & set(calls), path


def test_names_of_tensors(run: Run, tmp_path: Path) -> None:
    save_file({EVIL: torch.zeros(4)}, tmp_path / "a.safetensors")
    save_file({EVIL: torch.ones(4)}, tmp_path / "b.safetensors")
    for arguments in (
        ("show", "a.safetensors"),
        ("show", "a.safetensors", "--json"),
        ("compare", "b.safetensors", "a.safetensors"),
        ("compare", "b.safetensors", "a.safetensors", "--json"),
        ("weights", "b.safetensors", "a.safetensors"),
        ("parity", "keys", "a.safetensors", "b.safetensors"),
    ):
        _, out, err = run(*arguments)
        harmless(out, err)
        assert re.search(r"x\\(x1b|u001b)", out + err), (arguments, out, err)
    result = compare({EVIL: torch.ones(4)}, {EVIL: torch.zeros(4)})
    harmless(str(result), result.table())
    with pytest.raises(AssertionError) as failed:
        assert_equivalent(result)
    harmless(str(failed.value))


def test_paths_and_arguments(run: Run) -> None:
    for arguments in (
        ("show", EVIL),
        ("compare", EVIL, EVIL),
        ("check", EVIL),
        ("record", EVIL, "--prompt", "p"),
        ("check", "--set", EVIL),
        ("check", "a", "--apply", f"{EVIL}:f"),
        ("check", "--depth", EVIL),
        (EVIL,),
        ("ab", "--rounds", EVIL),
        ("trace", EVIL, EVIL),
        ("trace", "recover", EVIL),
        ("perf", "import", EVIL),
        ("gate", "thresholds", "lint", EVIL),
        ("gate", "selftest", "--gate", EVIL),
        ("ab", "ablate", EVIL, "--all"),
        ("record", "--runs", "3", EVIL),
        ("doctor", "--model", EVIL),
        ("parity", "show", EVIL),
        ("demo", EVIL),
    ):
        code, out, err = run(*arguments)
        assert code, arguments
        harmless(out, err)


def test_a_case_and_a_change(run: Run, tmp_path: Path, tiny_wan: dict[str, Path]) -> None:
    model = tiny_wan["wan21"]
    name = json.dumps(EVIL)  # a TOML basic string, but for the escape of \x1b
    case = (
        f'model = "{model}"\nprompt = {name}\nsteps = 2\nheight = 16\nwidth = 16\n'
        'num_frames = 5\nmax_sequence_length = 8\nsettings = {device = "cpu"}\n'
    )
    (tmp_path / "truestep.toml").write_text(f"[case.{name}]\n{case}\n[case.b]\n{case}seed = 1\n")
    (tmp_path / "c.py").write_text(
        f"def raises(pipe):\n    raise ValueError({EVIL!r})\n"
        f"def stage(pipe):\n    def update(*a, **k):\n        raise ValueError({EVIL!r})\n"
        "    pipe.update = update\n"
    )
    for arguments, code in (
        (("check", EVIL), 3),
        (("record", EVIL, "--floor", "none"), 0),
        (("check", "all", "--apply", "c.py:raises"), 2),
        (("check", EVIL, "--apply", "c.py:stage"), 1),
        (("run", EVIL, "--latent-only"), 0),
        (("trace", "record", EVIL, "--apply", "c.py:stage"), 2),
    ):
        got, out, err = run(*arguments)
        assert got == code, (arguments, out, err)
        harmless(out, err)
        assert SHOWN in out + err or "x\\x1b" in out + err, arguments
