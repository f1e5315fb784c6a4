"""A candidate that is meant to differ (quantised): is anything broken underneath?

Its weights (`meant_weights`) are set against what the declared change explains of them
(`judge.meant`). Then the trusted ones are put in their place, and all else is checked as ever: what
still drifts was not made by the change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from truestep.case import Case
from truestep.errors import UsageError
from truestep.explanations import Meant, MeantFault
from truestep.judge.meant import (
    SLACK,
    WHOLE_STEP,
    WHOLE_STEPS,
    Fit,
    Limits,
    beside,
    broken,
    fit,
    infer,
    limits,
    of_another_kind,
    on_grids,
)
from truestep.judge.meant_kinds import what_is_wrong
from truestep.measure.quantisers import QUANTISERS, Quantiser, rms
from truestep.pairing.naming import ROOT
from truestep.recording.format import Recording
from truestep.replay.locating import locate_module
from truestep.replay.meant_weights import Acted, Changed, Models, Weights, compared, put_back
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Code, Pipeline, models_of
from truestep.runtime.stored import in_files
from truestep.text import nearest
from truestep.verdict import Comparison, Divergence, Verdict

Tensor = torch.Tensor

AUTO, SIBLINGS = "auto", "siblings"
NAMES = (AUTO, SIBLINGS, *QUANTISERS)
"""What a change may be declared as."""

_ACTED = 0.05
"""Share of what a layer gives by which its tokens' own quantisation may move it: 8 bits of floating
point move each number by 1/16 at most."""

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


_STORED = Limits(SLACK, WHOLE_STEPS)
"""Of numbers that no quantiser takes."""


@dataclass(frozen=True)
class Judged:
    """What the weights say.

    Attributes:
        change: Name of what explains them.
        fits: Of each changed weight of two axes and more.
        limit: None where too few layers were changed to tell.
        faults: The furthest first.
        other: How far off most layers are, where the declared change does not explain them.
        free: Whether the values lie on no grid, so that nothing says they are quantised.
        choices: Layers that are to the last number what another quantiser makes of them.
    """

    change: str
    fits: Mapping[str, Fit]
    limit: Limits | None
    faults: tuple[MeantFault, ...]
    other: float | None = None
    free: bool = False
    choices: int = 0


def _stored_in(each: Changed) -> float:
    """Relative rounding of numbers that no quantiser takes (biases, norms): of the coarsest dtype
    that holds them as they are, for a cast is no fault."""
    for dtype in (torch.bfloat16, torch.float16):
        candidate = each.pair.candidate
        if torch.equal(candidate.to(dtype).float(), candidate):
            return _CAST * torch.finfo(dtype).eps
    return each.eps


_CAST = 0.375
"""Of a dtype's eps: half of it is the rounding of one number, which `reach_of` takes twice, and a
cast through another 16 bits adds half as much."""


def judge_weights(found: Weights, name: str) -> Judged:
    """Which of the changed weights their change does not explain.

    Args:
        name: One of `NAMES`.
    """
    layers = [each for each in found.changed if each.pair.trusted.ndim > 1]
    quantiser = QUANTISERS.get(name)
    pairs = {each.name: each.pair for each in layers}
    free = name != SIBLINGS and bool(layers) and not on_grids(pairs.values())
    if name == AUTO and not free:
        eps = max((each.eps for each in layers), default=0.0)
        quantiser = infer(pairs, eps=eps)
    known = quantiser is not None
    unit = quantiser or _UNIT
    makers = _makers(layers, quantiser)
    choices, coarser = makers.choices, makers.coarser
    if 2 * len(choices) > len(layers):  # then it is they that were declared by another name
        choices = set()
    fits = {
        e.name: fit(e.pair.trusted, e.pair.candidate, unit, eps=e.eps)
        for e in layers
        if e.name not in choices
    }
    change = quantiser.name if quantiser is not None else SIBLINGS
    limit = limits(fits.values(), known=known)
    explained = [Fit(1.0, 1.0, 0.0, 1.0)] * len(choices)
    other = of_another_kind([*fits.values(), *explained]) if known else None
    if free:
        return Judged(change, fits, limit, (), free=True)
    if other is not None:
        return Judged(change, fits, limit, (), other)
    faults = [*_there_or_not(found), *coarser.values()]
    alone = known and not choices and len(layers) > _ALL_OTHERS
    unlike = _unlike_all_others(makers.inexact, unit) if alone else None
    others = {each.module: each.pair.trusted for each in layers}
    for each in found.changed:
        if each.name in choices or each.name in coarser:
            continue
        is_layer = each.name in fits
        here = limit if is_layer else _STORED
        if is_layer and limit is not None and known:
            here = beside(limit, _siblings(each, layers, fits))
        eps = each.eps if is_layer else _stored_in(each)
        own = (
            fits[each.name]
            if is_layer
            else fit(each.pair.trusted, each.pair.candidate, None, eps=eps)
        )
        ratio = broken(own, here) if here is not None else None
        if unlike is each and ratio is None:
            faults.append(_inexact(each, own, unit))
        if ratio is None or here is None:
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
    return Judged(change, fits, limit, tuple(faults), choices=len(choices))


def _there_or_not(found: Weights) -> list[MeantFault]:
    """Parameters that one side alone has."""
    sides = ((found.missing, "it is missing"), (found.added, "the trusted layer has none"))
    return [
        MeantFault(module=module, tensor=key, kind=kind, ratio=math.inf)
        for names, kind in sides
        for module, key in names
    ]


def _siblings(each: Changed, layers: Sequence[Changed], fits: Mapping[str, Fit]) -> list[Fit]:
    """The other layers with rows as long."""
    wide = each.pair.trusted[0].numel()
    alike = (e for e in layers if e is not each and e.pair.trusted[0].numel() == wide)
    return [fits[e.name] for e in alike if e.name in fits]


def _same(each: Changed, values: torch.Tensor, candidate: torch.Tensor) -> bool:
    return torch.allclose(values, candidate, rtol=2 * each.eps, atol=each.slack)


def _unlike_all_others(inexact: Sequence[Changed], quantiser: Quantiser) -> Changed | None:
    """The one layer that is not exactly what the quantiser makes of it, where all others are."""
    if len(inexact) != 1:
        return None
    rows = _inexact_rows(inexact[0], quantiser)
    return inexact[0] if 2 * len(rows) < inexact[0].pair.trusted.shape[0] else None


def _inexact_rows(each: Changed, quantiser: Quantiser) -> list[int]:
    """Rows that are not what the quantiser makes of them: of a layer made otherwise all are not."""
    made = quantiser(each.pair.trusted)
    values = each.pair.trusted if made is None else made.values
    off = (each.pair.candidate - values).abs() > 2 * each.eps * values.abs() + each.slack
    return [int(row) for row in torch.nonzero(off.flatten(1).any(1)).flatten()]


_INEXACT = "not what"
_ALL_OTHERS = 8
"""Layers that say who the maker is."""


def _inexact(each: Changed, own: Fit, unit: Quantiser) -> MeantFault:
    """What is said of a layer that is within its reach and yet not what all others are."""
    rows = _inexact_rows(each, unit)
    shown = ", ".join(map(str, rows[:3])) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
    kind = f"{_INEXACT} {unit.name} makes of it, as all other layers are: rows {shown}"
    return MeantFault(module=each.module, tensor=each.key, kind=kind, ratio=own.peak)


@dataclass
class _Makers:
    """Which layers are to the last number what some quantiser makes of them.

    Attributes:
        choices: Of another than the declared one, not much coarser, or a cast.
        coarser: Of a much coarser one, with what is said of that.
        inexact: Those that the declared one does not make so.
    """

    choices: set[str] = field(default_factory=set)
    coarser: dict[str, MeantFault] = field(default_factory=dict)
    inexact: list[Changed] = field(default_factory=list)


def _makers(layers: Sequence[Changed], quantiser: Quantiser | None) -> _Makers:
    """Who made each layer; nobody else is asked of one that is as declared."""
    found = _Makers()
    for each in layers if quantiser is not None else ():
        trusted, candidate = each.pair.trusted, each.pair.candidate
        own = quantiser(trusted) if quantiser is not None else None
        if own is not None and _same(each, own.values, candidate):
            continue
        found.inexact.append(each)
        casts = (trusted.to(dtype).float() for dtype in (torch.bfloat16, torch.float16))
        if any(_same(each, cast, candidate) for cast in casts):
            found.choices.add(each.name)
        for other in QUANTISERS.values():
            made = other(trusted) if other is not quantiser else None
            if made is None or not _same(each, made.values, candidate):
                continue
            ratio = rms(made.reach) / rms(own.reach) if own is not None else 0.0
            if ratio <= _COARSER:
                found.choices.add(each.name)
            else:
                kind = f"it is what {other.name} makes of it"
                found.coarser[each.name] = MeantFault(
                    module=each.module, tensor=each.key, kind=kind, ratio=ratio
                )
            break
    return found


_COARSER = 10.0
"""So many times as coarse as what was declared a layer's own choice may be: 8 bits of floating
point for 8 whole ones, and not 4 bits."""


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
        models_of(pipe),
        models_of(trusted),
        name,
        code=pipe.code,
        check=lambda: check(pipe, recording, case=case),
        locate=lambda rest: locate_module(pipe, trusted, recording, rest),
    )


def with_meant(
    result: Comparison,
    models: Models,
    trusted: Models,
    name: str,
    *,
    code: Code,
    check: Callable[[], Comparison],
    locate: Callable[[Comparison], Comparison],
) -> Comparison:
    """A check's result with what the declared change explains of it.

    Args:
        result: Of the candidate, at depth `steps`.
        models, trusted: The candidate's, and those of the reference, loaded here.
        name: One of `NAMES`.
        code: Entered while layers of the candidate run.
        check: Checks the candidate, as its models then are, against the reference.
        locate: Opens the models where a check failed.
    """
    with code():  # layers of another class are read by what they make of unit vectors
        found = compared(models, trusted)
    judged = judge_weights(found, name)
    with put_back(models, trusted, found) as acted:
        rest = check()
        if not rest.verdict.passed:
            rest = locate(rest)
    named = {fault.module for fault in judged.faults}
    acting = [fault for fault in _acting(acted) if fault.module not in named]
    judged = replace(judged, faults=(*judged.faults, *acting))
    found.unjudged += [
        f"{model}.{fqn} (it was given no tokens)"
        for (model, fqn), each in acted.items()
        if not each.calls
    ]
    layers = len(judged.fits) + judged.choices
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
    meant = meant.model_copy(update={"text": _text(meant, rest, judged)})
    told = _told(result, meant, rest)
    if meant.outcome != "undecided":
        return told
    sentence = f"undecided whether as meant: {result.verdict.value}, {_seen(meant, judged)}"
    update = {"sentence": f"{sentence}{meant.text}", "hint": _hint(meant, judged, rest)}
    return told.model_copy(update=update)


def _seen(meant: Meant, judged: Judged) -> str:
    """What is decided of the weights although not all is, and what would not have been seen."""
    if not meant.layers:
        return ""
    known = judged.limit is not None and not judged.limit.unlike
    if not known or judged.free or judged.other is not None:
        return f"and a fault in any of {meant.layers} changed weights would not have been seen: "
    blind = f" (from {meant.limit:.2g} x its reach on one would have been seen)"
    return f"no fault in {meant.layers} changed weights{blind}, but "


def _hint(meant: Meant, judged: Judged, rest: Comparison) -> str:
    """The command that says more than that it is undecided."""
    if rest.verdict is Verdict.INCONCLUSIVE and not meant.unjudged:
        return "truestep record CASE --runs 30"
    if meant.layers and meant.declared != AUTO and not (judged.free or meant.unjudged):
        return "truestep check CASE --meant auto"
    return "truestep check CASE --depth modules"


def _outcome(judged: Judged, found: Weights, rest: Comparison) -> str:
    drifted = rest.verdict in (Verdict.DRIFTED, Verdict.INVALID)
    if judged.faults or (drifted and not found.unjudged):
        return "fault"
    if (
        not judged.fits
        or judged.limit is None
        or judged.limit.unlike
        or judged.other is not None
        or judged.free
        or found.unjudged
        or not rest.verdict.passed
    ):
        return "undecided"
    return "explained"


def _acting(acted: Mapping[tuple[str, str], Acted]) -> list[MeantFault]:
    """Layers that make something else of their tokens than their own weights do."""
    faults = []
    for (model, fqn), each in acted.items():
        if each.apart > _ACTED:
            told = each.raised or f"{each.apart:.2g} from what its own weights make of them"
            kind = f"what it makes of the tokens it is given: {told}"
            module = model if fqn == ROOT else f"{model}.{fqn}"
            ratio = each.apart / _ACTED
            faults.append(MeantFault(module=module, tensor="", kind=kind, ratio=ratio))
    return sorted(faults, key=lambda fault: -fault.ratio)


def _text(meant: Meant, rest: Comparison, judged: Judged) -> str:
    """What is to be said, in a sentence."""
    own = "its siblings explain" if meant.change == SIBLINGS else f"its {meant.change} explains"
    if meant.faults:
        first = meant.faults[0]
        more = f"; {len(meant.faults) - 1} more" if len(meant.faults) > 1 else ""
        if first.kind.startswith(_INEXACT):
            return f"`{first.module}.{first.tensor}` is {first.kind}{more}"
        far = f"{first.ratio:.3g} x as far off as {own}" if math.isfinite(first.ratio) else "broken"
        if first.tensor and f"{first.module}.{first.tensor}" != first.module and first.kind:
            far += f": {first.tensor}, {first.kind}"
        elif first.kind:
            far += f": {first.kind}"
        return f"`{first.module}` is {far}{more}"
    if meant.outcome == "fault":
        return f"with the trusted weights put back it still differs: {rest.sentence}"
    if meant.unjudged:
        names = ", ".join(meant.unjudged[:2])
        return f"{len(meant.unjudged)} weights cannot be read, such as {names}"
    if not meant.layers:
        return "no weight differs from the trusted one: there is nothing that a change explains"
    if judged.free:
        return (
            f"the values of {meant.layers} changed weights lie on no grid: nothing says that they "
            "are quantised (an adapter fused in, another checkpoint)"
        )
    if judged.other is not None:
        return (
            f"most of {meant.layers} changed weights are {judged.other:.3g} x as far off as {own}: "
            "it is another change, or all of them are broken"
        )
    if meant.limit is None:
        return f"{meant.layers} layers are too few to be set against one another"
    if judged.limit is not None and judged.limit.unlike:
        return (
            f"{meant.layers} layers differ too much among themselves to be set against one another"
        )
    if meant.outcome == "undecided":
        return f"with the trusted weights put back it is {rest.sentence}"
    each = f"each of {meant.layers} changed weights is as far off as {own}"
    if meant.change != SIBLINGS and (meant.worst or 0.0) > WHOLE_STEP:
        each = (
            f"each of {meant.layers} changed weights is within a step of {meant.change} in most "
            "numbers, and clipped in others"
        )
    if judged.choices:
        each += f", or ({judged.choices}) what another quantiser makes of it"
    return f"{each} ({meant.worst:.2g} x its reach at most); no fault underneath"


def _told(result: Comparison, meant: Meant, rest: Comparison) -> Comparison:
    """The result with the sentence, place and notes that the declared change gives it."""
    verdict = result.verdict.value
    if meant.outcome == "explained":
        sentence = f"{verdict}, as meant: {meant.text}"
    else:
        sentence = f"{verdict}, and not as meant: {meant.text}"
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
