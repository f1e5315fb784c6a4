"""`truestep trace recorder`: one file that makes recordings where truestep cannot be installed."""

from __future__ import annotations

from pathlib import Path

import click

from truestep.cli.common import print_screen
from truestep.text import quoted, say


@click.command("recorder")
@click.option(
    "--write",
    "path",
    required=True,
    type=click.Path(path_type=Path, allow_dash=True),
    help="Where to write the file; - is stdout.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def recorder(path: Path, force: bool) -> None:
    """Write a recorder that needs torch and the standard library only, for the environment of an
    official implementation. Recordings that it makes are judged here."""
    text = standalone_source()
    if str(path) == "-":
        say(text.removesuffix("\n"), lines=True)
        return
    from truestep.errors import UsageError
    from truestep.files import write_text

    if path.exists() and not force:
        raise UsageError(
            "the recorder was not written: there is a file of this name",
            where=str(path),
            hint=f"truestep trace recorder --write {quoted(str(path))} --force",
        )
    write_text(path, text, "the recorder")
    print_screen(f"{path}: copy it to the other environment; python {path.name} --help")


def standalone_source() -> str:
    """Source of the recorder, with the version of this truestep in it."""
    from importlib import resources

    from truestep.environment import library_version

    version = library_version("truestep") or "0"
    text = resources.files("truestep.standalone").joinpath("recorder.py").read_text("utf-8")
    head = (
        f"# Written by truestep {version} (truestep trace recorder --write recorder.py)\n"
        "# for another environment. How to use it is below, and in `python recorder.py --help`.\n"
    )
    return head + text.replace('VERSION = "source"', f'VERSION = "{version}"', 1)
