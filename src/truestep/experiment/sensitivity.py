"""Which layers a change of weights (quantisation) costs most in, and which to leave as they are.

What a layer costs is what its change moves the end of a run by. All layers are first estimated at
once: the derivative of the guided prediction along a random direction, taken back through the
model, gives the share of every weight's change in that direction, whose mean square over directions
is that of the whole error (Hutchinson 1989); what the run makes of an error is measured by one run
from that step on. The foremost are then run, each changed alone, to the end of a run of few steps.
How these ends add up, and which cancel, says which to leave as they are; that is verified by
running it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from truestep.call_case import CallCase
from truestep.case import Case
from truestep.environment import library_version
from truestep.errors import UsageError, surviving
from truestep.experiment.remains import beside, refuse_endless, refuse_not_finite
from truestep.experiment.sensitivity_records import LayerSensitivity, MeasuredError, Sensitivity
from truestep.experiment.trajectory import Generation, Trajectory, apart, length
from truestep.joint import each, tensors_of
from truestep.measure.quantisers import QUANTISERS
from truestep.progress import Progress, silent
from truestep.randomness import own_randomness
from truestep.replay.meant_weights import compared
from truestep.runtime.applying import Apply
from truestep.runtime.quantising import Layer, instead, layers_in, quantised
from truestep.turns import taking_turns

Tensor = torch.Tensor

PROBES = 8
"""Random directions at a step: an error is then known to a quarter of itself."""

REFINED = 24
"""Layers of the largest estimates that are run, each changed alone."""

SHORT = 8
"""Steps of these runs."""


@taking_turns()
@surviving("the model")
@own_randomness()
def sensitivity(
    case: Case | CallCase,
    *,
    change: str | Apply,
    budget: float = 0.1,
    steps: Sequence[int] | None = None,
    probes: int = PROBES,
    exact: bool = False,
    progress: Progress = silent,
) -> Sensitivity:
    """Rank the layers of a case's denoisers by what a change of each costs.

    Args:
        case: What is generated.
        change: Name of a quantiser, or a function that changes the weights of a pipeline.
        budget: Share of the bytes of all layers that may be left as they are.
        steps: Where predictions are looked at; default the first, middle and last.
        probes: Random directions at each.
        exact: Change each layer on its own and run it, instead: as many forwards as layers.
        progress: Told (what, done, total).

    Raises:
        CaseError, ModelLoadError: The case cannot be run.
        UsageError: The change is not known, changes no weight of a layer, reaches the trusted model
            too, or makes values that are not finite.
    """
    _refuse(change, budget, probes)
    progress("generation", 0, 1)
    run = _recorded(case)
    chosen = _chosen(run, steps)
    layers = layers_in(run.denoisers)
    changed, left_out = _changed(layers, run, change)
    refuse_not_finite(changed)
    made = _Change(run, layers, changed, chosen, progress)
    nothing, gains = _nothing_kept(made)
    told, kept = _ranked(made, gains, 0 if exact else probes, budget)
    progress("what the list buys", 0, 1)
    rest = {name: tensor for name, tensor in changed.items() if name not in kept}
    bought = _measured(replace(made, changed=rest))
    return Sensitivity(
        tool_version=library_version("truestep") or "",
        sentence=_sentence(len(kept), nothing, bought),
        case_id=case.id,
        case=case.canonical(),
        change=change if isinstance(change, str) else getattr(change, "__name__", "change"),
        steps=chosen,
        gains=gains,
        layers=tuple(told),
        budget=budget,
        kept=tuple(layer.name for layer in told if layer.name in kept),
        kept_bytes=sum(layers[name].bytes for name in kept),
        total_bytes=sum(layers[name].bytes for name in changed),
        nothing_kept=nothing,
        list_kept=bought,
        method="exact" if exact else "estimate",
        probes=0 if exact else probes,
        forwards=run.spent,
        forwards_generation=run.forwards,
        left_out=left_out,
    )


def _recorded(case: Case | CallCase) -> Generation:
    """The case's generation, recorded."""
    if isinstance(case, Case):
        return Trajectory.recorded(case)
    from truestep.experiment.call_trajectory import CallTrajectory

    return CallTrajectory.recorded(case)


@dataclass(frozen=True)
class _Change:
    """A change of layers: their numbers, the trusted run, the steps where errors are looked at."""

    run: Generation
    layers: Mapping[str, Layer]
    changed: Mapping[str, Tensor]
    steps: tuple[int, ...]
    progress: Progress


def _chosen(run: Generation, steps: Sequence[int] | None) -> tuple[int, ...]:
    """Steps to look at.

    Raises:
        UsageError: There are none such.
    """
    chosen = run.some_steps() if steps is None else tuple(sorted(set(steps)))
    bad = [step for step in chosen if not 0 <= step < run.total]
    if bad or not chosen:
        raise UsageError(
            f"no step {bad[0]} in the case" if bad else "no steps were chosen",
            measured=f"its steps are 0 to {run.total - 1}",
        )
    return chosen


def _ranked(
    made: _Change, gains: Sequence[float], probes: int, budget: float
) -> tuple[list[LayerSensitivity], frozenset[str]]:
    """The layers, the most sensitive first, by so many probes (0: exactly), and those to keep."""
    sizes = {name: made.layers[name].bytes for name in made.changed}
    errors = _estimated(made, probes) if probes else _exact(made)
    scores = {name: score_of(own, gains, made.run.total) for name, own in errors.items()}
    endless = [name for name, score in scores.items() if not math.isfinite(score)]
    names = foremost(scores, sizes, REFINED) if probes else [*made.changed]
    ends, whole, length_of_end = _ends(made, names)
    refuse_endless(ends, whole, endless)
    scores |= {name: float(end.norm()) / length_of_end for name, end in ends.items()}
    kept = worth_keeping(whole, ends, sizes, budget * sum(sizes.values()))
    told = [
        LayerSensitivity(
            name=name,
            bytes=sizes[name],
            errors=own,
            score=scores[name],
            exact=name in ends,
            kept=name in kept,
        )
        for name, own in errors.items()
    ]
    return sorted(told, key=lambda layer: -layer.score), kept


def _ends(made: _Change, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor, float]:
    """Where the end of a short run moves: with each of some layers changed, and with all of them.

    Returns:
        By layer, of all layers, and how long the trusted end is.
    """
    short = made.run.shortened(SHORT)

    def end() -> Tensor:
        parts = [part.double().cpu().flatten() for part in tensors_of(short.latent())]
        return torch.cat(parts)

    trusted, moved = end(), dict[str, Tensor]()
    with instead(made.layers, made.changed):
        whole = end() - trusted
    for done, name in enumerate(names):
        made.progress("layers", done, len(names))
        with instead(made.layers, {name: made.changed[name]}):
            moved[name] = end() - trusted
    made.run.spent += short.spent
    return moved, whole, float(trusted.norm()) or 1.0


def _refuse(change: str | Apply, budget: float, probes: int) -> None:
    """Refuse what cannot be, before anything is loaded."""
    if isinstance(change, str) and change not in QUANTISERS:
        raise UsageError(
            f"no change {change!r}",
            measured=f"known are {', '.join(QUANTISERS)}, or FILE.py:FUNCTION",
        )
    if not 0 < budget < 1:
        raise UsageError("the share to keep lies between 0 and 1", measured=f"it is {budget:g}")
    if probes < 1:
        raise UsageError("an estimate takes one probe or more", measured=f"{probes} were asked for")


def _changed(
    layers: Mapping[str, Layer], run: Generation, change: str | Apply
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The numbers that a change gives each layer, and what else it does."""
    if isinstance(change, str):
        made = quantised(layers.values(), change)
        left = [f"{name}: its shape does not suit" for name in layers if name not in made]
    else:
        other = run.loaded(change)
        found = compared(other.models, run.loaded(None).models)
        made, left = {}, [f"{name}: cannot be read" for name in found.unjudged]
        for each_changed in found.changed:
            if each_changed.key == "weight" and each_changed.module in layers:
                like = layers[each_changed.module].weight
                made[each_changed.module] = each_changed.pair.candidate.to(like.dtype, copy=True)
            else:
                left.append(f"{each_changed.name}: of no layer of a denoiser")
        left += [f"{name}.{key}: it is gone" for name, key in found.missing]
        if made:
            changed = [(each_changed.module, each_changed.key) for each_changed in found.changed]
            weights = [*changed, *found.missing]
            left = [*beside(run, other, weights, SHORT), *left]
    made = {n: t for n, t in made.items() if not torch.equal(t.cpu(), layers[n].weight.cpu())}
    if not made:
        raise UsageError(
            "the change changes no weight of a denoiser's layers",
            measured=f"{len(layers)} linear and convolutional layers were looked at",
            likely="; ".join(left[:2]),
        )
    return made, tuple(left)


@contextmanager
def _learning(layers: Mapping[str, Layer]) -> Iterator[None]:
    """Weights of layers that take gradients, which are let go."""
    before = {name: layer.weight.requires_grad for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.grad = None
            layer.weight.requires_grad_(before[name])


def _estimated(change: _Change, probes: int) -> dict[str, tuple[float, ...]]:
    """Errors of the prediction by layer, a number a step, by random directions."""
    run, changed, steps = change.run, change.changed, change.steps
    generator = torch.Generator("cpu").manual_seed(0)
    squares = {name: [0.0] * len(steps) for name in changed}
    watched = {name: change.layers[name] for name in changed}
    for at, step in enumerate(steps):
        share: dict[str, float] = {}
        hooks = [_hook(name, layer, changed[name], share) for name, layer in watched.items()]
        try:
            with torch.enable_grad(), _learning(watched):
                run.begin()
                before = run.spent
                made = run.guided(step)
                each_pass = run.spent - before
                for probe in range(probes):
                    change.progress("probes", at * probes + probe, len(steps) * probes)
                    share.clear()
                    along = each(lambda t: torch.randn(t.shape, generator=generator).to(t), made)
                    pairs = zip(tensors_of(made), tensors_of(along), strict=True)
                    total = torch.stack([(m * a).sum().double() for m, a in pairs]).sum()
                    total.backward(retain_graph=probe < probes - 1)
                    run.spent += 2 * each_pass
                    for name, value in share.items():
                        squares[name][at] += value**2 / probes
        finally:
            for hook in hooks:
                hook.remove()
        whole = length(run.trusted(step))
        for name in changed:
            squares[name][at] = math.sqrt(squares[name][at]) / whole
    return {name: tuple(values) for name, values in squares.items()}


def _hook(
    name: str, layer: Layer, changed: Tensor, share: dict[str, float]
) -> torch.utils.hooks.RemovableHandle:
    """Take a weight's gradient for what its change moves, and let it go."""

    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        off = changed.to(weight.device).float() - weight.detach().float()
        share[name] = float((weight.grad.float() * off).sum(dtype=torch.float64))
        weight.grad = None

    before = layer.weight.requires_grad
    layer.weight.requires_grad_(True)  # what takes none has no hooks
    handle: torch.utils.hooks.RemovableHandle = layer.weight.register_post_accumulate_grad_hook(
        take
    )
    layer.weight.requires_grad_(before)
    return handle


def _exact(made: _Change) -> dict[str, tuple[float, ...]]:
    """Errors of the prediction by layer, a number a step, with that layer changed."""
    found = {}
    for done, (name, tensor) in enumerate(made.changed.items()):
        made.progress("layers", done, len(made.changed))
        with instead(made.layers, {name: tensor}):
            found[name] = _errors(made.run, made.steps)
    return found


def _errors(run: Generation, steps: Sequence[int]) -> tuple[float, ...]:
    """Of the guided prediction at steps, on the recorded latents."""
    with torch.no_grad():
        run.begin()
        return tuple(apart(run.guided(step), run.trusted(step)) for step in steps)


def _nothing_kept(made: _Change) -> tuple[MeasuredError, tuple[float, ...]]:
    """What the whole change costs, and what the run makes of its error at each step.

    A gain is the relative distance of the ends over that of the predictions.
    """
    run, gains = made.run, []
    with instead(made.layers, made.changed):
        errors = _errors(run, made.steps)
    for done, (step, off) in enumerate(zip(made.steps, errors, strict=True)):
        made.progress("gains", done, len(made.steps))
        moved = apart(run.end(step, lambda: instead(made.layers, made.changed)), run.final())
        gains.append(moved / off if off else 0.0)
    return _measured(made), tuple(gains)


def _measured(made: _Change) -> MeasuredError:
    """What a change of some layers costs, by running it."""
    run = made.run
    final, frames = run.final(), run.frames()
    with instead(made.layers, made.changed):
        predictions = _errors(run, made.steps)
        latent, decoded = run.free()
    return MeasuredError(
        predictions=predictions, final=apart(latent, final), frames=apart(decoded, frames)
    )


def score_of(errors: Sequence[float], gains: Sequence[float], total: int) -> float:
    """What a layer is estimated to cost at the end: errors times gains, of all steps as of those.

    The change of a weight is the same at every step: what it does adds up.
    """
    each_step = [error * gain for error, gain in zip(errors, gains, strict=True)]
    return sum(each_step) * total / len(errors)


def foremost(scores: Mapping[str, float], sizes: Mapping[str, int], most: int) -> list[str]:
    """Layers that may be worth keeping: the most sensitive, and the most so for their bytes."""
    for_bytes = sorted(scores, key=lambda name: -(scores[name] ** 2) / sizes[name])
    at_all = sorted(scores, key=lambda name: -scores[name])
    turns = (name for pair in zip(for_bytes, at_all, strict=True) for name in pair)
    return list(dict.fromkeys(turns))[:most]


def worth_keeping(
    whole: Tensor, ends: Mapping[str, Tensor], sizes: Mapping[str, int], most: float
) -> frozenset[str]:
    """Layers without whose changes the end is nearest, as their ends add up.

    Args:
        whole: Where the end moves with all layers changed. ends: with each alone.
        sizes: Bytes of each. most: Bytes that may be kept.

    Returns:
        Those taken one after another by what is nearer for their bytes, or by what is nearer at
        all: whichever is nearer in the end.
    """
    found = [_taken(whole, ends, sizes, most, for_bytes) for for_bytes in (True, False)]
    return min(found, key=lambda pair: pair[1])[0]


def _taken(
    whole: Tensor,
    ends: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    most: float,
    for_bytes: bool,
) -> tuple[frozenset[str], float]:
    """Layers taken one after another, and how far the end is with them."""
    kept, room, left = set[str](), most, whole
    while True:
        gains = {}
        for name, end in ends.items():
            if name in kept or sizes[name] > room:
                continue
            nearer = float(2 * left @ end - end @ end)
            if nearer > 0:
                gains[name] = nearer / (sizes[name] if for_bytes else 1)
        if not gains:
            return frozenset(kept), float(left.norm())
        best = max(gains, key=lambda name: gains[name])
        kept.add(best)
        room -= sizes[best]
        left = left - ends[best]


def _sentence(count: int, nothing: MeasuredError, bought: MeasuredError) -> str:
    """What a person would repeat."""
    if not count:
        return "no layer makes the end nearer within the share that may be kept"
    if not bought.final < nothing.final:
        return (
            f"keeping {count} layers buys nothing here: the final latent is {bought.final:.2g} "
            f"off, {nothing.final:.2g} without"
        )
    times = nothing.final / bought.final if bought.final else math.inf
    frames = "" if bought.frames < nothing.frames else "; what is decoded is no nearer"
    return (
        f"keeping {count} layers makes the final latent {times:.2g} x nearer: {bought.final:.2g} "
        f"off, not {nothing.final:.2g}{frames}"
    )
