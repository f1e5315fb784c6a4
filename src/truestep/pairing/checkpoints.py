"""Are two weight files the same checkpoint, the same one in a narrower precision, or two others?

Nothing computes parameters: one is another rounded only where every element is the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from truestep.verdict import Float, Record

if TYPE_CHECKING:
    import torch

    from truestep.pairing.conversion import Pair, State

OTHER = "other values"


class Likeness(Record):
    """One pair of parameters. `kind`: `same`, a precision that rounds as much, or other values."""

    official: str
    port: str
    rel_l2: Float
    kind: str


class Checkpoints(Record):
    """Verdict on two state dicts: `same`, `rounded`, `changed`, `another` or `unmatched`."""

    verdict: str
    sentence: str
    rows: tuple[Likeness, ...]

    def layers(self, *kinds: str) -> tuple[str, ...]:
        """Official names of parameters of some kinds (`int8`)."""
        return tuple(row.official for row in self.rows if row.kind in kinds)


def compare_checkpoints(pairs: Iterable[Pair], port: State, official: State) -> Checkpoints:
    """Judge paired parameters; see `conversion.pair_keys`."""
    rows = []
    for pair in pairs:
        whole = pair.how and not pair.how.startswith("chunk")
        if len(pair.official) == len(pair.port) == 1 and whole:
            own, theirs = _laid_out(port[pair.port[0]], official[pair.official[0]], pair.how)
            size, kind = _distance(own, theirs), _kind(own, theirs)
            rows.append(
                Likeness(official=pair.official[0], port=pair.port[0], rel_l2=size, kind=kind)
            )
    return _judge([row for row in rows if official[row.official].numel() > 1], rows)


def _judge(told: Sequence[Likeness], rows: Sequence[Likeness]) -> Checkpoints:
    other = [row for row in told if row.kind == OTHER]
    rounded = [row for row in told if row.kind not in (OTHER, "same")]
    worst = max((row.rel_l2 for row in told), default=0.0)
    count = f"{len(told)} paired parameters"
    if not told:
        verdict, text = "unmatched", "no parameters could be paired"
    elif len(other) * 4 > len(told):
        text = (
            f"another checkpoint: {len(other)} of {count} hold other values (up to rel_l2 "
            f"{worst:.1g}; the roundings of neither side)"
        )
        verdict = "another"
    elif other:
        verdict, text = "changed", f"the same checkpoint but for {len(other)} of {count}"
        text += f", which hold other values (up to rel_l2 {worst:.1g})"
    elif rounded:
        kinds = ", ".join(sorted({row.kind for row in rounded}))
        verdict, text = "rounded", f"the same checkpoint, {len(rounded)} of {count} as {kinds}"
        text += f" (up to rel_l2 {worst:.1g})"
    else:
        verdict, text = "same", f"the same checkpoint: {count} agree bit for bit"
    return Checkpoints(verdict=verdict, sentence=text, rows=tuple(rows))


def _laid_out(port: object, official: object, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both parameters in the port's layout."""
    import torch

    assert isinstance(port, torch.Tensor)
    assert isinstance(official, torch.Tensor)
    source = official.detach()
    if how.startswith("permute"):
        order = how.partition("(")[2].partition(")")[0]
        source = source.permute([int(part) for part in order.split(",")])
    return port.detach(), source.reshape(port.shape)


def _distance(actual: torch.Tensor, reference: torch.Tensor) -> float:
    target, source = actual.double(), reference.double()
    scale, size = float(source.norm()), float((target - source).norm())
    return size / scale if scale else size


def _kind(actual: torch.Tensor, reference: torch.Tensor) -> str:
    """`same`, the precision that one is the other's exact rounding to, or other values."""
    from truestep.measure.rounding import called, rounded_to

    if bool((actual.double() == reference.double()).all()):
        return "same"
    narrow = rounded_to(actual, reference) or rounded_to(reference, actual)
    if narrow is not None:
        return called(narrow)
    return "int8" if _on_grid(actual, reference) else OTHER


_GRID = 256
"""Numbers that one byte has."""


def _on_grid(actual: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether a tensor is another one on a grid of a byte: one for all of it, a row, or a column.

    The grid is that of its own numbers, and each must be the nearest on it.
    """
    tables = [(actual.reshape(1, -1), reference.reshape(1, -1))]
    if actual.ndim > 1:
        rows = [t.reshape(len(actual), -1) for t in (actual, reference)]
        columns = [t.reshape(-1, actual.shape[-1]).T for t in (actual, reference)]
        tables += [(rows[0], rows[1]), (columns[0], columns[1])]
    return any(_nearest(actual, reference) for actual, reference in tables)


_AT_ONCE = 2**22
"""Numbers that are sorted at once."""


def _nearest(rows: torch.Tensor, sources: torch.Tensor) -> bool:
    """Whether each row is the nearest to its source on the grid of the row's own numbers."""
    if _gaps(rows[:1, : 4 * _GRID]) is None:  # the common case: other values, seen at once
        return False
    count = max(_AT_ONCE // max(rows.shape[1], 1), 1)
    parts = zip(rows.split(count), sources.split(count), strict=True)
    return all(_nearest_at_once(part.double(), source.double()) for part, source in parts)


def _nearest_at_once(rows: torch.Tensor, sources: torch.Tensor) -> bool:
    gaps = _gaps(rows)
    if gaps is None:
        return False
    step = gaps.where(gaps > 0, math.inf).amin(1) if gaps.shape[1] else gaps.sum(1)
    step = step.where(step < math.inf, 0.0)  # all numbers of a row are one
    # Neighbours' distance is known to float32's rounding of the numbers themselves.
    slack = rows.abs().amax(1) * 2.0**-22
    return bool(((rows - sources).abs() <= (step / 2 + slack)[:, None]).all())


def _gaps(rows: torch.Tensor) -> torch.Tensor | None:
    """Distances of each row's sorted numbers; None where a row has more than a byte has."""
    import numpy as np
    import torch

    numbers = np.sort(rows.double().cpu().numpy(), axis=1)  # several times as fast as torch's
    gaps = torch.from_numpy(numbers).to(rows.device).diff(dim=1)
    return None if bool(((gaps != 0).sum(1) >= _GRID).any()) else gaps
