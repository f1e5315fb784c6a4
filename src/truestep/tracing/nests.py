"""Tensors in whatever a module takes or returns, each with the path that leads to it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

MAX_DEPTH = 32
"""Nests deeper than this are cut: a structure that holds itself has no end."""

_UNSAFE = re.compile(r"[./#%\x00-\x1f\x7f]")
_UNSAFE_IN_FQN = re.compile(r"[/#%\x00-\x1f\x7f]")


def leaves(value: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a nest of tuple, list, dict, dataclass or ModelOutput.

    Args:
        value: What a module returned, or was given.
        prefix: Path of the nest: `out` or `in`.

    Yields:
        Path and tensor: `out.0` for a tensor alone, else index, key or field, joined by dots
        (`out.sample`, `in.0.1`). What is neither nest nor tensor is left out.
    """
    if isinstance(value, torch.Tensor):
        yield f"{prefix}.0", value
    else:
        yield from _nested(value, prefix, 0)


def argument_leaves(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor among a call's arguments: `in.0`, `in.hidden_states`, `in.0.1`."""
    yield from _nested(args, "in", 0)
    yield from _nested(kwargs, "in", 0)


def _nested(value: Any, path: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if depth >= MAX_DEPTH:
        return
    for key, part in _parts(value):
        yield from _nested(part, f"{path}.{_UNSAFE.sub(_escaped, key)}", depth + 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Direct members of a nest; nothing of what is none."""
    if isinstance(value, Mapping):  # a ModelOutput is both: its keys leave out what is None
        for key, part in value.items():
            yield str(key), part
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name, None)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield str(index), part


def safe_fqn(fqn: str) -> str:
    """A module's name with `/`, `#`, `%` and control characters as `%2F` and the like."""
    return _UNSAFE_IN_FQN.sub(_escaped, fqn)


def _escaped(match: re.Match[str]) -> str:
    return f"%{ord(match.group()):02X}"
