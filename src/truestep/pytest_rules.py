"""What decides the checks of a test run and was changed: told at its end and in its results.

A test that is skipped by a new marker has no result to tell it in, so it is told of the run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from truestep.pytest_references import reference_root

if TYPE_CHECKING:
    from truestep.records import RuleChange, RuleKind
    from truestep.verdict import Comparison

MOST = 20
_ASKS = re.compile(rb"def \w+\([^)]*\btruestep\b[^)]*\)|mark\.parity")
"""A test that takes the fixture, or has the marker."""


@dataclass(frozen=True)
class RunRules:
    """What was changed since a commit; empty where git knows of none.

    Attributes:
        refused: Why the run fails for it.
    """

    since: str = ""
    changes: tuple[RuleChange, ...] = ()
    refused: str = ""

    def told(self, comparison: Comparison) -> Comparison:
        """The comparison with these changes."""
        update = {"rule_changes": self.changes, "rules_since": self.since}
        return comparison.model_copy(update=update)

    def lines(self) -> list[str]:
        """What the end of the run says of them."""
        if not self.changes:
            return [self.refused] * bool(self.refused)
        from truestep.report.words import change_text

        found = [f"CHANGED {change_text(change)}" for change in self.changes[:MOST]]
        more = len(self.changes) - MOST
        found += [f"CHANGED {more} more"] if more > 0 else []
        return [*found, *[self.refused] * bool(self.refused)]


def rules_of(config: pytest.Config, files: Iterable[str]) -> RunRules:
    """Compare what decides with the commit that the work began at.

    Args:
        files: Test files of the run, relative to its root; those count that have such tests.
    """
    locked: str | None = config.getoption("truestep_locked")
    paths = [config.rootpath / name for name in sorted(set(files))]
    tests = [path for path in paths if path.is_file() and _ASKS.search(path.read_bytes())]
    known = config.getoption("truestep_known")
    from truestep.recording.lock import LOCK_FILE

    lock = reference_root(config) / LOCK_FILE
    if not tests and locked is None and not known and not lock.is_file():
        return RunRules()
    from truestep.judge.rule_changes import promoted, rule_changes, text_then, went

    state = promoted(config.rootpath, since=locked or "", environment=os.environ)
    if state is None:
        why = "--truestep-locked: git knows no promoted state to compare with"
        return RunRules(refused="" if locked is None else why)
    asked = [p for p in paths if p not in tests and _ASKS.search(text_then(state, p) or b"")]
    gone = [
        path for path in went(state, config.rootpath) if _ASKS.search(text_then(state, path) or b"")
    ]
    around = [config.rootpath / name for name in _SETTINGS]
    folders = {config.rootpath}.union(*(_folders(path, config.rootpath) for path in tests))
    hooks = {folder / "conftest.py" for folder in folders}
    decides: list[tuple[RuleKind, Path]] = [
        ("test", path) for path in [*tests, *asked, *gone, *around, *sorted(hooks)]
    ]
    decides += [("known failure", Path(known))] if known else []
    decides.append(("reference", lock))
    changes = rule_changes(decides, state)
    why = f"--truestep-locked: what decides was changed since {state.commit[:12]}"
    return RunRules(state.commit, changes, why if locked is not None and changes else "")


_SETTINGS = (
    "pytest.toml",
    ".pytest.toml",
    "pytest.ini",
    ".pytest.ini",
    "pyproject.toml",
    "tox.ini",
    "setup.cfg",
)
"""Files in which pytest looks for settings."""


def _folders(path: Path, root: Path) -> list[Path]:
    """The folders from a file up to the root."""
    return [folder for folder in path.parents if folder == root or root in folder.parents]
