"""Read text, JSON and TOML as if they were hostile. No torch.

Every reader here raises one of our errors for any content of any file: too large, not UTF-8, nested
too deeply, numbers and characters that nothing else here could hold.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from truestep.errors import FileFormatError, TruestepError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

MOST_BYTES = 64 * 2**20
"""Largest file of text that is read."""

MOST_TOML = 4 * 2**20
"""Largest TOML file: its parser is written in Python, and people write these by hand."""

_TOML_TEXTS = re.compile(
    r'"""(?:[^\\]|\\.)*?"""|' + r"'''.*?'''|" + r'"(?:[^"\\\n]|\\.)*"|' + r"'[^'\n]*'|#[^\n]*",
    re.DOTALL,
)
"""Strings and comments of TOML."""

DEEPEST = 100
"""Nests of JSON and TOML; what is read is written, printed and compared by code that recurses."""

_BLOCK = 1 << 16

_SURROGATE = re.compile("[\ud800-\udfff]")


def read(
    path: str | Path,
    what: str,
    parse: Callable[[bytes], T],
    *,
    raises: type[TruestepError] = FileFormatError,
    most: int = MOST_BYTES,
    likely: str = "",
    hint: str = "",
) -> T:
    """Read a file whole and parse it; whatever goes wrong is one of our errors.

    Args:
        path: The file.
        what: The error's first line: "the case file cannot be read".
        parse: `parse_json`, `parse_toml`, or what raises ValueError likewise.
        raises: The class of the error.
        most: Bytes that are read at most; a larger file is refused.
        likely, hint: Of the error.

    Raises:
        TruestepError: As `raises` says.
    """
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise ValueError(f"{size:,} bytes; at most {most:,} are read")
            data = file.read(size) if size else _piped(file, most)
            if len(data) > most:
                raise ValueError(f"more than {most:,} bytes")
        return parse(data)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise raises(
            what, where=str(path), measured=reason(error), likely=likely, hint=hint
        ) from None


def _piped(file: BinaryIO, most: int) -> bytes:
    """What comes from a pipe, which does not say how much that is, up to a block past `most`."""
    data = b""
    while len(data) <= most and (block := file.read(_BLOCK)):
        data += block
    return data


def parse_toml(data: bytes) -> dict[str, Any]:
    """Parse TOML that may hold anything.

    Raises:
        ValueError: It is not TOML, is larger than people write it, or cannot be used: see
            `parse_json`.
    """
    if len(data) > MOST_TOML:
        raise ValueError(f"{len(data):,} bytes; at most {MOST_TOML:,} are read")
    text = data.decode("utf-8")
    words = re.split(r"[^\w.-]+", _TOML_TEXTS.sub("_", text).translate({32: None, 9: None}))
    if max(word.count(".") for word in words) >= DEEPEST:
        # tomllib takes the square of a dotted key's length in memory.
        raise ValueError(f"a key is nested more than {DEEPEST} deep")
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    check_plain(tables)
    return tables


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """Parse JSON that may hold anything.

    Args:
        text: UTF-8, if bytes.
        unique: Refuse tables that hold a key twice, of which a reader drops one silently.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or holds a number or text that cannot be
            used: integers beyond 64 bits, lone surrogates.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    check_plain(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice[:80]!r} is there twice: a reader would drop one silently")
    return table


def check_plain(value: Any) -> None:
    """Refuse plain data that other code could not print, compare or write again.

    Raises:
        ValueError: It is nested too deeply, or holds an integer or text that cannot be used.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                if not item.isascii() and _SURROGATE.search(item):
                    raise ValueError(f"half a character (a lone surrogate) in {item[:80]!a}")
            elif isinstance(item, int) and item.bit_length() > 64:
                raise ValueError(f"an integer of {item.bit_length()} bits; 64 can be used")
        level = below


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8: byte {error.start}"
    if isinstance(error, RecursionError):
        return f"it is nested more than {DEEPEST} deep"
    lines = str(error).encode("utf-8", "backslashreplace").decode().strip().splitlines()
    if _is_of_pydantic(error):  # after the count, the key and what is wrong with it
        return " ".join(line.strip() for line in lines[1:3])[:200]
    return lines[0][:200] if lines else type(error).__name__


def _is_of_pydantic(error: BaseException) -> bool:
    """Whether a model of pydantic's refused it; without pydantic there is none."""
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(error, pydantic.ValidationError)
