"""The command line. One thin module a verb; torch is imported inside a verb only."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from truestep.errors import TruestepError
    from truestep.guard import Ended


def main() -> None:
    """Run the command line, so that no code it runs can end it with 0 unjudged."""
    from truestep.guard import run

    sys.exit(run(run_here, _ended))


def _ended(ended: Ended) -> int:
    from truestep.cli.ended import report

    return report(ended)


def run_here() -> int:
    """Run the command line in this process; every error is five parts on stderr."""
    import click

    from truestep.cli.app import app
    from truestep.errors import ProcessEndedError, TruestepError, surviving
    from truestep.text import say

    began = time.time()
    try:
        try:
            with surviving("code that is not truestep's"):
                code = app(prog_name="truestep", standalone_mode=False)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except click.Abort as error:  # how click passes an interrupt on
            raise error.__cause__ or KeyboardInterrupt from None
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message(), err=True, lines=True)
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        if context is not None:
            say(context.get_usage(), err=True, lines=True)
            say(f"Try '{context.command_path} --help' for help.", err=True)
            say(err=True)
        say(f"Error: {error.format_message()}", err=True)
        _in_brief(error.format_message(), error.exit_code)
        return error.exit_code
    except ProcessEndedError as error:
        from truestep.cli.ended import invalid

        return invalid(error, since=began)
    except TruestepError as error:
        from truestep.cli.words import spelled

        say(f"{type(error).__name__}: {spelled(error)}", err=True, lines=True)
        _in_brief(error.what, error.exit_code, error)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        import signal

        from truestep.cli.ended import interrupted

        return interrupted(getattr(stop, "number", signal.SIGINT), since=began)
    except BaseException as error:
        return _unexpected(error)


def _in_brief(what: str, exit_code: int, error: TruestepError | None = None) -> None:
    """Give the error in brief, too, where that was asked for."""
    from truestep.cli.words import BRIEF, asked_for

    path = asked_for()[1].get(BRIEF)
    if path is not None and os.environ.get("RANK", "0") == "0":
        from truestep.cli.brief import write_error

        write_error(path, what, exit_code, error)


def _unexpected(error: BaseException) -> int:
    """Say what nobody foresaw: a fault of ours, or of code that is not ours; never a verdict."""
    from truestep.environment import command_line
    from truestep.errors import TruestepError, is_foreign, last_frame, one_line
    from truestep.text import say

    if os.environ.get("TRUESTEP_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    whose = "code that is not truestep's raised" if is_foreign(error) else "truestep failed:"
    told = TruestepError(
        f"{whose} {one_line(error)}",
        where=last_frame(error),
        hint=f"TRUESTEP_TRACEBACK=1 {command_line()}",
    )
    say(f"{type(told).__name__}: {told}", err=True, lines=True)
    return told.exit_code
