"""Which operators of another implementation give what the trusted one's give, in whatever form.

A port may fuse three projections, split one, or order its axes otherwise: the operators then cannot
be aligned, and their numbers are the same. Sums over a result do not change with its layout, and
those of parts add up to that of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

Tensor = torch.Tensor

_PARTS = 4
"""Most results that make one of the other side's: queries, keys, values, and a gate."""

_NEAR = 1e-5
"""Share of a sum that is rounding: both sides run in float32, and a sum is less off than its
parts."""

Sums = tuple[float, ...]


def accounted(
    actual: Sequence[tuple[str, Tensor | None]], reference: Sequence[tuple[str, Tensor | None]]
) -> list[bool]:
    """Whether each result is one of the reference's, part of one, or made of some, in any order.

    Args:
        actual, reference: Name of an operator and its result; None of one without real numbers,
            which counts as accounted for.
    """
    sides = [[None if t is None else _sums(t) for _, t in side] for side in (actual, reference)]
    single = _by_size(sums for sums in sides[1] if sums is not None)
    whole = _by_size(sums for _, sums in _runs(reference, sides[1]))
    found = [sums is None or _in(sums, single) or _in(sums, whole) for sums in sides[0]]
    for places, sums in _runs(actual, sides[0]):
        if not all(found[at] for at in places) and _in(sums, single):
            for at in places:
                found[at] = True
    return found


def _runs(
    operators: Sequence[tuple[str, Tensor | None]], sums: Sequence[Sums | None]
) -> Iterator[tuple[list[int], Sums]]:
    """Two to four results in a row of operators of one name, with their sums."""
    kinds: dict[str, list[tuple[int, Sums]]] = {}
    for at, (name, _) in enumerate(operators):
        each = sums[at]
        if each is not None:
            kinds.setdefault(name, []).append((at, each))
    for members in kinds.values():
        for length in range(2, _PARTS + 1):
            for start in range(len(members) - length + 1):
                places, parts = zip(*members[start : start + length], strict=True)
                yield list(places), tuple(map(sum, zip(*parts, strict=True)))


def _by_size(every: Iterable[Sums]) -> dict[float, list[Sums]]:
    found: dict[float, list[Sums]] = {}
    for sums in every:
        found.setdefault(sums[0], []).append(sums)
    return found


def _in(sums: Sums, every: dict[float, list[Sums]]) -> bool:
    return any(_same(sums, other) for other in every.get(sums[0], ()))


def _sums(tensor: Tensor) -> Sums:
    """Count, and sums of values, magnitudes, squares and fourth powers: those of parts add up."""
    values = tensor.double()
    squares = values.square()
    sums = (values.sum(), values.abs().sum(), squares.sum(), squares.square().sum())
    return (float(tensor.numel()), *map(float, sums))


def _same(actual: Sums, reference: Sums) -> bool:
    scales = (reference[2], reference[2], reference[3], reference[4])  # values may cancel
    pairs = zip(actual[1:], reference[1:], scales, strict=True)
    return all(abs(a - r) <= _NEAR * scale for a, r, scale in pairs)
