"""Set what arrives beside what was recorded: which tensor answers to which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.calls.keys import Path, dotted
from truestep.calls.values import GENERATOR, Leaf, Tree, encode, in_real_numbers, leaves

Shape = Callable[[str], tuple[int, ...]]
"""Shape of a recorded tensor."""

Taken = Callable[[Path, torch.Tensor], torch.Tensor]
"""The part of a tensor that arrived which is compared, by its path."""


@dataclass(frozen=True)
class Match:
    """One recorded tensor or number and what stands in its place.

    Attributes:
        path: Of the recorded one; of an extra tensor its own.
        actual: None where nothing stands there.
        recorded: Name of the recorded tensor, or a recorded number; None of an extra tensor.
        own: Path in the value that arrived, where that is another.
        unreadable: Class of what arrived, where only its own code can read it.
    """

    path: Path
    actual: torch.Tensor | float | None
    recorded: str | float | None
    own: Path | None = None
    unreadable: str = ""


@dataclass
class Matches:
    """How a value compares with a recorded tree.

    Attributes:
        alike: Same sizes on both sides.
        odd: Other sizes, or on one side only.
        differences: What is no tensor and differs: where, and in words.
    """

    alike: list[Match] = field(default_factory=list)
    odd: list[Match] = field(default_factory=list)
    differences: list[tuple[Path, str]] = field(default_factory=list)


def matched(
    value: Any, recorded: Tree, shape: Shape, prefix: Path = (), taken: Taken | None = None
) -> Matches:
    """Compare a value with a recorded tree, leaf by leaf.

    Args:
        value: What arrived.
        recorded: Its tree when it was recorded.
        shape: Of recorded tensors.
        prefix: Goes before every path.
        taken: Takes a part of each tensor that arrived; default all of it.
    """
    arrived: list[torch.Tensor] = []

    def collect(path: Path, tensor: torch.Tensor) -> str:
        arrived.append(tensor if taken is None else taken((*prefix, *path), tensor))
        return str(len(arrived) - 1)

    actual = {
        path: Leaf("tensor", arrived[int(leaf.value)]) if leaf.kind == "tensor" else leaf
        for path, leaf in leaves(encode(value, collect), prefix)
    }
    expected = dict(leaves(recorded, prefix))
    places = _places(actual, expected, shape)
    result = Matches()
    for path, leaf in expected.items():
        own = places.get(path, path)
        _match(result, path, own, actual.get(own), leaf, shape)
    used = {places.get(path, path) for path in expected}
    for path, leaf in actual.items():
        if path not in used:
            _extra(result, path, leaf)
    return result


def _places(
    actual: Mapping[Path, Leaf], expected: Mapping[Path, Leaf], shape: Shape
) -> dict[Path, Path]:
    """Where tensors of a value in another container stand: in the same order, if sizes agree."""
    mine = [path for path, leaf in actual.items() if leaf.kind == "tensor"]
    theirs = [path for path, leaf in expected.items() if leaf.kind == "tensor"]
    if mine == theirs or len(mine) != len(theirs):
        return {}
    pairs = list(zip(theirs, mine, strict=True))
    if any(_sizes(actual[m], shape) != _sizes(expected[t], shape) for t, m in pairs):
        return {}
    return dict(pairs)


def _match(
    result: Matches, path: Path, own: Path, actual: Leaf | None, recorded: Leaf, shape: Shape
) -> None:
    numeric = ("tensor", "number")
    if recorded.kind == "dropped":
        return
    if recorded.kind not in numeric or (actual is not None and actual.kind not in numeric):
        if recorded.kind in numeric and actual is not None and actual.value is None:
            result.odd.append(Match(path, None, recorded.value))
        elif recorded.kind in numeric and actual is not None and actual.kind == "opaque":
            result.odd.append(Match(path, None, recorded.value, unreadable=actual.value))
        elif recorded.kind == "opaque" or (actual is not None and actual.kind == "opaque"):
            pass  # live: where it was recorded so, it is said to be not judged
        elif actual is not None and actual.kind == "tensor":
            result.odd.append(Match(path, actual.value, None, own))
        elif {GENERATOR, None} == {recorded.value, actual.value if actual else None}:
            pass  # what is drawn by it is compared where it is drawn
        elif actual is None or actual.value != recorded.value:
            mine = "nothing" if actual is None else _text(actual.value)
            text = f"{dotted(path)}: {mine}, recorded {_text(recorded.value)}"
            result.differences.append((path, text))
        return
    if actual is None:
        if recorded.kind == "tensor":
            result.odd.append(Match(path, None, recorded.value))
        else:
            text = f"{dotted(path)}: nothing, recorded {recorded.value:g}"
            result.differences.append((path, text))
        return
    match = Match(path, actual.value, recorded.value, own)
    sizes = [_sizes(actual, shape), _sizes(recorded, shape)]
    single = all(size in ((), (1,)) for size in sizes) and actual.kind != recorded.kind
    (result.alike if sizes[0] == sizes[1] or single else result.odd).append(match)


def _sizes(leaf: Leaf, shape: Shape) -> tuple[int, ...]:
    if leaf.kind == "number":
        return ()
    if isinstance(leaf.value, str):
        return shape(leaf.value)
    return tuple(in_real_numbers(leaf.value).shape)


def _extra(result: Matches, path: Path, leaf: Leaf) -> None:
    if leaf.kind == "tensor":
        result.odd.append(Match(path, leaf.value, None, path))
    elif leaf.kind in ("number", "text") and leaf.value is not None:
        result.differences.append((path, f"{dotted(path)}: {_text(leaf.value)}, not recorded"))


def _text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
