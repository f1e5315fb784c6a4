"""Rename maps on disk: a TOML file with one table, `[rename]`."""

from __future__ import annotations

import json
from pathlib import Path

from truestep import reading
from truestep.errors import FileFormatError
from truestep.files import write_text
from truestep.pairing.records import Pairing
from truestep.pairing.rename import wildcards


def write(pairing: Pairing, path: str | Path) -> None:
    """Write what `Pairing.rename` says, numbers shortened to wildcards.

    Pairs of one with several are comments: they have no single output to compare.

    Raises:
        WriteError: The file could not be written.
    """
    lines = ["# Modules of the actual side = modules of the reference.", "[rename]"]
    rules = wildcards({a: r for a, r in pairing.rename().items() if a and r})
    # JSON strings are TOML strings: the same escapes.
    lines += [f"{json.dumps(actual)} = {json.dumps(rules[actual])}" for actual in rules]
    for pair in pairing.of("module"):
        if max(len(pair.actual), len(pair.reference)) > 1:
            lines.append(f"# {', '.join(pair.actual)} = {', '.join(pair.reference)}")
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
        )
    return dict(found)
