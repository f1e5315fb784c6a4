"""What of an optimiser is wrong, where it does not say so itself: its steps are computed anew under
one hypothesis after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

EXPLAINS = 0.05
"""A hypothesis explains a step if it leaves less than this share of the error."""

ALIKE = 3.0
"""Hypotheses that leave no more than this times what the best one leaves are told with it: from an
empty state Adam's step is nearly the sign of the gradient, so that a decay that goes through the
moments and none at all are all but the same step."""


@dataclass(frozen=True)
class Adam:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), and what ports
    make of it."""

    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    coupled: bool = False
    corrected: bool = True
    inside: bool = False
    without_root_correction: bool = False


def explained(
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    optimizers: tuple[Sequence[Mapping[str, str]], Sequence[Mapping[str, str]]],
) -> list[str]:
    """What explains the candidate's steps, if anything does.

    Args:
        actual, reference: Tensors by the names of rows.
        optimizers: What both say of themselves.
    """
    trusted = _adam(optimizers[1])
    name = _telling(actual, reference)
    if trusted is None or name is None:
        return []
    gradients = [reference[f"clipped/0/{name}"].double()]
    own = [actual[f"update/0/{name}"].double()]
    theirs = [reference[f"update/0/{name}"].double()]
    weight = reference[f"weight/{name}"].double()
    error = _apart(own, theirs)
    if _apart(_steps(trusted, weight, gradients), theirs) > EXPLAINS * max(error, 1e-12):
        return []
    left = {
        text: _apart(_steps(other, weight, gradients), own) for text, other in _hypotheses(trusted)
    }
    best = min(left.values())
    if not best < EXPLAINS * error:
        return []
    return [" or ".join(text for text, size in left.items() if size <= ALIKE * best)]


def _adam(said: Sequence[Mapping[str, str]]) -> Adam | None:
    if len(said) != 1 or said[0].get("optimizer") not in ("Adam", "AdamW"):
        return None
    group = said[0]
    try:
        first, second = group["betas"].strip("()[]").split(",")
        return Adam(
            float(group["lr"]),
            (float(first), float(second)),
            float(group["eps"]),
            float(group["weight_decay"]),
            coupled=group["optimizer"] == "Adam" and group.get("decoupled_weight_decay") != "True",
        )
    except (KeyError, ValueError):
        return None


def _telling(
    actual: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> str | None:
    """The largest parameter whose step is on both sides."""
    names = [
        name.removeprefix("update/0/")
        for name in reference
        if name.startswith("update/0/") and name in actual
    ]
    names = [name for name in names if f"clipped/0/{name}" in reference]
    return max(names, key=lambda name: reference[f"clipped/0/{name}"].numel(), default=None)


def _hypotheses(trusted: Adam) -> Iterator[tuple[str, Adam]]:
    """What ports get wrong, with the values that they get it wrong to."""
    yield (
        "weight decay goes through the moments (L2), and should not",
        replace(trusted, coupled=True),
    )
    yield (
        "weight decay does not go through the moments, and should",
        replace(trusted, coupled=False),
    )
    yield "no weight decay", replace(trusted, decay=0.0)
    yield "no bias correction", replace(trusted, corrected=False)
    yield "no bias correction of the second moment", replace(trusted, without_root_correction=True)
    yield "epsilon inside of the root", replace(trusted, inside=True)
    for eps in (1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-15):
        yield f"epsilon {eps:g} (was {trusted.eps:g})", replace(trusted, eps=eps)
    for factor in (0.1, 0.5, 2.0, 10.0):
        lr = trusted.lr * factor
        yield f"learning rate {lr:g} (was {trusted.lr:g})", replace(trusted, lr=lr)


def _steps(
    how: Adam, weight: torch.Tensor, gradients: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What each step adds, from an empty state."""
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    found = []
    for number, gradient in enumerate(gradients, start=1):
        if how.coupled:
            gradient = gradient + how.decay * weight
        first = how.betas[0] * first + (1 - how.betas[0]) * gradient
        second = how.betas[1] * second + (1 - how.betas[1]) * gradient.square()
        one = 1 - how.betas[0] ** number if how.corrected else 1.0
        other = 1 - how.betas[1] ** number if how.corrected else 1.0
        other = 1.0 if how.without_root_correction else other
        root = (
            (second / other + how.eps).sqrt() if how.inside else (second / other).sqrt() + how.eps
        )
        step = -how.lr * (first / one) / root
        step = step - (0.0 if how.coupled else how.lr * how.decay) * weight
        found.append(step)
        weight = weight + step
    return found


def _apart(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    total = sum(float((a - b).square().sum()) for a, b in zip(first, second, strict=True))
    return math.sqrt(total)
