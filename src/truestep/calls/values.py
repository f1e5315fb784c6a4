"""What calls take and give, as trees of JSON beside tensors; never a pickle.

Plain values stand for themselves; everything else is an object with one tag::

    {"tensor": NAME, "order": [...]}     dimensions from the outermost in memory, if not 0, 1, 2 ...
    {"tensor": NAME, "complex": true}    of real and imaginary parts, the last axis
    {"array": NAME} {"image": NAME, "mode": "RGB"}      of numpy and of PIL
    {"list": [...]} {"tuple": [...]} {"dict": [[KEY, VALUE], ...]} {"size": [...]} {"slice": [...]}
    {"float": "nan"} {"complex": [re, im]} {"dtype": "float32"} {"device": "cpu"}
    {"generator": {"device": "cpu", "seed": 0}}
    {"object": "package.module.Class", "kind": KIND, "fields": [[FIELD, VALUE], ...]}
    {"opaque": "package.module.Class", "state": true}   live at replay; `state`: it may change
    {"dropped": [1, 8], "dtype": "float32"}     a tensor that nothing reads

NAME says which tensor; who encodes decides on it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import torch

from truestep.errors import UsageError
from truestep.measure.plain import plain

Tree = Any
"""A value of JSON as described above."""

Path = tuple[str, ...]
Keep = Callable[[Path, torch.Tensor], str]
"""Told of a tensor and its place; says by which name it is kept."""

MAX_DEPTH = 24
"""Nests deeper than this are opaque: a structure that holds itself has no end."""

IMAGE_MODES = ("L", "LA", "RGB", "RGBA", "I", "F")
"""Modes of pictures that an array of numbers and the mode say all of."""

GENERATOR = "a random number generator"
"""What all generators are to a comparison: what they draw is compared where they draw it."""

_TENSORS = ("tensor", "array", "image")
_PARTS = ("list", "tuple", "dict", "size", "object")


def encode(value: Any, keep: Keep, path: Path = (), depth: int = 0) -> Tree:
    """A value as a tree.

    Args:
        value: What a call was given or gave, or a part of it.
        keep: Keeps the tensors in it.
        path: Where it is.
        depth: How deep that is.
    """
    if isinstance(value, torch.Tensor):
        return _encoded_tensor(value, keep, path)
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        return value if value.bit_length() < 64 else _opaque(value)
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if depth >= MAX_DEPTH:
        return _opaque(value)
    return _encoded_scalar(value) or _encoded_nest(value, keep, path, depth) or _opaque(value)


def _encoded_tensor(value: torch.Tensor, keep: Keep, path: Path) -> Tree:
    try:
        tensor = plain(value)
    except UsageError:  # sharded, quantised by a library: only its own class reads it
        return _opaque(value)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return _opaque(value)
    order = memory_order(tensor)
    node: dict[str, Any] = {"tensor": keep(path, value)}
    if tensor.is_complex():
        return {**node, "complex": True}
    return node if order is None else node | {"order": list(order)}


def in_real_numbers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is kept: a complex one with real and imaginary parts as its last axis."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Dimensions of a tensor from the outermost in memory; None where that is their own order."""
    if tensor.is_contiguous() or tensor.ndim < 2:
        return None
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=lambda axis: -strides[axis]))
    return None if order == tuple(range(tensor.ndim)) else order


def _encoded_scalar(value: Any) -> Tree:
    if isinstance(value, complex):
        return {"complex": [encode(part, _no_tensor) for part in (value.real, value.imag)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.Generator):
        seed = value.initial_seed()
        return {"generator": {"device": str(value.device), "seed": str(seed)}}
    return None


def _encoded_nest(value: Any, keep: Keep, path: Path, depth: int) -> Tree:
    def part(key: str, item: Any) -> Tree:
        return encode(item, keep, (*path, key), depth + 1)

    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, slice):
        ends = [value.start, value.stop, value.step]
        return {"slice": ends} if all(type(e) in (int, type(None)) for e in ends) else None
    if type(value) in (list, tuple):
        return {type(value).__name__: [part(str(i), v) for i, v in enumerate(value)]}
    if type(value) in (dict, OrderedDict):
        names = dict_names(value)
        items = zip(names, value.items(), strict=True)
        return {"dict": [[encode(key, _no_tensor), part(name, v)] for name, (key, v) in items]}
    media = _encoded_media(value, keep, path)
    if media is not None:
        return media
    kind = object_kind(type(value))
    if kind is None:
        return None
    fields = [[name, part(name, item)] for name, item in fields_of(value, kind)]
    node = {"object": qualified(type(value)), "kind": kind, "fields": fields}
    if kind == "plain" and (any(opaque(node)) or not any(tensors(node))):
        return None
    return node


def dict_names(value: Mapping[Any, Any]) -> list[str]:
    """Names of a mapping's entries in a path: the keys where all are texts, else their places."""
    if all(type(key) is str for key in value):
        return list(value)
    return [str(index) for index in range(len(value))]


def _encoded_media(value: Any, keep: Keep, path: Path) -> Tree:
    numpy, image = sys.modules.get("numpy"), sys.modules.get("PIL.Image")
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        if value.dtype.kind not in "biuf" or value.dtype.name == "uint64":
            return None
        if value.dtype.kind == "f" and value.dtype.itemsize > 8:  # no dtype of PyTorch's
            return None
        return {"array": keep(path, torch.from_numpy(numpy.array(value, order="C")))}
    if image is not None and isinstance(value, image.Image):
        if value.mode not in IMAGE_MODES or numpy is None:
            return None
        return {"image": keep(path, torch.from_numpy(numpy.array(value))), "mode": value.mode}
    return None


def object_kind(cls: type) -> str | None:
    """How an object of a class is kept by its fields; None of one that is not.

    `output`: a dataclass that is also a dict (what transformers and diffusers return), `mapping`: a
    dict of a class of its own, `dataclass`, `named`: a named tuple, `plain`: an object that is no
    more than its attributes.
    """
    if dataclasses.is_dataclass(cls):
        return "output" if issubclass(cls, OrderedDict) else "dataclass"
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return "named"
    if issubclass(cls, dict) and cls.__module__ not in sys.stdlib_module_names:
        return "mapping"
    new: Any = cls.__new__
    ordinary = new is object.__new__ and cls.__module__ not in sys.stdlib_module_names
    if not ordinary or issubclass(cls, (Enum, ModuleType, type, torch.nn.Module)):
        return None
    special = ("__del__", "__setstate__", "__slots__", "__call__", "__getattr__")
    return None if any(name in vars(c) for c in cls.__mro__ for name in special) else "plain"


def fields_of(value: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """Fields of an object and what they hold."""
    if kind == "named":
        yield from zip(value._fields, value, strict=True)
    elif kind == "plain":
        yield from vars(value).items()
    elif kind == "mapping":
        yield from ((key, part) for key, part in value.items() if type(key) is str)
    else:
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name, None)


def qualified(cls: type) -> str:
    """`package.module.Class`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _opaque(value: Any) -> Tree:
    fixed = callable(value) or isinstance(value, (torch.nn.Module, Enum, ModuleType, type, int))
    return {"opaque": qualified(type(value)), "state": not fixed}


def _no_tensor(path: Path, tensor: torch.Tensor) -> str:
    return ""


@dataclass(frozen=True)
class Leaf:
    """One end of a tree.

    Attributes:
        kind: `tensor` (also of arrays and images), `number`, `text`, `opaque` or `dropped`.
        value: A tensor's name, a number, or what can be compared as it is.
    """

    kind: str
    value: Any


def leaves(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Leaf]]:
    """Every end of a tree, with the path to it."""
    if not isinstance(tree, dict):
        is_number = isinstance(tree, int | float) and not isinstance(tree, bool)
        yield path, Leaf("number" if is_number else "text", tree)
        return
    tag = next(iter(tree))
    if tag in _TENSORS:
        yield path, Leaf("tensor", tree[tag])
    elif tag == "float":
        yield path, Leaf("number", float(tree[tag]))
    elif tag in ("opaque", "dropped"):
        yield path, Leaf(tag, tree[tag])
    elif tag in _PARTS and tag != "size":
        for name, part in parts(tree):
            yield from leaves(part, (*path, name))
    else:
        yield path, Leaf("text", repr(tree) if tag != "generator" else GENERATOR)


def parts(tree: Tree) -> Iterator[tuple[str, Tree]]:
    """Direct members of a nest's tree, by their names in a path."""
    tag = next(iter(tree))
    if tag == "dict":
        texts = all(isinstance(key, str) for key, _ in tree[tag])
        for index, (key, part) in enumerate(tree[tag]):
            yield key if texts else str(index), part
    elif tag == "object":
        yield from ((name, part) for name, part in tree["fields"])
    elif tag in ("list", "tuple"):
        yield from ((str(index), part) for index, part in enumerate(tree[tag]))


def dict_keys(tree: Tree) -> list[str]:
    """Keys of a dict's tree that are texts."""
    return [key for key, _ in tree.get("dict", []) if isinstance(key, str)]


def tensors(tree: Tree) -> Iterator[tuple[Path, str]]:
    """Path and name of every tensor of a tree."""
    return ((path, leaf.value) for path, leaf in leaves(tree) if leaf.kind == "tensor")


def in_lists(tree: Tree, path: Path = (), inside: bool = False) -> Iterator[Path]:
    """Paths of the tensors that are members of a list."""
    if not isinstance(tree, dict):
        return
    tag = next(iter(tree))
    if tag in ("tensor", "dropped"):
        if inside:
            yield path
    elif tag in ("list", "tuple", "dict", "object"):
        for name, part in parts(tree):
            yield from in_lists(part, (*path, name), inside or tag == "list")


def opaque(tree: Tree) -> Iterator[tuple[Path, str]]:
    """Path and class of everything in a tree that was not kept."""
    return ((path, leaf.value) for path, leaf in leaves(tree) if leaf.kind == "opaque")


def holds_state(tree: Tree) -> bool:
    """Whether something that was not kept may change when it is used."""
    if not isinstance(tree, dict):
        return False
    if "opaque" in tree:
        return bool(tree.get("state"))
    return any(holds_state(part) for _, part in parts(tree))


def renamed(tree: Tree, name: Callable[[Path, str], str], path: Path = ()) -> Tree:
    """A tree whose tensors have other names."""
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree))
    if tag in _TENSORS:
        return {**tree, tag: name(path, tree[tag])}
    return rebuilt(tree, lambda part, key: renamed(part, name, (*path, key)))


def dropped(
    tree: Tree,
    drop: Callable[[Path, str], bool],
    kind: Callable[[str], tuple[tuple[int, ...], str]],
    path: Path = (),
) -> Tree:
    """A tree without some of its tensors, of which shape and dtype stay.

    Args:
        drop: Says of a tensor, by path and name, whether it goes.
        kind: Shape and dtype of a tensor by name.
        path: Where the tree is.
    """
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree and drop(path, tree["tensor"]):
        shape, dtype = kind(tree["tensor"])
        return {"dropped": list(shape), "dtype": dtype}
    return rebuilt(tree, lambda part, name: dropped(part, drop, kind, (*path, name)))


def rebuilt(tree: Tree, change: Callable[[Tree, str], Tree]) -> Tree:
    """A nest's tree with changed members; any other tree as it is."""
    tag = next(iter(tree))
    if tag not in _PARTS or tag == "size":
        return tree
    inner = [change(part, name) for name, part in parts(tree)]
    if tag == "dict":
        return {"dict": [[key, new] for (key, _), new in zip(tree["dict"], inner, strict=True)]}
    if tag == "object":
        fields = [[key, new] for (key, _), new in zip(tree["fields"], inner, strict=True)]
        return {**tree, "fields": fields}
    return {tag: inner}
