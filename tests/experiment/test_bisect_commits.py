"""Commits of real repositories, probed by real processes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from truestep.errors import UsageError
from truestep.experiment.bisecting.bisect import Options, bisect_commits
from truestep.experiment.bisecting.commits import line_of
from truestep.experiment.bisecting.records import Bisection
from truestep.experiment.bisecting.running import Asked
from truestep.experiment.bisecting.store import Store

CHECK = """
import os, pathlib, sys
import {name} as value
{more}
sys.exit(value.X)
"""

GIT = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main")


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *GIT, *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit(folder: Path, text: str, message: str, file: str = "value.py") -> str:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return git(folder, "rev-parse", "HEAD")


def repository(
    folder: Path,
    values: Sequence[int | str],
    *,
    more: str = "",
    name: str = "value",
    file: str = "value.py",
) -> list[str]:
    """A history: at each commit value.X is the exit code, or the text is the module."""
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "check.py").write_text(CHECK.format(more=more, name=name))
    return [
        commit(folder, f"X = {v}\nN = {n}\n" if isinstance(v, int) else v, f"number {n}", file)
        for n, v in enumerate(values)
    ]


Bisect = Callable[..., Bisection]


@pytest.fixture
def bisect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bisect:
    """Bisect between two commits of `repo`, in it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def run(good: str, bad: str, *words: str, **options: object) -> Bisection:
        command = words or (sys.executable, "check.py")
        asked = Asked(command, again=bool(options.pop("again", False)))
        monkeypatch.chdir(tmp_path / "repo")
        return bisect_commits(Path.cwd(), good, bad, Options(asked, **options))  # type: ignore[arg-type]

    return run


def test_the_commit_is_named_with_its_files(tmp_path: Path, bisect: Bisect) -> None:
    shas = repository(tmp_path / "repo", [0] * 6 + [1] * 4)
    found = bisect(shas[0], "HEAD")
    assert (found.verdict, found.exit_code) == ("found", 0)
    assert found.culprits[0].name == shas[6]
    assert found.culprits[0].before == shas[5]
    assert found.culprits[0].files == ("value.py",)
    assert found.sentence == f"commit {shas[6][:12]} 'number 6' did it (value.py)"
    assert found.next == f"git show {shas[6][:12]}"
    assert found.suspects == 9
    assert found.probes <= found.limit == 10


@pytest.mark.parametrize("mark", ["\u2028", "\x0c", "\x1c", "\x85", "\r"])
def test_a_subject_may_hold_whatever_breaks_a_line(tmp_path: Path, mark: str) -> None:
    shas = repository(tmp_path / "repo", [0, 0])
    commit(tmp_path / "repo", "X = 1", f"one{mark}two")
    shas.append(git(tmp_path / "repo", "rev-parse", "HEAD"))
    commit(tmp_path / "repo", "X = 2", "three")
    found = line_of(tmp_path / "repo", shas[0], "HEAD")
    assert [point.sha for point in found.points[:3]] == shas
    assert found.points[2].subject == f"one{mark}two"
    assert found.points[3].subject == "three"
    assert mark not in found.points[2].label


@pytest.mark.parametrize("name", ["a b", " a ", "é "])
def test_a_repository_may_have_any_name(tmp_path: Path, name: str) -> None:
    repository(tmp_path / name, [0, 1])
    assert line_of(tmp_path / name, "HEAD~1", "HEAD").repository == tmp_path / name


def test_nothing_is_left_in_the_repository_or_beside_it(tmp_path: Path, bisect: Bisect) -> None:
    repository(tmp_path / "repo", [0, 0, 1, 1], more="open('left', 'w').write('x')")
    bisect("HEAD~3", "HEAD")
    repo = tmp_path / "repo"
    assert git(repo, "worktree", "list").count("\n") == 0
    assert git(repo, "status", "--porcelain") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]
    assert not (repo / "left").exists()


def with_submodule(folder: Path) -> list[str]:
    """A history in which a submodule is moved on: its value is the exit code."""
    kernels = folder / "kernels"
    repository(kernels, [0, 0, 1, 1], name="value")
    points = git(kernels, "rev-list", "--reverse", "HEAD").splitlines()
    repo = folder / "repo"
    repo.mkdir()
    git(repo, "init", "--quiet")
    allowed = ("-c", "protocol.file.allow=always")
    git(repo, *allowed, "submodule", "add", "--quiet", str(kernels), "kernels")
    (repo / "check.py").write_text(
        "import sys; sys.path.insert(0, 'kernels'); import value; sys.exit(value.X)"
    )
    shas = []
    for point in points:
        git(repo / "kernels", "checkout", "--quiet", point)
        shas.append(commit(repo, point, f"kernels {point[:8]}", file="pin"))
    return shas


def test_a_submodule_is_there_as_each_commit_has_it(tmp_path: Path, bisect: Bisect) -> None:
    shas = with_submodule(tmp_path)
    found = bisect(shas[0], "HEAD")
    assert found.verdict == "found"
    assert found.culprits[0].name == shas[2]
    assert not any("submodule" in note for note in found.notes)
    for repo in (tmp_path / "repo", tmp_path / "repo" / "kernels"):
        assert git(repo, "worktree", "list").count("\n") == 0
        assert git(repo, "status", "--porcelain") == ""


def test_a_submodule_that_is_not_cloned_is_said_to_be_empty(tmp_path: Path, bisect: Bisect) -> None:
    shas = with_submodule(tmp_path)
    git(tmp_path / "repo", "submodule", "deinit", "--all", "--force")
    found = bisect(shas[0], "HEAD")
    assert found.verdict != "found"
    note = "empty in probes, as here: submodule kernels (git submodule update --init)"
    assert note in found.notes


HIDDEN = {
    "a cache in HOME": "home = pathlib.Path.home()",
    "a compile cache": "home = pathlib.Path(os.environ.get('TORCHINDUCTOR_CACHE_DIR', '/none'))",
    "a build folder": "home = pathlib.Path('build')",
    "a temporary file": "import tempfile; home = pathlib.Path(tempfile.gettempdir())",
}

STICKY = """
home.mkdir(exist_ok=True)
if (home / 'answer').exists(): sys.exit(int((home / 'answer').read_text()))
(home / 'answer').write_text(str(value.X))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", HIDDEN)
def test_what_an_earlier_probe_cached_is_not_seen(
    tmp_path: Path, bisect: Bisect, kind: str
) -> None:
    """A cache that answers for whatever runs later: each probe has its own."""
    shas = repository(tmp_path / "repo", [0] * 5 + [1] * 3, more=HIDDEN[kind] + STICKY)
    found = bisect(shas[0], shas[-1])
    assert (found.verdict, found.culprits[0].name) == ("found", shas[5])


def test_a_file_that_no_probe_is_isolated_from_is_not_taken_for_a_commit(
    tmp_path: Path, bisect: Bisect
) -> None:
    """Once it was bad, it is bad: a state outside of everything that is fresh."""
    state = tmp_path / "outside"
    more = f"home = pathlib.Path({str(state)!r})\nif home.exists(): sys.exit(1)\n"
    more += "if value.X: home.write_text('x')"
    shas = repository(tmp_path / "repo", [0] * 5 + [1] * 3, more=more)
    found = bisect(shas[0], shas[-1])
    assert (found.verdict, found.exit_code) == ("inconclusive", 4)
    assert found.sentence == (
        f"not a commit: the same point gives two outcomes: {shas[0][:12]} 'number 0': good, bad"
    )
    assert not found.culprits


def test_what_cannot_be_judged_is_skipped(tmp_path: Path, bisect: Bisect) -> None:
    """Commits that do not build, fail otherwise, or ask to be skipped."""
    line: list[int | str] = [0] * 8 + ["syntax error", 125] + [1] * 6
    shas = repository(tmp_path / "repo", line)
    found = bisect(shas[0], shas[-1])
    assert found.verdict == "inconclusive"
    assert {culprit.name for culprit in found.culprits} == {*shas[8:11]}
    assert "those before the last cannot be judged" in found.sentence
    reasons = {attempt.reason for attempt in found.skipped}
    assert "exit 125: the command asks to skip it" in reasons
    assert any("SyntaxError" in reason for reason in reasons)


def test_ends_that_do_not_differ_stop_it(tmp_path: Path, bisect: Bisect) -> None:
    shas = repository(tmp_path / "repo", [0, 0, 0, 0])
    found = bisect(shas[0], shas[-1])
    assert found.verdict == "inconclusive"
    assert found.sentence.startswith("the ends do not differ: the bad end, ")
    assert found.probes <= 3


def test_an_end_that_judges_nothing_says_why(tmp_path: Path, bisect: Bisect) -> None:
    shas = repository(tmp_path / "repo", [0, 1])
    found = bisect(shas[0], shas[1], "no-such-program")
    assert found.verdict == "inconclusive"
    told = "cannot be judged: exit 127: the command was not found (No such file or directory: "
    assert told in found.sentence


def test_a_good_end_that_fails_is_told_with_its_words(tmp_path: Path, bisect: Bisect) -> None:
    shas = repository(tmp_path / "repo", ["raise ImportError('no acme._C')", 1])
    found = bisect(shas[0], shas[1])
    assert found.sentence.endswith("fails (ImportError: no acme._C)")


@pytest.mark.slow
def test_a_merge_says_that_it_is_one(tmp_path: Path, bisect: Bisect) -> None:
    repo = tmp_path / "repo"
    (first,) = repository(repo, [0])
    git(repo, "checkout", "--quiet", "-b", "side")
    commit(repo, "X = 1\n", "on the side")
    git(repo, "checkout", "--quiet", "main")
    commit(repo, "a", "on main", file="other")
    git(repo, "merge", "--quiet", "--no-ff", "--message", "the merge", "side")
    commit(repo, "b", "after", file="other")
    found = bisect(first, "HEAD")
    assert found.verdict == "found"
    assert found.sentence.startswith("merge ")
    assert found.culprits[0].text == "the merge"
    side, before = git(repo, "rev-parse", "HEAD~1^2")[:12], git(repo, "rev-parse", "HEAD~2")[:12]
    assert found.next.startswith(f"truestep bisect --good {before} --bad {side} -- ")
    inside = bisect(before, side)
    assert inside.culprits[0].text == "on the side"


@pytest.mark.slow
def test_a_tag_of_another_branch_is_stood_for_by_what_both_have(
    tmp_path: Path, bisect: Bisect
) -> None:
    repo = tmp_path / "repo"
    repository(repo, [0])
    base = commit(repo, "a", "the base", file="other")
    git(repo, "checkout", "--quiet", "-b", "release")
    commit(repo, "b", "release notes", file="notes")
    git(repo, "tag", "v1")
    git(repo, "checkout", "--quiet", "main")
    shas = [commit(repo, f"X = {int(n > 1)}\nN = {n}", f"main {n}") for n in range(4)]
    found = bisect("v1", "main")
    assert found.culprits[0].name == shas[2]
    assert found.good.startswith(base[:12])
    assert f"v1 is on another branch: {base[:12]}" in found.notes[0]


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ("HEAD", "HEAD", "both ends are the same commit"),
        ("HEAD", "HEAD~1", "the bad end is older than the good one"),
        ("nosuch", "HEAD", "the good end is no commit of this repository"),
        ("HEAD~1", "--output=x", "the bad end is no commit of this repository"),
    ],
)
def test_what_is_no_line_is_refused(
    tmp_path: Path, bisect: Bisect, good: str, bad: str, words: str
) -> None:
    repository(tmp_path / "repo", [0, 1])
    with pytest.raises(UsageError, match=words):
        bisect(good, bad)


def test_no_repository_is_told(tmp_path: Path, bisect: Bisect) -> None:
    (tmp_path / "repo").mkdir()
    with pytest.raises(UsageError, match="git could not do what the bisect needs"):
        bisect("a", "b")


PROJECT = '[project]\nname = "acme-kit"\n'


def package(tmp_path: Path, values: Sequence[int]) -> list[str]:
    """A project with a src folder, whose package another place on the path has, too."""
    repo = tmp_path / "repo"
    repository(repo, [0], name="acme_kit")
    commit(repo, PROJECT, "project", file="pyproject.toml")
    return [
        commit(repo, f"X = {v}\nN = {n}", f"kit {n}", file="src/acme_kit/__init__.py")
        for n, v in enumerate(values)
    ]


def test_the_package_of_the_worktree_wins_over_an_installed_one(
    tmp_path: Path, bisect: Bisect, monkeypatch: pytest.MonkeyPatch
) -> None:
    shas = package(tmp_path, [0, 0, 1, 1])
    installed = tmp_path / "installed" / "acme_kit"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("X = 0")
    monkeypatch.setenv("PYTHONPATH", str(installed.parent))
    assert bisect(shas[0], shas[-1]).culprits[0].name == shas[2]


def test_a_bisect_that_would_be_blind_says_so(tmp_path: Path, bisect: Bisect) -> None:
    """The command's interpreter looks elsewhere first: as one that ignores PYTHONPATH does."""
    shas = package(tmp_path, [0, 0, 1, 1])
    elsewhere = tmp_path / "elsewhere" / "acme_kit"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("X = 0")
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={elsewhere.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    found = bisect(shas[0], shas[-1], str(python), "check.py")
    assert found.verdict == "inconclusive"
    assert f"acme_kit would be imported from {elsewhere / '__init__.py'}" in found.sentence
    missing = bisect(shas[0], shas[-1], imports=["no_such_package"])
    assert "no_such_package cannot be found" in missing.sentence


def test_ends_that_do_not_differ_as_the_package_is_imported_from_elsewhere(
    tmp_path: Path, bisect: Bisect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The project is in a folder that no probe puts on the path: --import is proposed, and says
    so; where the package is found in the worktree it is not."""
    repo = tmp_path / "repo"
    shas = repository(repo, [0, 0, 0], name="kit", file="python/kit/__init__.py")
    monkeypatch.setenv("PYTHONPATH", str(repo / "python"))
    found = bisect(shas[0], shas[-1])
    origin = repo / "python" / "kit" / "__init__.py"
    assert found.sentence.startswith("the ends do not differ")
    note = f"if the command imports kit, that is {origin}, not the probed commit's"
    assert found.notes[0] == note
    assert found.next.startswith(f"truestep bisect --import kit --good {shas[0]} --bad ")
    named = bisect(shas[0], shas[-1], imports=["kit"])
    assert f"kit would be imported from {origin}, not from the worktree" in named.sentence
    assert not named.next


def test_ends_that_do_not_differ_of_a_package_in_the_worktree_propose_no_import(
    tmp_path: Path, bisect: Bisect
) -> None:
    shas = repository(tmp_path / "repo", [0, 0, 0], name="kit", file="kit/__init__.py")
    found = bisect(shas[0], shas[-1])
    assert found.sentence.startswith("the ends do not differ")
    assert not found.next
    assert not any("imports kit" in note for note in found.notes)


@pytest.mark.slow
def test_verdicts_are_kept_by_content_and_confirmed_anew(tmp_path: Path, bisect: Bisect) -> None:
    shas = repository(tmp_path / "repo", [0] * 9 + [1] * 8)
    first = bisect(shas[0], shas[-1])
    second = bisect(shas[0], shas[-1])
    assert second.culprits == first.culprits
    kept = [attempt for attempt in second.attempts if not attempt.ran]
    assert kept
    assert all(attempt.why in ("good end", "bad end", "search", "around") for attempt in kept)
    assert any("kept, of the same content" in note for note in second.notes)
    assert all(attempt.ran for attempt in bisect(shas[0], shas[-1], again=True).attempts)


JUDGE = "import helper, sys; sys.exit(int(open('value.py').read().split()[2]) >= helper.FIRST)"


def judge(tmp_path: Path, first: int) -> list[str]:
    """A command that imports a helper, which no word of it names."""
    folder = tmp_path / "judge"
    folder.mkdir(exist_ok=True)
    (folder / "judge.py").write_text(JUDGE)
    (folder / "helper.py").write_text(f"FIRST = {first}")
    return [sys.executable, str(folder / "judge.py")]


def stopped_after(probes: int) -> Callable[[str, int, int], None]:
    def progress(_: str, done: int, most: int) -> None:
        if done >= probes:
            raise KeyboardInterrupt

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("after", [6, 9])
def test_an_answer_of_before_it_was_stopped_is_not_trusted_alone(
    tmp_path: Path, bisect: Bisect, after: int
) -> None:
    """A helper of the command is mended in between: its repeats of before say the old outcome."""
    shas = repository(tmp_path / "repo", [*range(16)])
    with pytest.raises(KeyboardInterrupt):
        bisect(shas[0], shas[-1], *judge(tmp_path, 4), progress=stopped_after(after))
    found = bisect(shas[0], shas[-1], *judge(tmp_path, 11))
    assert [culprit.name for culprit in found.culprits] == [shas[11]]
    repeats = [a for a in found.attempts if a.why in ("again", "confirm")]
    assert not any(attempt.resumed for attempt in repeats)


@pytest.mark.slow
def test_kept_verdicts_that_no_longer_hold_are_dropped(tmp_path: Path, bisect: Bisect) -> None:
    """An unnamed helper of the command is changed between two bisects."""
    shas = repository(tmp_path / "repo", [*range(16)])
    for _ in range(2):
        bisect(shas[0], shas[-1], *judge(tmp_path, 4))
    for first in (5, 11, 3):
        found = bisect(shas[0], shas[-1], *judge(tmp_path, first))
        assert [culprit.name for culprit in found.culprits] == [shas[first]], found.sentence
        if any("no longer hold" in note for note in found.notes):
            assert all(attempt.ran for attempt in found.attempts)
        assert found.probes <= found.limit
    again = bisect(shas[0], shas[-1], *judge(tmp_path, 3))
    assert not any("no longer hold" in note for note in again.notes)


@pytest.mark.slow
def test_a_line_turns_by_what_was_seen_now_alone(tmp_path: Path, bisect: Bisect) -> None:
    """A point beside the pair was good twice, and is bad since a helper was mended."""
    shas = repository(tmp_path / "repo", [*range(16)])
    command = judge(tmp_path, 4)
    helper = tmp_path / "judge" / "helper.py"
    helper.write_text(
        "class First:\n    def __le__(self, n): return n > 3 and n != 11\nFIRST = First()"
    )
    for _ in range(3):
        found = bisect(shas[0], shas[-1], *command, most=20)
        assert found.sentence.startswith("not one commit: bad at ")
        assert not any("no longer hold" in note for note in found.notes)
    judge(tmp_path, 4)
    found = bisect(shas[0], shas[-1], *command, most=20)
    assert [culprit.name for culprit in found.culprits] == [shas[4]], found.sentence
    assert "no longer hold" in found.notes[0]


@pytest.mark.slow
def test_what_is_kept_is_not_used_for_other_imports(tmp_path: Path, bisect: Bisect) -> None:
    shas = repository(tmp_path / "repo", [0, 0, 1, 1])
    bisect(shas[0], shas[-1])
    bisect(shas[0], shas[-1])
    assert not all(attempt.ran for attempt in bisect(shas[0], shas[-1]).attempts)
    named = bisect(shas[0], shas[-1], imports=["value"])
    assert all(attempt.ran for attempt in named.attempts)


@pytest.mark.slow
def test_what_was_stopped_and_is_unchanged_goes_on(tmp_path: Path, bisect: Bisect) -> None:
    shas = repository(tmp_path / "repo", [*range(16)])
    with pytest.raises(KeyboardInterrupt):
        bisect(shas[0], shas[-1], *judge(tmp_path, 4), progress=stopped_after(9))
    found = bisect(shas[0], shas[-1], *judge(tmp_path, 4))
    assert found.culprits[0].name == shas[4]
    assert sum(attempt.resumed for attempt in found.attempts) >= 5
    assert found.probes <= found.limit


@pytest.mark.slow
def test_what_is_kept_is_not_used_for_another_command_or_variable(
    tmp_path: Path, bisect: Bisect, monkeypatch: pytest.MonkeyPatch
) -> None:
    shas = repository(tmp_path / "repo", [0, 0, 1, 1])
    bisect(shas[0], shas[-1])
    again = bisect(shas[0], shas[-1], sys.executable, "-B", "check.py")
    assert all(attempt.ran for attempt in again.attempts)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert all(attempt.ran for attempt in bisect(shas[0], shas[-1]).attempts)


def test_two_bisects_of_a_project_at_once_are_refused(tmp_path: Path, bisect: Bisect) -> None:
    shas = repository(tmp_path / "repo", [0, 1])
    store = Store(tmp_path / "repo")
    store.prepare()
    with store.locked(), pytest.raises(UsageError, match="another bisect"):
        bisect(shas[0], shas[1])


def test_a_probe_that_runs_too_long_is_skipped_with_what_it_started(
    tmp_path: Path, bisect: Bisect, monkeypatch: pytest.MonkeyPatch
) -> None:
    shas = repository(tmp_path / "repo", [0, 1])
    asked = Asked((sys.executable, "-c", "import time; time.sleep(60)"), timeout_s=0.5)
    monkeypatch.chdir(tmp_path / "repo")
    found = bisect_commits(Path.cwd(), shas[0], shas[1], Options(asked))
    assert found.sentence.endswith("it ran longer than 0.5 s")


DETACHED = """
import os, subprocess, sys, time
words = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(words, start_new_session=True)
open({pids!r}, "a").write(f"{{child.pid}}\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other processes are known of on Linux alone")
def test_what_a_probe_started_in_a_session_of_its_own_is_ended_with_it(
    tmp_path: Path, bisect: Bisect
) -> None:
    shas = repository(tmp_path / "repo", [0, 1], more=DETACHED.format(pids=str(tmp_path / "pids")))
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert bisect(shas[0], shas[1]).verdict == "found"
        numbers = (tmp_path / "pids").read_text().split()
        assert len(numbers) == 4
        assert not any(_alive(number) for number in numbers)
        assert other.poll() is None, "no probe started it"
    finally:
        other.kill()
        other.wait()


def _alive(number: str) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_what_a_killed_bisect_left_is_cleared(tmp_path: Path, bisect: Bisect) -> None:
    """A worktree that git still knows of, and nothing of another repository's."""
    shas = repository(tmp_path / "repo", [0, 1])
    mark = hashlib.sha256(str(tmp_path / "repo").encode()).hexdigest()[:8]
    left, other = (tmp_path / f"truestep-bisect-{name}-abc" for name in (mark, "00000000"))
    for folder in (left, other):
        folder.mkdir()
    git(tmp_path / "repo", "worktree", "add", "--detach", str(left / "tree"), shas[0])
    bisect(shas[0], shas[1])
    assert not left.exists()
    assert other.exists()
    assert git(tmp_path / "repo", "worktree", "list").count("\n") == 0


@pytest.mark.slow
def test_a_commit_that_git_cannot_check_out_is_skipped(tmp_path: Path, bisect: Bisect) -> None:
    """Its content is gone, as with large files of a store that is not there."""
    repo = tmp_path / "repo"
    shas = repository(repo, [0] * 8 + [1] * 8)
    blob = git(repo, "rev-parse", f"{shas[7]}:value.py")
    (repo / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    found = bisect(shas[0], shas[-1])
    assert found.verdict == "inconclusive"
    assert {culprit.name for culprit in found.culprits} == {*shas[7:9]}
    assert any("git cannot check it out" in attempt.reason for attempt in found.skipped)


def test_a_worktree_that_git_was_killed_in_making_is_cleared(
    tmp_path: Path, bisect: Bisect
) -> None:
    """It is locked, and prune leaves it."""
    shas = repository(tmp_path / "repo", [0, 1])
    mark = hashlib.sha256(str(tmp_path / "repo").encode()).hexdigest()[:8]
    tree = tmp_path / f"truestep-bisect-{mark}-abc" / "p000" / "tree"
    git(tmp_path / "repo", "worktree", "add", "--detach", "--lock", str(tree), shas[0])
    bisect(shas[0], shas[1])
    assert not tree.parent.parent.exists()
    assert git(tmp_path / "repo", "worktree", "list").count("\n") == 0
