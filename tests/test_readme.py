"""The README's blocks run, and print what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.warm import Command

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def comparable(text: str) -> str:
    """Measured numbers differ between machines, and with them where a line is broken; everything
    else must not."""
    text = re.sub(r"\n {15,}", " ", text)
    text = re.sub(r"\d(\.\d{1,2})?e[+-]\d\d", "N", text)
    text = re.sub(r"from \d+ benign runs", "from N benign runs", text)  # one a number of cores
    text = re.sub(r"; \d+\.\d\d s", "; S s", text)
    text = re.sub(r"above \d+(\.\d+)?( to \d+(\.\d+)?)? x", "above B x", text)
    text = re.sub(r"(flash-cpu|math)", "KERNEL", text)
    text = re.sub(r"[0-9a-f]{12}", "HASH", text)
    return re.sub(r" +", " ", text).strip()


def printed(block: str, folder: Path, run: Command) -> None:
    """Run the commands of a block in a folder, and compare what they print."""
    expected: dict[str, list[str]] = {}
    command = ""
    for line in block.splitlines():
        if line.startswith("$ "):
            command = line[2:]
            expected[command] = []
        else:
            expected[command].append(line)
    for command, lines in expected.items():
        program, *words = shlex.split(command)
        assert program == "truestep"
        done = run(*words, cwd=folder)
        assert comparable(done.stdout) == comparable("\n".join(lines)), done.stderr


@pytest.mark.slow
def test_the_first_block_prints_what_it_says(tmp_path: Path, command: Command) -> None:
    assert blocks("console")[0].count("\n$ ") == 1
    printed(blocks("console")[0], tmp_path, command)


@pytest.mark.slow
def test_any_pipeline_prints_what_it_says(tmp_path: Path, command: Command) -> None:
    (change,) = (block for block in blocks("python") if block.startswith("# bias.py"))
    (tmp_path / "bias.py").write_text(change)
    first = next(i for i, b in enumerate(blocks("console")) if b.startswith("$ truestep tiny"))
    for block in blocks("console")[first : first + 3]:
        printed(block, tmp_path, command)


@pytest.mark.slow
def test_two_checkpoints_print_what_it_says(tmp_path: Path, command: Command) -> None:
    (made,) = (b for b in blocks("console") if b.startswith("$ truestep tiny FluxPipeline flux"))
    printed("\n".join(made.splitlines()[:3]), tmp_path, command)
    (block,) = (b for b in blocks("console") if "$ truestep weights" in b)
    printed(block, tmp_path, command)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_named_options_and_files_exist() -> None:
    from truestep.cli import check, record

    known = {
        option
        for command in (check.command, record.command)
        for parameter in command.params
        for option in parameter.opts
    }
    for option in set(re.findall(r"truestep (?:check|record)\b.*?(--[a-z-]+)", README)):
        assert option in known
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
