"""What the pairing solver adds to a listing of keys: parameters that were fused or split."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import TYPE_CHECKING

import torch

from truestep.errors import UsageError
from truestep.parity.keys import Pair

if TYPE_CHECKING:
    from truestep.pairing.records import Pair as Solved
    from truestep.parity.keys import State

_MOST = 4


def solved(port: State, official: State) -> list[Pair]:
    """Pairs of what is left over, each with an expression that was tried and reproduces the port.

    Args:
        port, official: Parameters without a pair.
    """
    from truestep.pairing.solve import pair_modules

    if not port or not official:
        return []
    try:
        pairing = pair_modules(port, official)
    except UsageError:
        return []
    return [pair for found in pairing.of("parameter") for pair in _expressed(found, port, official)]


def _expressed(found: Solved, port: State, official: State) -> Iterator[Pair]:
    if len(found.actual) == 1 and 1 < len(found.reference) <= _MOST:
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
