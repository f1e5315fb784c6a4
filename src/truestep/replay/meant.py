"""A candidate that is meant to differ (quantised): is anything broken underneath?

Its weights are read, or found out by what its layers make of unit vectors, and set against what the
declared change explains of them (`judge.meant`). Then the trusted layers are put in their place,
and all else is checked as ever: what still drifts was not made by the change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from truestep.case import Case
from truestep.errors import FOREIGN, UsageError
from truestep.explanations import Meant, MeantFault
from truestep.judge.meant import (
    SLACK,
    WHOLE_STEPS,
    Fit,
    Limits,
    Pair,
    broken,
    fit,
    infer,
    limits,
    of_another_kind,
)
from truestep.judge.meant_kinds import what_is_wrong
from truestep.measure.distance import same_bits
from truestep.measure.plain import is_wrapped
from truestep.measure.quantisers import QUANTISERS, Quantiser
from truestep.pairing.naming import ROOT, named_modules
from truestep.recording.format import Recording
from truestep.replay.locating import locate_module
from truestep.runtime.loading import load
from truestep.runtime.pipeline import MODELS, Pipeline
from truestep.runtime.precision import is_packed
from truestep.runtime.stored import in_files
from truestep.text import nearest
from truestep.verdict import Comparison, Divergence, Verdict

Tensor = torch.Tensor

AUTO, SIBLINGS = "auto", "siblings"
NAMES = (AUTO, SIBLINGS, *QUANTISERS)
"""What a change may be declared as."""

_CAST = 2.0**-8
"""Of numbers that no quantiser takes (biases, norms): a cast to bfloat16 is no fault."""

_AT_ONCE = 256
"""Unit vectors that a layer is given at once."""

_UNIT = QUANTISERS["int8"]
"""What layers are measured by where nothing explains them: they are set against one another."""


def require_name(name: str) -> None:
    """Refuse a change that is not known.

    Raises:
        UsageError: It is none of `NAMES`.
    """
    if name not in NAMES:
        raise UsageError(
            f"--meant {name!r} is no change that is known",
            measured=f"known are {', '.join(NAMES)}",
            likely=nearest(name, NAMES),
            hint="give --meant auto: it finds out which quantiser explains the weights",
        )


@dataclass(frozen=True)
class Changed:
    """A parameter that is not what it was.

    Attributes:
        module, key: Where it is; the module with its model before it.
        pair: Both sides.
        eps: Of the precision that the candidate keeps it in.
    """

    module: str
    key: str
    pair: Pair
    eps: float

    @property
    def name(self) -> str:
        """Of the parameter."""
        return f"{self.module}.{self.key}"


@dataclass
class Weights:
    """What became of a pipeline's parameters.

    Attributes:
        changed: Those that are not what they were.
        same: How many weights of two axes and more are.
        unjudged: Modules whose weights cannot be read.
        touched: Modules to put back, by model and fqn.
    """

    changed: list[Changed]
    same: int
    unjudged: list[str]
    touched: list[tuple[str, str]]


def compared(pipe: Pipeline, trusted: Pipeline) -> Weights:
    """Every parameter of the trusted models beside the candidate's."""
    found = Weights([], 0, [], [])
    for model in MODELS:
        own, theirs = getattr(pipe, model), getattr(trusted, model)
        if not isinstance(own, torch.nn.Module) or not isinstance(theirs, torch.nn.Module):
            continue
        ours = named_modules(own).modules
        for fqn, module in named_modules(theirs).modules.items():
            _compare(found, model, fqn, ours.get(fqn), module)
    return found


def _compare(
    found: Weights,
    model: str,
    fqn: str,
    own: torch.nn.Module | None,
    theirs: torch.nn.Module,
) -> None:
    """Add what became of one module's own parameters."""
    parameters = {k: p for k, p in theirs._parameters.items() if p is not None}
    name = model if fqn == ROOT else f"{model}.{fqn}"
    touched = own is not None and type(own) is not type(theirs) and not theirs._modules
    read = _probed(own, theirs) if touched and own is not None else {}
    for key, parameter in parameters.items():
        reference = parameter.detach()
        actual = read.get(key) if key in read else _readable(own, key)
        if actual is None or actual.shape != reference.shape:
            found.unjudged.append(f"{name}.{key}")
            continue
        if same_bits(actual, reference):
            found.same += reference.ndim > 1
            continue
        touched = True
        eps = max(torch.finfo(side.dtype).eps for side in (actual, reference)) / 2
        pair = Pair(reference.float().cpu(), actual.float().cpu())
        found.changed.append(Changed(name, key, pair, eps))
    if touched:
        found.touched.append((model, fqn))


def _readable(module: torch.nn.Module | None, key: str) -> Tensor | None:
    """A parameter as plain numbers; None where there is none of that name, or of numbers."""
    if module is None:
        return None
    tensor: Tensor | None = module._parameters.get(key)
    if tensor is None:
        tensor = module._buffers.get(key)
    if tensor is None or tensor.is_meta:
        return None
    if is_packed(tensor):
        plain: Tensor = tensor.dequantize()
        return plain.detach()
    return tensor.detach() if tensor.is_floating_point() and not is_wrapped(tensor) else None


def _probed(own: torch.nn.Module, theirs: torch.nn.Module) -> dict[str, Tensor]:
    """Weight and bias that a layer of another class works with, by what it makes of unit vectors.

    Of layers that quantise what they are given, too: one number of a vector is a whole step.
    """
    if not isinstance(theirs, torch.nn.Linear):
        return {}
    units = torch.eye(theirs.in_features).to(theirs.weight)
    try:
        with torch.no_grad():
            nothing = own(torch.zeros_like(units[:1]))
            columns = [
                own(units[at : at + _AT_ONCE]) - nothing for at in range(0, len(units), _AT_ONCE)
            ]
    except FOREIGN:  # it takes something else: what it holds may still be read
        return {}
    made = {"weight": torch.cat(columns).T.contiguous()}
    return made if theirs.bias is None else {**made, "bias": nothing[0]}


_STORED = Limits(SLACK, WHOLE_STEPS)
"""Of numbers that no quantiser takes."""


@dataclass(frozen=True)
class Judged:
    """What the weights say.

    Attributes:
        other: How far off most layers are, where the declared change does not explain them.
        change: Name of what explains them.
        fits: Of each changed weight of two axes and more.
        limit: None where too few layers were changed to tell.
        faults: The furthest first.
    """

    change: str
    fits: Mapping[str, Fit]
    limit: Limits | None
    faults: tuple[MeantFault, ...]
    other: float | None = None


def judge_weights(found: Weights, name: str) -> Judged:
    """Which of the changed weights their change does not explain.

    Args:
        name: One of `NAMES`.
    """
    layers = [each for each in found.changed if each.pair.trusted.ndim > 1]
    quantiser = QUANTISERS.get(name)
    if name == AUTO:
        eps = max((each.eps for each in layers), default=0.0)
        quantiser = infer({each.name: each.pair for each in layers}, eps=eps)
    known = quantiser is not None
    unit = quantiser or _UNIT
    fits = {e.name: fit(e.pair.trusted, e.pair.candidate, unit, eps=e.eps) for e in layers}
    change = quantiser.name if quantiser is not None else SIBLINGS
    limit = limits(fits.values(), known=known)
    other = of_another_kind(fits.values()) if known else None
    if other is not None:
        return Judged(change, fits, limit, (), other)
    faults: list[MeantFault] = []
    others = {each.module: each.pair.trusted for each in layers}
    for each in found.changed:
        is_layer = each.name in fits
        here = limit if is_layer else _STORED
        eps = each.eps if is_layer else _CAST
        own = (
            fits[each.name]
            if is_layer
            else fit(each.pair.trusted, each.pair.candidate, None, eps=eps)
        )
        ratio = broken(own, here) if here is not None else None
        if ratio is None or here is None or (is_layer and _of_another(each, quantiser)):
            continue
        kind = what_is_wrong(
            each.pair.trusted,
            each.pair.candidate,
            unit(each.pair.trusted) if is_layer else None,
            limit=here,
            eps=eps,
            others={k: v for k, v in others.items() if k != each.module},
        )
        faults.append(MeantFault(module=each.module, tensor=each.key, kind=kind, ratio=ratio))
    faults.sort(key=lambda fault: -fault.ratio)
    return Judged(change, fits, limit, tuple(faults))


def _of_another(each: Changed, quantiser: Quantiser | None) -> bool:
    """Whether a layer is to the last number what another quantiser makes of it: a choice."""
    trusted, candidate = each.pair.trusted, each.pair.candidate
    for other in QUANTISERS.values():
        made = other(trusted) if other is not quantiser else None
        if made is not None and torch.allclose(made.values, candidate, rtol=2 * each.eps, atol=0):
            return True
    return False


@contextmanager
def put_back(pipe: Pipeline, trusted: Pipeline, touched: list[tuple[str, str]]) -> Iterator[None]:
    """The candidate with the trusted model's layers in the place of its own."""
    undone: list[tuple[torch.nn.Module, str, torch.nn.Module | None]] = []
    tensors: list[tuple[torch.nn.Module, str, torch.nn.Parameter | None]] = []
    try:
        for model, fqn in touched:
            own, theirs = (named_modules(getattr(side, model)).modules for side in (pipe, trusted))
            if fqn not in own:
                continue
            module, other = own[fqn], theirs[fqn]
            if other._modules:  # with others in it: its own parameters alone
                for key, parameter in other._parameters.items():
                    tensors.append((module, key, module._parameters.get(key)))
                    module._parameters[key] = parameter
                continue
            for holder in getattr(pipe, model).modules():
                for key, child in holder._modules.items():
                    if child is module:
                        undone.append((holder, key, child))
                        holder._modules[key] = other
        yield
    finally:
        for holder, key, child in undone:
            holder._modules[key] = child
        for holder, key, parameter in tensors:
            holder._parameters[key] = parameter


def refuse_meant(name: str | None, depth: str) -> None:
    """Refuse a declared change that is not known, or that nothing can be said of.

    Raises:
        UsageError: See above.
    """
    if name is None:
        return
    require_name(name)
    if depth not in ("steps", "modules"):
        raise UsageError(
            f"a declared change is judged by its weights, not at depth {depth!r}",
            hint="leave --depth out",
        )


Check = Callable[[Pipeline], Comparison]


def as_meant(
    pipe: Pipeline,
    case: Case,
    recording: Recording,
    result: Comparison,
    name: str,
    *,
    check: Callable[..., Comparison],
) -> Comparison:
    """What `with_meant` says, beside the reference's model, which is loaded here."""
    with in_files():
        trusted = load(case)
    return with_meant(
        result,
        pipe,
        trusted,
        name,
        check=lambda candidate: check(candidate, recording, case=case),
        locate=lambda rest: locate_module(pipe, trusted, recording, rest),
    )


def with_meant(
    result: Comparison,
    pipe: Pipeline,
    trusted: Pipeline,
    name: str,
    *,
    check: Check,
    locate: Callable[[Comparison], Comparison],
) -> Comparison:
    """A check's result with what the declared change explains of it.

    Args:
        result: Of the candidate, at depth `steps`.
        pipe, trusted: Candidate, and the reference's model loaded here.
        name: One of `NAMES`.
        check: Checks a pipeline against the reference.
        locate: Opens the models where a check failed.
    """
    found = compared(pipe, trusted)
    judged = judge_weights(found, name)
    with put_back(pipe, trusted, found.touched):
        rest = check(pipe)
        if not rest.verdict.passed:
            rest = locate(rest)
    layers = len(judged.fits)
    worst = max(judged.fits, key=lambda k: judged.fits[k].peak, default="")
    meant = Meant(
        change=judged.change,
        declared=name,
        outcome=_outcome(judged, found, rest),
        text="",
        layers=layers,
        kept=found.same,
        worst=judged.fits[worst].peak if worst else None,
        worst_layer=worst,
        limit=judged.limit.peak if judged.limit is not None else None,
        faults=judged.faults,
        rest=rest.sentence,
        unjudged=tuple(found.unjudged),
    )
    text = _text(meant, rest, judged.other)
    meant = meant.model_copy(update={"text": text})
    return _told(result, meant, rest)


def _outcome(judged: Judged, found: Weights, rest: Comparison) -> str:
    if judged.faults or rest.verdict in (Verdict.DRIFTED, Verdict.INVALID):
        return "fault"
    if (
        not judged.fits
        or judged.limit is None
        or judged.other is not None
        or found.unjudged
        or not rest.verdict.passed
    ):
        return "undecided"
    return "explained"


def _text(meant: Meant, rest: Comparison, other: float | None) -> str:
    """What is to be said, in a sentence."""
    own = "its siblings explain" if meant.change == SIBLINGS else f"its {meant.change} explains"
    if meant.faults:
        first = meant.faults[0]
        more = f"; {len(meant.faults) - 1} more" if len(meant.faults) > 1 else ""
        far = f"{first.ratio:.3g} x as far off as {own}" if math.isfinite(first.ratio) else "broken"
        if first.tensor and f"{first.module}.{first.tensor}" != first.module and first.kind:
            far += f": {first.tensor}, {first.kind}"
        return f"`{first.module}` is {far}{more}"
    if meant.outcome == "fault":
        return f"with the trusted weights put back it still differs: {rest.sentence}"
    if not meant.layers:
        return "no weight differs from the trusted one: there is nothing that a change explains"
    if other is not None:
        return (
            f"most of {meant.layers} changed weights are {other:.3g} x as far off as {own}: it is "
            "another change (--meant auto), or all of them are broken"
        )
    if meant.unjudged:
        names = ", ".join(meant.unjudged[:2])
        return f"{len(meant.unjudged)} weights cannot be read, such as {names}"
    if meant.limit is None:
        return f"{meant.layers} layers are too few to be set against one another"
    if meant.outcome == "undecided":
        return f"with the trusted weights put back it is {rest.sentence}"
    each = f"each of {meant.layers} changed weights is as far off as {own}"
    return f"{each} ({meant.worst:.2g} x its reach at most); no fault underneath"


def _told(result: Comparison, meant: Meant, rest: Comparison) -> Comparison:
    """The result with the sentence, place and notes that the declared change gives it."""
    verdict = result.verdict.value
    if meant.outcome == "explained":
        sentence = f"{verdict}, as meant: {meant.text}"
    elif meant.outcome == "fault":
        sentence = f"{verdict}, and not as meant: {meant.text}"
    else:
        sentence = f"{verdict}, undecided whether as meant: {meant.text}"
    first = result.first_divergence
    if meant.faults:
        fault = meant.faults[0]
        first = Divergence(
            name=f"{fault.module}.{fault.tensor}".rstrip("."),
            stage="weights",
            fqn=fault.module,
            kind=fault.kind or None,
        )
    elif meant.outcome == "fault":
        first = rest.first_divergence
    return result.model_copy(
        update={"meant": meant, "sentence": sentence, "first_divergence": first}
    )
