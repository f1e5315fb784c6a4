"""`truestep skill`: short, and every command in it is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from tests.commands import Run, runner
from truestep.cli.app import FURTHER, VERBS, app
from truestep.cli.skill import skill


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `truestep skill`."""
    monkeypatch.chdir(tmp_path)
    return runner(monkeypatch, capfd, "skill")


def commands() -> list[str]:
    """Every command of the skill: lines of blocks, and what is set as code."""
    text = skill()
    lines = re.findall(r"^(truestep .*)$", text, re.MULTILINE)
    return lines + re.findall(r"`(truestep [^`]+)`", text)


def test_it_is_written_once(run: Run, tmp_path: Path) -> None:
    assert run("--write", "my skills/truestep")[:2] == (0, "skill: my skills/truestep/SKILL.md\n")
    text = (tmp_path / "my skills" / "truestep" / "SKILL.md").read_text("utf-8")
    assert text == skill()
    code, _, err = run("--write", "my skills/truestep")
    assert code == 2
    assert "hint: truestep skill --write 'my skills/truestep' --force" in err
    assert run("--write", "my skills/truestep", "--force")[0] == 0
    assert run("--write", "-")[1] == text


def test_it_is_short_and_says_what_it_is_for() -> None:
    lines = skill().splitlines()
    assert len(lines) <= 150
    assert lines[0] == "---"
    assert lines[1] == "name: truestep"
    assert lines[2].startswith("description: ")
    assert len(lines[2]) < 1024


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 20


@pytest.mark.parametrize("text", sorted(set(commands())))
def test_every_command_of_it_is_one(text: str) -> None:
    words = shlex.split(text, comments=True)[1:]
    if words[0] == "VERB":
        return
    assert words[0] in {**VERBS, **FURTHER}
    group: click.Command = app
    context = click.Context(app)
    while isinstance(group, click.Group):
        _, inner, words = group.resolve_command(context, words)  # a group may have a default
        assert inner is not None, text
        group = inner
    group.make_parser(context).parse_args(list(words))  # an option that there is not raises
    flags = {word for word in words if word.startswith("--") and word != "--"}
    known = {name for p in group.params for name in (*p.opts, *p.secondary_opts)}
    assert flags <= known | {"--help"}, text
