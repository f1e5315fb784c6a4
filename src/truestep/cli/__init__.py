"""The command line. One thin module a verb; torch is imported inside a verb only."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; every deliberate error is five parts on stderr and an exit code."""
    from truestep.cli.app import app
    from truestep.errors import TruestepError

    try:
        app(prog_name="truestep")
    except TruestepError as error:
        sys.stdout.flush()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
