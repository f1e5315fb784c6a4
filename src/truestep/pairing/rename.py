"""Rename maps: actual names to reference names, `*` for one part of a dotted name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from truestep.errors import UsageError


def renamed(name: str, rename: Mapping[str, str]) -> str | None:
    """What a map makes of a module's or parameter's name; None where no rule applies.

    A rule for a module holds for everything in it; of several, the longest rule applies.

    Raises:
        UsageError: A rule has more wildcards on the reference's side than on the actual one.
    """
    if name in rename and "*" not in rename[name]:
        return rename[name]
    for rule in sorted(rename, key=len, reverse=True):
        target = rename[rule]
        if target.count("*") > rule.count("*"):
            raise UsageError(
                f"the rename rule {rule!r} = {target!r} has a wildcard that nothing fills",
                hint="use at most as many * on the right as on the left",
            )
        pattern = "([^.]+)".join(re.escape(part) for part in rule.split("*"))
        found = re.fullmatch(rf"{pattern}(\..+)?", name)
        if found:
            values = iter(found.groups()[:-1])
            made = "".join(next(values) if c == "*" else c for c in target)
            return made + (found.groups()[-1] or "")
    return None


def numbered(name: str) -> tuple[str, str] | None:
    """`blocks.*.norm2` and `3` of `blocks.3.norm2`: its first number apart; None without one."""
    parts = name.split(".")
    at = _first_number(parts)
    return None if at is None else (".".join([*parts[:at], "*", *parts[at + 1 :]]), parts[at])


def closed(
    links: Mapping[str, str], actual: Collection[str], reference: Collection[str]
) -> dict[str, str]:
    """Pairs, and the name that an exchange leaves over on one side with that on the other.

    Args:
        links: Actual names to the reference's: `norm3` is `norm2`.
        actual, reference: Names that may still be paired: `norm2` is then `norm3`.
    """
    made = dict(links)
    for start in [a for a in links if a not in set(links.values())]:
        end = start
        while end in made:
            end = made[end]
        if end in actual and start in reference:
            made[end] = start
    return made


def wildcards(names: Mapping[str, str]) -> dict[str, str]:
    """Shorten a map: rules that differ only in one number, the same on both sides, become one.

    A rule with `*` is kept only where it says the same as all the names it replaces.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for actual, reference in names.items():
        groups.setdefault(_starred(actual, reference), []).append(actual)
    made: dict[str, str] = {}
    for (rule, target), members in groups.items():
        kept = {rule: target}
        if len(members) > 1 and all(renamed(name, kept) == names[name] for name in members):
            made[rule] = target
        else:
            made.update({name: names[name] for name in members})
    return made


def _starred(actual: str, reference: str) -> tuple[str, str]:
    """Both names with their first number replaced, where it is the same on both sides."""
    own, theirs = (_first_number(name.split(".")) for name in (actual, reference))
    if own is None or theirs is None:
        return actual, reference
    left, right = actual.split("."), reference.split(".")
    if left[own] != right[theirs]:
        return actual, reference
    left[own] = right[theirs] = "*"
    return ".".join(left), ".".join(right)


def _first_number(parts: Iterable[str]) -> int | None:
    return next((i for i, part in enumerate(parts) if part.isdecimal()), None)
