"""The operator inside one module whose output departs, with the line of code that calls it.

The level below modules. Both sides run the module on the reference's inputs while every ATen
operator is kept with its output, its arguments that are no tensors, and the line of Python nearest
to it outside torch. The two lists are aligned by operator and shape; the first place where they
part, in another call, another argument or another result, is where the error is made. Code of
another class may do the same in another form: there, operators whose numbers the reference has,
fused, split or laid out anew, are passed by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch

from truestep.calls.values import in_real_numbers
from truestep.floors import EPSILON
from truestep.judge.rows import dtype_name
from truestep.measure.distance import distance, same_bits
from truestep.measure.plain import inside, is_wrapped
from truestep.pairing.naming import named_modules
from truestep.pairing.partners import Names, namesake
from truestep.replay.accounted import accounted
from truestep.replay.isolation import Flow, Forward, flow, heard
from truestep.replay.lines import Line, Place, Watch
from truestep.runtime.lent import active

Tensor = torch.Tensor

ALIKE = 0.5
"""Below this share of operators in common two implementations are not compared line by line."""

_ULPS = 16.0
"""Distance of two results of one operator, in epsilon, that is rounding whatever was measured."""

_MARGIN = 8.0
"""Distance over that of a benign run from which on a result is wrong."""


@dataclass(frozen=True)
class Operator:
    """One call of an operator.

    Attributes:
        name: As torch writes it: `aten.gelu.default`.
        arguments: What is no tensor, by name where it has one, as text.
        outputs: Host copies, in real numbers.
        line: `file:line` of the nearest Python outside torch.
        code: That line.
        place: File and number of that line, where it is the user's; see `_below`.
    """

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[Tensor, ...]
    line: str
    code: str
    place: Place | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What two calls of the same computation share."""
        return (self.name, *(tuple(tensor.shape) for tensor in self.outputs))

    def __str__(self) -> str:
        return f"{self.name.removesuffix('.default')} at {self.line}: {self.code}"


def kept(found: list[Operator]) -> Watch:
    """A watch that keeps every operator with host copies of its results."""

    def told(name: str, arguments: tuple[str, ...], outputs: list[Tensor], line: Line) -> None:
        made = tuple(in_real_numbers(tensor).to("cpu", copy=True) for tensor in outputs)
        found.append(Operator(name, arguments, made, *line))

    return Watch(told)


def operators(
    model: torch.nn.Module,
    forward: Forward,
    fqn: str,
    *,
    place: tuple[int, str],
    given: Flow | None = None,
    parts: Names = namesake,
    change: Any = None,
) -> list[Operator]:
    """Operators of the first call of one module, hooks on it included, in a forward of its model.

    Args:
        fqn: The module, as this model names it.
        place: Step and branch of the forward.
        given, parts, change: See `isolation.flow`: what its inputs are replaced by.
    """
    module = named_modules(model).modules[fqn]
    found: list[Operator] = []
    watch = kept(found)
    running: list[bool] = []

    def before(*_: object) -> None:
        if heard() and not running and not found:
            running.append(True)
            watch.__enter__()  # type: ignore[no-untyped-call]

    def after(*_: object) -> None:
        if heard() and running:
            running.pop()
            watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    handles = (
        module.register_forward_pre_hook(before, prepend=True),
        module.register_forward_hook(after, always_call=True),
    )
    answers = {part.fqn for part in parts(fqn)} or {fqn}
    try:
        flow(
            model,
            forward,
            place=place,
            given=given,
            select=answers,
            parts=parts,
            change=change,
        )
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class Parting:
    """Where two runs of one module part.

    Attributes:
        text: The operator and its line, in words.
        place: That line, where it is the user's.
    """

    text: str
    place: Place | None = None

    def __str__(self) -> str:
        return self.text


def first_operator(
    actual: Sequence[Operator],
    reference: Sequence[Operator],
    benign: Sequence[Operator] = (),
    *,
    same_class: bool = True,
) -> Parting | None:
    """Where two runs of one module, of which the outputs differ, part.

    Args:
        actual, reference: Operators of both sides on the same inputs.
        benign: The reference's again under a harmless change: what its results may differ by.
        same_class: Both sides are of one class: whatever is added or lacking, is so by intent.

    Returns:
        The operator and its line; None where the two sides are built too differently to align.
    """
    matcher = SequenceMatcher(
        None, [op.key for op in actual], [op.key for op in reference], autojunk=False
    )
    if not same_class and matcher.ratio() < 1.0:
        sides = [[(op.name, _result(op)) for op in side] for side in (actual, reference)]
        ours = accounted(*sides)
        if any(ours):
            theirs = accounted(*reversed(sides))
            return _unaccounted(actual, reference, benign, matcher, (ours, theirs))
        if matcher.ratio() < ALIKE:
            return None
    for tag, a0, a1, r0, _ in matcher.get_opcodes():
        if tag == "equal":
            for at in range(a1 - a0):
                told = _differs(actual[a0 + at], reference[r0 + at], benign, r0 + at)
                if told:
                    return Parting(told, actual[a0 + at].place)
        elif tag == "insert":  # only the reference has it
            return Parting(f"lacks {reference[r0]}")
        elif tag == "delete":
            return Parting(f"adds {actual[a0]}", actual[a0].place)
        else:
            return Parting(f"{actual[a0]} (for {_short(reference[r0])})", actual[a0].place)
    return Parting("all its operators agree: a hook, or code around them, returns another tensor")


def _unaccounted(
    actual: Sequence[Operator],
    reference: Sequence[Operator],
    benign: Sequence[Operator],
    matcher: SequenceMatcher[tuple[object, ...]],
    known: tuple[list[bool], list[bool]],
) -> Parting | None:
    """The first operator of other code whose result the reference has in no form.

    Other code may add, lack and exchange operators without harm, as long as its numbers are there.

    Args:
        matcher: Of both lists by operator and shape.
        known: Of each side's operators, whether the other one has its result in any form.
    """
    ours, theirs = known
    lacking: Operator | None = None
    for tag, a0, a1, r0, r1 in matcher.get_opcodes():
        if tag == "insert" and not all(theirs[r0:r1]):
            lacking = reference[r0 + theirs[r0:r1].index(False)]
        for at in range(a0, a1):
            op, other = actual[at], reference[min(r0 + at - a0, len(reference) - 1)]
            if ours[at]:
                lacking = None
            elif lacking is not None:
                return Parting(f"lacks {lacking}")
            elif tag == "equal":
                told = _differs(op, other, benign, r0 + at - a0)
                if told:
                    return Parting(told, op.place)
            else:
                same = tag == "replace" and r0 + at - a0 < r1 and op.name != other.name
                return Parting(f"{op} (for {_short(other)})" if same else str(op), op.place)
    return None


def _result(op: Operator) -> Tensor | None:
    """What an operator gives, where it is in real numbers."""
    first = next(iter(op.outputs), None)
    real = first is not None and first.is_floating_point() and first.numel() > 1
    return first if real else None


def differing_in_step(
    actual: Sequence[Operator], reference: Sequence[Operator], benign: Sequence[Operator] = ()
) -> str | None:
    """The first operator to differ while two implementations still do the same, in words.

    Other code may add, lack and exchange operators without harm: what comes behind the first of
    these says nothing.

    Args:
        actual, reference: Operators of both sides on the same inputs.
        benign: The reference's again under a harmless change.
    """
    ours, theirs, changed = (
        [op for op in side if op.outputs] for side in (actual, reference, benign)
    )
    for at, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if own.key != other.key:
            return None
        found = _differs(own, other, changed, at)
        if found:
            return found
    return None


def maker(tensor: Tensor, found: Sequence[Operator]) -> str | None:
    """The operator that gave a tensor, bit for bit; None where none of them did."""
    for op in found:
        for output in op.outputs:
            same = output.numel() == tensor.numel() and output.dtype == tensor.dtype
            if same and same_bits(output.reshape(tensor.shape), tensor):
                return f"made by {op}"
    return None


def differing_parameters(actual: torch.nn.Module, reference: torch.nn.Module) -> str | None:
    """Parameters and buffers of a module itself that are not the same on both sides, in words."""
    own, theirs = _weights(actual), _weights(reference)
    lender = active()
    if lender is not None:
        lender.buffers.clear()  # both sides of a weight are made next
    told = []
    for name, tensor in theirs.items():
        if name not in own:
            told.append(f"{name} is missing")
        elif own[name].shape != tensor.shape:
            told.append(f"{name} has shape {list(own[name].shape)} for {list(tensor.shape)}")
        elif own[name].is_meta or tensor.is_meta:
            told.append(f"{name} is not in memory, and was not compared")
        elif is_wrapped(tensor) or is_wrapped(own[name]):
            told += _wrapped_apart(name, own[name], tensor)
        elif not torch.equal(own[name].to(tensor.device, tensor.dtype), tensor):
            told.append(f"{name} {_apart(own[name].data, tensor.data)}")
    told += [f"{name} is extra" for name in own if name not in theirs]
    return ", ".join(told) or None


def _wrapped_apart(name: str, actual: torch.Tensor, reference: torch.Tensor) -> list[str]:
    """What differs of quantised weights: the tensors that they are made of."""
    if type(actual) is not type(reference):
        return [f"{name} is a {type(actual).__name__} for a {type(reference).__name__}"]
    own, theirs = inside(actual), inside(reference)
    if own is None or theirs is None:
        return [f"{name} is a {type(reference).__name__}, and was not compared"]
    if own.keys() != theirs.keys() or any(own[k].shape != theirs[k].shape for k in own):
        return [f"{name} is packed in another way"]
    apart = [k for k, part in theirs.items() if not same_bits(own[k].to(part.device), part)]
    return [f"{name}.{k} {_apart(own[k], theirs[k])}" for k in apart]


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module itself; those that accelerate holds for it, from there."""
    hook = getattr(module, "_hf_hook", None)
    maps = (getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,)))
    held: Mapping[str, torch.Tensor] = next((each for each in maps if each), {})
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: held[name] if w.is_meta and name in held else w for name, w in named}


def _apart(actual: torch.Tensor, reference: torch.Tensor) -> str:
    found = distance(actual, reference)
    if found.nonfinite_actual != found.nonfinite_reference:
        return f"has {found.nonfinite_actual:,} of {actual.numel():,} values that are not finite"
    return f"differs by {found.rel_l2:.2g}"


def _differs(
    actual: Operator, reference: Operator, benign: Sequence[Operator], at: int
) -> str | None:
    if actual.arguments != reference.arguments:
        own = [a for a in actual.arguments if a not in reference.arguments]
        theirs = [r for r in reference.arguments if r not in actual.arguments]
        return f"{actual} ({', '.join(own) or 'default'} for {', '.join(theirs) or 'default'})"
    for index, (a, r) in enumerate(zip(actual.outputs, reference.outputs, strict=True)):
        if a.dtype != r.dtype:
            return f"{actual} ({dtype_name(a)} for {dtype_name(r)})"
        if not a.is_floating_point():
            if not torch.equal(a, r):
                return str(actual)
            continue
        if not r.numel() or same_bits(a, r):
            continue
        limit = _ULPS * EPSILON.get(dtype_name(r), 0.0)
        if at < len(benign) and benign[at].key == reference.key:
            limit = max(limit, _MARGIN * distance(benign[at].outputs[index], r).rel_l2)
        found = distance(a, r)
        if not found.rel_l2 <= limit or found.nonfinite_actual != found.nonfinite_reference:
            return str(actual)
    return None


def _short(op: Operator) -> str:
    return op.name.removesuffix(".default")
