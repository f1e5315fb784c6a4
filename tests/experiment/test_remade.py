"""A baseline that is recorded anew: real commits, real processes, one change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from truestep.errors import ReferenceNotFoundError, UsageError
from truestep.experiment.remade import Asked, _shared, baseline_of, judged
from truestep.testing import tiny
from truestep.verdict import Verdict

CASES = """
[case.cat]
model = "flux"
prepare = "change.py:prepare"

[case.cat.call]
prompt = "a cat"
num_inference_steps = 2
height = 16
width = 16
"""

PREPARE = """
import torch

from ported import GAIN


def prepare(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(GAIN)
"""


def git(folder: Path, *words: str) -> str:
    told = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *told, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port with two commits: the second one scales a layer. Its weights are in none."""
    folder = tmp_path_factory.mktemp("port")
    (folder / "src" / "ported").mkdir(parents=True)
    (folder / "src" / "ported" / "__init__.py").write_text("GAIN = 1.0\n")
    (folder / "pyproject.toml").write_text('[project]\nname = "ported"\nversion = "1"\n')
    (folder / "truestep.toml").write_text(CASES)
    (folder / "change.py").write_text(PREPARE)
    (folder / ".gitignore").write_text("flux/\n__pycache__/\n")
    tiny.pipeline("FluxPipeline").save_pretrained(folder / "flux")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "the port")
    (folder / "src" / "ported" / "__init__.py").write_text("GAIN = 1.001\n")
    git(folder, "commit", "--quiet", "--all", "--message", "a faster gain")
    return folder


def asked(project: Path, **fields: Any) -> Asked:
    return Asked(folder=project, words=[], files=[Path("truestep.toml")], **fields)


@pytest.mark.slow
def test_a_change_since_a_commit_is_found_and_named(project: Path) -> None:
    (result,) = judged(baseline_of("HEAD~1", project), asked(project))
    assert result.verdict is Verdict.DRIFTED
    assert result.actual.label == "working tree"
    assert result.reference.label.startswith("HEAD~1 (")
    assert result.reference.path is None
    assert any(
        note.startswith("changed since HEAD~1 (") and note.endswith("src/ported/__init__.py")
        for note in result.notes
    )
    assert "flux is in no commit, or not whole: both sides have this one" in result.notes
    assert result.hint.startswith("git diff ")
    assert git(project, "worktree", "list").count("\n") == 1


@pytest.mark.slow
def test_what_did_not_change_passes_though_its_files_did(project: Path) -> None:
    path = project / "change.py"
    path.write_text(f"{PREPARE}\nSAME = True\n")
    try:
        (result,) = judged(baseline_of("HEAD", project), asked(project, floor="final"))
    finally:
        path.write_text(PREPARE)
    assert result.verdict is Verdict.IDENTICAL
    assert "changed in the case: prepare" in result.notes
    assert any("HEAD (" in note and note.endswith(": change.py") for note in result.notes)


@pytest.mark.slow
def test_the_baseline_may_be_an_environment(project: Path) -> None:
    environment = Path(sys.prefix)
    (result,) = judged(baseline_of(str(environment), project), asked(project))
    assert result.verdict is Verdict.IDENTICAL
    assert result.reference.label == f"environment {environment}"


def test_a_baseline_that_cannot_be_recorded_says_what_it_said(project: Path) -> None:
    one = Asked(folder=project, words=["dog"], files=[Path("truestep.toml")])
    with pytest.raises(ReferenceNotFoundError) as told:
        judged(baseline_of("HEAD", project), one)
    assert told.value.what == "the baseline could not be recorded"
    assert "dog" in (told.value.measured or "")
    assert told.value.hint == "truestep record dog  # in the baseline"


def test_what_is_no_baseline_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no commit of this repository, and no Python environ"):
        baseline_of("nosuch", project)
    with pytest.raises(UsageError, match="this folder is in no git repository"):
        baseline_of("HEAD", tmp_path)


def plain(folder: Path, **files: str) -> Path:
    """A repository with one commit."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "a commit")
    return folder


@pytest.mark.parametrize("text", ["HEAD..HEAD", "HEAD:a.py", "--all", "a.py", "run"])
def test_only_one_commit_is_a_baseline(tmp_path: Path, text: str) -> None:
    folder = plain(tmp_path, **{"a.py": ""})
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    with pytest.raises(UsageError, match="no commit of this repository"):
        baseline_of(text, folder)


@pytest.mark.slow
def test_a_baseline_that_imports_the_working_tree_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package is in no place that is put first, and the environment has the working tree's."""
    cases = CASES.replace('"flux"', '"builtin:digits"')
    folder = plain(
        tmp_path,
        **{"python__ported.py": "GAIN = 1.0", "truestep.toml": cases, "change.py": PREPARE},
    )
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{folder / 'python'}")
    with pytest.raises(UsageError, match="would not run its own code") as told:
        judged(baseline_of("HEAD", folder), Asked(folder, [], [Path("truestep.toml")]))
    assert "of the working tree" in (told.value.measured or "")


def test_a_file_of_the_repository_with_its_whole_path_is_refused(tmp_path: Path) -> None:
    cases = CASES.replace('"change.py', f'"{tmp_path}/change.py')
    folder = plain(tmp_path, **{"truestep.toml": cases, "change.py": PREPARE})
    with pytest.raises(UsageError, match="named by its whole path: both sides would have it"):
        judged(baseline_of("HEAD", folder), Asked(folder, [], [Path("truestep.toml")]))


def test_nothing_is_written_through_a_link_of_the_commit(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "truestep.toml").write_text("precious")
    folder = tmp_path / "port"
    folder.mkdir()
    (folder / "cases").symlink_to(outside)
    plain(folder, **{"a.py": ""})
    (folder / "cases").unlink()
    (folder / "cases").mkdir()
    (folder / "cases" / "truestep.toml").write_text(CASES)
    asked = Asked(folder, ["--file", "cases/truestep.toml"], [Path("cases/truestep.toml")])
    with pytest.raises(UsageError, match="a link in the commit leads out of it"):
        judged(baseline_of("HEAD", folder), asked)
    assert (outside / "truestep.toml").read_text() == "precious"


def test_weights_that_a_commit_lacks_are_shared_file_by_file(tmp_path: Path) -> None:
    folder = plain(tmp_path, **{"flux__config.json": "{}", "truestep.toml": CASES})
    (folder / "flux" / "model.safetensors").write_text("weights")
    tree = tmp_path / "tree"
    git(folder, "worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
    asked = Asked(folder, [], [Path("truestep.toml")])
    told = list(_shared(folder, tree, asked))
    assert (tree / "flux" / "model.safetensors").read_text() == "weights"
    assert not (tree / "flux" / "config.json").is_symlink()
    assert told == ["flux is in no commit, or not whole: both sides have this one"]


@pytest.mark.slow
def test_a_case_that_cannot_be_recorded_leaves_the_others_judged(tmp_path: Path) -> None:
    (tmp_path / "truestep.toml").write_text(
        '[case.a]\nmodel = "builtin:digits"\nprompt = "a red three moving left"\nsteps = 1\n'
        '[case.b]\nmodel = "./gone"\nprompt = "x"\nsteps = 1\n'
    )
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    results = judged(baseline_of("HEAD", tmp_path), asked(tmp_path, floor="none"))
    assert sorted(result.verdict for result in results) == [Verdict.IDENTICAL, Verdict.MISSING]
    assert any(
        "not all could be recorded: BROKEN b: ModelLoadError" in note for note in results[0].notes
    )
