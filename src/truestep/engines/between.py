"""What leads from one seam of an engine's run to the next.

A step begins with what the step before it gave, and its model is given that latent; text and all
else that conditions a model stays as the reference has it, at every step. Where an engine changes
any of this, each seam by itself may still be right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from truestep.engines.conventions import as_shape
from truestep.engines.engine import LATENTS, SCALES, SOUND, TIMES
from truestep.engines.expected import AGREES, SCALE, Seams, fitted
from truestep.engines.run import Pass, Run, Step
from truestep.keys import step_name
from truestep.measure.distance import distance, same_bits

SOUND_NOISE = "audio/latent/initial"

INPUT = "input"
"""Name of what a step's model is given as its latent."""


def put_between(found: Seams, run: Run, known: Run | None) -> None:
    """Latents that models are given, and what else conditions them, at every step."""
    _put_inputs(found, run, known)
    if known is not None:
        for number, one, other in _pairs(run, known):
            _put_conditions(found, number, one, other, {*run.adapter.called.values()})


def _put_inputs(found: Seams, run: Run, known: Run | None) -> None:
    """The latent of the step, times what the reference's model is given of its own."""
    changed = []
    for index, step in enumerate(run.steps):
        for one in step.passes:
            given = _inner(one, step)
            if given is None or step.latent is None:
                continue
            latent = step.latent.to(given.dtype).reshape(given.shape)
            factor = _factor(known, index, one.branch)
            if factor is not None:
                name = step_name(step.number, INPUT)
                if name not in found.expected or not _same(given, latent):
                    found.put(name, given, latent if factor == 1.0 else latent * factor)
            elif not _same(given, latent):
                changed.append(step.number)
    if changed:
        why = "no reference was given" if known is None else "the reference does not hold it so"
        text = f"it is not the latent of step {changed[0]}, and {why}"
        found.unjudged["model input"] = text


def _inner(one: Pass, step: Step) -> torch.Tensor | None:
    """Of what a model is given, the part that may be the latent: conditions are behind it."""
    given, latent = one.role("latent"), step.latent
    if given is None or latent is None:
        return None
    if given.numel() == latent.numel():
        return given
    if given.ndim == latent.ndim > 1 and given.shape[1] > latent.shape[1]:
        first = given[:, : latent.shape[1]]
        return first if first.shape == latent.shape else None
    return None


def _factor(known: Run | None, index: int, branch: str) -> float | None:
    """By what the reference multiplies its latent for its model; None where it does other things.

    1 is the rule; schedulers with noise of more than one scale it.
    """
    if known is None or index >= len(known.steps):
        return None
    step = known.steps[index]
    one = next((each for each in step.passes if each.branch == branch), None)
    given = None if one is None else _inner(one, step)
    if given is None or step.latent is None:
        return None
    a, b = (t.reshape(-1).double() for t in (given, step.latent.to(given.dtype)))
    size = float(b @ b)
    if torch.equal(a, b) or not size:
        return 1.0
    factor = float(a @ b) / size
    return factor if float((a - factor * b).norm()) <= AGREES * float(a.norm()) else None


def _pairs(run: Run, known: Run) -> Iterator[tuple[int, Pass, Pass]]:
    """Predictions of one step and branch, of the run and of the reference."""
    for ours, theirs in zip(run.steps, known.steps, strict=False):
        others = {one.branch: one for one in theirs.passes}
        for one in ours.passes:
            if one.branch in others:
                yield ours.number, one, others[one.branch]


def _put_conditions(
    found: Seams, number: int, one: Pass, other: Pass, called: Collection[str]
) -> None:
    """Text of a step, and tensors that both sides call the same; of a later one, what changes.

    The latent of a sound that is made together with the video is no condition: its noise is judged.
    Times are judged by the schedule where an adapter says that they are such (`called`).
    """
    text = f"text/{one.branch}"
    if number:
        _put(found, text, number, one.role("text"), other.role("text"))
    roles = {*one.names.values(), *other.names.values()}
    for name, value in one.arguments.items():
        theirs = other.arguments.get(name)
        tensors = isinstance(value, torch.Tensor) and isinstance(theirs, torch.Tensor)
        bare = name.removeprefix(SOUND)
        if name in called and bare in TIMES:
            continue
        if name != bare and bare in LATENTS:
            if tensors and not number:
                found.put(SOUND_NOISE, value, theirs)
            continue
        if name not in roles and tensors:
            head = SCALE if name in SCALES else "text"
            label = name.replace("/", ".")
            _put(found, f"{head}/{label}/{one.branch}", number, value, theirs)


def _put(
    found: Seams, name: str, number: int, value: torch.Tensor | None, other: torch.Tensor | None
) -> None:
    if value is None or other is None:
        return
    if name not in found.expected:
        if fitted(name, value, other).shape == other.shape:
            found.put(name, value, other)
        else:
            found.unjudged[name] = f"sizes {tuple(value.shape)} and {tuple(other.shape)}"
        return
    same = _same(fitted(name, value, other), found.actual[name])
    if not same or not _same(other, found.expected[name]):
        head, *part, branch = name.split("/")
        found.put(f"{head}/{'.'.join([f'{number:04d}', *part])}/{branch}", value, other)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and same_bits(a, b)


def entering(found: Seams, run: Run, known: Run | None) -> Run:
    """A run whose steps end with what the next begins with: what was changed between is seen.

    Where the reference changes its own latents there, too, or none says whether it should be, they
    end with what the update gave.
    """
    changes = _changes(run)
    if not changes:
        return run
    worst = max(changes, key=lambda index: changes[index])
    text = f"the latent is changed between steps, most before step {worst + 1}"
    if known is None or _changes(known):
        why = "no reference was given" if known is None else "the reference's is, too"
        found.unjudged["between steps"] = f"{text}, and {why}"
        return run
    found.notes.append(f"{text}: by {changes[worst]:.1e} of what the update gave")
    steps = [
        step.but(after=run.steps[index + 1].latent) if index in changes else step
        for index, step in enumerate(run.steps)
    ]
    return run.but(steps=tuple(steps))


def _changes(run: Run) -> dict[int, float]:
    """By step how far, relative, what the next begins with is from what it gave."""
    changes = {}
    for index, (step, after) in enumerate(zip(run.steps, run.steps[1:], strict=False)):
        if step.after is None or after.latent is None:
            continue
        begun, _ = as_shape(after.latent, step.after)
        if begun.shape != step.after.shape:
            changes[index] = float("inf")
        elif not _same(begun, step.after.to(begun.dtype)):
            changes[index] = distance(begun, step.after).rel_l2
    return changes
