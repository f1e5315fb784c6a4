"""Guidance branches of a run: told by their weights, or by the text that they are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from truestep.engines.conventions import AS_IT_IS, FORMS, Conversion, Form, text_as
from truestep.engines.run import COND, UNCOND, Pass, Run, Step
from truestep.measure.distance import same_bits

AFFINE = 1e-4
"""Largest residual, relative to what is stepped, of a combination that is taken for guidance."""


def latents_between(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Latents of runs without a scheduler: what the first prediction of a step is given.

    A last step without an update begins with what the one before it gave.
    """
    known: list[Step] = []
    for step in steps:
        if step.latent is None and step.passes:
            before = known[-1].after if known else None
            given = step.passes[0].role("latent")
            step = replace(step, latent=given if before is None else before)
        known.append(step)
    return tuple(
        replace(step, after=known[index + 1].latent)
        if step.after is None and index + 1 < len(known)
        else step
        for index, step in enumerate(known)
    )


def with_branches(run: Run) -> Run:
    """Name the passes: by their weights in what is stepped by, else as the engine says."""
    run = _once(run)
    counts = {len(step.passes) for step in run.steps if step.passes}
    if counts == {1}:
        alone = [s.but(passes=tuple(replace(p, branch=COND) for p in s.passes)) for s in run.steps]
        factor, residual = _weights(run, 1)
        if factor is None and all(step.guided is None for step in run.steps):
            factor, residual = [1.0], 0.0
        own = {} if factor is None else {COND: factor[0]}
        return replace(run, steps=tuple(alone), weights=own, affine=residual)
    most = max(counts, default=0)
    weights, residual = _weights(run, most)
    several: dict[str, list[float]] = {}
    if weights is None and (several := _by_model(run, most)):
        weights, residual = next(iter(several.values())), 0.0
    formed = _in_a_form(run, most) if weights is None else None
    if formed is not None:
        run, weights, residual = formed
    labels = [str(index) for index in range(most)] if weights is None else _labels(weights)
    steps = []
    for step in run.steps:
        passes = []
        for index, one in enumerate(step.passes):
            named = weights is None or (bool(step.parts) and formed is None)
            told = one.said if one.said in (COND, UNCOND) and named else ""
            passes.append(replace(one, branch=told or labels[index]))
        parts = {labels[int(i)]: p for i, p in step.parts.items()} if formed else step.parts
        steps.append(step.but(passes=tuple(passes), parts=parts))
    if weights is not None and run.steps and run.steps[0].parts and formed is None:
        labels = list(run.steps[0].parts)
    named_weights = {} if weights is None else dict(zip(labels, weights, strict=True))
    scales = {model: dict(zip(labels, own, strict=True)) for model, own in several.items()}
    named_run = replace(run, steps=tuple(steps), weights=named_weights, affine=residual)
    return named_run.but(scales=scales)


def _in_a_form(run: Run, most: int) -> tuple[Run, list[float], float] | None:
    """A run whose steps combine predictions in a form in which they add up to what is stepped by.

    Guidance is affine: its weights add up to 1. None where no form makes it so.
    """
    for form in FORMS:
        try:
            steps = tuple(_formed(run, index, form) for index in range(len(run.steps)))
        except ValueError:
            continue
        made = run.but(steps=steps, notes=(*run.notes, f"converted: guidance {form.name}"))
        weights, residual = _weights(made, most)
        if weights is not None and _is_affine({str(i): w for i, w in enumerate(weights)}):
            return made, weights, residual
    return None


def _formed(run: Run, index: int, form: Form) -> Step:
    """A step with its predictions in a form, by their numbers; what ends it is its denoised sample
    where nothing is stepped by."""
    step, sigma = run.steps[index], run.sigma(index)
    parts = {
        str(number): form.part(one.output, one.role("latent"), sigma)
        for number, one in enumerate(step.passes)
    }
    guided = step.guided
    if form.stepped is None or not parts:
        return step.but(parts=parts)
    if guided is None and index == len(run.steps) - 1:
        guided = step.after
    stepped = None if guided is None else form.stepped(guided, step.latent, sigma)
    return step.but(parts=parts, guided=guided, stepped=stepped)


def _by_model(run: Run, most: int) -> dict[str, list[float]]:
    """Weights of the passes by the expert that made them; empty where these do not say it."""
    found: dict[str, list[float]] = {}
    models = [{one.component for one in step.passes} for step in run.steps]
    for model in dict.fromkeys(name for names in models for name in sorted(names)):
        own = [s for s, names in zip(run.steps, models, strict=True) if names == {model}]
        weights, _ = _weights(run.but(steps=tuple(own)), most)
        if weights is None:
            return {}
        found[model] = weights
    return found if len(found) > 1 else {}


def _once(run: Run) -> Run:
    """Leave out calls that only repeat another of their step, as a warm-up does.

    Two of a step stay: both branches may be given the same.
    """
    counts = Counter(len(step.passes) for step in run.steps if step.passes)
    usual = min(counts.most_common(1)[0][0], 2) if counts else 0
    steps = []
    for step in run.steps:
        passes = list(step.passes)
        for one in step.passes:
            again = sum(other.output is not one.output and _repeats(other, one) for other in passes)
            if again and len(passes) > usual:
                passes = [other for other in passes if other is not one]
        steps.append(step.but(passes=tuple(passes)))
    return replace(run, steps=tuple(steps))


def _repeats(one: Pass, other: Pass) -> bool:
    same = one.component == other.component and one.said == other.said
    return same and one.output.shape == other.output.shape and same_bits(one.output, other.output)


def _labels(weights: Sequence[float]) -> list[str]:
    """Guidance moves away from `uncond`: the branch of the largest weight is `cond`."""
    largest = max(range(len(weights)), key=lambda i: weights[i])
    if len(weights) == 2:
        return [COND if index == largest else UNCOND for index in range(2)]
    return [COND if index == largest else str(index) for index in range(len(weights))]


def _weights(run: Run, most: int) -> tuple[list[float] | None, float]:
    """Weights of the passes in what is stepped by, over all steps that have all of them.

    Returns:
        None, and the residual, where it is not an affine combination of them.
    """
    rows, wanted = [], []
    for step in run.steps:
        found = step.combined if step.parts else dict(enumerate(p.output for p in step.passes))
        outputs = [output.reshape(-1).double() for output in found.values()]
        fits = step.guided is not None and len(outputs) == most > 0
        if fits and step.guided is not None and step.guided.numel() == outputs[0].numel():
            rows.append(torch.stack(outputs, dim=1))
            wanted.append(step.guided.reshape(-1).double())
    if not rows or not most:
        return None, float("nan")
    matrix, target = torch.cat(rows), torch.cat(wanted)
    if not (matrix.isfinite().all() and target.isfinite().all()):
        return None, float("nan")
    solved = torch.linalg.lstsq(matrix.T @ matrix, (matrix.T @ target)[:, None]).solution[:, 0]
    size = float(target.norm())
    residual = float((matrix @ solved - target).norm()) / size if size else float("inf")
    return ([float(w) for w in solved], residual) if residual <= AFFINE else (None, residual)


def in_convention(run: Run, conversion: Conversion) -> Run:
    """A run whose engine predicts in another convention, with what is combined and stepped by.

    Guidance is affine: its weights add up to 1. Where those of the engine's own predictions do, it
    combines these, and what is stepped by is converted; where those of the converted ones do, it
    had converted them before.
    """
    if conversion is AS_IT_IS or any(step.parts or step.stepped is not None for step in run.steps):
        return run
    if _is_affine(run.weights):
        return run.but(
            steps=tuple(_stepped(run, index, conversion) for index in range(len(run.steps)))
        )
    steps = [_converted(run, index, conversion) for index in range(len(run.steps))]
    if any(step is None for step in steps):
        return run
    made = run.but(steps=tuple(step for step in steps if step is not None))
    branches = next((list(step.parts) for step in made.steps if step.parts), [])
    weights, residual = _weights(made, len(branches))
    if weights is None or not _is_affine(named := dict(zip(branches, weights, strict=True))):
        return run
    return made.but(weights=named, affine=residual)


def _is_affine(weights: Mapping[str, float]) -> bool:
    return bool(weights) and abs(sum(weights.values()) - 1.0) < AFFINE * max(
        1.0, *(abs(weight) for weight in weights.values())
    )


def _stepped(run: Run, index: int, conversion: Conversion) -> Step:
    """A step that is stepped by what its guidance makes, in the trusted convention."""
    step = run.steps[index]
    if step.guided is None:
        return step
    with suppress(ValueError):
        made = conversion.to_trusted(step.guided, step.latent, run.sigma(index))
        return step.but(stepped=made)
    return step


def _converted(run: Run, index: int, conversion: Conversion) -> Step | None:
    """A step whose guidance combines what its predictions are in the trusted convention."""
    step, sigma = run.steps[index], run.sigma(index)
    try:
        parts = {
            one.branch: conversion.to_trusted(one.output, step.latent, sigma) for one in step.passes
        }
    except ValueError:
        return None
    return step.but(parts=parts)


def named_by_text(run: Run, known: Run | None) -> Run:
    """Name branches by the text they are given, where a reference says what that is.

    Two branches are so named whatever their weights say: where these are exchanged, it is seen.
    """
    if known is None or len(run.text) != 2 or {*known.text} != {COND, UNCOND}:
        return run
    sizes: dict[tuple[str, str], float] = {}
    for mine, text in run.text.items():
        for theirs, other in known.text.items():
            fitted, _ = text_as(text, other)
            same = fitted.shape == other.shape  # else it is of another length
            apart = float((fitted.double() - other.double()).norm()) if same else float("inf")
            sizes[mine, theirs] = apart
    first, second = run.text
    straight = sizes[first, COND] + sizes[second, UNCOND]
    crossed = sizes[first, UNCOND] + sizes[second, COND]
    if straight == crossed:
        return run
    names = {first: COND, second: UNCOND} if straight < crossed else {first: UNCOND, second: COND}
    steps = tuple(
        step.but(
            passes=tuple(replace(one, branch=names[one.branch]) for one in step.passes),
            parts={names[branch]: part for branch, part in step.parts.items()},
        )
        for step in run.steps
    )
    weights = {names[branch]: weight for branch, weight in run.weights.items()}
    scales = {
        model: {names[branch]: weight for branch, weight in own.items()}
        for model, own in run.scales.items()
    }
    return replace(run, steps=steps, weights=weights, scales=scales)
