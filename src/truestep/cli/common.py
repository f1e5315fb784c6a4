"""What the verbs share: options, the change under test, progress, writing results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from truestep.cli import completing
from truestep.cli.brief import brief_option, in_brief, one_on_stdout
from truestep.cli.screens import print_screen as print_screen
from truestep.cli.screens import verbose as verbose
from truestep.cli.screens import verbose_option as verbose_option
from truestep.screen import LINES
from truestep.text import command_lines, say, say_json, visible, wrapped

if TYPE_CHECKING:
    from truestep.verdict import Comparison, Record

Command = TypeVar("Command", bound=Callable[..., Any])


class GroupWithDefault(click.Group):
    """A group that does something where no verb of its own follows; its options may come first."""

    default = ""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = [self.default, *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def end(code: int) -> NoReturn:
    """End the verb with an exit code. Not by SystemExit: that is how code that is not ours ends."""
    click.get_current_context().exit(code)


def give(
    result: Record, *, json_path: str | None, show: Callable[[], None], what: str = "the result"
) -> None:
    """Give a result: as JSON alone on stdout (`-`), else in words, and as JSON in a file if asked.

    Args:
        show: Prints it in words.
        what: What the file is called where it cannot be written.
    """
    if json_path == "-":
        say_json(result.model_dump_json(indent=2))
        in_brief(result, json_path)
        return
    if json_path is not None:
        from truestep.files import write_text

        write_text(json_path, result.model_dump_json(indent=2), what)
    if not in_brief(result, json_path):
        show()


file_option = click.option(
    "--file",
    "case_file",
    type=click.Path(path_type=Path),
    default=Path("truestep.toml"),
    show_default=True,
    help="Case file.",
)
names_argument = click.argument(
    "names", nargs=-1, metavar="[CASES]...", shell_complete=completing.cases
)


def case_options(function: Command) -> Command:
    """Arguments and options that choose cases."""
    for option in (
        click.option("--tier", default="default", show_default=True, help="Tier of the cases."),
        click.option("--prompt", help="Prompt of an ad-hoc case, where CASES names a model."),
        file_option,
        names_argument,
    ):
        function = option(function)
    return function


def subject_options(function: Command) -> Command:
    """Options that say a case of any pipeline on the command line."""
    for option in (
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="NAME=FILE",
            help="A picture, video, sound or tensor for an argument of the pipeline's call.",
        ),
        click.option(
            "--lora",
            "loras",
            multiple=True,
            metavar="FILE[:SCALE]",
            help="A LoRA that the reference and every candidate have.",
        ),
        click.option(
            "--prepare",
            metavar="FILE.py:FUNCTION",
            help="What is done to the pipeline of the reference and of every candidate.",
        ),
        click.option("--pipeline", metavar="CLASS", help="Pipeline class, if not the model's own."),
        click.option(
            "--subject",
            type=click.Choice(["runtime", "diffusers"]),
            help="What runs the model: truestep's stages (of families that have them, the "
            "default), or its plain pipeline.",
        ),
    ):
        function = option(function)
    return function


def _writable(
    context: click.Context, option: click.Parameter, value: str | Path | None
) -> str | Path | None:
    """Refuse a result file that could not be written, before anything is computed for it."""
    if value is not None and value != "-" and not context.resilient_parsing:
        from truestep.files import require_room

        require_room(Path(value), f"the file of {option.opts[0]}")
    if option.name == "json_path":
        one_on_stdout(context, option, str(value))
    return value


class Told:
    """Entries that are printed as they come, and counted when a dozen lines are full."""

    def __init__(self) -> None:
        self._room, self._untold = LINES - 1, 0

    def say(self, entry: Iterable[str], *, ending: Iterable[str] = ()) -> None:
        """Print an entry, if it fits or is the first.

        Args:
            entry: Lines of text.
            ending: Lines with commands, and where files are.
        """
        lines = [row for text in entry for row in wrapped("", text)]
        lines += [row for text in ending for row in command_lines(visible(text))]
        if self._untold or (len(lines) > self._room < LINES - 1 and not verbose()):
            self._untold += 1
            return
        self._room -= len(lines)
        for line in lines:
            say(line)

    def end(self) -> None:
        """Say how many were not printed."""
        if self._untold:
            say(f"... {self._untold} more (-v)")


def output_options(function: Command) -> Command:
    """`-v`, `--json [PATH]`, `--brief [PATH]` and `--report PATH`."""
    for option in (
        verbose_option,
        brief_option,
        click.option(
            "--report",
            type=click.Path(path_type=Path),
            callback=_writable,
            help="Write an HTML report.",
        ),
        click.option(
            "--json",
            "json_path",
            is_flag=False,
            flag_value="-",
            metavar="[PATH]",
            callback=_writable,
            help="Write the result as JSON; without a path, or with -, to stdout alone.",
        ),
    ):
        function = option(function)
    return function


json_option = click.option(
    "--json",
    "json_path",
    is_flag=False,
    flag_value="-",
    metavar="[PATH]",
    callback=one_on_stdout,
    help="Write the result as JSON; without a path, or with -, to stdout alone.",
)


set_option = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=completing.settings,
    help="Change a value of the case or its settings.",
)


expect_option = click.option(
    "--expect",
    type=click.Choice(["same", "different"]),
    help="different: the change is for something; `unmet` (exit 1) where the model stays the same.",
)


from_disk_option = click.option(
    "--from-disk",
    is_flag=True,
    help="Leave large weights in their files and read each when it is used: for a model that does "
    "not fit into memory.",
)

low_memory_option = click.option(
    "--low-memory",
    is_flag=True,
    help="Keep one model of the pipeline in memory at a time: what is not running is dropped, and "
    "read again when it runs.",
)


def load_change(spec: str | None, option: str = "--apply") -> Callable[[Any], Any] | None:
    """The function that `--apply file.py:function` names, or what else an error is to call it.

    Raises:
        UsageError: The file cannot be imported or has no such function.
        ProcessEndedError: It called sys.exit.
    """
    from truestep.functions import function_of, parts_of

    if spec is None:
        return None
    file, name = parts_of(spec, option)
    return function_of(Path(file), name, option)


def change_digest(spec: str | None) -> str:
    """Of the file of --apply, so that a resumed experiment runs the same change."""
    import hashlib

    if spec is None:
        return ""
    return hashlib.sha256(Path(spec.rpartition(":")[0]).read_bytes()).hexdigest()[:16]


def own_version() -> str:
    """truestep's own, for a plan; empty where it is not installed."""
    from truestep.environment import library_version

    return library_version("truestep") or ""


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Numbers that an option is given as `0,10,19`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"{option} needs numbers like 0,10,19, got {text!r}") from None


class Lines:
    """Progress as lines on stderr, one at most every `EVERY_S` seconds."""

    EVERY_S = 30.0

    def __init__(self) -> None:
        from truestep.progress import written_bytes

        self._written = written_bytes() or 0
        self._begun = self._told = time.monotonic()
        self._what = ""
        self._first = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say how far something is, how long it takes, the memory of this process, and how much it
        has written since the work began."""
        from truestep.progress import resident_peak, written_bytes

        now = time.monotonic()
        if what != self._what or done < self._first:
            self._what, self._first, self._begun = what, done, now
        if now - self._told < self.EVERY_S:
            return
        self._told = now
        line = f"{what}: {done} of {total}"
        if done > self._first:
            pace = (now - self._begun) / (done - self._first)
            line += f", {pace:.1f} s each, {_minutes(pace * (total - done))} left"
        peak = resident_peak()
        line += f", at most {peak / 1e9:.1f} GB of memory" if peak else ""
        written = (written_bytes() or 0) - self._written
        line += f", {_size(written)} written" if written >= _LEAST else ""
        say(line, err=True)


_LEAST = 10**6
"""Bytes below which nothing is said of what was written: they are what was printed."""


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr; where that is no terminal, a line every half minute."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        what = visible(what)
        key = what.split(":")[0]
        if key not in tasks or done <= 1:
            if key in tasks:
                bar.remove_task(tasks[key])
            tasks[key] = bar.add_task(what, total=total, pace="")
        task = next(t for t in bar.tasks if t.id == tasks[key])
        pace = f"{task.elapsed / done:.2f} s/step" if task.elapsed and done > 1 else ""
        bar.update(tasks[key], completed=done, description=what, pace=pace)

    with bar:
        yield show


def finish(
    comparisons: Sequence[Comparison],
    *,
    json_path: str | None,
    report: Path | None,
    told: str = "",
) -> int:
    """Print comparisons, write JSON and report, and return the exit code of the worst verdict.

    Args:
        told: What all of them together say; it stands first.
    """
    from truestep.environment import command_line
    from truestep.report import terminal
    from truestep.verdict import Results

    repeat = command_line()
    if os.environ.get("RANK", "0") != "0":  # torchrun: the first process speaks for all
        return Results.of(comparisons).exit_code
    results = Results.of([c.model_copy(update={"repeat": repeat}) for c in comparisons])
    if report is not None:
        from truestep.report import html

        html.write_many(report, results.comparisons)
    name = str(report) if report else None
    show = partial(terminal.print_results, results, report=name, verbose=verbose(), told=told)
    give(results, json_path=json_path, show=show)
    return results.exit_code
