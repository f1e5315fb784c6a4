"""What a reference must be to judge anything: full of numbers, and the same when made again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from truestep.errors import UsageError
from truestep.floors import NoiseRun
from truestep.judge.floor import coarser, repeat_limit, unsteady
from truestep.keys import address
from truestep.measure.distance import is_constant


def refuse_empty_content(tensors: Mapping[str, torch.Tensor], *, where: str = "") -> None:
    """Refuse tensors that nothing could ever agree with, or that any broken model gives.

    Args:
        tensors: The outputs that a reference is to judge by.
        where: What they are of.

    Raises:
        UsageError: One is empty or not finite, or all of several elements hold one value each.
    """
    problems = [
        f"{name}: {text}" for name, tensor in tensors.items() if (text := _unusable(tensor))
    ]
    constant = [name for name, tensor in tensors.items() if is_constant(tensor)]
    if constant and len(constant) == len(tensors):
        value = tensors[constant[0]].reshape(-1)[0].item()
        problems.append(f"{constant[0]}: one value everywhere ({value:g})")
    if not problems:
        return
    more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
    raise UsageError(
        "this cannot be a reference: nothing could be judged by it",
        where=where,
        measured=problems[0] + more,
        likely="weights that were not loaded, or a run that failed without an error",
        hint="look at what the trusted side gives, then record again",
    )


def refuse_empty_run(tensors: Mapping[str, torch.Tensor], *, where: str = "") -> None:
    """The same for a recorded generation, stage by stage; its schedule may well be constant."""
    by_stage: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        place = address(name)
        if place.stage in {"latent", "prediction", "update", "decoding"} and not place.modality:
            by_stage.setdefault(place.stage, {})[name] = tensor
    for found in by_stage.values():
        refuse_empty_content(found, where=where)


def _unusable(tensor: torch.Tensor) -> str:
    if not tensor.numel():
        return "empty"
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return ""
    finite = torch.isfinite(tensor.to(torch.float32) if tensor.itemsize == 1 else tensor)
    if bool(finite.all()):
        return ""
    count = tensor.numel() - int(finite.sum())
    return f"{count:,} of {tensor.numel():,} values are not finite"


def refuse_unsteady(runs: Iterable[NoiseRun], *, model: object = None) -> None:
    """Refuse a trusted side that gave something else when the same thing was run again.

    Args:
        runs: Benign runs, of which those of kind `repeat` are looked at.
        model: What ran, to look for dropout in.

    Raises:
        UsageError: One differs by far more than it rounds.
    """
    listed = list(runs)
    found = unsteady(listed)
    if not found:
        return
    name, size = max(found.items(), key=lambda item: item[1])
    pair = next(run.pair for run in listed if any(m.name == name for m in run.tensors))
    dropout = _dropout(model)
    raise UsageError(
        "the trusted side differs from itself when it is run again",
        where=name,
        measured=f"rel_l2 {size:.1e}; {coarser(*pair.split('/'))} rounds by "
        f"{repeat_limit(pair):.1e} at most",
        likely=f"{dropout} is in training mode"
        if dropout
        else "it draws random numbers without a seed, or keeps state between calls",
        hint="call .eval() on it before it is recorded"
        if dropout
        else "seed or reset it inside what is recorded",
    )


def _dropout(model: object) -> str:
    """Name of a module that draws at random while training, if there is one."""
    modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    for name, module in modules:
        if module.training and isinstance(module, torch.nn.modules.dropout._DropoutNd):
            return f"the dropout {name or '(root)'}"
    return ""
