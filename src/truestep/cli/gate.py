"""`truestep gate`: judge one change with the baseline recorded anew; whether a gate notices damage,
and limits that come from a measured floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from truestep.cli.common import (
    GroupWithDefault,
    case_options,
    end,
    expect_option,
    finish,
    output_options,
    progress_bar,
    subject_options,
)
from truestep.cli.selftest import selftest
from truestep.cli.thresholds import thresholds
from truestep.cli.words import SAYING, option_words, sole_case
from truestep.text import quoted


class _Gate(GroupWithDefault):
    """`truestep gate CASES` judges a change."""

    default = "against"


@click.group("gate", cls=_Gate, subcommand_metavar="[CASES]... --baseline REV | VERB [ARGS]...")
def command() -> None:
    """Judge one change with no frozen reference; say whether a gate is any good.

    truestep gate CASES --baseline REV records the baseline anew and checks the working tree against
    it. Its options: truestep gate against --help.
    """


def _no_change(_: click.Context, __: click.Parameter, value: str | None) -> None:
    """Say which verb judges a function that changes the pipeline.

    Raises:
        UsageError: There is one.
    """
    from truestep.errors import UsageError

    if value is not None:
        name = "CASE " if sole_case() is not None else ""
        raise UsageError(
            "gate judges the working tree against --baseline, and takes no --apply",
            likely="a function that changes the pipeline is judged by check",
            hint=f"truestep check {name}--apply {quoted(value)}",
        )


@command.command("against")
@click.option("--apply", callback=_no_change, expose_value=False, hidden=True)
@case_options
@subject_options
@click.option(
    "--baseline",
    required=True,
    metavar="REV|ENV",
    help="A commit of this repository, or the folder of another Python environment.",
)
@click.option(
    "--depth",
    type=click.Choice(["steps", "final"]),
    default="steps",
    show_default=True,
    help="Replay each stage on recorded inputs, or generate freely and compare latents.",
)
@expect_option
@output_options
def against(
    baseline: str,
    depth: str,
    expect: str | None,
    json_path: str | None,
    report: Path | None,
    **said: Any,
) -> None:
    """Record the baseline anew, in this build, and check the working tree against it.

    The baseline is a commit in a worktree of its own, or this code in another environment. Both
    sides run in processes of their own, with compile caches of their own; what was recorded is
    thrown away. CASES as in truestep check.
    """
    from truestep.experiment.remade import Asked, baseline_of, judged

    folder = Path.cwd()
    trusted = baseline_of(baseline, folder)
    with progress_bar() as progress:
        asked = Asked(
            folder=folder,
            words=_words(**said),
            files=_files(said["names"], said["case_file"]),
            options=["--depth", depth, *(["--expect", expect] if expect else [])],
            floor=depth,
            told=progress,
        )
        results = judged(trusted, asked)
    end(finish(results, json_path=json_path, report=report))


def _words(**said: Any) -> list[str]:
    """The same cases in another verb."""
    words = [*said["names"], "--file", str(said["case_file"]), "--tier", said["tier"]]
    return [*words, *option_words(said, SAYING, "record")]


def _files(names: tuple[str, ...], case_file: Path) -> list[Path]:
    """Case files that are read."""
    files = [Path(name) for name in names if name.endswith(".toml")]
    return files or [case_file]


command.add_command(selftest)
command.add_command(thresholds)
