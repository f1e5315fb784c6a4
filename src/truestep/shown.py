"""How an object shows itself: in a line, and in a notebook.

What a notebook shows is written by `truestep.report.notebook`, one of the last rooms of the house,
which is loaded by its name when a notebook asks: nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from truestep.text import visible

MOST = 299
"""Letters of a `repr`."""

_WORD = 60
"""Letters of a text in it; a sentence has as many as there is room for."""

_NOTEBOOK = "truestep.report.notebook"


class Shown:
    """An object of which a notebook shows more than its `repr`."""

    def _repr_html_(self) -> str | None:
        text: str | None = import_module(_NOTEBOOK).html(self)
        return text

    def _repr_markdown_(self) -> str | None:
        text: str | None = import_module(_NOTEBOOK).markdown(self)
        return text


def short(text: str, most: int = MOST) -> str:
    """A text in which nothing acts, cut at its end."""
    text = visible(text[: 2 * most])
    return text if len(text) <= most else text[: most - 1] + "…"


def line_of(model: BaseModel) -> str:
    """What a record says that is not its default: `Comparison(verdict=drifted, sentence='...')`."""
    parts: list[str] = []
    fields = type(model).model_fields
    for name in sorted(
        fields, key=lambda name: (name not in _FIRST, not fields[name].is_required())
    ):
        value = getattr(model, name)
        if value is None or name in _SILENT:
            continue
        if fields[name].is_required() or value != fields[name].get_default():
            parts.append(f"{name}={_value(name, value)}")
        if sum(map(len, parts)) > MOST:
            break
    return short(f"{type(model).__name__}({', '.join(parts)})", MOST)


_FIRST = frozenset({"verdict", "sentence", "name", "case_id", "exit_code"})
_SILENT = frozenset({"schema_version", "tool_version"})


def _value(name: str, value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):
        return repr(short(value, MOST - 60 if name == "sentence" else _WORD))
    if isinstance(value, BaseModel):
        return type(value).__name__
    if isinstance(value, Mapping | Sequence):
        return f"<{len(value)}>"
    return short(repr(value), _WORD)
