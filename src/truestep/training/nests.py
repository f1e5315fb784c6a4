"""Arguments and outputs of modules: their tensors by path, and the nest with others in their
place."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from truestep.nests import MAX_DEPTH, argument_leaves, leaves, parts, safe_fqn

Exchange = Callable[[str, torch.Tensor], torch.Tensor]
"""Path and tensor to what stands in its place."""


class Arguments:
    """What a module was called with, by the names of its forward's parameters.

    Positional and keyword arguments have the same paths: two sides may differ in that.
    """

    def __init__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._bound: inspect.BoundArguments | None = None
        self._args, self._kwargs = args, dict(kwargs)
        try:
            self._bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return  # a forward without a signature: names as they were given

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by path: `in.hidden_states`."""
        if self._bound is None:
            return dict(argument_leaves(self._args, self._kwargs))
        return dict(argument_leaves((), self._bound.arguments))

    def exchanged(self, exchange: Exchange) -> Arguments:
        """The same arguments with other tensors."""
        made = copy.copy(self)
        if self._bound is None:
            made._args = substituted(self._args, "in", exchange)
            made._kwargs = substituted(self._kwargs, "in", exchange)
            return made
        held = substituted(dict(self._bound.arguments), "in", exchange)
        made._bound = inspect.BoundArguments(self._bound.signature, held)
        return made

    def call(self, function: Callable[..., Any]) -> Any:
        """Call a function with them."""
        if self._bound is None:
            return function(*self._args, **self._kwargs)
        return function(*self._bound.args, **self._bound.kwargs)


def outputs(value: Any) -> dict[str, torch.Tensor]:
    """Every tensor that a module returned by path: `out.0`, `out.sample`."""
    return dict(leaves(value, "out"))


def exchanged(value: Any, exchange: Exchange) -> Any:
    """What a module returned, with other tensors."""
    if isinstance(value, torch.Tensor):
        return exchange("out.0", value)
    return substituted(value, "out", exchange)


def substituted(value: Any, path: str, exchange: Exchange, depth: int = 0) -> Any:
    """A nest of the same make with other tensors; what holds none is the same object."""
    if isinstance(value, torch.Tensor):
        return exchange(path, value)
    if depth >= MAX_DEPTH:
        return value
    known = [(key, part, f"{path}.{_escaped(key)}") for key, part in parts(value)]
    inner = {key: substituted(part, p, exchange, depth + 1) for key, part, p in known}
    if all(inner[key] is part for key, part, _ in known):
        return value
    if isinstance(value, Mapping):
        held: Any = copy.copy(value)
        for key in value:
            held[key] = inner[str(key)]
        return held
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*inner.values())
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in fields(value):
            object.__setattr__(made, field.name, inner[field.name])
        return made
    return type(value)(inner.values())


def _escaped(key: str) -> str:
    return safe_fqn(key).replace(".", "%2E")


def matched(
    given: Mapping[str, torch.Tensor], recorded: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """Paths of one side to those of the other: by name, then what is left in order by shape."""
    pairs = {path: path for path in given if path in recorded}
    left = [path for path in recorded if path not in pairs]
    for path, tensor in given.items():
        if path in pairs:
            continue
        other = next((p for p in left if recorded[p].shape == tensor.shape), None)
        if other is not None:
            left.remove(other)
            pairs[path] = other
    return pairs
