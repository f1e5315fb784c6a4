"""Every tensor in any nest of outputs, by name, and inputs taken apart and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from truestep.errors import UsageError

_PLAIN = (str, bytes, bool, type(None), torch.dtype, torch.device)


def flatten(value: Any) -> dict[str, torch.Tensor]:
    """All tensors of a nest by dotted name; a lone tensor is `out`.

    Goes into mappings (`ModelOutput` among them), sequences, dataclasses and plain objects that
    hold tensors (a `latent_dist`). Arrays and numbers become tensors; strings, flags and None say
    nothing and are left out.

    Raises:
        UsageError: Something in it is none of these, or it holds no tensor at all.
    """
    found = dict(_walk(value, "out"))
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


def _walk(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, np.ndarray):
        yield name, torch.from_numpy(np.array(value))
    elif isinstance(value, np.generic) or (isinstance(value, (int, float)) and value is not True):
        if not isinstance(value, bool):
            yield name, torch.as_tensor(value, dtype=torch.float64)
    elif isinstance(value, _PLAIN):
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{name}.{key}")
    elif _is_sequence(value) and _all_numbers(value):
        yield name, torch.tensor([float(item) for item in value], dtype=torch.float64)
    elif _is_sequence(value):
        for index, item in enumerate(value):
            yield from _walk(item, f"{name}.{index}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from _walk(getattr(value, item.name), f"{name}.{item.name}")
    else:
        yield from _walk_object(value, name)


def _all_numbers(value: Sequence[Any]) -> bool:
    return len(value) > 0 and all(
        isinstance(item, (int, float)) and not isinstance(item, bool) for item in value
    )


def _walk_object(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
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
        elif isinstance(value, Mapping):
            for key, item in value.items():
                collect(item, f"{name}.{key}" if name else str(key))
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                collect(item, f"{name}.{index}")

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
