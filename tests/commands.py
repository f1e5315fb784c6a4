"""Run the command line in this process, on small case files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from truestep.cli import run_here

Run = Callable[..., tuple[int, str, str]]
"""Arguments to exit code, stdout and stderr."""

Captured = pytest.CaptureFixture[str]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    words = [sys.executable, "-m", "truestep", *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


CASE = """
[case.{name}]
model = "{model}"
prompt = "a red three moving left"
seed = {seed}
steps = 2
height = 16
width = 16
num_frames = 5
max_sequence_length = 8
settings = {{ device = "cpu" }}
"""


def write_cases(folder: Path, model: Path, *names: str) -> None:
    """Write a case file of equal cases, with seeds 0, 1, ..."""
    cases = [CASE.format(name=name, model=model, seed=seed) for seed, name in enumerate(names)]
    (folder / "truestep.toml").write_text("".join(cases))


def runner(patch: pytest.MonkeyPatch, captured: Captured, *verb: str) -> Run:
    """A function that runs a verb, or any where none is given."""

    def run(*arguments: str) -> tuple[int, str, str]:
        patch.setattr(sys, "argv", ["truestep", *verb, *arguments])
        patch.delenv("COLUMNS", raising=False)  # as in a pipe: a command is one line
        code = run_here()
        out, err = captured.readouterr()
        return code, out, err

    return run


def flat(text: str) -> str:
    """What was printed, without where its lines were broken."""
    return " ".join(text.split())
