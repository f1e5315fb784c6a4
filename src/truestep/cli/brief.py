"""`--brief [PATH]`: a result in one small envelope, for agents; see `truestep.report.brief`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from truestep.cli.words import BRIEF
from truestep.text import say, say_json

if TYPE_CHECKING:
    from truestep.errors import TruestepError
    from truestep.records import Record
    from truestep.report.brief import Brief


def _kept(context: click.Context, option: click.Parameter, value: str | None) -> None:
    """Keep the path for whoever gives the result; refuse one that could not be written."""
    if value is None:
        return
    context.meta[BRIEF] = value
    if value != "-" and not context.resilient_parsing:
        from pathlib import Path

        from truestep.files import require_room

        require_room(Path(value), f"the file of {option.opts[0]}")
    one_on_stdout(context, option, context.params.get("json_path"))


def one_on_stdout(context: click.Context, _: click.Parameter, json_path: str | None) -> str | None:
    """Refuse two forms of JSON on one stdout: what `--json` calls back.

    Raises:
        UsageError: Both are to go there.
    """
    if json_path == "-" == context.meta.get(BRIEF):
        raise click.UsageError("--json and --brief cannot both go to stdout: give one a path")
    return json_path


brief_option = click.option(
    "--brief",
    is_flag=False,
    flag_value="-",
    metavar="[PATH]",
    callback=_kept,
    expose_value=False,
    help="Give the result in under 2,000 tokens as JSON, with the next command; on stdout alone, "
    "or in a file. With --json PATH, truestep show PATH ID prints its details.",
)


def in_brief(result: Record, json_path: str | None) -> bool:
    """Give a result in brief where that is asked for.

    Returns:
        Whether it is now on stdout, where nothing else belongs.
    """
    context = click.get_current_context(silent=True)
    path = context.meta.get(BRIEF) if context else None
    if path is None:
        return False
    write_brief(result, path, json_path)
    return bool(path == "-")


def write_brief(result: Record, path: str, json_path: str | None) -> None:
    """Write a result in brief, `-` to stdout."""
    from truestep.experiment.bisecting.records import Bisection
    from truestep.report.brief import brief_of
    from truestep.report.results_file import AnyResult

    if isinstance(result, Bisection):
        from truestep.report.bisect import bisection_brief

        _written(bisection_brief(result), path)
        return
    assert isinstance(result, AnyResult), "every verb with --brief has one of these"
    _written(brief_of(result, path=json_path if json_path and json_path != "-" else ""), path)


def write_error(path: str, what: str, exit_code: int, error: TruestepError | None) -> None:
    """Write in brief that nothing was judged, and why."""
    from truestep.errors import WriteError
    from truestep.report.brief import error_brief

    notes = (error.where, error.measured, error.likely) if error else ()
    hint = error.hint if error else ""
    try:
        _written(error_brief(what, notes=notes, exit_code=exit_code, hint=hint), path)
    except WriteError as unwritten:  # the outcome stays that of the error
        say(f"{type(unwritten).__name__}: {unwritten}", err=True, lines=True)


def _written(brief: Brief, path: str) -> None:
    if path == "-":
        say_json(brief.to_json())
        return
    from truestep.files import write_text

    write_text(path, brief.to_json() + "\n", "the brief")
