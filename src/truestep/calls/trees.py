"""Trees from a file are hostile until they are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from truestep.calls.values import IMAGE_MODES, MAX_DEPTH, Tree

MOST_DROPPED = 2**28
"""Elements of a dropped tensor at most: a gibibyte, once something computes with it."""

_KINDS = ("output", "mapping", "dataclass", "named", "plain")


def check_tree(tree: Tree, ranks: Mapping[str, int], depth: int = 0) -> None:
    """Refuse a tree that `values.encode` would not make.

    Args:
        tree: From a file.
        ranks: Number of dimensions of every tensor in the file.
        depth: How deep inside another one it is.

    Raises:
        ValueError: It is none.
    """
    if tree is None or isinstance(tree, bool | int | float | str):
        return
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested more than {MAX_DEPTH} deep")
    if not isinstance(tree, dict) or not tree:
        raise ValueError("a value is neither plain nor tagged")
    tag, content = next(iter(tree.items()))
    extra = {key for key in tree if key != tag}
    if tag in ("tensor", "array", "image"):
        _check_tensor(tree, tag, ranks)
    elif tag == "object":
        _check_object(tree, ranks, depth)
    elif tag == "dropped":
        _check_dropped(tree, ranks)
    elif tag == "opaque":
        _require(isinstance(content, str) and type(tree.get("state")) is bool, tag)
        _require(extra == {"state"}, tag)
    else:
        _require(not extra and tag in _CHECKS, tag)
        _require(_CHECKS[tag](content), tag)
        for part in _inner(tag, content):
            check_tree(part, ranks, depth + 1)


def _require(holds: bool, tag: object) -> None:
    if not holds:
        raise ValueError(f"a value tagged {str(tag)[:40]!r} is not one")


def _check_tensor(tree: dict[str, Any], tag: str, ranks: Mapping[str, int]) -> None:
    name = tree[tag]
    if not isinstance(name, str) or name not in ranks:
        raise ValueError(f"a value points to tensor {str(name)[:80]!r}, which is not there")
    order = tree.get("order", [0])
    ordered = isinstance(order, list) and all(type(axis) is int for axis in order)
    _require(ordered and ("order" not in tree or sorted(order) == [*range(ranks[name])]), tag)
    _require(tag != "image" or tree.get("mode") in IMAGE_MODES, tag)
    complex_ = tree.get("complex", False)
    _require(complex_ in (True, False) and not (complex_ and "order" in tree), tag)
    allowed = {"tensor": {"order", "complex"}, "array": set(), "image": {"mode"}}[tag]
    _require(set(tree) - {tag} <= allowed, tag)


def _check_dropped(tree: dict[str, Any], ranks: Mapping[str, int]) -> None:
    """What takes the place of a dropped tensor may be no larger than what the file holds."""
    shape = tree["dropped"]
    _require(set(tree) == {"dropped", "dtype"} and _is_dtype(tree["dtype"]), "dropped")
    _require(_is_size(shape) and len(shape) < 16, "dropped")
    _require(math.prod(shape) <= MOST_DROPPED, "dropped")


def _check_object(tree: dict[str, Any], ranks: Mapping[str, int], depth: int) -> None:
    name, fields = tree["object"], tree.get("fields")
    _require(isinstance(name, str) and set(tree) == {"object", "kind", "fields"}, "object")
    _require(tree["kind"] in _KINDS and _is_pairs(fields), "object")
    for field, part in fields or ():
        _require(isinstance(field, str), "object")
        check_tree(part, ranks, depth + 1)


def _inner(tag: str, content: Any) -> list[Tree]:
    if tag in ("list", "tuple", "complex"):
        return list(content)
    return [part for pair in content for part in pair] if tag == "dict" else []


def _is_pairs(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in content
    )


def _is_dict(content: Any) -> bool:
    hashable = (str, int, float, bool, type(None))
    return _is_pairs(content) and all(isinstance(key, hashable) for key, _ in content)


def _is_list(content: Any) -> bool:
    return isinstance(content, list)


def _is_complex(content: Any) -> bool:
    return isinstance(content, list) and len(content) == 2 and all(map(_is_number, content))


def _is_number(content: Any) -> bool:
    if isinstance(content, dict):
        return set(content) == {"float"} and _is_float(content["float"])
    return type(content) in (int, float)


def _is_float(content: Any) -> bool:
    return content in ("nan", "inf", "-inf")


def _is_dtype(content: Any) -> bool:
    return isinstance(content, str) and isinstance(getattr(torch, content, None), torch.dtype)


def _is_device(content: Any) -> bool:
    try:
        torch.device(content)
    except (RuntimeError, TypeError):
        return False
    return isinstance(content, str)


def _is_size(content: Any) -> bool:
    return isinstance(content, list) and all(type(n) is int and 0 <= n < 2**60 for n in content)


def _is_slice(content: Any) -> bool:
    ends = (int, type(None))
    return isinstance(content, list) and len(content) == 3 and all(type(e) in ends for e in content)


def _is_generator(content: Any) -> bool:
    if not isinstance(content, dict) or set(content) != {"device", "seed"}:
        return False
    seed = content["seed"]
    whole = isinstance(seed, str) and seed.removeprefix("-").isdecimal() and len(seed) < 24
    return whole and abs(int(seed)) < 2**64 and _is_device(content["device"])


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "list": _is_list,
    "tuple": _is_list,
    "dict": _is_dict,
    "size": _is_size,
    "slice": _is_slice,
    "float": _is_float,
    "complex": _is_complex,
    "dtype": _is_dtype,
    "device": _is_device,
    "generator": _is_generator,
}
