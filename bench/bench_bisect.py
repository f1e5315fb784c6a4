"""Does a bisect ever name a wrong commit? 50 histories of real repositories and processes.

    python -m bench.bench_bisect [--only NAME] [--output FOLDER]

35 have one commit that does it. 15 have hidden state: commits whose outcome is chance, caches that
an earlier probe left, files outside of every probe, lines that turn twice, commits that do not run.
A bisect may name the commit or say `inconclusive`; it may not name another one, nor take more than
2 log2 n + 4 runs of the command for n commits. Rows go to bisect.jsonl, and the table to bisect.md;
what is there already is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from bench.common import RESULTS, read
from truestep.experiment.bisecting.bisect import Options, bisect_commits
from truestep.experiment.bisecting.records import Bisection
from truestep.experiment.bisecting.running import Asked

SIZES = (
    *(
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        12,
        13,
        15,
        16,
        17,
        20,
        24,
        31,
        32,
        33,
        40,
        47,
        50,
        63,
        64,
        65,
    ),
    *(80, 100, 120, 127, 128, 150, 200, 256, 300),
)
"""Commits after the good end of the histories without hidden state."""

START = """
import os, pathlib, random, sys, tempfile
from value import N, X
OUTSIDE = pathlib.Path(sys.argv[1])

def count():
    runs = OUTSIDE / "runs"
    number = int(runs.read_text()) if runs.exists() else 0
    runs.write_text(str(number + 1))
    return number

def chance():
    sys.exit(random.Random(f"{N} {count()}").random() < 0.5)

def sticky(folder, *answers):
    file = folder / "answer"
    if file.exists():
        sys.exit(int(file.read_text()))
    if X in answers:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(str(X))

"""
"""Of the command: what the histories' own lines may use."""

CACHES = {
    "cache in HOME, either": "sticky(pathlib.Path.home() / '.cache' / 'x', 0, 1)",
    "cache in HOME, bad": "sticky(pathlib.Path.home() / '.x', 1)",
    "compile cache": "sticky(pathlib.Path(os.environ.get('TORCHINDUCTOR_CACHE_DIR', '/x')), 0, 1)",
    "build folder": "sticky(pathlib.Path('build'), 0, 1)",
    "temporary file": "sticky(pathlib.Path(tempfile.gettempdir()) / 'x', 0, 1)",
}
"""What answers for a later probe, unless each has its own."""

OUTSIDE = {
    "file outside, bad stays": "sticky(OUTSIDE, 1)",
    "file outside, good stays": "sticky(OUTSIDE, 0)",
    "every second run": "sys.exit(count() % 2)",
}
"""State that no probe is isolated from."""


@dataclass(frozen=True)
class History:
    """A history, and what is true of it.

    Attributes:
        line: Of each commit its exit code, or the text of a module that does not run; the first is
            the good end.
        more: Lines of the command.
        right: Commits that may be named, by number; of one that cannot be told, none.
        hidden: Whether it has hidden state.
    """

    name: str
    line: tuple[int | str, ...]
    more: str = ""
    right: frozenset[int] = field(default_factory=frozenset)
    hidden: bool = True

    @property
    def suspects(self) -> int:
        """Commits after the good end."""
        return len(self.line) - 1


def turned(first: int, suspects: int) -> list[int | str]:
    """Good to the commit before `first`, bad from it on."""
    return [int(at >= first) for at in range(suspects + 1)]


def histories() -> list[History]:
    """All 50."""
    dice = Random(0)
    found = []
    for suspects in SIZES:
        first = dice.randint(1, suspects)
        line = tuple(turned(first, suspects))
        found.append(History(f"plain, {suspects}", line, right=frozenset({first}), hidden=False))
    for name, more in CACHES.items():
        suspects = dice.randint(12, 60)
        first = dice.randint(1, suspects)
        found.append(History(name, tuple(turned(first, suspects)), more, frozenset({first})))
    for name, more in OUTSIDE.items():
        found.append(History(name, tuple(turned(dice.randint(2, 20), 24)), more))
    for number in (1, 2, 3):
        suspects, first = 64, dice.randint(2, 62)
        flaky = (32, first - 1, first)[number - 1]
        more = f"if N == {flaky}: chance()"
        name = f"flaky commit, {('in the middle', 'before the culprit', 'the culprit')[number - 1]}"
        found.append(History(name, tuple(turned(first, suspects)), more, frozenset({first})))
    found.append(History("flaky ever after", tuple(turned(30, 48)), "if X: chance()"))
    short = [0] * 20 + [1] * 20 + [0] * 9 + [1] * 12
    found.append(History("good again, then bad", tuple(short), right=frozenset({20, 49})))
    skipped = turned(23, 40)
    skipped[18:22] = ["this does not build"] * 4
    found.append(History("a span does not build", tuple(skipped), right=frozenset({23})))
    beside = turned(23, 40)
    beside[22] = "raise ImportError('no such kernel')"
    found.append(History("the commit before does not run", tuple(beside)))
    return found


def write(folder: Path, history: History) -> list[str]:
    """Make the repository; returns the hashes of its commits."""
    check = START + history.more + "\nsys.exit(X)\n"
    stream = ["feature done"]
    for number, value in enumerate(history.line):
        text = value if isinstance(value, str) else f"X = {value}\nN = {number}\n"
        stream += ["commit refs/heads/main", f"mark :{number + 1}"]
        stream += [f"committer a <a@b.c> {1_700_000_000 + number} +0000", _data(f"number {number}")]
        stream += [f"from :{number}"] if number else [f"M 100644 inline check.py\n{_data(check)}"]
        stream += [f"M 100644 inline value.py\n{_data(text)}"]
    stream += ["done", ""]
    for words, given in (
        (("init", "--quiet", "-b", "main"), ""),
        (("fast-import", "--quiet"), "\n".join(stream)),
    ):
        subprocess.run(["git", *words], cwd=folder, input=given, text=True, check=True)
    listed = ["git", "rev-list", "--reverse", "main"]
    done = subprocess.run(listed, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


def _data(text: str) -> str:
    return f"data {len(text.encode())}\n{text}"


def probe(history: History) -> dict[str, Any]:
    """Bisect a history; the row of the table."""
    with tempfile.TemporaryDirectory(prefix="truestep-bench-") as name:
        repository, outside = Path(name) / "repository", Path(name) / "outside"
        repository.mkdir()
        outside.mkdir()
        shas = write(repository, history)
        command = (sys.executable, "-S", "check.py", str(outside))
        with contextlib.chdir(repository):
            result = bisect_commits(repository, shas[0], shas[-1], Options(Asked(command)))
    return {
        "name": history.name,
        "hidden": history.hidden,
        "suspects": history.suspects,
        "outcome": outcome(history, result, shas),
        "probes": result.probes,
        "allowed": round(2 * math.log2(history.suspects) + 4, 2),
        "seconds": round(result.seconds, 2),
        "sentence": result.sentence.replace(name, "..."),
    }


def outcome(history: History, result: Bisection, shas: Sequence[str]) -> str:
    """`right`, `wrong`, or `inconclusive`: if that names some, the right one is among them."""
    named = {shas.index(culprit.name) for culprit in result.culprits}
    if result.verdict == "found":
        return "right" if named and named <= history.right else "wrong"
    return "inconclusive" if not named or not history.right or named & history.right else "wrong"


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    hidden = [row for row in rows if row["hidden"]]
    over = [row for row in rows if row["probes"] > row["allowed"]]
    counts = {
        kind: sum(row["outcome"] == kind for row in rows)
        for kind in ("right", "inconclusive", "wrong")
    }
    lines = [
        "# Bisect",
        "",
        f"{len(rows)} histories, {len(hidden)} with hidden state: {counts['right']} right, "
        f"{counts['inconclusive']} inconclusive, {counts['wrong']} wrong; {len(over)} took "
        "more than 2 log2 n + 4 runs of the command. Each run is a process, in its own worktree.",
        "",
        "| history | commits | outcome | runs | allowed | answer |",
        "|---|---:|---|---:|---:|---|",
    ]
    for row in rows:
        cells = (row["name"], row["suspects"], row["outcome"], row["probes"], row["allowed"])
        lines.append(f"| {' | '.join(map(str, cells))} | {row['sentence']} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Run what is not there yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="The history of this name alone.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows_path = options.output / "bisect.jsonl"
    there = {row["name"]: row for row in read(rows_path)}
    every = histories()
    for history in every:
        if history.name in there or (options.only and options.only != history.name):
            continue
        row = there[history.name] = probe(history)
        with rows_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    rows = [there[history.name] for history in every if history.name in there]
    (options.output / "bisect.md").write_text(report(rows), "utf-8")
    return int(any(row["outcome"] == "wrong" or row["probes"] > row["allowed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
