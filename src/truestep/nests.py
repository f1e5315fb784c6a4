"""Nests of tensors: whatever a module, a function or a file takes, returns or holds, by path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from truestep.errors import UsageError

MAX_DEPTH = 32
"""Nests deeper than this are cut: a structure that holds itself has no end."""

_UNSAFE = re.compile(r"[./#%\x00-\x1f\x7f]")
_UNSAFE_IN_FQN = re.compile(r"[/#%\x00-\x1f\x7f]")

_PLAIN = (str, bytes, bool, type(None), torch.dtype, torch.device)
"""What says nothing in an output: left out."""


def leaves(value: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a nest of tuple, list, dict, dataclass or ModelOutput.

    Args:
        value: What a module returned, or was given.
        prefix: Path of the nest: `out` or `in`.

    Yields:
        Path and tensor: `out.0` for a tensor alone, else index, key or field, joined by dots
        (`out.sample`, `in.0.1`). Arrays are tensors, and plain objects give the tensors that they
        hold; what is none of these is left out, see `unread`.
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
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.isnative:
        yield path, torch.from_numpy(np.array(value))
        return
    if depth >= MAX_DEPTH:
        return
    for key, part in parts(value) if _is_nest(value) else _held(value):
        yield from _nested(part, f"{path}.{_UNSAFE.sub(_escaped, key)}", depth + 1)


def _held(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that a plain object holds: a `latent_dist`."""
    if isinstance(value, (type, torch.nn.Module)):
        return
    for key, item in getattr(value, "__dict__", {}).items():
        if isinstance(item, torch.Tensor):
            yield key, item


def unread(value: Any, depth: int = 0) -> Iterator[str]:
    """Kinds of what is in a nest and is neither read as tensors nor says nothing."""
    if isinstance(value, (torch.Tensor, int, float, complex, np.generic, *_PLAIN)):
        return
    if _is_nest(value) and depth < MAX_DEPTH:
        for _, part in parts(value):
            yield from unread(part, depth + 1)
    elif not any(True for _ in _nested(value, "", MAX_DEPTH - 1)):
        yield type(value).__name__


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Direct members of a nest, each with its key, field or index; nothing of what is none."""
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


def flatten(value: Any) -> dict[str, torch.Tensor]:
    """All tensors of a nest by dotted name; a lone tensor is `out`.

    Goes into mappings (`ModelOutput` among them), sequences, dataclasses and plain objects that
    hold tensors (a `latent_dist`). Arrays and numbers become tensors; strings, flags and None say
    nothing and are left out.

    Raises:
        UsageError: Something in it is none of these, or it holds no tensor at all.
    """
    found = dict(_content(value, "out"))
    if not found:
        raise UsageError(
            f"the output is a {type(value).__name__} that holds no tensor",
            hint="return tensors in any nest of tuple, list, dict and dataclass",
        )
    prefix = "out."
    if all(name.startswith(prefix) for name in found) and not _is_sequence(value):
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _content(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, np.ndarray):
        yield name, torch.from_numpy(np.array(value))
    elif isinstance(value, np.generic) or (isinstance(value, (int, float)) and value is not True):
        if not isinstance(value, bool):
            yield name, torch.as_tensor(value, dtype=torch.float64)
    elif isinstance(value, _PLAIN):
        return
    elif _is_sequence(value) and _all_numbers(value):
        yield name, torch.tensor([float(item) for item in value], dtype=torch.float64)
    elif _is_sequence(value):
        for index, item in enumerate(value):
            yield from _content(item, f"{name}.{index}")
    elif _is_nest(value):
        for key, item in parts(value):
            yield from _content(item, f"{name}.{key}")
    else:
        yield from _content_of_object(value, name)


def _is_nest(value: Any) -> bool:
    dataclass = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclass or isinstance(value, Mapping | tuple | list)


def _all_numbers(value: Sequence[Any]) -> bool:
    return len(value) > 0 and all(
        isinstance(item, (int, float)) and not isinstance(item, bool) for item in value
    )


def _content_of_object(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    held = {
        key: item
        for key, item in getattr(value, "__dict__", {}).items()
        if isinstance(item, torch.Tensor)
    }
    if not held:
        raise UsageError(
            f"the output holds a {type(value).__name__}, which cannot be taken apart",
            where=name,
            hint="convert it in the loader's function: every output has to be compared",
        )
    for key, item in held.items():
        yield f"{name}.{key}", item


def take_apart(
    inputs: Mapping[str, Any],
) -> tuple[dict[str, torch.Tensor], Callable[[Mapping[str, torch.Tensor]], dict[str, Any]]]:
    """Tensors of an input nest by dotted name, and a function that puts the nest together again.

    Raises:
        UsageError: A tensor is not on the CPU, or there is none.
    """
    tensors: dict[str, torch.Tensor] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise UsageError(
                    "an input was not made on the CPU",
                    where=name,
                    measured=f"it is on {value.device}",
                    likely="random numbers differ between devices, so the two sides get others",
                    hint="make it on the CPU; the loaders' functions move it",
                )
            tensors[name] = value
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                collect(item, f"{name}.{index}")
        elif isinstance(value, Mapping):
            for key, item in parts(value):
                collect(item, f"{name}.{key}" if name else key)

    def build(value: Any, name: str, given: Mapping[str, torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            return given[name]
        if isinstance(value, Mapping):
            return {
                key: build(item, f"{name}.{key}" if name else str(key), given)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            items = [build(item, f"{name}.{i}", given) for i, item in enumerate(value)]
            if hasattr(value, "_fields"):
                return type(value)(*items)
            return type(value)(items)
        return value

    collect(inputs, "")
    if not tensors:
        raise UsageError("the inputs hold no tensor", measured=f"got {sorted(inputs)}")
    return tensors, lambda given: dict(build(inputs, "", given))
