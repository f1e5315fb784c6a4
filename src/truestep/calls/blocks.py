"""Blocks: named parts of a run's own code, each called with a state that it reads and writes.

A block is an object that is called with components and a state, and returns both; blocks that hold
others have them in `sub_blocks`. What a leaf, or a loop over leaves, writes into the state is
compared and set back to what was recorded, so that a difference is named by the block that made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from truestep.calls.values import Keep, Tree, encode, leaves

BLOCK = "(block)"
"""Component name of blocks; the method is where the block is, as `denoise.prepare_latents`."""


def root_of(thing: Any) -> Any:
    """The blocks that a pipeline runs; None of one that is not made of blocks."""
    root = getattr(thing, "__dict__", {}).get("_blocks")
    return root if isinstance(getattr(root, "sub_blocks", None), Mapping) else None


def parts_of(block: Any) -> Mapping[str, Any]:
    """The blocks inside of one, by name."""
    inner = getattr(block, "sub_blocks", None)
    return inner if isinstance(inner, Mapping) else {}


def every(block: Any) -> Iterator[Any]:
    """A block and all that it holds."""
    yield block
    for part in parts_of(block).values():
        yield from every(part)


def is_judged(block: Any) -> bool:
    """Whether a block has code of its own: it holds no others, or loops over them."""
    return not parts_of(block) or hasattr(block, "loop_step")


def state_in(values: Any) -> dict[str, Any] | None:
    """What the state holds, to be read and changed; None where there is none.

    Args:
        values: What a block is given or gives: components and the state, an object with a dict of
            `values` or with attributes.
    """
    if not isinstance(values, tuple) or len(values) < 2:
        return None
    held: dict[str, Any] = getattr(values[1], "__dict__", {})
    inner = held.get("values")
    return inner if isinstance(inner, dict) else held


def marks(held: Mapping[str, Any]) -> dict[str, Tree]:
    """What tells whether a value of a state was replaced or written to."""

    def mark(path: Any, tensor: torch.Tensor) -> str:
        version = 0 if tensor.is_inference() else tensor._version
        return f"{id(tensor)} {tensor.data_ptr()} {version}"

    return {name: encode(value, mark) for name, value in held.items()}


def written(before: Mapping[str, Tree], held: Mapping[str, Any], keep: Keep) -> Tree:
    """The tree of what a block wrote: of what can be compared, nothing else.

    Args:
        before: Marks of the state that it was given.
        held: The state that it left.
        keep: Keeps tensors.
    """
    after = marks(held)
    kept = []
    for name, value in held.items():
        if name in before and before[name] == after[name]:
            continue
        if any(leaf.kind in ("tensor", "number") for _, leaf in leaves(after[name])):
            kept.append([name, encode(value, keep, (name,))])
    return {"dict": kept}
