"""Which pull request an event is of, and its one comment: created once, then updated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.fake_github import BOT, GitHub
from truestep.errors import EndpointError, FileFormatError, UsageError
from truestep.report.pull_request import Event, event_of, numbers_of, post

EVENTS = Path(__file__).parent / "events"
SHA = "a" * 40
MARK = "<!-- truestep:truestep -->"
MINE = Event("acme/video", number=7, sha=SHA)


def event(name: str, file: str = "") -> Event:
    path = str(EVENTS / f"{file or name}.json")
    environment = {"GITHUB_EVENT_NAME": name, "GITHUB_EVENT_PATH": path}
    return event_of({**environment, "GITHUB_REPOSITORY": "acme/video"})


def test_a_pull_request_of_the_repository_itself() -> None:
    assert event("pull_request") == MINE


@pytest.mark.parametrize("file", ["pull_request_fork", "pull_request_fork_deleted"])
def test_a_fork_may_not_write(file: str) -> None:
    found = event("pull_request", file)
    assert found.number is None
    assert "comes from a fork" in found.why_not
    github = GitHub()
    assert numbers_of(found, github.answer) == []
    assert github.asked == []


def test_what_is_no_pull_request_has_no_comment() -> None:
    assert event("push").why_not == "the workflow runs for push, not for a pull request"
    assert "for push, not for a pull request" in event("workflow_run", "workflow_run_push").why_not
    assert "use workflow_run" in event("pull_request_target", "pull_request").why_not


def test_a_run_of_a_fork_is_found_by_its_commit() -> None:
    """The branch's name is an attacker's: it stays one word of the request."""
    found = event("workflow_run")
    assert found.claimed
    github = GitHub(heads={7: SHA, 8: "c" * 40})
    assert numbers_of(found, github.answer) == [7]
    ((method, path),) = github.asked
    assert method == "GET"
    assert "head=someone%3Afaster%26state%3Dclosed%231&" in path


def test_of_a_branch_that_has_moved_on_nothing_is_written() -> None:
    assert numbers_of(event("workflow_run"), GitHub(heads={7: "c" * 40}).answer) == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("pull_request", {}),
        ("pull_request", {"pull_request": {"number": "7; x", "head": {"sha": SHA, "repo": None}}}),
        ("workflow_run", {"workflow_run": {"head_sha": "main", "event": "pull_request"}}),
        ("workflow_run", []),
    ],
)
def test_an_event_that_lacks_something_is_an_error(name: str, data: Any, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match="the event cannot be read"):
        event_of(
            {
                "GITHUB_EVENT_NAME": name,
                "GITHUB_EVENT_PATH": str(tmp_path / "e.json"),
                "GITHUB_REPOSITORY": "acme/video",
            }
        )


@pytest.mark.parametrize("repo", ["", "acme", "acme/video/../../x", "acme/vi deo"])
def test_outside_of_a_workflow_there_is_none(repo: str) -> None:
    environment = {"GITHUB_EVENT_NAME": "push", "GITHUB_EVENT_PATH": "x"}
    with pytest.raises(UsageError, match="this is no workflow of GitHub Actions"):
        event_of({**environment, "GITHUB_REPOSITORY": repo})


def test_the_comment_is_created_once_then_updated() -> None:
    github = GitHub()
    said = [post(MINE, 7, MARK, f"{MARK}\n{text}", github.answer)[0] for text in "aabc"]
    assert said == ["created", "unchanged", "updated", "updated"]
    (comment,) = github.comments[7]
    assert comment["body"] == f"{MARK}\nc"


def test_comments_of_others_stay_whatever_they_begin_with() -> None:
    github = GitHub()
    others = [
        github.add(7, f"{MARK}\nforged", {"login": "mallory", "type": "User"}),
        github.add(7, f"{MARK}\nforged", {"login": "github-actions[bot]x", "type": "Bot"}),
        github.add(7, "hello", BOT),
        github.add(7, f"quoted {MARK}", BOT),
        github.add(7, "<!-- truestep:other -->\nx", BOT),
    ]
    before = json.dumps(others)
    assert post(MINE, 7, MARK, f"{MARK}\na", github.answer)[0] == "created"
    assert post(MINE, 7, MARK, f"{MARK}\nb", github.answer)[0] == "updated"
    assert json.dumps(others) == before
    assert len(github.comments[7]) == 6


def test_a_comment_on_a_later_page_is_found() -> None:
    github = GitHub()
    for at in range(250):
        github.add(7, f"comment {at}", {"login": "someone", "type": "User"})
    github.add(7, f"{MARK}\nold", BOT)
    assert post(MINE, 7, MARK, f"{MARK}\nnew", github.answer)[0] == "updated"
    pages = [path for method, path in github.asked if "per_page" in path]
    assert len(pages) == 3


def test_a_token_of_a_person_finds_its_own_comment() -> None:
    github = GitHub(login="maintainer")
    github.add(7, f"{MARK}\nold", {"login": "maintainer", "type": "User"})
    assert post(MINE, 7, MARK, f"{MARK}\nnew", github.answer)[0] == "updated"


def test_an_answer_that_says_nothing_is_an_error() -> None:
    with pytest.raises(EndpointError, match="GitHub's answer cannot be read"):
        post(MINE, 7, MARK, MARK, lambda *_: {})
