"""What is said of a command that did not run to its end: what ended it, what is kept, what next."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from truestep.cli.words import BRIEF, asked_for
from truestep.environment import command_line
from truestep.errors import ProcessEndedError
from truestep.guard import Ended
from truestep.text import listed, quoted, say

_MOST_NAMES = 5


def report(ended: Ended) -> int:
    """Say what ended the verb's process before it had judged; returns the exit code."""
    if ended.asked and ended.ended_by:  # it was stopped before it could say so
        return interrupted(ended.asked, since=ended.began)
    by_itself = f"the process ended itself with exit status {ended.exit_code}"
    what = f"{ended.ended_by} ended the process" if ended.ended_by else by_itself
    error = ProcessEndedError(
        f"{what} before anything was judged",
        where=ended.place,
        measured=ended.measured,
        likely=ended.likely,
    )
    return invalid(error, since=ended.began)


def invalid(error: ProcessEndedError, *, since: float) -> int:
    """Print the outcome `invalid`, also as JSON where that was asked for; returns its exit code."""
    _, parameters = asked_for()
    kept, again = what_is_left(parameters, since)
    error.measured = "; ".join(part for part in (error.measured, kept) if part)
    error.hint = error.hint or again
    error.what = f"invalid: {error.what}"
    say(f"{type(error).__name__}: {error}", err=True, lines=True)
    if os.environ.get("RANK", "0") == "0":
        _write(error, parameters.get("json_path"), parameters.get(BRIEF))
    return error.exit_code


def interrupted(number: int, *, since: float) -> int:
    """Print one line on what was written and how to go on; returns the exit code, 128 + signal."""
    kept, again = what_is_left(asked_for()[1], since)
    word = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    say(f"{word}: {kept}; to go on: {again}", err=True)
    return 128 + number


def what_is_left(parameters: dict[str, Any], since: float) -> tuple[str, str]:
    """What was written since a time, in words, and the command that goes on."""
    from truestep.recording.store import DEFAULT_ROOT, PARTIAL

    texts = [value for key, value in parameters.items() if key == "json_path" and value]
    paths = [value for value in parameters.values() if isinstance(value, Path)]
    output = parameters.get("output")
    partial = [output.with_name(output.name + PARTIAL)] if isinstance(output, Path) else []
    places = dict.fromkeys([*paths, *map(Path, texts), *partial, DEFAULT_ROOT])
    names = [name for place in places for name in _written(place, since)]
    kept = f"kept: {listed(names, _MOST_NAMES)}" if names else "nothing was written"
    again = command_line()
    if "resume" in parameters and not parameters["resume"] and names:
        again += " --resume"
    elif isinstance(output, Path) and (
        spools := sorted(output.parent.glob(f"{output.name}.*.spool"))
    ):
        again = f"truestep trace recover {quoted(str(spools[-1]))}"
    return kept, again


def _written(place: Path, since: float) -> Iterator[str]:
    """A file that is newer than a time; of a folder, how many files in it are."""
    try:
        if place.is_dir():
            files = (path for path in place.rglob("*") if not path.name.startswith("."))
            newer = sum(path.is_file() and path.stat().st_mtime >= since for path in files)
            if newer:
                yield f"{place}{os.sep} ({newer} file{'s' * (newer > 1)})"
        elif place.is_file() and place.stat().st_mtime >= since:
            yield str(place)
    except OSError:  # it went away, or is not ours to read: nothing can be said of it
        return


def _write(error: ProcessEndedError, json_path: str | None, brief_path: str | None) -> None:
    """Write the outcome as JSON, and in brief, where they were asked for."""
    if json_path is None and brief_path is None:
        return
    from truestep.cli.brief import write_brief
    from truestep.cli.common import give
    from truestep.environment import library_version
    from truestep.verdict import Comparison, Results, Rule, Side, Verdict

    result = Comparison(
        tool_version=library_version("truestep") or "",
        verdict=Verdict.INVALID,
        sentence=error.what,
        rule=Rule(name="run", text="a candidate is judged by what it gives"),
        actual=Side(label="candidate"),
        reference=Side(label="reference"),
        notes=tuple(part for part in (error.where, error.measured, error.likely) if part),
        hint=error.hint,
        repeat=command_line(),
    )
    if json_path is not None:
        give(Results.of([result]), json_path=json_path, show=lambda: None)
    if brief_path is not None:
        write_brief(Results.of([result]), brief_path, json_path)
