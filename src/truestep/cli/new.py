"""`truestep new`: files to begin with."""

from __future__ import annotations

from pathlib import Path

import click

from truestep.text import say, visible


@click.group("new")
def command() -> None:
    """Write a file to begin with, ready to run."""


@command.command("test")
@click.argument("subject", metavar="FOLDER|FILE.py:FUNCTION")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where it goes; default test_NAME.py. A file that exists is not replaced.",
)
def test(subject: str, output: Path | None) -> None:
    """Write a pytest file that passes as it stands once its reference is made.

    FOLDER is a pipeline of diffusers, as one made by `truestep tiny FluxPipeline flux`. Of a
    module, give a function that loads it: FILE.py:FUNCTION, or package.module:FUNCTION; it returns
    a module, or a module and a dict of its inputs.
    """
    from truestep.engines.folders import still
    from truestep.files import write_text
    from truestep.runtime.loading import quiet
    from truestep.testing.new_test import commands, new_test

    with quiet(), still("transformers"):
        made = new_test(subject, output)
    write_text(made.path, made.text, "the test")
    update, check = commands(made)
    say(f"WROTE {visible(str(made.path))}: one test of {visible(made.what)}")
    say(f"reference: {update}")
    say(f"check: {check}")
