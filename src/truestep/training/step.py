"""A training step as its owner gives it: the model, the code that trains it, and its optimiser."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from truestep.errors import UsageError
from truestep.nests import safe_fqn


@dataclass(frozen=True)
class TrainingStep:
    """One step of training, made anew by a function whenever it is run.

    Attributes:
        model: What is trained; its calls are watched. Several models: a ModuleDict of them.
        run: The trainer's own code for one step: forward, loss, backward, clipping, the
            optimiser's step, EMA. It may return the loss, or a mapping of its parts.
        optimizer: What `run` steps, where it does; without one the gradients alone are judged.
        ema: The averaged model that `run` updates, if there is one.
        merge: Returns the model that inference runs: LoRA merged. Called after `run`.
        seed: Of torch's, numpy's and Python's random numbers, before it is built and run.
    """

    model: torch.nn.Module
    run: Callable[[], Any]
    optimizer: torch.optim.Optimizer | None = None
    ema: torch.nn.Module | None = None
    merge: Callable[[], torch.nn.Module] | None = None
    seed: int = 0

    @classmethod
    def of_loss(
        cls,
        model: torch.nn.Module,
        loss: Callable[[torch.nn.Module, Any], torch.Tensor],
        batch: Any,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        clip_norm: float | None = None,
        seed: int = 0,
    ) -> TrainingStep:
        """Make a step without a trainer: a loss, its gradient, one step of the optimiser.

        Args:
            model: What is trained.
            loss: Called with the model and the batch; returns a scalar.
            batch: Given to it as it is.
            optimizer: Stepped once, if given.
            clip_norm: Largest norm of all gradients together.
            seed: See `TrainingStep`.
        """

        def run() -> torch.Tensor:
            value = loss(model, batch)
            value.backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            if optimizer is not None:
                optimizer.step()
            return value.detach()

        return cls(model=model, run=run, optimizer=optimizer, seed=seed)


Build = Callable[[], TrainingStep]
"""Makes the step: the same weights, batch and optimiser every time."""


def seeded(seed: int) -> None:
    """Begin the random numbers that a trainer may draw from."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def built(build: Build) -> TrainingStep:
    """Call the function that makes a step.

    Raises:
        UsageError: It returns something else, or a model without anything to train.
    """
    seeded(0)
    step = build() if callable(build) else build
    if not isinstance(step, TrainingStep):
        raise UsageError(
            f"the function returned {type(step).__name__}, not a training step",
            hint="return truestep.TrainingStep(model=..., run=..., optimizer=...)",
        )
    if not any(p.requires_grad for p in step.model.parameters()):
        raise UsageError(
            "there is nothing to train: no parameter of the model requires a gradient",
            where=type(step.model).__name__,
            likely="the model is frozen; a LoRA was not added, or was added to another model",
        )
    return step


_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model"}
)
"""Names of what a wrapper holds: data parallelism, compilation, sharding, checkpointing, peft."""

_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Wrappers of modules inside a model."""


def inside(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """A model and what its wrappers hold: with the prefix of its names, outermost first.

    A wrapper holds one module, and no weight of its own.
    """
    found = [("", model)]
    last = ""
    while True:
        prefix, module = found[-1]
        children = {name: child for name, child in module._modules.items() if child is not None}
        bare = not module._parameters and not module._buffers and len(children) == 1
        name, child = next(iter(children.items())) if bare else ("", module)
        if name not in _WRAPPERS and not (name == "model" and last == "base_model"):
            return found
        found.append((f"{prefix}{name}.", child))
        last = name


def parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters by the names that rows have: without those of wrappers."""
    prefix = inside(model)[-1][0]
    for name, parameter in model.named_parameters():
        name = name.removeprefix(prefix)
        for wrapper in _INSIDE:
            name = name.replace(wrapper, "")
        yield safe_fqn(name), parameter


def snapshot(model: torch.nn.Module) -> Callable[[], None]:
    """Keep what a model holds now.

    Returns:
        Puts it back: parameters and buffers.
    """
    kept = {
        id(tensor): (tensor, tensor.detach().clone())
        for tensor in (*model.parameters(), *model.buffers())
    }

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in kept.values():
                tensor.data.copy_(value)
        for parameter in model.parameters():
            parameter.grad = None

    return restore


def hyperparameters(optimizer: torch.optim.Optimizer | None) -> list[dict[str, str]]:
    """What an optimiser says of itself, a group at a time: class, learning rate, betas, ..."""
    if optimizer is None:
        return []
    return [
        {
            "optimizer": type(optimizer).__name__,
            **{key: str(value) for key, value in group.items() if key not in _HOW},
        }
        for group in optimizer.param_groups
    ]


_HOW = frozenset(
    {"params", "foreach", "fused", "capturable", "differentiable", "param_names", "initial_lr"}
)
"""What says how a step is computed, not what it computes."""


def said_otherwise(
    actual: Sequence[Mapping[str, str]], reference: Sequence[Mapping[str, str]]
) -> Iterator[tuple[str, str, str]]:
    """Hyper-parameters that both have and that differ: which, and their values on both sides."""
    if len(actual) != len(reference):
        yield "parameter groups", str(len(actual)), str(len(reference))
        return
    for own, theirs in zip(actual, reference, strict=True):
        for key in {**theirs, **own}:
            if key in own and key in theirs and own[key] != theirs[key]:
                yield key, own[key], theirs[key]
