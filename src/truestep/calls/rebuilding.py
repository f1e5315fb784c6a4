"""Values from trees, and trees laid over values that are there. The other half of `values`."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.calls.values import (
    MAX_DEPTH,
    Path,
    Tree,
    dict_names,
    fields_of,
    memory_order,
    object_kind,
    qualified,
)

Fetch = Callable[[str], torch.Tensor]
"""A tensor by the name that a tree gives it; what it returns may be written to."""


class CannotBuildError(ValueError):
    """A tree that holds what only a live run can give."""


def build(tree: Tree, fetch: Fetch, packages: Collection[str]) -> Any:
    """A value from its tree.

    Args:
        tree: Checked by `check_tree`.
        fetch: Tensors by name.
        packages: Top-level packages whose classes may be built; none is imported for it.

    Raises:
        CannotBuildError: It holds something that was not kept, or of another package.
    """
    if not isinstance(tree, dict):
        return tree
    tag, content = next(iter(tree.items()))

    def inner(part: Tree) -> Any:
        return build(part, fetch, packages)

    if tag == "tensor":
        if tree.get("complex"):
            return torch.view_as_complex(fetch(content))
        return ordered(fetch(content), tree.get("order"))
    if tag == "dropped":
        return torch.zeros(content, dtype=getattr(torch, tree["dtype"]))
    if tag in ("array", "image"):
        return _media(tree, fetch(content))
    if tag == "list":
        return [inner(part) for part in content]
    if tag == "tuple":
        return tuple(inner(part) for part in content)
    if tag == "dict":
        return {inner(key): inner(part) for key, part in content}
    if tag == "object":
        return _object(tree, {name: inner(part) for name, part in tree["fields"]}, packages)
    return _scalar(tag, content)


def ordered(tensor: torch.Tensor, order: list[int] | None) -> torch.Tensor:
    """A tensor laid out in memory with its dimensions in an order; see `memory_order`."""
    if order is None:
        return tensor
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def laid_out_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor with its dimensions in memory in another one's order."""
    order = memory_order(like)
    return tensor if order is None else ordered(tensor, list(order))


def _media(tree: Tree, tensor: torch.Tensor) -> Any:
    array = tensor.numpy()
    if "image" not in tree:
        return array[()] if not array.ndim else array
    from PIL import Image

    return Image.fromarray(array)


def _scalar(tag: str, content: Any) -> Any:
    if tag == "float":
        return float(content)
    if tag == "complex":
        return complex(*(build(part, _no_tensor, ()) for part in content))
    if tag == "dtype":
        return getattr(torch, content)
    if tag == "device":
        return torch.device(content)
    if tag == "size":
        return torch.Size(content)
    if tag == "slice":
        return slice(*content)
    if tag == "generator":
        return torch.Generator(content["device"]).manual_seed(int(content["seed"]))
    raise CannotBuildError(f"{content} was not kept")


def _no_tensor(name: str) -> torch.Tensor:
    raise CannotBuildError("a tensor where a number belongs")


def _object(tree: Tree, fields: dict[str, Any], packages: Collection[str]) -> Any:
    cls = known_class(tree["object"], tree["kind"], packages)
    if tree["kind"] == "named":
        return cls._make(fields.values())  # type: ignore[attr-defined]
    if tree["kind"] in ("output", "mapping"):
        return cls(**fields)
    value: Any = object.__new__(cls)
    value.__dict__.update(fields)  # no code of the class runs
    return value


def known_class(name: str, kind: str, packages: Collection[str]) -> type:
    """A class that is loaded already and may be built from fields.

    Raises:
        CannotBuildError: It is of another package, not loaded, or another kind of class.
    """
    for module_name in _prefixes(name):
        module = sys.modules.get(module_name)
        if module is None or module_name.partition(".")[0] not in packages:
            continue
        cls: Any = module
        for part in name[len(module_name) + 1 :].split("."):
            cls = vars(cls).get(part) if hasattr(cls, "__dict__") else None
        if isinstance(cls, type) and qualified(cls) == name and object_kind(cls) == kind:
            return cls
    raise CannotBuildError(f"{name} cannot be built from its fields here")


def _prefixes(name: str) -> list[str]:
    places = name.split(".")
    return [".".join(places[:end]) for end in range(len(places) - 1, 0, -1)]


@dataclass(frozen=True)
class Swaps:
    """What takes the place of parts of a value.

    Attributes:
        tensors: Identity of a tensor to another tensor.
        numbers: Place to a number with a point.
    """

    tensors: Mapping[int, torch.Tensor]
    numbers: Mapping[Path, float] = field(default_factory=dict)


def laid_over(value: Any, swaps: Swaps, path: Path = ()) -> Any:
    """A value with other tensors and numbers in the place of its own.

    Lists and dicts are changed in place: whoever made them may look at them later. What nothing
    takes the place of stays the object it is.
    """
    if isinstance(value, torch.Tensor):
        return swaps.tensors.get(id(value), value)
    if type(value) is float:
        return swaps.numbers.get(path, value)
    if len(path) >= MAX_DEPTH or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, list):
        value[:] = [laid_over(v, swaps, (*path, str(i))) for i, v in enumerate(value)]
    elif type(value) in (dict, OrderedDict):
        for name, key in zip(dict_names(value), list(value), strict=True):
            value[key] = laid_over(value[key], swaps, (*path, name))
    elif type(value) is tuple:
        after = tuple(laid_over(v, swaps, (*path, str(i))) for i, v in enumerate(value))
        return after if _changed(value, after) else value
    else:
        return _object_over(value, swaps, path)
    return value


def _object_over(value: Any, swaps: Swaps, path: Path) -> Any:
    kind = object_kind(type(value))
    if kind is None:
        return value
    before = dict(fields_of(value, kind))
    after = {name: laid_over(part, swaps, (*path, name)) for name, part in before.items()}
    if not _changed(tuple(before.values()), tuple(after.values())):
        return value
    if kind == "named":
        return type(value)._make(after.values())
    changed = copy.copy(value)
    for name, part in after.items():
        if part is before[name]:
            continue
        if kind != "mapping":
            object.__setattr__(changed, name, part)
        if kind in ("output", "mapping") and name in changed:
            changed[name] = part
    return changed


def written_back(value: Any, written: Any) -> None:
    """Make a list, a dict, a tensor or an object hold what another one does, in place.

    Lists and dicts inside of others are kept, as callers may hold them too; tensors inside of them
    are replaced, as a model replaces what it keeps.
    """
    if isinstance(value, torch.Tensor) and isinstance(written, torch.Tensor):
        if value.shape == written.shape:
            value.copy_(written)
    elif isinstance(value, list) and isinstance(written, list):
        inner = [*value[: len(written)], *[None] * (len(written) - len(value))]
        value[:] = [_merged(old, new) for old, new in zip(inner, written, strict=True)]
    elif isinstance(value, dict) and isinstance(written, dict):
        merged = {key: _merged(value.get(key), new) for key, new in written.items()}
        value.clear()
        value.update(merged)
    elif isinstance(value, tuple) and isinstance(written, tuple):
        for part, new in zip(value, written, strict=False):
            written_back(part, new)
    elif type(value) is type(written) and object_kind(type(value)) in ("plain", "dataclass"):
        held = vars(value)
        held.update({name: _merged(held.get(name), new) for name, new in vars(written).items()})


def _merged(old: Any, new: Any) -> Any:
    """What stands inside a container afterwards: the old container written to, or the new value."""
    if type(old) is type(new) and isinstance(old, list | dict):
        written_back(old, new)
        return old
    return new


def _changed(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return any(a is not b for a, b in zip(before, after, strict=True))
