"""What the pairing solver adds to a listing of keys: fused, split and equal parameters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import TYPE_CHECKING

import torch

from truestep.errors import UsageError
from truestep.parity.keys import Pair, relation

if TYPE_CHECKING:
    from truestep.pairing.records import Pair as Solved
    from truestep.parity.keys import State

_MOST = 4


def solved(port: State, official: State, *, known: tuple[set[str], set[str]]) -> list[Pair]:
    """Pairs of what is left over, each with an expression that was tried and reproduces the port.

    Args:
        port, official: All parameters: the pairs that are known tell where the others belong.
        known: Names that have a pair, of the port and of the official side.
    """
    from truestep.pairing.solve import pair_modules

    ours, theirs = known
    if ours >= set(port) or theirs >= set(official):
        return []
    try:
        pairing = pair_modules(port, official)
    except UsageError:
        return []
    return [
        pair
        for found in pairing.of("parameter")
        if not (ours & set(found.actual) or theirs & set(found.reference))
        for pair in _expressed(found, port, official)
    ]


def _expressed(found: Solved, port: State, official: State) -> Iterator[Pair]:
    if len(found.actual) == len(found.reference) == 1:
        how = relation(port[found.actual[0]], official[found.reference[0]])
        if how:
            yield Pair(found.reference, found.actual, how, found.text())
    elif len(found.actual) == 1 and 1 < len(found.reference) <= _MOST:
        target = port[found.actual[0]]
        for order in permutations(found.reference):
            if _same_cat([official[name] for name in order], target):
                yield Pair(order, found.actual, "cat", found.text())
                return
    elif len(found.reference) == 1 and len(found.actual) > 1:
        source, count = official[found.reference[0]], len(found.actual)
        for name in found.actual:
            for index, part in enumerate(source.chunk(count)):
                if part.shape == port[name].shape and torch.equal(part, port[name]):
                    how = f"chunk({count})[{index}]"
                    yield Pair(found.reference, (name,), how, found.text())
                    break


def _same_cat(parts: list[torch.Tensor], target: torch.Tensor) -> bool:
    if any(part.shape[1:] != target.shape[1:] for part in parts if part.ndim):
        return False
    joined = torch.cat(parts)
    return joined.shape == target.shape and torch.equal(joined, target)
