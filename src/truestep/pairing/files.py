"""Rename maps on disk: a TOML file with one table, `[rename]`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from truestep import reading
from truestep.errors import FileFormatError
from truestep.files import write_text
from truestep.pairing.rename import wildcards


def write(
    path: str | Path,
    renamed: Mapping[str, str],
    several: Iterable[tuple[Sequence[str], Sequence[str]]] = (),
) -> None:
    """Write a rename map, numbers shortened to wildcards.

    Args:
        renamed: Modules of the actual side to those of the reference.
        several: Names of pairs of one with several: written as comments, for they have no single
            output to compare.

    Raises:
        WriteError: The file could not be written.
    """
    lines = ["# Modules of the actual side = modules of the reference.", "[rename]"]
    rules = wildcards({a: r for a, r in renamed.items() if a and r})
    # JSON strings are TOML strings: the same escapes.
    lines += [f"{json.dumps(actual)} = {json.dumps(rules[actual])}" for actual in rules]
    lines += [f"# {', '.join(actual)} = {', '.join(reference)}" for actual, reference in several]
    write_text(path, "\n".join(lines), "the rename map")


def read(path: str | Path) -> dict[str, str]:
    """Read a rename map.

    Raises:
        FileFormatError: The file cannot be read, or holds something else.
    """
    found = reading.read(path, "the rename map cannot be read", reading.parse_toml).get("rename")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise FileFormatError(
            "the file holds no rename map",
            where=str(path),
            measured="a table [rename] of names in quotes is needed",
            hint="write [rename], then 'layers.*' = 'blocks.*': the actual side's names first",
        )
    return dict(found)
