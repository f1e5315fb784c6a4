"""`truestep comment`: results as pull requests and pipelines show them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from truestep.text import say

if TYPE_CHECKING:
    from truestep.report.markdown import Frame
    from truestep.report.pull_request import Event
    from truestep.report.results_file import AnyResult

FORMATS = ("markdown", "summary", "annotations", "sarif", "gitlab", "junit")


def _https(_: click.Context, option: click.Parameter, value: str | None) -> str:
    """An address that can stand in Markdown as it is."""
    import re

    if value and not re.fullmatch(r"https://[A-Za-z0-9._~/?#=&%+:@-]{1,500}", value):
        raise click.UsageError(f"{option.opts[0]} needs an address like https://host/path")
    return value or ""


@click.command("comment")
@click.argument("result", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="markdown",
    show_default=True,
    help="A comment, a job's summary, GitHub's annotations, SARIF, GitLab's code quality, JUnit.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write it there, not to stdout; replaces it."
)
@click.option(
    "--link", callback=_https, metavar="URL", help="Where the report and the results can be had."
)
@click.option(
    "--key",
    default="truestep",
    show_default=True,
    help="Tells the comments of several workflows apart.",
)
@click.option(
    "--post",
    is_flag=True,
    help="In a workflow of GitHub Actions: write it as the one comment of its pull request, by gh.",
)
def command(result: Path, form: str, output: Path | None, link: str, key: str, post: bool) -> None:
    """Render RESULT, a file that --json of check, compare, engine, ab, perf wrote.

    RESULT may come from code that nobody vouches for: it is read as hostile, what it says is
    escaped, and in a workflow on workflow_run the comment says whose claim it is. The exit code is
    0 whatever the verdict is.
    """
    from truestep.report.markdown import Frame
    from truestep.report.pull_request import event_of
    from truestep.report.results_file import read_result

    if post and (form != "markdown" or output is not None):
        raise click.UsageError(
            "--post writes a comment: it goes with neither --format nor --output"
        )
    event = event_of(os.environ) if post or _is_claimed() else None
    found = read_result(result)
    claimed = event.sha if event is not None and event.claimed else ""
    text = rendered(found, form, Frame(key=key, link=link, claimed_by=claimed))
    if post and event is not None:
        _post(event, key, text)
    elif output is not None:
        from truestep.files import write_text

        write_text(output, text, "the comment")
        say(f"{form}: {output}", err=True)
    else:
        say(text.removesuffix("\n"), lines=True)


def _is_claimed() -> bool:
    """Whether this is a workflow that runs after another, whose results it has."""
    return os.environ.get("GITHUB_EVENT_NAME") == "workflow_run"


def rendered(result: AnyResult, form: str, frame: Frame) -> str:
    """A result in one of `FORMATS`."""
    from truestep.report import ci, markdown

    prefix = below_the_root(os.environ)
    forms: Mapping[str, Callable[[], str]] = {
        "markdown": lambda: markdown.comment(result, frame),
        "summary": lambda: markdown.summary(result, frame),
        "annotations": lambda: ci.workflow_commands(result, prefix),
        "sarif": lambda: ci.sarif(result, prefix),
        "gitlab": lambda: ci.code_quality(result, prefix),
        "junit": lambda: ci.junit(result),
    }
    return forms[form]()


def below_the_root(environment: Mapping[str, str]) -> str:
    """The current folder below the root of the repository, as the beginning of a path."""
    root = environment.get("GITHUB_WORKSPACE") or environment.get("CI_PROJECT_DIR")
    if not root:
        return ""
    here = Path.cwd().resolve()
    below = here.is_relative_to(Path(root).resolve()) and here != Path(root).resolve()
    return f"{here.relative_to(Path(root).resolve()).as_posix()}/" if below else ""


def _post(event: Event, key: str, text: str) -> None:
    """Write the comment of every pull request that the event is of."""
    from truestep.report.markdown import marker
    from truestep.report.pull_request import numbers_of, post

    numbers = numbers_of(event, gh)
    for number in numbers:
        what, address = post(event, number, marker(key), text, gh)
        say(f"{what}: {address}")
    if not numbers:
        why = event.why_not or f"no open pull request has the commit {event.sha} as its head"
        say(f"no comment: {why}")


def gh(method: str, path: str, body: Any) -> Any:
    """One request by GitHub's own command line, which knows the token and the host.

    Raises:
        UsageError: It is not installed.
        EndpointError: GitHub refused, or its answer is no JSON.
    """
    import json
    import subprocess

    from truestep.errors import EndpointError, UsageError
    from truestep.reading import parse_json

    words = ["gh", "api", "--method", method, path]
    words += ["--input", "-"] if body is not None else []
    given = None if body is None else json.dumps(body)
    try:
        done = subprocess.run(words, input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError(
            "gh, GitHub's command line, is not installed", hint="leave --post out"
        ) from None
    if done.returncode:
        raise EndpointError(
            f"GitHub refused {method} {path.partition('?')[0]}",
            measured=(done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300],
            likely="the token may not write here: permissions: pull-requests: write",
        )
    try:
        return parse_json(done.stdout)
    except ValueError as error:
        raise EndpointError("GitHub's answer cannot be read", measured=str(error)) from None
