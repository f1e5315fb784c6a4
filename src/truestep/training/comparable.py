"""Whether two training steps can be set against each other part by part: the same parameters, and
the same calls of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from truestep.training.names import call_name
from truestep.training.pulling import Recorded
from truestep.training.running import Whole
from truestep.verdict import Row

Key = tuple[str, int]
_NAMED = 2
_Shapes = list[tuple[int, ...]]


def names_apart(own: Iterable[str], recorded: Iterable[str]) -> str:
    """Why nothing can be paired, if no parameter of one side has its name on the other."""
    mine, theirs = list(own), list(recorded)
    if not theirs or set(mine) & set(theirs):
        return ""
    first, second = (", ".join(names[:_NAMED]) for names in (mine, theirs))
    return (
        f"no parameter has a name that was recorded: the candidate's are {first}, ..., the "
        f"recorded ones {second}, ...; give the step the module that the recording was made of"
    )


def called_otherwise(
    whole: Whole, recorded: Mapping[Key, Recorded], outermost: Sequence[Key]
) -> tuple[str, str]:
    """How the candidate calls its model with other batches, if so.

    Calls that no gradient comes back to (of an average, of an evaluation) do not count.

    Returns:
        Name of a row, and what it says; both empty where each call has its partner.
    """
    theirs: dict[str, _Shapes] = defaultdict(list)
    for key in outermost:
        if recorded[key].pulled:
            theirs[key[0]].append(_shape(recorded[key].given.values()))
    mine: dict[str, _Shapes] = defaultdict(list)
    for key, call in whole.calls.items():
        if call.outermost and call.pulled:
            mine[key[0]].append(_shape(call.given.values()))
    for fqn, shapes in theirs.items():
        own = mine.get(fqn)
        if own and [shape[:1] for shape in own] != [shape[:1] for shape in shapes]:
            text = f"{fqn} is called with {_said(own)}, and was recorded with {_said(shapes)}"
            return call_name("input", (fqn, 0), "calls"), text
    return "", ""


def _shape(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """Shape of the largest tensor of a call."""
    return tuple(max(tensors, key=lambda tensor: tensor.numel(), default=torch.empty(0)).shape)


def _said(shapes: _Shapes) -> str:
    counts = ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
    return f"{len(shapes)} micro-batch{'es' if len(shapes) != 1 else ''} of {counts}"


def of_total(rows: Sequence[Row]) -> str:
    """What is said of the gradients of the whole step, however it was divided."""
    wrong = [row for row in rows if not row.verdict.passed]
    ratios = [row.ratio for row in rows if row.ratio is not None]
    worst = max(ratios, default=0.0)
    if not wrong:
        return f"the total gradient agrees (the worst at {worst:.2g} x its floor)"
    apart = max((row.metrics.rel_l2 for row in wrong if row.metrics), default=float("inf"))
    return f"{len(wrong)} of {len(rows)} total gradients differ, by up to rel_l2 {apart:.1e}"


_TOTAL = ("out", "loss", "total", "total_loss")
"""Names of a loss that is returned alone, or as the first part of a mapping."""


def with_losses(
    tensors: Mapping[str, torch.Tensor], recorded: Iterable[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A candidate's tensors, its losses by their recorded names, however `run` returns them.

    Returns:
        The tensors, and what is not looked at: losses that one side does not return.
    """
    theirs = [name for name in recorded if name.startswith("loss/")]
    mine = [name for name in tensors if name.startswith("loss/")]
    if not mine:
        return dict(tensors), [f"{name}: run() returns no loss" for name in theirs]
    if not theirs:
        kept = {name: tensor for name, tensor in tensors.items() if name not in mine}
        return kept, [f"{name}: no loss was recorded" for name in mine]
    left = [name for name in mine if name not in theirs]
    without = [name for name in theirs if name not in mine]
    pairs = dict(zip(left, without, strict=True)) if len(left) == len(without) == 1 else {}
    if len(mine) != len(theirs):
        first = [name for name in left if name.removeprefix("loss/") in _TOTAL]
        other = [name for name in without if name.removeprefix("loss/") in _TOTAL]
        pairs = dict(zip(first, other, strict=False)) if len(other) == len(first) == 1 else {}
    return {pairs.get(name, name): tensor for name, tensor in tensors.items()}, []
