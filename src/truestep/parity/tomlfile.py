"""Write plain data as TOML: what `tomllib` reads back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from truestep import reading

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_WIDTH = 88


def dumps(data: Mapping[str, Any]) -> str:
    """TOML of nested mappings, sequences, strings, numbers and flags; None is left out."""
    return "\n".join(_table(data, ())).strip() + "\n"


def read(path: Path, what: str) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        FileFormatError: It cannot be read or is no TOML.
    """
    return reading.read(
        path,
        f"{what} cannot be read",
        reading.parse_toml,
        likely="a merge conflict or an edit by hand",
        hint=f"git checkout {path}  # or delete it and run the parity tests again",
    )


def _table(data: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines, below = [], []
    for key, value in data.items():
        if isinstance(value, Mapping):
            if value:
                inner = _table(value, (*path, key))
                plain = any(not isinstance(v, Mapping) for v in value.values())
                below += ["", f"[{_dotted((*path, key))}]", *inner] if plain else inner
        elif _is_tables(value):
            for item in value:
                below += ["", f"[[{_dotted((*path, key))}]]", *_table(item, (*path, key))]
        elif value is not None:
            lines.append(f"{_key(key)} = {_value(value)}")
    return lines + below


def _is_tables(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(item, Mapping) for item in value)
    )


def _dotted(path: Sequence[str]) -> str:
    return ".".join(_key(part) for part in path)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return repr(value) if "." in repr(value) or "e" in repr(value) else f"{value}.0"
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, str):
        return _string(value)
    items = [_value(item) for item in value]
    flat = f"[{', '.join(items)}]"
    if len(flat) <= _WIDTH:
        return flat
    return "[\n" + "".join(f"  {item},\n" for item in items) + "]"
