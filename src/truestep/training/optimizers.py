"""What of an optimiser is wrong, where it does not say so itself: its steps are computed anew under
one hypothesis after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

EXPLAINS = 0.05
"""A hypothesis explains a step if it leaves less than this share of the error."""

AS_NEAR, NEARER = 1.25, 2.0
"""So does one that is as near to the candidate's steps as the trusted formula is to the trusted
ones, which are rounded otherwise than here; and that formula is this many times further off."""

KNOWN = 0.01
"""Share of the trusted steps that may be left of them for the formula to be theirs."""

ALIKE = 3.0
"""Hypotheses that leave no more than this times what the best one leaves are told with it: from an
empty state Adam's step is nearly the sign of the gradient, so that a decay that goes through the
moments and none at all are all but the same step."""

_FITTED = "learning rate"
MOST = 3
"""Parameters of many dimensions, and of one, whose steps are computed anew: the largest."""


@dataclass(frozen=True)
class Steps:
    """The steps of one parameter, from an empty state.

    Attributes:
        weight: Before the first. gradients: what each was given.
        own, recorded: What each added, by the candidate and by the trusted side.
        dtype: That the parameter is kept in: each change of it is rounded to that.
    """

    weight: torch.Tensor
    gradients: Sequence[torch.Tensor]
    own: Sequence[torch.Tensor]
    recorded: Sequence[torch.Tensor]
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Adam:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), and what ports
    make of it.

    Attributes:
        coupled: The decay goes through the moments. unscaled: it has no learning rate.
        late: It is of the weight after the step.
        corrected: The moments are. root_corrected: the second one is, too. ahead: by so many steps
            more than were made.
        inside: Epsilon is inside of the root. outside: it is beside the root before that is
            corrected.
        nesterov: The step looks ahead (NAdam's first term).
        state: Dtype that the moments are kept in.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    coupled: bool = False
    unscaled: bool = False
    late: bool = False
    corrected: bool = True
    root_corrected: bool = True
    ahead: int = 0
    inside: bool = False
    outside: bool = False
    nesterov: bool = False
    state: torch.dtype = torch.float64


def explained(parameters: Mapping[str, Steps], group: Mapping[str, str] | None) -> list[str]:
    """What explains the candidate's steps, if anything does.

    Args:
        parameters: Those that are wrong, by name.
        group: What the trusted optimiser says of itself.
    """
    trusted = _adam(group)
    chosen = _telling(parameters)
    if trusted is None or not chosen:
        return []
    error = _total(_apart(steps.own, steps.recorded) for steps in chosen)
    floor = _left(trusted, chosen, recorded=True)
    if floor > KNOWN * _total(_size(steps.recorded) for steps in chosen):
        return []
    if floor > EXPLAINS * error and _left(trusted, chosen) < NEARER * floor:
        return []
    left = {text: _left(other, chosen) for text, other in _hypotheses(trusted, chosen)}
    best = min(left.values())
    if not best <= max(EXPLAINS * error, AS_NEAR * floor):
        return []
    alike = [text for text, size in left.items() if size <= ALIKE * best]
    unfitted = [text for text in alike if not text.startswith(_FITTED)]  # a fit has a free number
    return [" or ".join(unfitted or alike)]


def _adam(group: Mapping[str, str] | None) -> Adam | None:
    if group is None or group.get("optimizer") not in ("Adam", "AdamW"):
        return None
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


def _telling(parameters: Mapping[str, Steps]) -> list[Steps]:
    """The largest parameters, with those of one dimension among them."""
    ordered = sorted(parameters.values(), key=lambda steps: -steps.weight.numel())
    flat = [steps for steps in ordered if steps.weight.ndim <= 1]
    return [*[steps for steps in ordered if steps.weight.ndim > 1][:MOST], *flat[:MOST]]


def _hypotheses(trusted: Adam, chosen: Sequence[Steps]) -> Iterator[tuple[str, Adam]]:
    """What ports get wrong, with the values that they get it wrong to."""
    if trusted.decay:
        yield from _of_decay(trusted)
    else:
        for decay in (0.1, 0.01, 1e-3, 1e-4):
            yield f"weight decay {decay:g} (was 0)", replace(trusted, decay=decay)
    yield "no bias correction", replace(trusted, corrected=False)
    yield "no bias correction of the second moment", replace(trusted, root_corrected=False)
    yield "bias correction of the step after", replace(trusted, ahead=1)
    yield "epsilon inside of the root", replace(trusted, inside=True)
    yield "epsilon beside the root before its bias correction", replace(trusted, outside=True)
    yield "Nesterov's look ahead", replace(trusted, nesterov=True)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield f"moments kept in {name}", replace(trusted, state=dtype)
    for betas in ((0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.999), (0.95, 0.999), (0.0, 0.99)):
        if betas != trusted.betas:
            yield f"betas {betas} (was {trusted.betas})", replace(trusted, betas=betas)
    for eps in (1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-15):
        if eps != trusted.eps:
            yield f"epsilon {eps:g} (was {trusted.eps:g})", replace(trusted, eps=eps)
    lr = trusted.lr * _factor(trusted, chosen)
    if lr > 1e-6 * trusted.lr:
        if f"{lr:.4g}" != f"{trusted.lr:.4g}":
            yield f"{_FITTED} {lr:.4g} (was {trusted.lr:g})", replace(trusted, lr=lr)
    else:
        yield "no step", replace(trusted, lr=0.0, decay=0.0)


def _of_decay(trusted: Adam) -> Iterator[tuple[str, Adam]]:
    if not trusted.coupled:
        text = "weight decay goes through the moments (L2), and should not"
        yield text, replace(trusted, coupled=True)
        text = "weight decay is not multiplied by the learning rate"
        yield text, replace(trusted, unscaled=True)
        yield "weight decay is of the weight after the step", replace(trusted, late=True)
    else:
        text = "weight decay does not go through the moments, and should"
        yield text, replace(trusted, coupled=False)
    yield "no weight decay", replace(trusted, decay=0.0)


def _factor(trusted: Adam, chosen: Sequence[Steps]) -> float:
    """How many times the trusted first step the candidate's is."""
    product = square = 0.0
    for steps in chosen:
        expected = _steps(trusted, replace(steps, gradients=steps.gradients[:1]))[0]
        product += float((expected * steps.own[0]).sum())
        square += float(expected.square().sum())
    return product / square if square else 1.0


def _left(how: Adam, chosen: Sequence[Steps], *, recorded: bool = False) -> float:
    """How far steps are from those that were made."""
    return _total(
        _apart(_steps(how, steps), steps.recorded if recorded else steps.own) for steps in chosen
    )


def _steps(how: Adam, steps: Steps) -> list[torch.Tensor]:
    """What each step adds, from an empty state."""
    weight = steps.weight
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    found = []
    for number, given in enumerate(steps.gradients, start=1 + how.ahead):
        gradient = given + how.decay * weight if how.coupled else given
        first = how.betas[0] * first + (1 - how.betas[0]) * gradient
        second = how.betas[1] * second + (1 - how.betas[1]) * gradient.square()
        first, second = (moment.to(how.state).double() for moment in (first, second))
        step = -how.lr * _direction(how, first, second, gradient, number)
        left = 1.0 if how.coupled else 1.0 - how.decay * (1.0 if how.unscaled else how.lr)
        factors = (1.0, left) if how.late else (left, 1.0)
        before = _kept(weight * factors[0], steps.dtype)
        after = _kept(_kept(before + step, steps.dtype) * factors[1], steps.dtype)
        found.append(after - weight)
        weight = after
    return found


def _kept(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype).double()


def _direction(
    how: Adam, first: torch.Tensor, second: torch.Tensor, gradient: torch.Tensor, number: int
) -> torch.Tensor:
    """The first moment over the root of the second."""
    one = 1 - how.betas[0] ** number if how.corrected else 1.0
    other = 1 - how.betas[1] ** number if how.corrected and how.root_corrected else 1.0
    if how.nesterov:
        first = how.betas[0] * first + (1 - how.betas[0]) * gradient
    if how.inside:
        root = (second / other + how.eps).sqrt()
    elif how.outside:
        root = (second.sqrt() + how.eps) / other**0.5
    else:
        root = (second / other).sqrt() + how.eps
    return (first / one) / root


def _apart(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    return _total(float((a - b).norm()) for a, b in zip(first, second, strict=True))


def _size(steps: Sequence[torch.Tensor]) -> float:
    return _total(float(step.norm()) for step in steps)


def _total(sizes: Iterator[float]) -> float:
    return math.sqrt(sum(size * size for size in sizes))
