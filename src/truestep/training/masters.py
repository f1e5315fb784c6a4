"""What an optimiser steps in a parameter's place: the parameter itself, or a copy of it in a higher
precision, which the trainer copies back."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def stepped_for(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Name of a parameter to the tensor that the optimiser steps for it.

    A copy is known by its values: cast to the parameter's dtype they are the parameter's. Of equal
    ones each stands for the next parameter.

    Args:
        optimizer: Before its first step.
        named: The model's parameters.

    Returns:
        Nothing of a parameter that is not stepped, or by what cannot be told.
    """
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    own = {id(parameter): name for name, parameter in named.items()}
    found: dict[str, torch.Tensor] = {own[id(t)]: t for t in held if id(t) in own}
    waiting = {name: p for name, p in named.items() if name not in found}
    for tensor in (t for t in held if id(t) not in own):
        for name, parameter in waiting.items():
            if _is_copy(tensor, parameter):
                found[name] = tensor
                del waiting[name]
                break
    return found


def _is_copy(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    if tensor.shape != parameter.shape:
        return False
    values = tensor.detach().to(parameter.device, parameter.dtype)
    return torch.equal(values, parameter.detach())
