"""Which part of a training step is wrong: a module's forward, its backward alone, the loss, the
optimiser, the merge; or what lies between the modules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from truestep.judge.divergence import ROOT, failed, kind_of
from truestep.judge.sentence import sentence_of
from truestep.training.afterwards import done_after
from truestep.training.derivative import Slope, of_other_function, slope
from truestep.training.pulling import BACKWARD, FORWARD, Recorded, pull
from truestep.training.running import Whole, run_whole
from truestep.training.step import Build
from truestep.training.stepping import Optimizers, causes, of_given
from truestep.training.unchecked import without_checkpointing
from truestep.verdict import Comparison, Divergence, Row, Rows

Key = tuple[str, int]
_LISTED = 3
_SCALER = 4
"""Least power of two that is taken for a GradScaler's factor; its default begins at 2 ** 16."""
_MENDED = 0.1
"""Share of an error that may be left where something mends it."""


@dataclass(frozen=True)
class Evidence:
    """What a place is looked for in.

    Attributes:
        actual, reference: Tensors by the names of rows.
        nodes, recorded_nodes: Of each module's call, kinds of nodes of its graph.
        custom: Of each, where somebody's own kinds of node are written.
        optimizers: Both of them.
        whole: How the candidate calls its modules. calls: what was recorded of each.
        build: Makes the candidate's step.
    """

    actual: Mapping[str, torch.Tensor]
    reference: Mapping[str, torch.Tensor]
    nodes: Mapping[Key, Counter[str]]
    recorded_nodes: Mapping[Key, Mapping[str, int]]
    custom: Mapping[Key, Mapping[str, str]]
    optimizers: Optimizers
    whole: Whole
    calls: Mapping[Key, Recorded]
    build: Build


def located(comparison: Comparison, evidence: Evidence) -> Comparison:
    """A comparison with the place of what is wrong, and what is said of it."""
    rows = list(comparison.rows)
    wrong = [row for row in rows if failed(row)]
    if not wrong:
        return comparison
    place = _place(wrong)
    origin = [_with_origin(row, place, wrong) if failed(row) else row for row in rows]
    row = place
    elsewhere = _is_of_forward(row, evidence)
    kind = _kind(row, wrong, evidence, elsewhere=elsewhere)
    found = Divergence(
        name=row.name,
        stage=row.stage,
        fqn=row.fqn,
        kind=kind or None,
        operator=_operator(row, evidence) or None,
    )
    judged = Rows.of(origin)
    told = _sentence(comparison, judged, found, wrong, elsewhere=elsewhere)
    return comparison.model_copy(
        update={"rows": judged, "first_divergence": found, "sentence": told}
    )


def _place(wrong: Sequence[Row]) -> Row:
    """The first row of the innermost module that is wrong in the first stage that is; of the
    whole gradient the first."""
    stage = wrong[0].stage
    inside = [row for row in wrong if row.stage == stage]
    if stage not in (FORWARD, BACKWARD):
        return inside[0]
    fqns = {row.fqn or "" for row in inside}
    outer = {holder for fqn in fqns for holder in holders(fqn)}
    innermost = [row for row in inside if (row.fqn or "") not in outer]
    first = innermost[0]
    own = [row for row in innermost if (row.fqn, row.step) == (first.fqn, first.step)]
    return max(own, key=_how_far)


def holders(fqn: str) -> list[str]:
    """Modules around a module, a Sequential among them: its call is looked at, too."""
    if fqn == ROOT:
        return []
    parts = fqn.split(".")
    return [*(".".join(parts[:at]) for at in range(len(parts) - 1, 0, -1)), ROOT]


def _how_far(row: Row) -> float:
    return float("inf") if row.ratio is None else row.ratio


def _with_origin(row: Row, place: Row, wrong: Sequence[Row]) -> Row:
    """Whether a failing row is of a fault of its own, or of one that is told already."""
    own = (row.stage, row.fqn) == (place.stage, place.fqn)
    if row.stage in (FORWARD, BACKWARD):
        inner = {
            holder
            for other in wrong
            if other.stage == row.stage
            for holder in holders(other.fqn or "")
        }
        own = own or (row.fqn or "") not in inner
        if row.stage == BACKWARD:
            own = own and not any(o.stage == FORWARD and o.fqn == row.fqn for o in wrong)
    elif row.stage == "gradient":
        own = place.stage == "gradient"
    return row.model_copy(update={"origin": "introduced" if own else "inherited"})


def _kind(row: Row, wrong: Sequence[Row], evidence: Evidence, *, elsewhere: bool) -> str:
    """What is wrong, in words."""
    parts = []
    key = row.fqn or "", row.step or 0
    if row.stage == BACKWARD:
        parts.append(f"the gradient of {_slot(row)}")
    looks = _looks(row, evidence)
    if looks:
        parts += [looks, *_scaler(row, evidence)]
    if elsewhere:
        parts += ["so is the derivative of its own forward, by differences"]
        parts += _hidden(row, evidence)
    elif row.stage == BACKWARD and key in evidence.calls:
        found = slope(evidence.whole, key, evidence.calls[key])
        parts += [_said_slope(found)] if found is not None else []
        parts += _checkpointed(row, evidence)
    if row.stage == "optimizer":
        parts += _of_optimizer(row, wrong, evidence)
    if row.stage == "gradient":
        parts += _between(row, evidence)
    return "; ".join(part for part in parts if part)


def _scaler(row: Row, evidence: Evidence) -> list[str]:
    """A gradient that is a large power of two times the recorded one."""
    actual, reference = evidence.actual.get(row.name), evidence.reference.get(row.name)
    if row.stage not in ("loss", "gradient", "optimizer") or actual is None or reference is None:
        return []
    if row.name.partition("/")[0] not in ("prediction", "gradient", "clipped"):
        return []
    square = float(reference.double().square().sum())
    gain = float((actual.double() * reference.double()).sum()) / square if square else 0.0
    power = abs(math.log2(gain)) if gain > 0 else 0.0
    if power < _SCALER or abs(power - round(power)) > 1e-4:
        return []
    return ["a power of two: a GradScaler's factor? Record with the same one"]


def _slot(row: Row) -> str:
    slot = row.name.rpartition("/")[2]
    head, _, name = slot.partition(".")
    return f"parameter {name}" if head == "w" else f"its input {name}"


def _looks(row: Row, evidence: Evidence) -> str:
    actual, reference = evidence.actual.get(row.name), evidence.reference.get(row.name)
    if actual is None or reference is None or row.metrics is None:
        return row.note
    if reference.numel() == 1 or row.name.startswith("after/"):
        return ""  # of one number every change is a factor; what was added is told by the weights
    return kind_of(actual, reference) or ""


def _is_of_forward(row: Row, evidence: Evidence) -> bool:
    """Whether a wrong gradient is right of the module's own forward."""
    key = row.fqn or "", row.step or 0
    reference = evidence.reference.get(row.name)
    if row.stage != BACKWARD or row.metrics is None or reference is None:
        return False
    if key not in evidence.calls or evidence.calls[key].random is not None:
        return False
    slot = row.name.rpartition("/")[2]
    recorded = evidence.calls[key]
    return of_other_function(evidence.whole, key, recorded, slot=slot, reference=reference)


def _hidden(row: Row, evidence: Evidence) -> list[str]:
    """A parameter that is 0 hides what the forward does with it."""
    head, _, name = row.name.rpartition("/")[2].partition(".")
    fqn = name if row.fqn == ROOT else f"{row.fqn}.{name}"
    weight = evidence.reference.get(f"weight/{fqn}") if head == "w" else None
    if weight is None or bool(weight.any()):
        return []
    return [f"while {name} is 0 no output shows what the forward does with it"]


def _said_slope(found: Slope) -> str:
    if found.agrees:
        return ""
    return (
        f"it is not the derivative of its own forward (along one direction {found.pulled:.2g}, "
        f"and by differences {found.numeric:.2g})"
    )


def _operator(row: Row, evidence: Evidence) -> str:
    """The kinds of node that the candidate's graph has and the recorded one has not, and where
    somebody's own one is written."""
    if row.stage not in (BACKWARD, FORWARD):
        return ""
    key = row.fqn or "", row.step or 0
    own, theirs = evidence.nodes.get(key), evidence.recorded_nodes.get(key)
    if own is None or theirs is None:
        return ""
    custom = evidence.custom.get(key, {})
    more = [kind for kind in own if own[kind] > theirs.get(kind, 0)]
    fewer = [kind for kind in theirs if theirs[kind] > own[kind]]
    more.sort(key=lambda kind: kind not in custom)
    said = [f"{kind} ({custom[kind]})" if kind in custom else kind for kind in more[:_LISTED]]
    if not said and custom:
        said = [f"{kind} ({where})" for kind, where in list(custom.items())[:_LISTED]]
        return f"its own {', '.join(said)}"
    text = ", ".join(said)
    if fewer:
        lost = ", ".join(fewer[:_LISTED]) + (" and more" if len(fewer) > _LISTED else "")
        text = f"{text} in the place of {lost}" if text else f"without {lost}"
    return text


def _of_optimizer(row: Row, wrong: Sequence[Row], evidence: Evidence) -> list[str]:
    """What the two optimisers say of themselves, or what explains their steps."""
    head = row.name.partition("/")[0]
    name = row.fqn or ""
    if head == "clipped":
        added = of_given(name, evidence.actual, evidence.reference)
        return [added or "what the optimiser is given of right gradients: clipping, or a scale"]
    if head == "after":
        ends = [other.fqn or "" for other in wrong if other.name.startswith("after/")]
        return done_after(ends, evidence.actual, evidence.reference)
    if head == "ema":
        return ["what is added to the averaged model: its decay"]
    heads = ("update", "probe")
    names = [other.fqn or "" for other in wrong if other.name.partition("/")[0] in heads]
    moved = list(dict.fromkeys(names))
    return causes(moved, evidence.optimizers, evidence.actual, evidence.reference)


def _between(row: Row, evidence: Evidence) -> list[str]:
    """Every module is right by itself, and the gradient is not: what lies between them."""
    text = "every module and the loss are right by themselves"
    with without_checkpointing():
        plain = run_whole(evidence.build)
    if _mended(row.name, plain.tensors, evidence):
        return [text, _CHECKPOINTING]
    return [text, "it is made between them: gradients that are not added, or added twice"]


def _checkpointed(row: Row, evidence: Evidence) -> list[str]:
    """Whether a module that holds others is right without activation checkpointing."""
    key = row.fqn or "", row.step or 0
    call, module = evidence.whole.calls.get(key), evidence.whole.modules.get(key[0])
    if call is None or module is None or not any(True for _ in module.children()):
        return []
    with without_checkpointing():
        plain = pull(module, call, evidence.calls[key])
    return [_CHECKPOINTING] if _mended(row.name, plain.named(key), evidence) else []


def _mended(name: str, tensors: Mapping[str, torch.Tensor], evidence: Evidence) -> bool:
    """Whether most of an error is gone in tensors that were made otherwise."""
    mine, theirs, before = (
        tensors.get(name),
        evidence.reference.get(name),
        evidence.actual.get(name),
    )
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return False
    left = float((mine.double() - theirs.double()).norm())
    was = float("inf") if before is None else float((before.double() - theirs.double()).norm())
    return left < _MENDED * was


def _sentence(
    comparison: Comparison,
    rows: Rows,
    found: Divergence,
    wrong: Sequence[Row],
    *,
    elsewhere: bool,
) -> str:
    text = sentence_of(comparison.verdict, rows, found, {})
    word = f"{comparison.verdict.value}: "
    said = _OTHER_FUNCTION if elsewhere else _SAID.get(found.stage, "")
    if found.stage == "loss":
        value = any(row.name.startswith("loss/") for row in wrong)
        said = _LOSS if value else _LOSS_GRADIENT
    if not said or not text.startswith(word):
        return text
    return text.replace(word, f"{word}{said}: ", 1)


_SAID = {
    "weights": "the weights differ before anything is trained",
    "input": "the model is given something else",
    FORWARD: "the trainer's forward is not the reference's",
    BACKWARD: "backward alone is wrong, the forward agrees",
    "gradient": "the parts are right, and the gradient is not",
    "optimizer": "gradients are right, and what is made of them is not",
    "merge": "the merged model is not the trainer's",
}
_OTHER_FUNCTION = "the forward is another function, which agrees on what was recorded"
_LOSS = "the loss is wrong on right predictions"
_LOSS_GRADIENT = "the loss agrees, and its gradient does not"
_CHECKPOINTING = "without activation checkpointing the gradient is right"
