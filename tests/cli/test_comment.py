"""`truestep comment`, and the scripts of the two actions, against a GitHub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import Run, runner
from tests.report import results_to_show as results
from tests.report.fake_github import GitHub, served
from truestep.verdict import Results

ROOT = Path(__file__).parents[2]
EVENTS = ROOT / "tests" / "report" / "events"
SHA = "a" * 40


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in a folder with results, in no workflow."""
    for name in [n for n in os.environ if n.startswith(("GITHUB_", "CI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text(results.everything().model_dump_json())
    return runner(monkeypatch, capfd, "comment")


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHub]:
    """GitHub on loopback, with a `gh` that speaks to it on PATH."""
    found = GitHub(heads={7: SHA})
    with served(found, tmp_path / "bin") as folder:
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        yield found


def in_workflow(monkeypatch: pytest.MonkeyPatch, name: str, file: str = "") -> None:
    monkeypatch.setenv("GITHUB_EVENT_NAME", name)
    monkeypatch.setenv("GITHUB_EVENT_PATH", str(EVENTS / f"{file or name}.json"))
    monkeypatch.setenv("GITHUB_REPOSITORY", "acme/video")


def test_every_form_is_written_and_the_verdict_is_not_its_exit_code(
    run: Run, tmp_path: Path
) -> None:
    golden = ROOT / "tests" / "report" / "golden"
    link = ("--link", "https://github.com/acme/video/actions/runs/99")
    names = {
        "summary": "summary.md",
        "annotations": "annotations.txt",
        "sarif": "results.sarif",
        "gitlab": "code-quality.json",
        "junit": "junit.xml",
    }
    for form, name in names.items():
        code, out, err = run("r.json", "--format", form, *link)
        assert (code, err) == (0, "")
        assert out == (golden / name).read_text("utf-8")
        assert run("r.json", "--format", form, *link, "--output", "o")[:2] == (0, "")
        assert (tmp_path / "o").read_text("utf-8") == out


def test_lines_are_below_the_root_of_the_repository(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path.parent))
    out = run("r.json", "--format", "annotations")[1]
    assert f"file={tmp_path.name}/src/change.py,line=6" in out
    monkeypatch.setenv("GITHUB_WORKSPACE", "/elsewhere")
    assert "file=src/change.py,line=6" in run("r.json", "--format", "annotations")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--link", "javascript:alert(1)"), "--link needs an address"),
        (("--link", "https://a/b) [x](c"), "--link needs an address"),
        (("--post", "--output", "x"), "--post writes a comment"),
        (("--post", "--format", "sarif"), "--post writes a comment"),
        (("--post",), "this is no workflow of GitHub Actions"),
    ],
)
def test_what_cannot_be_is_refused(run: Run, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run("r.json", *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_one_comment_created_once_then_updated(
    run: Run, github: GitHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_workflow(monkeypatch, "workflow_run")
    assert run("r.json", "--post")[:2] == (
        0, "created: https://github.com/acme/video/pull/7#issuecomment-0\n"
    )  # fmt: skip
    first = github.comments[7][0]["body"]
    assert f"the run of <code>{SHA}</code> says of itself" in first
    assert run("r.json", "--post")[1].startswith("unchanged: ")
    (tmp_path / "r.json").write_text(Results.of([results.passed()]).model_dump_json())
    assert run("r.json", "--post")[1].startswith("updated: ")
    (comment,) = github.comments[7]
    assert "truestep: ✓ equivalent" in comment["body"]
    assert run("r.json", "--post", "--key", "gpu")[1].startswith("created: ")
    assert len(github.comments[7]) == 2


def test_in_the_repository_itself_nobody_else_claims_it(
    run: Run, github: GitHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_workflow(monkeypatch, "pull_request")
    assert run("r.json", "--post")[0] == 0
    assert "says of itself" not in github.comments[7][0]["body"]


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("pull_request", "pull_request_fork", "no comment: the pull request comes from a fork"),
        ("push", "", "no comment: the workflow runs for push"),
        ("workflow_run", "workflow_run_push", "no comment: the run was for push"),
    ],
)
def test_without_a_pull_request_to_write_to_it_says_so(
    run: Run, github: GitHub, monkeypatch: pytest.MonkeyPatch, name: str, file: str, said: str
) -> None:
    in_workflow(monkeypatch, name, file)
    code, out, _ = run("r.json", "--post")
    assert code == 0
    assert out.startswith(said)
    assert github.asked == []


def test_a_pull_request_that_has_moved_on_keeps_its_comment(
    run: Run, github: GitHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_workflow(monkeypatch, "workflow_run")
    github.heads = {7: "c" * 40}
    assert "no open pull request has the commit" in run("r.json", "--post")[1]
    assert github.comments == {}


def test_what_github_refuses_is_told(
    run: Run, github: GitHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_workflow(monkeypatch, "pull_request")
    github.refuse = ("POST",)
    code, _, err = run("r.json", "--post")
    assert code == 2
    assert "GitHub refused POST graphql" in err
    assert "HTTP 403" in err
    assert "permissions: pull-requests: write" in err


def test_results_that_were_tampered_with_write_no_comment(
    run: Run, github: GitHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_workflow(monkeypatch, "workflow_run")
    data = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**data, "verdict": "identical", "exit_code": 0}))
    code, _, err = run("r.json", "--post")
    assert code == 2
    assert "the file of results contradicts itself" in err
    assert github.asked == []


def steps_of(file: str) -> dict[str, dict[str, Any]]:
    """Steps of an action that run a script, by name."""
    action = yaml.safe_load((ROOT / file).read_text("utf-8"))
    return {step["name"]: step for step in action["runs"]["steps"] if "run" in step}


@pytest.mark.parametrize("file", ["action.yml", "comment/action.yml"])
def test_no_script_of_an_action_has_an_expression_in_it(file: str) -> None:
    """What an expression gives would be code of the script: names of branches, titles."""
    for name, step in steps_of(file).items():
        assert "${{" not in step["run"], name
        assert step["shell"] == "bash"


class Runner:
    """A runner of GitHub's as far as the scripts need it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "temp").mkdir()
        (folder / "bin").mkdir(exist_ok=True)
        truestep = folder / "bin" / "truestep"
        truestep.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m truestep "$@"\n')
        truestep.chmod(0o755)
        python = folder / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")},
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "RUNNER_TEMP": str(folder / "temp"),
            "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_STEP_SUMMARY": str(folder / "summary"),
            "GITHUB_WORKSPACE": str(folder),
            "GITHUB_ACTION_PATH": str(ROOT),
        }

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A step, as `shell: bash` runs it."""
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        environment = {**self.environment, **variables}
        return subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    @property
    def outputs(self) -> dict[str, str]:
        """What steps gave."""
        lines = (self.folder / "output").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def machine(tmp_path: Path) -> Runner:
    """A runner with two files of tensors that differ."""
    import torch
    from safetensors.torch import save_file

    x = torch.linspace(1, 2, 64).reshape(8, 8)
    save_file({"a": x, "::error::b": x.clone()}, tmp_path / "x.safetensors")
    save_file({"a": x, "::error::b": 1.1 * x}, tmp_path / "my file.safetensors")
    return Runner(tmp_path)


def test_the_action_runs_tells_and_keeps_the_exit_code(machine: Runner) -> None:
    steps = steps_of("action.yml")
    done = machine.run(steps["run"]["run"], WORDS="compare 'my file.safetensors' x.safetensors")
    assert done.returncode == 0, done.stderr
    outputs = machine.outputs
    assert outputs["exit-code"] == "1"
    names = {path.name for path in Path(outputs["folder"]).iterdir()}
    assert names == {"results.json", "report.html", "results.sarif", "junit.xml"}
    lines = done.stdout.splitlines()
    token = lines[0].removeprefix("::stop-commands::")
    assert len(token) == 32
    assert f"::{token}::" in lines[1:]
    told = machine.run(
        steps["tell"]["run"], OUT=outputs["folder"], CODE="1", LINK="https://github.com/a/b/runs/1"
    )
    assert told.returncode == 1, told.stderr
    assert told.stdout.count("\n") == 1
    assert told.stdout.startswith("::error file=truestep.toml,line=1,title=truestep%3A drifted ")
    assert "truestep: ✕ drifted" in (machine.folder / "summary").read_text("utf-8")


def test_words_of_the_action_are_words_and_no_script(machine: Runner) -> None:
    step = steps_of("action.yml")["run"]["run"]
    done = machine.run(step, WORDS="compare $(touch gone) x.safetensors; touch gone `touch gone`")
    assert done.returncode == 0
    assert machine.outputs["exit-code"] == "2"
    assert not (machine.folder / "gone").exists()
    tell = steps_of("action.yml")["tell"]["run"]
    told = machine.run(tell, OUT=machine.outputs["folder"], CODE="2", LINK="")
    assert told.returncode == 2
    assert "ended with 2 and gave no result" in (machine.folder / "summary").read_text("utf-8")


def test_the_action_of_the_comment_writes_one(machine: Runner, github: GitHub) -> None:
    steps = steps_of("comment/action.yml")
    event = {
        "GITHUB_EVENT_NAME": "workflow_run",
        "GITHUB_EVENT_PATH": str(EVENTS / "workflow_run.json"),
        "GITHUB_REPOSITORY": "acme/video",
    }
    found = machine.folder / "results.json"
    found.write_text(results.everything().model_dump_json())
    given = {**event, "NAME": "truestep", "RESULTS": str(found)}
    given["LINK"] = "https://github.com/acme/video/actions/runs/99"
    assert machine.run(steps["guard"]["run"], **event).returncode == 0
    for said in ("created", "unchanged"):
        done = machine.run(steps["post"]["run"], **given)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(said)
    assert len(github.comments[7]) == 1
    (machine.folder / "link.json").symlink_to("/etc/passwd")
    link = machine.run(
        steps["post"]["run"], **{**given, "RESULTS": str(machine.folder / "link.json")}
    )
    assert link.stdout == "the run gave no result\n"


def test_the_action_of_the_comment_belongs_to_workflow_run(machine: Runner) -> None:
    guard = steps_of("comment/action.yml")["guard"]["run"]
    for name in ("pull_request", "pull_request_target", "push"):
        assert machine.run(guard, GITHUB_EVENT_NAME=name).returncode == 1
