"""`truestep skill`: what a coding agent has to know, as one file."""

from __future__ import annotations

from pathlib import Path

import click

from truestep.text import quoted, say


@click.command("skill")
@click.option(
    "--write",
    "folder",
    required=True,
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="DIR",
    help="Folder of the skill, as .claude/skills/truestep; - is stdout.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def command(folder: Path, force: bool) -> None:
    """Write SKILL.md: which command for which job, how to read results in brief, what not to do."""
    text = skill()
    if str(folder) == "-":
        say(text.removesuffix("\n"), lines=True)
        return
    from truestep.errors import UsageError
    from truestep.files import write_text

    path = folder / "SKILL.md"
    if path.exists() and not force:
        raise UsageError(
            "the skill was not written: there is one",
            where=str(path),
            hint=f"truestep skill --write {quoted(str(folder))} --force",
        )
    write_text(path, text, "the skill")
    say(f"skill: {path}")


def skill() -> str:
    """The text of SKILL.md."""
    from importlib import resources

    return resources.files("truestep").joinpath("skill", "SKILL.md").read_text("utf-8")
