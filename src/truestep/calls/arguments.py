"""What a call is given, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from truestep.calls.boundaries import Arrival
from truestep.calls.classes import positional


@dataclass(frozen=True)
class Arguments:
    """Arguments of one call.

    Attributes:
        values: Name to value, in the order in which they were given.
        unnamed: How many of the first were given without a name.
        defaults: What the call takes where nothing is given.
    """

    values: dict[str, Any]
    unnamed: int
    defaults: Mapping[str, Any]

    def split(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Values in the place of these, as they are given to a call."""
        names = list(self.values)
        args = tuple(values[name] for name in names[: self.unnamed])
        return args, {name: values[name] for name in names[self.unnamed :]}


def arguments_of(arrival: Arrival, recorded: Sequence[str] = ()) -> Arguments:
    """Name the arguments of a call.

    Args:
        arrival: The call.
        recorded: Names of its parameters when it was recorded, for a call that does not say them.
    """
    names = positional(arrival.signature)
    named = {_name(index, names, recorded): value for index, value in enumerate(arrival.args)}
    parameters = arrival.signature.parameters.values() if arrival.signature else ()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return Arguments({**named, **arrival.kwargs}, len(arrival.args), defaults)


def _name(index: int, names: Sequence[str], recorded: Sequence[str]) -> str:
    """Name of a value without one: its parameter's, or that of the recorded one in its place."""
    name = names[index] if index < len(names) else ""
    if index < len(recorded) and name not in recorded:
        return recorded[index]
    return name or f"*{index}"
