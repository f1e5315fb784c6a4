"""A command in a warm process is the command in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import Command


@pytest.mark.parametrize(
    "arguments", [("--version",), ("check", "nothing"), ("chek",), ("doctor", "--recipe")]
)
def test_it_ends_and_prints_as_the_other_does(
    arguments: tuple[str, ...], command: Command, tmp_path: Path
) -> None:
    plain = subprocess.run(
        [sys.executable, "-m", "truestep", *arguments],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    done = command(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (
        plain.returncode, plain.stdout, plain.stderr,
    )  # fmt: skip
    assert done.stdout + done.stderr


CASE = ("record", "builtin:digits", "--prompt", "a", "--apply", "change.py:f")


def test_it_has_the_environment_of_now(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "change.py").write_text("import os\nprint(os.environ['MARK'], os.getcwd())\n")
    for mark in ("one", "two"):
        monkeypatch.setenv("MARK", mark)
        done = command(*CASE, cwd=tmp_path)
        assert f"{mark} {tmp_path}" in done.stdout
        assert done.returncode == 2


@pytest.mark.parametrize(
    ("end", "said"),
    [("kill(os.getpid(), 9)", "SIGKILL ended the process"), ("_exit(0)", "exit status 0")],
)
def test_its_guard_is_there(end: str, said: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "change.py").write_text(f"import os\nos.{end}\n")
    done = command(*CASE, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
