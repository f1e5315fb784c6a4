"""What the content of a case says, of whichever kind it is: its id, its differences, its errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from truestep.errors import CaseError
from truestep.text import slug
from truestep.verdict import Difference


def readable_id(content: Mapping[str, Any], model: str, *names: str) -> str:
    """Readable, collision-free and safe as a file name: slugs plus 12 digits of a SHA-256.

    Args:
        content: What the digits are of.
        model: A folder or a hub id, of which the last part counts.
        names: The class, if there is one, and last the prompt.
    """
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    *short, prompt = model.rstrip("/").rsplit("/", 1)[-1], *names
    slugs = [*(slug(name, 24) for name in short), slug(prompt, 40)]
    return "-".join([*filter(None, slugs), digest])


def case_differences(
    actual: Mapping[str, Any], reference: Mapping[str, Any]
) -> tuple[Difference, ...]:
    """Dotted keys of two cases' contents whose values differ."""
    return mapping_differences(_flat(actual), _flat(reference))


def mapping_differences(
    actual: Mapping[str, Any], reference: Mapping[str, Any]
) -> tuple[Difference, ...]:
    """Keys of both mappings whose values differ, sorted; an absent key reads `(absent)`."""
    keys = sorted({*actual, *reference})
    absent = "(absent)"
    return tuple(
        Difference(
            key=key, actual=str(actual.get(key, absent)), reference=str(reference.get(key, absent))
        )
        for key in keys
        if actual.get(key, absent) != reference.get(key, absent)
    )


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A case's content by dotted key, without what is not part of its id."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    for key in ("settings.device", "settings.attention_backend", "settings.compile"):
        flat.pop(key, None)
    return flat


def invalid_case(error: ValidationError, *, likely: Callable[[str], str]) -> CaseError:
    """One clear error from pydantic's list: every key, what it holds and what is allowed.

    Args:
        error: Of a case.
        likely: Says what was meant by the first unknown key.
    """
    lines, meant = [], ""
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key")
            meant = meant or likely(key)
        elif item["type"] == "missing":
            lines.append(f"{key}: required, not given")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{key} = {item['input']!r:.60}: {message[:1].lower()}{message[1:]}")
    measured = "\n".join(lines) if len(lines) > 1 else ""
    what = f"the case is not valid: {lines[0]}"
    return CaseError(what, where="case", measured=measured, likely=meant)
