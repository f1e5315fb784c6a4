"""What an update left as it was, and what runs without a reference left behind. No torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from truestep.pytest_references import KEPT
from truestep.pytest_rules import RunRules
from truestep.text import visible

_NAMED = 3
"""References that are named of each kind; of the others there is the number."""

_NEXT = {
    "there": "--truestep-update=all replaces them",
    "rule": "--truestep-update=all replaces them",
    "promoted": "truestep references promote CASE --reason TEXT",
}


def kept_lines(kept: Sequence[tuple[str, str]], rules: RunRules) -> list[str]:
    """What an update did not replace, a line a reason.

    Args:
        kept: References, each with a word of `KEPT`.
        rules: What was changed since the promoted state: what is kept is judged by that now.
    """
    lines = []
    for word, why in KEPT.items():
        names = sorted({name for name, reason in kept if reason == word})
        if names:
            more = len(names) - _NAMED
            told = ", ".join(map(visible, names[:_NAMED])) + (f", {more} more" if more > 0 else "")
            lines.append(f"not replaced ({why}): {told}; {_NEXT[word]}")
    judged = [change for change in rules.changes if change.kind == "test"]
    if lines and judged:
        files = ", ".join(sorted({visible(os.path.basename(change.file)) for change in judged}))
        were = "rule was" if len(judged) == 1 else "rules were"
        lines.append(
            f"not replaced, and now judged otherwise: {len(judged)} {were} changed in {files} "
            f"since {rules.since[:12]} (see CHANGED)"
        )
    return lines


def remove_stale(root: Path, used: Collection[str]) -> None:
    """Remove candidates of references that no test of a complete run asked for: of tests that have
    another name now, or are gone."""
    from truestep.recording.store import CANDIDATE, place_named

    for path in root.glob(f"*/*/*/*{CANDIDATE}"):
        name = path.relative_to(root).as_posix().removesuffix(CANDIDATE)
        if name not in used and place_named(name) is not None:
            path.unlink(missing_ok=True)
