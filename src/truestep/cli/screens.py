"""`-v`, and the screen of a verb; light, for verbs that must feel instant."""

from __future__ import annotations

from collections.abc import Iterable

import click

from truestep.screen import Entries, print_lines, screen

_VERBOSE = "truestep.verbose"


def verbose() -> bool:
    """Whether this command is to print all that it knows."""
    context = click.get_current_context(silent=True)
    return bool(context is not None and context.meta.get(_VERBOSE))


def be_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    """Callback of options that ask for everything."""
    context.meta[_VERBOSE] = value or verbose()


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=be_verbose,
    help="Print everything, not only what fits in a dozen lines.",
)


def print_screen(
    head: str,
    *listed: Entries,
    ending: Iterable[str] = (),
    exit_code: int | None = None,
) -> None:
    """Print an answer and what is listed under it: a dozen lines, or all where -v is given."""
    print_lines(screen(head, *listed, ending=ending, verbose=verbose()), exit_code=exit_code)
