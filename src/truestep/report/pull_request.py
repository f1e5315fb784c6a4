"""The pull request that a workflow of GitHub ran for, and its one comment.

Which pull request it is, is read from the event and asked of GitHub, never of the results: those
come from code that nobody vouches for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from truestep.errors import EndpointError, UsageError
from truestep.reading import parse_json, read

Call = Callable[[str, str, Any], Any]
"""Method, path and body of a request to GitHub's API; what it answers."""

_REPO = re.compile(r"[A-Za-z0-9_.-]{1,100}/[A-Za-z0-9_.-]{1,100}")
_SHA = re.compile(r"[0-9a-f]{40,64}")
_PAGE, _MOST_PAGES = 100, 30


@dataclass(frozen=True)
class Event:
    """What a workflow runs for.

    Attributes:
        repo: `owner/name`, whose pull requests are meant.
        number: Of the pull request, where the event says it.
        head: `owner:branch` of the code under test; sha: its commit.
        claimed: The results come from another run, of code that nobody vouches for.
        why_not: Why there is no comment to write; empty where there is one.
    """

    repo: str
    number: int | None = None
    head: str = ""
    sha: str = ""
    claimed: bool = False
    why_not: str = ""


def event_of(environment: Mapping[str, str]) -> Event:
    """The event that a workflow of GitHub Actions runs for.

    Args:
        environment: With `GITHUB_EVENT_NAME`, `GITHUB_EVENT_PATH` and `GITHUB_REPOSITORY`.

    Raises:
        UsageError: These are not there: this is no workflow.
        FileFormatError: The file of the event cannot be read, or lacks what such an event has.
    """
    name = environment.get("GITHUB_EVENT_NAME", "")
    path, repo = environment.get("GITHUB_EVENT_PATH", ""), environment.get("GITHUB_REPOSITORY", "")
    if not name or not path or not _REPO.fullmatch(repo):
        raise UsageError(
            "this is no workflow of GitHub Actions: there is no event to comment on",
            measured="GITHUB_EVENT_NAME, GITHUB_EVENT_PATH and GITHUB_REPOSITORY tell of one",
            hint="leave --post out",
        )
    return read(
        Path(path), "the event cannot be read", lambda data: _event(name, repo, parse_json(data))
    )


def _event(name: str, repo: str, data: Any) -> Event:
    if name == "pull_request":
        pull = _at(data, "pull_request")
        number, sha = _at(pull, "number"), str(_at(pull, "head", "sha"))
        if _full_name(pull, "head") != _full_name(pull, "base"):
            why = "the pull request comes from a fork, whose workflows may not write; a workflow "
            why += "on workflow_run writes the comment"
            return Event(repo, sha=sha, why_not=why)
        if not isinstance(number, int) or number < 1:
            raise ValueError("its pull request has no number")
        return Event(repo, number=number, sha=sha)
    if name == "workflow_run":
        run = _at(data, "workflow_run")
        sha = str(_at(run, "head_sha"))
        if not _SHA.fullmatch(sha):
            raise ValueError("its head_sha is no commit")
        if _at(run, "event") != "pull_request":
            why = f"the run was for {str(_at(run, 'event'))[:40]}, not for a pull request"
            return Event(repo, sha=sha, claimed=True, why_not=why)
        owner = str(_at(run, "head_repository", "owner", "login"))
        return Event(repo, head=f"{owner}:{_at(run, 'head_branch')}", sha=sha, claimed=True)
    if name == "pull_request_target":
        why = "pull_request_target would give the code under test this token: use workflow_run"
        return Event(repo, claimed=True, why_not=why)
    return Event(repo, why_not=f"the workflow runs for {name[:40]}, not for a pull request")


def _at(data: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            raise ValueError(f"it has no {'.'.join(keys)}")
        data = data[key]
    return data


def _full_name(pull: Any, side: Literal["head", "base"]) -> str | None:
    """Repository of one side; None where it is deleted."""
    repo = _at(pull, side, "repo")
    return None if repo is None else str(_at(repo, "full_name"))


def numbers_of(event: Event, call: Call) -> list[int]:
    """Open pull requests whose head is the commit of the event.

    One whose branch has moved on is left out: the results are of other code.
    """
    if event.why_not:
        return []
    if event.number is not None:
        return [event.number]
    head = quote(event.head, safe="")
    found = call("GET", f"repos/{event.repo}/pulls?state=open&head={head}&per_page={_PAGE}", None)
    pulls = found if isinstance(found, list) else []
    return [int(_answer(p, "number")) for p in pulls if _answer(p, "head", "sha") == event.sha]


def post(event: Event, number: int, marker: str, body: str, call: Call) -> tuple[str, str]:
    """Write the comment of a pull request, or replace what it said.

    Args:
        marker: First line of `body`; our own comment that begins with it is replaced.

    Returns:
        `created`, `updated` or `unchanged`; the comment's address.
    """
    issue = f"repos/{event.repo}/issues/{number}"
    before = next(_ours(issue, marker, call), None)
    if before is None:
        made = call("POST", f"{issue}/comments", {"body": body})
        return "created", str(_answer(made, "html_url"))
    if before.get("body") == body:
        return "unchanged", str(_answer(before, "html_url"))
    comment = f"repos/{event.repo}/issues/comments/{int(_answer(before, 'id'))}"
    return "updated", str(_answer(call("PATCH", comment, {"body": body}), "html_url"))


def _ours(issue: str, marker: str, call: Call) -> Iterator[dict[str, Any]]:
    """Comments that begin with the marker and are of this token's own account: anyone can write
    the marker."""
    viewer = call("POST", "graphql", {"query": "query { viewer { login } }"})
    login = str(_answer(viewer, "data", "viewer", "login")).removesuffix("[bot]")
    for page in range(1, _MOST_PAGES + 1):
        found = call("GET", f"{issue}/comments?per_page={_PAGE}&page={page}", None)
        comments = found if isinstance(found, list) else []
        for comment in comments:
            user = comment.get("user") or {}
            name, bot = str(user.get("login")), user.get("type") == "Bot"
            own = name == login or (bot and name.removesuffix("[bot]") == login)
            if own and str(comment.get("body")).startswith(marker):
                yield comment
        if len(comments) < _PAGE:
            return


def _answer(data: Any, *keys: str) -> Any:
    """A value of an answer.

    Raises:
        EndpointError: It has none.
    """
    try:
        return _at(data, *keys)
    except ValueError as error:
        raise EndpointError("GitHub's answer cannot be read", measured=str(error)) from None
