"""Nothing loosens unseen: what decides is compared with the commit that the work began at."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Run, runner, write_cases
from truestep.cli.rules import Rules
from truestep.errors import UsageError
from truestep.judge.rule_changes import promoted, rule_changes
from truestep.records import RuleKind

ENTRY = '[known.{name}]\nreason = "issue 41"\nsince = 2024-10-01\nstage = "text"\nrel_l2 = {size}\n'
TEST = """
import pytest
def helper(): ...
@pytest.mark.parity(scope="step")
def test_a(truestep):
    truestep.check(1, tolerance=1e-3)
class TestB:
    def test_c(self, truestep):
        truestep.check(2)
"""

Change = Callable[[str], str]


def git(folder: Path, *words: str) -> str:
    """Run git there."""
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    command = ["git", *who, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


FILES: dict[str, tuple[RuleKind, str]] = {
    "known.toml": ("known failure", ENTRY.format(name="a", size=1e-3)),
    "limits.json": ("threshold", '{"cases": {"a": {"ssim_threshold": 0.95}}}'),
    "truestep.lock": ("reference", '{"lock_version": 1, "references": {"a": {"sha256": "1234"}}}'),
    "cases.toml": ("case", '[case.a]\nmodel = "x"\nsteps = 20\n[case.b]\nmodel = "x"\n'),
    "test_port.py": ("test", TEST),
}


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose one commit has each kind of file."""
    for name in [n for n in os.environ if n.startswith(("GITHUB_", "CI_", "GIT_"))]:
        monkeypatch.delenv(name)
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    for name, (_, text) in FILES.items():
        (tmp_path / name).write_text(text)
    commit(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commit(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "m")
    return git(folder, "rev-parse", "HEAD")


def told(repo: Path, since: str = "", **environment: str) -> list[str]:
    """What was changed in a repository, in short."""
    state = promoted(repo, since=since, environment=environment)
    assert state is not None
    files = [(kind, repo / name) for name, (kind, _) in FILES.items()]
    found = rule_changes(files, state)
    return [f"{c.kind} {c.key}: {c.actual} (was {c.reference})" for c in found]


def edit(repo: Path, name: str, before: str, after: str) -> None:
    text = (repo / name).read_text()
    assert before in text
    (repo / name).write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("name", "before", "after", "said"),
    [
        ("known.toml", "0.001", "0.5", "known failure known.a: reason issue 41, since 2024-10-01, "
         "stage text, rel_l2 0.5 (was reason issue 41, since 2024-10-01, stage text, "
         "rel_l2 0.001)"),
        ("limits.json", "0.95", "0.5", "threshold cases.a.ssim_threshold: 0.5 (was 0.95)"),
        ("limits.json", '"ssim_threshold": 0.95', "",
         "threshold cases.a.ssim_threshold: (not there) (was 0.95)"),
        ("truestep.lock", "1234", "5678", "reference a: 5678 (was 1234)"),
        ("cases.toml", "steps = 20", "steps = 1", "case case.a: steps: 1 (was 20)"),
        ("cases.toml", '[case.b]\nmodel = "x"', '[case.b]\nmodel = "x"\nsteps = 1',
         "case case.b: steps: 1 (was (not there))"),
        ("test_port.py", "tolerance=1e-3", "tolerance=1e-1",
         "test test_a: judged by: pytest.mark.parity(scope='step'); scope='step'; tolerance=0.1 "
         "(was pytest.mark.parity(scope='step'); scope='step'; tolerance=0.001)"),
        ("test_port.py", '@pytest.mark.parity(scope="step")', "@pytest.mark.skip",
         "test test_a: judged by: pytest.mark.skip; tolerance=0.001 "
         "(was pytest.mark.parity(scope='step'); scope='step'; tolerance=0.001)"),
        ("test_port.py", "class TestB:", "@pytest.mark.xfail\nclass TestB:",
         "test TestB: judged by: pytest.mark.xfail (was (not there))"),
        ("test_port.py", "import pytest", "import pytest\npytestmark = [pytest.mark.skip]",
         "test (module): judged by: [pytest.mark.skip] (was (not there))"),
        ("test_port.py", "check(2)", "check(2); import pytest; pytest.skip('x')",
         "test TestB::test_c: judged by: pytest.skip('x') (was (not there))"),
    ],
)  # fmt: skip
def test_what_loosens_is_told(repo: Path, name: str, before: str, after: str, said: str) -> None:
    edit(repo, name, before, after)
    assert said in told(repo)


def test_a_new_known_failure_is_told_in_a_new_file_too(repo: Path) -> None:
    (repo / "known.toml").write_text(FILES["known.toml"][1] + ENTRY.format(name="b", size=0.1))
    assert [t for t in told(repo) if "known.b: reason issue 41" in t]
    git(repo, "rm", "--quiet", "--cached", "known.toml")
    git(repo, "commit", "--quiet", "--message", "m")
    assert len(told(repo)) == 2


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("known.toml", FILES["known.toml"][1], "[known]\n"),
        ("truestep.lock", '"a": {', '"b": {"sha256": "9"}, "a": {'),
        ("cases.toml", "[case.b]", '[case.c]\nmodel = "y"\n[case.b]'),
        ("cases.toml", "steps = 20", "steps = 20  # words"),
        ("test_port.py", "class TestB:", "@pytest.mark.skip\ndef test_new(): ...\nclass TestB:"),
        ("test_port.py", "truestep.check(2)", "truestep.check(3)"),
        ("test_port.py", "def helper(): ...\n", ""),
    ],
)
def test_what_tightens_comes_or_changes_nothing_is_not(
    repo: Path, name: str, before: str, after: str
) -> None:
    edit(repo, name, before, after)
    assert told(repo) == []


def test_what_goes_is_told(repo: Path) -> None:
    edit(repo, "cases.toml", '[case.b]\nmodel = "x"\n', "")
    edit(repo, "test_port.py", "class TestB:\n    def test_c", "class TestB:\n    def other")
    found = told(repo)
    assert "case case.b: (not there) (was there)" in found
    assert "test TestB::test_c: (not there) (was there)" in found
    for name in FILES:
        (repo / name).unlink()
    kinds = {text.partition(":")[0].split()[0] for text in told(repo)}
    assert kinds == {"threshold", "reference", "case", "test"}


def test_a_file_that_cannot_be_read_is_told(repo: Path) -> None:
    (repo / "limits.json").write_text("{")
    assert "threshold : cannot be read (was (not there))" in told(repo)


def test_what_was_committed_on_a_branch_is_told(repo: Path) -> None:
    """Compared is where the branch began, also where the other side has moved on since."""
    main = git(repo, "rev-parse", "HEAD")
    git(repo, "update-ref", "refs/remotes/origin/main", main)
    git(repo, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/main")
    git(repo, "switch", "--quiet", "--create", "faster")
    edit(repo, "limits.json", "0.95", "0.5")
    commit(repo)
    assert told(repo) == ["threshold cases.a.ssim_threshold: 0.5 (was 0.95)"]
    assert told(repo, GITHUB_BASE_REF="main") == told(repo)
    assert told(repo, CI_MERGE_REQUEST_DIFF_BASE_SHA=main) == told(repo)
    assert told(repo, since="HEAD") == []
    git(repo, "switch", "--quiet", "main")
    edit(repo, "limits.json", "0.95", "0.99")
    git(repo, "update-ref", "refs/remotes/origin/main", commit(repo))
    git(repo, "switch", "--quiet", "faster")
    assert told(repo) == ["threshold cases.a.ssim_threshold: 0.5 (was 0.95)"]


def test_without_a_commit_to_compare_with_nothing_is_said(
    repo: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert promoted(repo, environment={"GITHUB_BASE_REF": "gone"}) is None
    assert promoted(repo, since="--help", environment={}) is None
    outside = tmp_path_factory.mktemp("outside")
    assert promoted(outside, environment={}) is None
    monkeypatch.setenv("PATH", str(outside))
    assert promoted(repo, environment={}) is None
    monkeypatch.chdir(outside)
    assert Rules.compared([], locked=None) == Rules()
    with pytest.raises(UsageError, match="there is no promoted state to compare with"):
        Rules.compared([], locked="")


def test_locked_refuses_with_the_difference_and_a_command_that_shows_it(repo: Path) -> None:
    files = [(kind, Path(name)) for name, (kind, _) in FILES.items()]
    assert Rules.compared(files, locked="").changes == ()
    edit(repo, "limits.json", "0.95", "0.5")
    with pytest.raises(UsageError) as caught:
        Rules.compared(files, locked="")
    assert "1 thing that decides here was changed since" in caught.value.what
    assert "cases.a.ssim_threshold: 0.5 (was 0.95), in limits.json" in str(caught.value)
    words = caught.value.hint.split()
    assert words[0] == "git"
    assert "0.95" in git(repo, *words[1:])


def test_a_check_tells_and_locked_refuses_before_any_forward(
    repo: Path,
    tiny_wan: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run: Run = runner(monkeypatch, capfd)
    write_cases(repo, tiny_wan["wan21"], "a")
    assert run("record", "a", "--floor", "none")[0] == 0
    base = commit(repo)
    code, out, _ = run("check", "a", "--locked", "--json")
    plain = json.loads(out)["comparisons"][0]
    assert (code, plain["rule_changes"], plain["rules_since"]) == (0, [], base)
    edited = (repo / "truestep.toml").read_text()  # a case that comes loosens nothing
    (repo / "truestep.toml").write_text(edited + '\n[case.z]\nmodel = "x"\nprompt = "y"\n')
    (repo / "mine.toml").write_text(ENTRY.format(name="a", size=1e-3))
    code, out, _ = run("check", "a", "--known", "mine.toml", "--brief")
    brief = json.loads(out)
    assert brief["notes"][0]["id"] == "c0.l0"
    assert brief["notes"][0]["text"].startswith("changed: known failure known.a: reason issue 41")
    assert "  changed      known failure known.a" in run("check", "a", "--known", "mine.toml")[1]
    with monkeypatch.context() as patch:
        patch.setattr("truestep.engines.subjects.check", None)  # nothing is run
        code, _, err = run("check", "a", "--known", "mine.toml", "--locked")
    assert code == 2
    assert "--locked: 1 thing that decides here was changed" in err
    assert run("check", "a", "--known", "mine.toml", "--locked", "nothing")[0] == 2
