"""Are two weight files the same checkpoint, the same one in a narrower precision, or two others?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from truestep.verdict import Float, Record

if TYPE_CHECKING:
    from truestep.parity.keys import Pair, State

STEPS = ((0.0, "same"), (1e-3, "float16"), (2.5e-3, "bfloat16"), (0.1, "int8"))
"""Largest rel_l2 between a parameter and its rounding: float16 rounds by 2^-12 of each element on
average, bfloat16 by 2^-9, int8 with a scale a channel by about a hundredth."""

OTHER = "other values"


class Likeness(Record):
    """One pair of parameters. `kind`: `same`, a precision that rounds as much, or other values."""

    official: str
    port: str
    rel_l2: Float
    kind: str


class Checkpoints(Record):
    """Verdict on two state dicts: `same`, `rounded`, `another` or `unmatched`."""

    verdict: str
    sentence: str
    rows: tuple[Likeness, ...]

    def layers(self, *kinds: str) -> tuple[str, ...]:
        """Official names of parameters of some kinds (`int8`)."""
        return tuple(row.official for row in self.rows if row.kind in kinds)


def compare_checkpoints(pairs: Iterable[Pair], port: State, official: State) -> Checkpoints:
    """Judge paired parameters; see `keys.pair_keys`."""
    rows = []
    for pair in pairs:
        whole = pair.how and not pair.how.startswith("chunk")
        if len(pair.official) == len(pair.port) == 1 and whole:
            size = _distance(port[pair.port[0]], official[pair.official[0]], pair.how)
            kind = next((name for limit, name in STEPS if size <= limit), OTHER)
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
            f"{worst:.1g}; rounding to float16 would be below 1e-3)"
        )
        verdict = "another"
    elif rounded or other:
        kinds = sorted({row.kind for row in (*rounded, *other)})
        text = (
            f"the same checkpoint, {len(rounded) + len(other)} of {count} as {', '.join(kinds)} "
            f"(up to rel_l2 {worst:.1g})"
        )
        verdict = "rounded"
    else:
        verdict, text = "same", f"the same checkpoint: {count} agree bit for bit"
    return Checkpoints(verdict=verdict, sentence=text, rows=tuple(rows))


def _distance(actual: object, reference: object, how: str) -> float:
    import torch

    assert isinstance(actual, torch.Tensor)
    assert isinstance(reference, torch.Tensor)
    source, target = reference.detach().double(), actual.detach().double()
    if how.startswith("permute"):
        order = how.partition("(")[2].partition(")")[0]
        source = source.permute([int(part) for part in order.split(",")])
    source = source.reshape(target.shape)
    scale = float(source.norm())
    size = float((target - source).norm())
    return size / scale if scale else size
