"""What decides the checks of a run and was changed: told at its end, refused where it is locked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch  # noqa: F401  pytester unloads what a run imported, and torch cannot load twice

import truestep.judge.compare
import truestep.judge.latent  # noqa: F401
from tests.judge.test_rule_changes import commit, git

pytest_plugins = ["pytester"]

TEST = """
import pytest, torch

def test_same(truestep):
    truestep.check(torch.arange(4.0), tolerance=1e-3)

def test_more(truestep):
    truestep.check(torch.arange(5.0))
"""
PLAIN = "def test_plain():\n    pass\n"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A repository with tests and references, all committed."""
    for name in [n for n in os.environ if n.startswith(("GITHUB_", "CI", "GIT_"))]:
        monkeypatch.delenv(name)
    pytester.makepyfile(test_a=TEST, test_b=PLAIN)
    assert run(pytester, "--truestep-update").ret == 0
    git(pytester.path, "init", "--quiet", "--initial-branch", "main")
    commit(pytester.path)
    return pytester


def run(project: pytest.Pytester, *args: str) -> pytest.RunResult:
    left_out = ("cacheprovider", "xdist", "hypothesispytest", "anyio")  # a second each to import
    return project.runpytest(*(text for name in left_out for text in ("-p", f"no:{name}")), *args)


def changed(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if line.startswith("CHANGED")]


def test_nothing_was_changed(project: pytest.Pytester) -> None:
    result = run(project, "--truestep-locked", "--truestep-json=r.json")
    assert (result.ret, changed(result)) == (0, [])
    (first, _) = json.loads((project.path / "r.json").read_text())["comparisons"]
    assert first["rules_since"] == git(project.path, "rev-parse", "HEAD")
    assert first["rule_changes"] == []


def test_a_test_that_is_skipped_by_a_new_marker_is_told(project: pytest.Pytester) -> None:
    project.makepyfile(test_a=TEST.replace("def test_same", "@pytest.mark.skip\ndef test_same"))
    result = run(project, "--truestep-json=r.json")
    result.assert_outcomes(passed=2, skipped=1)
    assert result.ret == 0
    (line,) = changed(result)
    assert (
        "test test_same: judged by: pytest.mark.skip; tolerance=0.001 (was tolerance=0.001)" in line
    )
    (only,) = json.loads((project.path / "r.json").read_text())["comparisons"]
    assert only["rule_changes"][0]["key"] == "test_same: judged by"
    locked = run(project, "--truestep-locked")
    assert locked.ret == 1
    locked.stdout.fnmatch_lines(["--truestep-locked: what decides was changed since *"])


def test_a_limit_and_a_reference_that_were_changed(project: pytest.Pytester) -> None:
    project.makepyfile(test_a=TEST.replace("1e-3", "1e-1").replace("5.0", "6.0"))
    assert run(project, "--truestep-update=all").ret == 0
    found = "\n".join(changed(run(project)))
    assert "test test_same: judged by: tolerance=0.1 (was tolerance=0.001)" in found
    assert "CHANGED reference default/" in found


def test_a_known_failure_that_came(project: pytest.Pytester) -> None:
    (project.path / "known.toml").write_text(
        '[known."test_a.py::test_same"]\nreason = "x"\nsince = 2024-10-01\nstage = "tensors"\n'
        "rel_l2 = 0.1\n"
    )
    assert "CHANGED known failure" in changed(run(project, "--truestep-known=known.toml"))[0]


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (_write("test_a.py", TEST.replace("def test_same", "@pytest.mark.xfail\ndef test_same")),
         "test test_same: judged by: pytest.mark.xfail"),
        (_write("test_a.py", TEST.replace("truestep.check(torch.arange(5.0))", "pass")),
         "test test_more: checks: (not there) (was 1)"),
        (_write("test_a.py", TEST.partition("def test_more")[0]),
         "test test_more: (not there) (was there)"),
        (_write("test_a.py", TEST + "\n\npytestmark = pytest.mark.skipif(True, reason='x')\n"),
         "test (module): judged by: pytest.mark.skipif"),
        (lambda folder: (folder / "test_a.py").unlink(),
         "test test_same: (not there) (was there), in "),
        (_write("test_a.py", "def test_same():\n    pass\n"),
         "test test_more: (not there) (was there)"),
        (_write("test_a.py", TEST + "\n\n@pytest.fixture\ndef truestep():\n    return 1\n"),
         "test pytest truestep: "),
        (_write(".pytest.ini", "[pytest]\naddopts = --deselect test_a.py::test_more\n"),
         "test pytest addopts: --deselect test_a.py::test_more (was (not there))"),
        (_write("pytest.ini", "[pytest]\naddopts = --deselect test_a.py::test_more\n"),
         "test pytest addopts: --deselect test_a.py::test_more (was (not there))"),
        (_write("pyproject.toml", "[tool.pytest.ini_options]\naddopts = ['-k', 'not more']\n"),
         "test pytest addopts: ['-k', 'not more'] (was (not there))"),
        (_write("conftest.py", "collect_ignore = ['test_a.py']\n"),
         "test pytest collect_ignore: collect_ignore = ['test_a.py'] (was (not there))"),
        (_write("conftest.py", "def pytest_collection_modifyitems(items):\n    del items[1:]\n"),
         "test pytest pytest_collection_modifyitems: "),
        (_write("conftest.py", "import pytest\nfrom unittest.mock import Mock\n\n"
                "@pytest.fixture\ndef truestep():\n    return Mock()\n"),
         "test pytest truestep: "),
    ],
)  # fmt: skip
def test_an_attempt_to_make_it_easier_is_told_and_refused_where_it_is_locked(
    project: pytest.Pytester, attempt: Callable[[Path], None], said: str
) -> None:
    attempt(project.path)
    found = "\n".join(changed(run(project)))
    assert said in found
    assert run(project, "--truestep-locked").ret == 1


def test_settings_that_decide_nothing_and_fixtures_of_others_are_left_alone(
    project: pytest.Pytester,
) -> None:
    project.makeconftest("import pytest\n\n@pytest.fixture\ndef port():\n    return 1\n")
    project.makepyprojecttoml("[project]\nname = 'x'\n")
    assert changed(run(project, "--truestep-locked")) == []


def test_plain_tests_and_code_that_no_test_asks_for_are_left_alone(
    project: pytest.Pytester,
) -> None:
    project.makepyfile(test_b="import pytest\n@pytest.mark.skip\n" + PLAIN)
    result = run(project, "test_b.py")
    assert result.ret == 0
    assert "CHANGED" not in result.stdout.str()


def test_locked_without_a_repository_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_b=PLAIN)
    result = run(pytester, "--truestep-locked")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["--truestep-locked: git knows no promoted state*"])
    assert run(pytester).ret == 0
