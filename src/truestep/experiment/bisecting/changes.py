"""Changes that can be made or left: variables with two values, packages with two versions.

Each has its values from good to bad; between the two there may be more, which are searched when the
change alone makes the difference. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from truestep.errors import UsageError

MOST_VALUES = 4096
"""Whole numbers of a range, at most."""

_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class Change:
    """Something with a good value and a bad one.

    Attributes:
        values: From the good one to the bad one; an empty value is none.
    """

    name: str
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        """Both ends in words."""
        return f"{self.values[0] or '(unset)'} to {self.values[-1] or '(unset)'}"


def values_of(changes: Sequence[Change], chosen: Iterable[int]) -> dict[str, str]:
    """The value of each change where only the chosen ones are made."""
    made = {*chosen}
    return {c.name: c.values[-1 if at in made else 0] for at, c in enumerate(changes)}


def variables(specs: Sequence[str]) -> list[Change]:
    """Changes of variables: `NAME=A..B`, where whole numbers are a range, or `NAME=A:B`.

    Raises:
        UsageError: One is not of these forms, or a name is there twice.
    """
    changes = []
    for spec in specs:
        name, equals, rest = spec.partition("=")
        ends = rest.split("..") if rest.count("..") == 1 else rest.split(":")
        if not equals or not _VARIABLE.fullmatch(name) or len(ends) != 2 or ends[0] == ends[1]:
            raise UsageError(
                "--env needs a variable with a good and a bad value",
                where=f"--env {spec}",
                hint="write it as NAME=GOOD..BAD, or NAME=GOOD:BAD for two values alone",
            )
        first, last = ends
        values = _range(first, last, spec) if ".." in rest else (first, last)
        changes.append(Change(name, values))
    return _named_once(changes, "--env")


def _range(first: str, last: str, spec: str) -> tuple[str, ...]:
    """Whole numbers from one to the other; just the two where they are none."""
    if not all(re.fullmatch(r"-?(0|[1-9]\d{0,999})", text) for text in (first, last)):
        return first, last
    low, high = int(first), int(last)
    count = abs(high - low) + 1
    if count > MOST_VALUES:
        raise UsageError(
            "--env has more values than can be searched",
            where=f"--env {spec}",
            measured=f"{count} whole numbers, of at most {MOST_VALUES}",
            hint=f"write it as {spec.partition('=')[0]}={first}:{last} for the two values alone",
        )
    step = 1 if high > low else -1
    return tuple(map(str, range(low, high + step, step)))


@dataclass(frozen=True)
class Versions:
    """A package and what was said of its versions: both ends, or all of them."""

    name: str
    said: tuple[str, ...]
    ends_only: bool


def packages(specs: Sequence[str]) -> list[Versions]:
    """Packages as they are said: `NAME==A..B`, or `NAME==A,B,C`.

    Raises:
        UsageError: One is not of these forms, or a name is there twice.
    """
    found = []
    for spec in specs:
        name, equals, rest = spec.partition("==")
        ends_only = ".." in rest
        said = tuple(text.strip() for text in rest.split(".." if ends_only else ","))
        wrong = len(said) < 2 or (ends_only and len(said) != 2) or len({*said}) != len(said)
        if not equals or not _PACKAGE.fullmatch(name) or wrong or not all(map(_version, said)):
            raise UsageError(
                "--packages needs a package with a good and a bad version",
                where=f"--packages {spec}",
                hint="write it as NAME==GOOD..BAD, or NAME==A,B,C to name all versions",
            )
        found.append(Versions(name, said, ends_only))
    _named_once([Change(each.name, each.said) for each in found], "--packages")
    return found


def _version(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+!-]*", text))


def between(said: Versions, listed: Sequence[str]) -> Change:
    """All versions of a package from its good to its bad one.

    Args:
        listed: Those that there are, newest or oldest first.

    Raises:
        UsageError: An end is not among them.
    """
    if not said.ends_only:
        return Change(said.name, said.said)
    at = []
    for end in said.said:
        places = [i for i, version in enumerate(listed) if same_version(version, end)]
        if not places:
            raise UsageError(
                f"there is no {said.name} {end}",
                measured=f"there are {', '.join(listed[:8])}{', ...' if listed[8:] else ''}",
                hint="write it as NAME==GOOD..BAD, or NAME==A,B,C to name all versions",
            )
        at.append(places[0])
    first, last = at
    step = 1 if last > first else -1
    return Change(said.name, tuple(listed[i] for i in range(first, last + step, step)))


def same_version(one: str, other: str) -> bool:
    """Whether two versions are the same, zeros at their ends left out."""
    return re.sub(r"(\.0)+$", "", one) == re.sub(r"(\.0)+$", "", other)


def _named_once(changes: list[Change], option: str) -> list[Change]:
    names = [change.name for change in changes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"{option} names {twice} twice", hint="drop one of them")
    return changes
