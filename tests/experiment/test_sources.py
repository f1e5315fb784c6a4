"""An experiment goes on only with the code that it ran, whatever of it was imported when."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.counting import calls_of
from truestep.errors import UsageError
from truestep.experiment.quality.records import QualityPlan
from truestep.experiment.quality.store import QualityStore
from truestep.experiment.records import Plan, PlannedCase
from truestep.experiment.sources import NAME, Sources
from truestep.experiment.store import Store
from truestep.functions import function_of

CHANGE = """
import helper_of_change

def change(pipe):
    import late_of_change
    return helper_of_change.FACTOR * late_of_change.FACTOR
"""
CASE = PlannedCase(name="one", content={"model": "builtin:digits", "prompt": "a"})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "project"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "change.py").write_text(CHANGE)
    (folder / "inner" / "helper_of_change.py").write_text("FACTOR = 2\n")
    (folder / "late_of_change.py").write_text("FACTOR = 3\n")
    (folder / "unused.py").write_text("FACTOR = 3\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("helper_of_change", "late_of_change"):
        sys.modules.pop(name, None)


def sources() -> Sources:
    return Sources(["inner/change.py:change", "clip:folder", ""])


def kept(folder: Path) -> Path:
    """What an experiment has written down that loaded its change and called it."""
    ours = sources()
    change = function_of(Path("inner/change.py"), "change", "--apply")
    ours.keep(folder)
    assert "late_of_change" not in (folder / NAME).read_text()
    assert change(None) == 6
    ours.keep(folder)
    return folder / NAME


def test_files_that_are_imported_when_a_change_is_called_are_kept(project: Path) -> None:
    import json

    found = json.loads(kept(project).read_text())
    assert {"change.py", "helper_of_change.py", "late_of_change.py"} <= {*found}
    assert "unused.py" not in found
    assert not any("site-packages" in name or "truestep/" in name for name in found)


@pytest.mark.parametrize("name", ["inner/helper_of_change.py", "late_of_change.py"])
def test_a_file_that_changed_or_is_gone_is_refused(project: Path, name: str) -> None:
    kept(project)
    sources().check(project)
    (project / "unused.py").write_text("FACTOR = 4\n")
    sources().check(project)
    path = project / name
    before = path.read_text()
    path.write_text("FACTOR = 4\n")
    with pytest.raises(UsageError, match=f"{path.name} changed since"):
        sources().check(project)
    path.unlink()
    with pytest.raises(UsageError, match="changed since"):
        sources().check(project)
    path.write_text(before)
    sources().check(project)


def test_both_experiments_check_their_sources_when_they_go_on(project: Path) -> None:
    function_of(Path("inner/change.py"), "change", "--apply")
    plan = Plan(cases=(CASE,), cells=(), rounds=5, most_rounds=5, margin=0.02)
    quality = QualityPlan(cases=(CASE,), cells=(), seeds=3, margin=0.5, broken=0.1)
    stores = (Store("plain", sources=sources()), QualityStore("quality", sources=sources()))
    stores[0].begin(plan, resume=False)
    stores[1].begin(quality, resume=False)
    Store("plain", sources=sources()).begin(plan, resume=True)
    QualityStore("quality", sources=sources()).begin(quality, resume=True)
    (project / "inner" / "helper_of_change.py").write_text("FACTOR = 4\n")
    with pytest.raises(UsageError, match="ran other code"):
        Store("plain", sources=sources()).begin(plan, resume=True)
    with pytest.raises(UsageError, match="ran other code"):
        QualityStore("quality", sources=sources()).begin(quality, resume=True)


@pytest.mark.slow
def test_a_resumed_command_refuses_a_changed_import(project: Path) -> None:
    (project / "inner" / "change.py").write_text(
        "import helper_of_change\n\ndef change(pipe):\n"
        "    for p in pipe.transformer.parameters():\n"
        "        p.data.mul_(helper_of_change.FACTOR)\n"
    )
    words = [
        *(sys.executable, "-m", "truestep", "ab", "builtin:digits", "--quality"),
        *("--num-prompts", "3", "--seeds", "3", "--set", "steps=2", "--vs", "steps=2"),
        *("--apply", "inner/change.py:change", "--output", "kept"),
    ]
    first = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "kept" in first.stdout, first.stderr
    again = subprocess.run([*words, "--resume"], capture_output=True, text=True, check=False)
    assert again.returncode == first.returncode
    (project / "inner" / "helper_of_change.py").write_text("FACTOR = 1\n")
    other = subprocess.run([*words, "--resume"], capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "helper_of_change.py changed since" in other.stderr


def test_what_is_no_users_file_is_looked_up_once(project: Path) -> None:
    """Thousands of modules are there after every run of an experiment."""
    ours = sources()
    ours.keep(project)
    assert calls_of(lambda: ours.keep(project), "realpath") < len(sys.modules) / 10
