"""Steps that hold fewer predictions than the reference's: guidance left out, a prediction reused.

What is not there is the trusted model's own, of the engine's latent and the reference's text; what
the engine stepped by is then guidance of both. A rank that predicts but one branch of a group's
agrees with that, and an engine that leaves the branch out does not.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from truestep.engines.conventions import AS_IT_IS, Conversion
from truestep.engines.expected import AGREES, Seams
from truestep.engines.run import Pass, Run, Step
from truestep.engines.trusted import Denoiser, Trusted, arguments
from truestep.errors import FOREIGN, UsageError, one_line
from truestep.keys import step_name
from truestep.measure.distance import distance, same_bits

ROUNDINGS = 4.0
"""Roundings by which two implementations' predictions may be apart, in units of the last place."""


def put_absent(
    found: Seams, run: Run, known: Run | None, trusted: Trusted, conversion: Conversion | None
) -> None:
    """Guidance of steps in which a branch was not predicted."""
    several = max((len(step.combined) for step in run.steps), default=0)
    if known is None:
        few = [step.number for step in run.steps if len(step.combined) < several]
        if few:
            text = f"step {few[0]} holds fewer than others, and no reference was given"
            found.unjudged["predictions that are not there"] = text
        return
    if not several or len(run.steps) != len(known.steps) or not known.weights:
        return
    for step, other in zip(run.steps, known.steps, strict=True):
        absent = {*known.weights} - {*step.combined}
        predicted = {one.branch for one in other.passes}
        if step.guided is None or not absent or not {*known.weights} <= predicted:
            continue
        if not {*step.combined} <= {*known.weights}:
            continue
        try:
            made = {branch: _predicted(step, other, branch, trusted) for branch in absent}
        except (UsageError, *FOREIGN) as error:
            found.unjudged[f"guidance of step {step.number}"] = one_line(error)
            continue
        _put(found, step, known, made, conversion or AS_IT_IS, run.sigma(step.number))


def _predicted(step: Step, other: Step, branch: str, trusted: Trusted) -> torch.Tensor:
    """The trusted model's prediction: the reference's arguments, with the engine's latent.

    Raises:
        UsageError: Nothing says what latent the model is to be given.
    """
    theirs = next(one for one in other.passes if one.branch == branch)
    own = theirs.role("latent")
    given = next((one.role("latent") for one in step.passes), None)
    if given is None and own is not None and _same(own, other.latent):
        given = step.latent
    if given is None or own is None or given.numel() != own.numel():
        raise UsageError("what its model would have been given cannot be told")
    latent = given.reshape(own.shape)
    at = {**theirs.arguments, theirs.names["latent"]: latent}
    one = Pass(at, theirs.names, theirs.output, theirs.component, branch)
    model = trusted.denoiser(one.timestep)
    tensors, plain, _ = arguments(one, model, replace(theirs, arguments=at), 1.0)
    return Denoiser(model, plain, AS_IT_IS)(**tensors)  # type: ignore[no-any-return]


def _same(given: torch.Tensor, latent: torch.Tensor | None) -> bool:
    if latent is None or given.numel() != latent.numel():
        return False
    return same_bits(given, latent.to(given.dtype).reshape(given.shape))


def _put(
    found: Seams,
    step: Step,
    known: Run,
    made: dict[str, torch.Tensor],
    conversion: Conversion,
    sigma: float | None,
) -> None:
    guided = step.guided
    assert guided is not None
    try:
        outputs = {
            branch: conversion.to_engine(output, step.latent, sigma)
            for branch, output in made.items()
        }
    except ValueError:
        return
    outputs |= step.combined
    known_weights = known.weights_at(step.number)
    parts = [weight * outputs[b].reshape(-1).double() for b, weight in known_weights.items()]
    expected = torch.stack(parts).sum(dim=0).reshape(guided.shape).to(guided.dtype)
    size = distance(guided, expected).rel_l2
    weights = sum(abs(weight) for weight in known.weights.values())
    rounded = ROUNDINGS * weights * torch.finfo(guided.dtype).eps
    which = f"of step {step.number}, {' and '.join(sorted(made))} is not there"
    if size <= max(AGREES, rounded):
        found.unjudged[f"prediction {which}"] = (
            f"by the trusted model's in its place the guidance is right to {size:.1e}"
        )
        return
    found.notes.append(f"{which}: guidance is judged by the trusted model's in its place")
    found.put(step_name(step.number, "guided"), guided, expected)
