"""`truestep bisect`: which commit, version, flag or weight made the difference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.cli.brief import brief_option
from truestep.cli.common import end, give, json_option, progress_bar, verbose, verbose_option

if TYPE_CHECKING:
    from truestep.experiment.bisecting.bisect import Options
    from truestep.experiment.bisecting.records import Bisection

_AXES = ("--good and --bad", "--packages", "--env", "--weights")


@click.command("bisect", context_settings={"ignore_unknown_options": True})
@click.option("--good", metavar="REV", help="A commit at which the command passes.")
@click.option("--bad", metavar="REV", help="A later one at which it does not.")
@click.option(
    "--packages",
    multiple=True,
    metavar="NAME==A..B",
    help="Versions of a package, good to bad; NAME==A,B,C names them. Several: which of them.",
)
@click.option(
    "--env",
    "variables",
    multiple=True,
    metavar="NAME=A..B",
    help="Values of a variable, good to bad, either may be empty. Several: which of them.",
)
@click.option(
    "--weights",
    metavar="GOOD..BAD",
    help="Two checkpoints, files or folders: which tensors. {weights} in COMMAND is the mixed one.",
)
@click.option(
    "--import",
    "imports",
    multiple=True,
    metavar="NAME",
    help="A package that must come from the probed commit; by default that of pyproject.toml.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="VARIABLE",
    help="Leave HOME, TMPDIR or a compiler's cache as it is, instead of fresh in each probe.",
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
              help="Skip a point whose command runs longer.")  # fmt: skip
@click.option(
    "--probes",
    type=click.IntRange(min=4),
    metavar="N",
    help="Runs of the command at most; by default 2 log2 n + 4 for n suspects.",
)
@click.option("--again", is_flag=True,
              help="Take no verdict that an earlier bisect has kept; install anew.")  # fmt: skip
@verbose_option
@brief_option
@json_option
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND")
def command(**given: Any) -> None:
    """Find which commit, version, variable or weight turned a command from good to bad.

    truestep bisect --good v1 --bad HEAD -- truestep check --reference {repo}/ref.safetensors

    COMMAND says by its exit code: 0 good, 1 bad, anything else: this point cannot be judged. It
    runs without a shell, for each commit in a worktree of its own, with caches of its own; {repo}
    in it is the folder of the repository. The same command goes on where it was stopped.
    """
    from truestep.environment import command_line

    with progress_bar() as progress:
        result = _bisection(given, _options(given, progress))
    result = result.model_copy(update={"repeat": command_line()})

    def show() -> None:
        from truestep.report.bisect import print_bisection

        print_bisection(result, verbose=verbose())

    give(result, json_path=given["json_path"], show=show)
    end(result.exit_code)


def _options(given: dict[str, Any], progress: Any) -> Options:
    from truestep.experiment.bisecting.bisect import Options
    from truestep.experiment.bisecting.isolation import FRESH
    from truestep.experiment.bisecting.running import Asked

    unknown = [name for name in given["keep"] if name not in FRESH]
    if unknown:
        raise click.UsageError(f"--keep {unknown[0]}: it is not fresh; {', '.join(FRESH)} are")
    asked = Asked(given["program"], given["keep"], given["timeout"], given["again"])
    return Options(asked, given["probes"], given["imports"], progress)


def _bisection(given: dict[str, Any], options: Options) -> Bisection:
    """Search the axis that was given.

    Raises:
        UsageError: None or several were given.
    """
    from truestep.experiment.bisecting import bisect, sides

    commits = given["good"] is not None or given["bad"] is not None
    axes = (commits, bool(given["packages"]), bool(given["variables"]), bool(given["weights"]))
    if sum(axes) != 1:
        raise click.UsageError(f"give one of {', '.join(_AXES)}: what is to be searched")
    folder = Path.cwd()
    if commits:
        if given["good"] is None or given["bad"] is None:
            missing = "--good" if given["good"] is None else "--bad"
            raise click.UsageError(f"{missing} is missing: both ends are needed")
        return bisect.bisect_commits(folder, given["good"], given["bad"], options)
    if given["imports"]:
        raise click.UsageError("--import is of commits: leave it out")
    if given["packages"]:
        return sides.bisect_packages(folder, given["packages"], options)
    if given["variables"]:
        return sides.bisect_variables(folder, given["variables"], options)
    return sides.bisect_weights(folder, given["weights"], options)
