"""What is said of a call beside its tensors: names of arguments, a model's dtype and branch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def dtype_of(module: torch.nn.Module) -> str:
    """The dtype of a model's first weights."""
    kinds = (p.dtype for p in module.parameters() if p.is_floating_point())
    return str(next(kinds, "")).removeprefix("torch.")


def largest_of(values: Iterable[Any]) -> torch.nn.Module | None:
    """Of what a function is given, the model with the most modules."""
    models = [value for value in values if isinstance(value, torch.nn.Module)]
    return max(models, key=lambda model: sum(1 for _ in model.modules()), default=None)


def branch_of(module: Any) -> str | None:
    """The guidance branch that a pipeline has told its model, if it does."""
    if "diffusers.models.cache_utils" not in sys.modules:
        return None
    from truestep.replay.contexts import said

    told = said(module)
    return told[0] if told else None


def signature_of(function: Any) -> inspect.Signature | None:
    """What a function takes, where that can be told."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def named_of(
    signature: inspect.Signature | None, args: Any, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by the names of their parameters, without the object that a method is of."""
    parameters = list(signature.parameters.values()) if signature else []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
    named.pop("self", None)
    return {**named, **kwargs}


def config_of(scheduler: Any) -> dict[str, Any]:
    """Settings of a scheduler that are plain values."""
    held = getattr(scheduler, "config", None)
    values = dict(held) if isinstance(held, Mapping) else vars(scheduler)
    plain = (bool, int, float, str, type(None))
    return {str(k): v for k, v in values.items() if isinstance(v, plain)}
