"""What two optimisers say of themselves, parameter by parameter, and what their steps say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from truestep.training.forced import PROBES, drawn
from truestep.training.optimizers import EXPLAINS, Steps, explained
from truestep.training.step import parameters, said_otherwise

Said = Sequence[Mapping[str, str]]
_LISTED = 3
_ENOUGH = 16
"""Numbers of which two factors are no coincidence."""
_DECOUPLED = "decoupled_weight_decay"
_NO_CAUSE = frozenset({"optimizer", "parameter groups"})
"""What may differ without anything being wrong: the name of a class, how parameters are grouped."""


@dataclass(frozen=True)
class Optimizers:
    """Two optimisers.

    Attributes:
        own, recorded: What each says of its groups.
        own_groups, recorded_groups: Parameter to its group; empty where that is not known.
        size: Of drawn gradients.
        model: The candidate's.
    """

    own: Said
    recorded: Said
    own_groups: Mapping[str, int]
    recorded_groups: Mapping[str, int]
    size: float
    model: torch.nn.Module


def groups_of(optimizer: torch.optim.Optimizer | None, model: torch.nn.Module) -> dict[str, int]:
    """Parameter to the number of the group that holds it."""
    if optimizer is None:
        return {}
    names = {id(parameter): name for name, parameter in parameters(model)}
    return {
        names[id(parameter)]: number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if id(parameter) in names
    }


def noted(optimizers: Optimizers) -> list[str]:
    """What the two say otherwise, and what is no cause."""
    both = said_otherwise(optimizers.own, optimizers.recorded)
    return [_text(*said) for said in both if said[0] in _NO_CAUSE]


def causes(
    wrong: Sequence[str],
    optimizers: Optimizers,
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
) -> list[str]:
    """What makes the steps of parameters wrong.

    Args:
        wrong: Their names.
        actual, reference: Tensors by the names of rows.
    """
    said = _said(wrong, optimizers)
    if said:
        return said[:_LISTED]
    numbers = {optimizers.recorded_groups.get(name, 0) for name in wrong}
    known = len(optimizers.recorded) == 1 or bool(optimizers.recorded_groups)
    group = optimizers.recorded[numbers.pop()] if known and len(numbers) == 1 else None
    steps = _steps(wrong, optimizers, actual, reference)
    found = explained(steps, group)
    return [f"{text}{_of(list(steps), reference)}" for text in found]


def _said(wrong: Sequence[str], optimizers: Optimizers) -> list[str]:
    """Hyper-parameters of wrong parameters that both sides say, and say otherwise."""
    if not optimizers.own_groups or not optimizers.recorded_groups:
        both = said_otherwise(optimizers.own, optimizers.recorded)
        return [_text(*said) for said in both if said[0] not in _NO_CAUSE]
    held: dict[str, list[str]] = defaultdict(list)
    for name in wrong:
        if name not in optimizers.own_groups or name not in optimizers.recorded_groups:
            continue
        own = optimizers.own[optimizers.own_groups[name]]
        theirs = optimizers.recorded[optimizers.recorded_groups[name]]
        for text in _between(own, theirs):
            held[text].append(name)
    everything = len(optimizers.recorded_groups)
    return [
        text if len(names) == everything else f"{text} of {_listed(names)}"
        for text, names in held.items()
    ]


def _between(own: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """What of two groups may make their steps others.

    Where a decay goes counts only where there is one; then the class that stands for it is said.
    """
    said = {key: (key, mine, other) for key, mine, other in said_otherwise([own], [theirs])}
    decays = [float(group.get("weight_decay", 0)) for group in (own, theirs)]
    if not any(decays):
        said.pop(_DECOUPLED, None)
    texts = [_text(*said["optimizer"])] if _DECOUPLED in said and "optimizer" in said else []
    return texts + [_text(*each) for key, each in said.items() if key not in _NO_CAUSE]


def _text(key: str, own: str, theirs: str) -> str:
    return f"{key} {own} (was {theirs})"


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{len(names)} parameters ({names[0]}, ...)"


def _of(names: Sequence[str], reference: Mapping[str, torch.Tensor]) -> str:
    """Which parameters, if not all."""
    trained = [name for name in reference if name.startswith("update/0/")]
    if len(names) >= len(trained):
        return ""
    flat = all(reference[f"weight/{name}"].ndim <= 1 for name in names)
    return f" of {_listed(names)}" + (", all of one dimension: biases, norms" if flat else "")


def _steps(
    wrong: Sequence[str],
    optimizers: Optimizers,
    actual: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
) -> dict[str, Steps]:
    """The first step and those on drawn gradients, of parameters that both sides have."""
    found = {}
    for at, (name, parameter) in enumerate(parameters(optimizers.model)):
        keys = [f"update/0/{name}", *(f"probe/{number}/{name}" for number in range(PROBES))]
        first = reference.get(f"clipped/0/{name}")
        known = first is not None and f"update/1/{name}" not in reference
        if name not in wrong or not known or not all(k in actual and k in reference for k in keys):
            continue
        assert first is not None
        gradients = [drawn(parameter, optimizers.size, at, number) for number in range(PROBES)]
        found[name] = Steps(
            reference[f"weight/{name}"].double(),
            [first.double(), *(gradient.to(first.dtype).double() for gradient in gradients)],
            [actual[key].double().cpu() for key in keys],
            [reference[key].double() for key in keys],
            first.dtype,
        )
    return found


def of_given(
    name: str, actual: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> str:
    """What the optimiser is given, if that is the gradient, scaled or not, and a share of the
    weight."""
    sides = [side.get(f"clipped/0/{name}") for side in (actual, reference)]
    tensors = [*sides, reference.get(f"weight/{name}")]
    given, right, held = (
        None if tensor is None else tensor.double().cpu().flatten() for tensor in tensors
    )
    if given is None or right is None or held is None:
        return ""
    if not len(given) == len(right) == len(held) or len(given) < _ENOUGH:
        return ""
    terms = torch.stack([right, held], dim=1)
    scale, share = torch.linalg.lstsq(terms, given[:, None]).solution.flatten().tolist()
    apart = float((given - scale * right).norm())
    left = float((given - scale * right - share * held).norm())
    if not left < EXPLAINS * apart or apart < EXPLAINS * float((given - right).norm()):
        return ""
    return f"{share:.3g} x the weight is added to the gradient (L2)"
