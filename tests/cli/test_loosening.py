"""Whoever makes a check easier is seen: attempts at the files, the references and the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Run, runner, write_cases
from tests.judge.test_rule_changes import commit, git
from truestep.recording.lock import LOCK_FILE

KNOWN = '[known.a]\nreason = "issue 41"\nsince = 2024-10-01\nstage = "text"\nrel_l2 = {size}\n'

Attempt = Callable[[Path, Run], tuple[str, ...]]
"""Changes a project, and gives the options of the check that would pass for it."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_wan: dict[str, Path]) -> Path:
    """A repository with two cases, known failures and limits."""
    for name in [n for n in os.environ if n.startswith(("GITHUB_", "CI", "GIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    write_cases(tmp_path, tiny_wan["wan21"], "a", "b")
    (tmp_path / "known.toml").write_text(KNOWN.format(size=1e-3))
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capfd)


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text("utf-8")
    assert before in text, (before, text)
    path.write_text(text.replace(before, after, 1), "utf-8")


def known_widened(project: Path, run: Run) -> tuple[str, ...]:
    edit(project / "known.toml", "0.001", "0.9")
    return ("--known", "known.toml")


def known_of_another_stage(project: Path, run: Run) -> tuple[str, ...]:
    edit(project / "known.toml", '"text"', '"prediction"')
    return ("--known", "known.toml")


def known_elsewhere(project: Path, run: Run) -> tuple[str, ...]:
    (project / "mine.toml").write_text(KNOWN.format(size=0.9))
    return ("--known", "mine.toml")


def case_shortened(project: Path, run: Run) -> tuple[str, ...]:
    edit(project / "truestep.toml", "steps = 2", "steps = 1")
    assert run("record", "a", "--floor", "none")[0] == 0
    return ()


def case_gone(project: Path, run: Run) -> tuple[str, ...]:
    text = (project / "truestep.toml").read_text()
    (project / "truestep.toml").write_text(text.partition("[case.b]")[0])
    return ()


def recorded_again_on_the_candidate(project: Path, run: Run) -> tuple[str, ...]:
    assert (
        run("record", "a", "--floor", "none", "--set", "guidance_scale=9", "--output", "x")[0] == 0
    )
    for reference in (project / "truestep-references").rglob("*-a-*.safetensors"):
        reference.write_bytes((project / "x").read_bytes())
    return ()


def recorded_again(project: Path, run: Run) -> tuple[str, ...]:
    assert run("record", "a", "--floor", "steps", "--update")[0] == 0
    return ()


def lock_gone(project: Path, run: Run) -> tuple[str, ...]:
    (project / "truestep-references" / LOCK_FILE).unlink()
    return ()


def entry_of_the_lock_gone(project: Path, run: Run) -> tuple[str, ...]:
    path = project / "truestep-references" / LOCK_FILE
    read = json.loads(path.read_text())
    read["references"].pop(next(iter(read["references"])))
    path.write_text(json.dumps(read))
    return ()


def committed_on_a_branch(project: Path, run: Run) -> tuple[str, ...]:
    git(project, "update-ref", "refs/remotes/origin/main", "HEAD")
    git(project, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main")
    known_widened(project, run)
    commit(project)
    return ("--known", "known.toml")


def floor_from_more_runs(project: Path, run: Run) -> tuple[str, ...]:
    assert run("record", "a", "--runs", "2")[0] == 0
    return ()


ATTEMPTS: tuple[Attempt, ...] = (
    known_widened,
    known_of_another_stage,
    known_elsewhere,
    case_shortened,
    case_gone,
    recorded_again_on_the_candidate,
    recorded_again,
    lock_gone,
    entry_of_the_lock_gone,
    committed_on_a_branch,
    floor_from_more_runs,
)


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda f: f.__name__)
def test_an_attempt_is_told_and_refused_where_it_is_locked(
    attempt: Attempt, project: Path, run: Run
) -> None:
    assert (
        run("record", "a", "--floor", "none" if attempt is not floor_from_more_runs else "steps")[0]
        == 0
    )
    commit(project)
    code, out, err = run("check", "a", "--locked", "--brief")
    assert (code, json.loads(out).get("notes", [])) == (0, []), err
    options = attempt(project, run)
    code, out, err = run("check", "a", *options, "--brief")
    brief = json.loads(out)
    told = any(note["text"].startswith("changed: ") for note in brief.get("notes", ()))
    assert told or code != 0, out
    locked, _, err = run("check", "a", *options, "--locked")
    assert locked == 2, err


def test_a_reference_that_the_lock_does_not_know_is_told_where_it_is_judged_by_all_the_same(
    project: Path, run: Run
) -> None:
    assert run("record", "a", "--floor", "none")[0] == 0
    commit(project)
    (path,) = (project / "truestep-references").rglob("*.safetensors")
    plain = run("check", "--reference", str(path), "--brief")[1]
    assert "notes" not in json.loads(plain)
    recorded_again_on_the_candidate(project, run)
    (note,) = json.loads(run("check", "--reference", str(path), "--brief")[1])["notes"]
    assert note["text"].startswith("changed: reference default/cpu/")
    assert " in the lock file), in " in note["text"]
    assert run("check", "--reference", str(path), "--locked")[0] == 2
    command = json.loads(run("check", "a", "--brief")[1])["next"]
    assert command == "truestep references status"
    assert "CHANGED here" in " ".join(run(*command.split()[1:])[1].split())
