"""What decides a check and was changed: told in every result, refused by `--locked`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from truestep.text import quoted

if TYPE_CHECKING:
    from truestep.records import RuleChange, RuleKind
    from truestep.verdict import Comparison


@dataclass(frozen=True)
class Rules:
    """What was changed since a commit; empty where git knows of none."""

    since: str = ""
    changes: tuple[RuleChange, ...] = ()

    @classmethod
    def of(
        cls,
        cases: Path,
        known: Path | None,
        thresholds: Path | None,
        references: Path,
        *,
        reference: Path | None = None,
        locked: str | None,
    ) -> Rules:
        """Compare the files that decide a check with the promoted state.

        Args:
            reference: A recording that is judged by as it is, whatever a lock file says of it.
            locked: A revision, or empty for the usual one: refuse changes. None: tell them.

        Raises:
            UsageError: It is locked, and there are changes or nothing to compare with.
        """
        from truestep.recording.lock import LOCK_FILE

        files: list[tuple[RuleKind, Path]] = [
            ("case", cases),
            ("reference", references / LOCK_FILE),
        ]
        files += [("known failure", known)] if known is not None else []
        files += [("threshold", thresholds)] if thresholds is not None else []
        unlike = () if reference is None else tuple(_unlike_the_lock(reference))
        return cls.compared(files, unlike, locked=locked)

    @classmethod
    def compared(
        cls,
        files: Iterable[tuple[RuleKind, Path]],
        more: tuple[RuleChange, ...] = (),
        *,
        locked: str | None,
    ) -> Rules:
        """Likewise, of any files; with further changes that need no commit to be seen."""
        from truestep.judge.rule_changes import promoted, rule_changes

        state = promoted(Path.cwd(), since=locked or "", environment=os.environ)
        if state is None:
            if locked is not None:
                raise _nothing_to_compare(locked)
            return cls(changes=more)
        found = cls(state.commit, (*more, *rule_changes(files, state)))
        if locked is not None and found.changes:
            raise found.refused()
        return found

    def told(self, comparison: Comparison) -> Comparison:
        """The comparison with these changes."""
        update = {"rule_changes": self.changes, "rules_since": self.since}
        return comparison.model_copy(update=update)

    def refused(self) -> Exception:
        """The error of a check that is locked."""
        from truestep.errors import UsageError
        from truestep.report.words import change_text

        files = " ".join(dict.fromkeys(quoted(change.file) for change in self.changes))
        count = len(self.changes)
        return UsageError(
            f"--locked: {count} thing{'s' * (count > 1)} that decide{'s' * (count == 1)} here "
            f"{'were' if count > 1 else 'was'} changed since {self.since[:12]}",
            measured="\n".join(map(change_text, self.changes[:12])) + "\n",
            likely="the change under test brought them along: a person has to agree to each",
            hint=f"git diff {self.since[:12]} -- {files}",
        )


def _unlike_the_lock(reference: Path) -> Iterator[RuleChange]:
    """What a lock file in a folder above a recording says of it, where that is something else."""
    from truestep.recording.lock import LOCK_FILE, read_lock
    from truestep.recording.placing import content_of
    from truestep.records import RuleChange

    path = reference.resolve()
    root = next((f for f in path.parents[: _DEEPEST + 1] if (f / LOCK_FILE).is_file()), None)
    if root is None:
        return
    name = path.relative_to(root).as_posix()
    entry, here = read_lock(root).references.get(name), content_of(path)
    promised = () if entry is None else tuple(filter(None, (entry.sha256, entry.pending)))
    if here is not None and here not in promised:
        yield RuleChange(
            kind="reference",
            file=str(reference),
            key=name,
            actual=here[:16],
            reference=f"{promised[0][:16]} in the lock file"
            if promised
            else "not in the lock file",
        )


_DEEPEST = 4
"""Folders from the lock file down to a recording: tier, device class, kernel; or drafts."""


def _nothing_to_compare(locked: str) -> Exception:
    from truestep.errors import UsageError

    return UsageError(
        "--locked: there is no promoted state to compare with",
        measured=f"git knows no commit {locked}" if locked else "git knows none here",
        likely="no git repository, or the base commit was not fetched (fetch-depth: 0)",
        hint="git log --oneline --max-count 5",
    )
