"""The three passes over a training step: whole, module by module, and forced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from truestep.errors import FOREIGN, one_line
from truestep.nests import flatten
from truestep.runtime.precision import converted
from truestep.training.benign import AS_IT_IS, Change
from truestep.training.forced import Forcing, Script, Stepped
from truestep.training.pulling import Pulled, Recorded, pull
from truestep.training.step import Build, TrainingStep, built, parameters, seeded, snapshot
from truestep.training.watching import Gradients, ModuleCall, Watch, modules_of, wrapped


@dataclass
class Whole:
    """A step that ran by itself, nothing forced.

    Attributes:
        step: Its model holds again what it held before.
        modules: Those looked at, by name. calls: what they were called with, in order of return.
        tensors: Gradients and the loss by the names of rows.
        weights: Parameters before it.
    """

    step: TrainingStep
    modules: Mapping[str, torch.nn.Module]
    calls: dict[tuple[str, int], ModuleCall]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def outermost(self) -> list[tuple[str, int]]:
        """Calls that no other module made, in order."""
        return [key for key, call in self.calls.items() if call.outermost]


def run_whole(
    build: Build, *, select: str = "*", change: Change = AS_IT_IS, copies: bool = False
) -> Whole:
    """Build a step and run it, watched.

    Args:
        select: Modules that are looked at, beside those that are outermost.
        change: A harmless change of it.
        copies: Whether what modules are given and return is kept as it is now.
    """
    step = built(build)
    with _changed(change, step.model, step.ema):
        named = list(parameters(step.model))
        weights = {name: p.detach().clone() for name, p in named} if copies else {}
        restore = snapshot(step.model)
        gradients = Gradients(named)
        watch = Watch(copies=copies, rounded=change.rounding(), dtype=change.dtype)
        modules = {**modules_of(step.model), **modules_of(step.model, select)}
        chosen = set(modules_of(step.model, select))
        with wrapped(modules, watch.seen), gradients.kept():
            seeded(step.seed)
            loss = step.run()
        restore()
        found = {f"gradient/{name}": value for name, value in gradients.found.items()}
    if loss is not None:
        found |= {f"loss/{n}": v.detach().reshape(-1) for n, v in flatten(loss).items()}
    calls = {c.key: c for c in watch.calls if c.fqn in chosen or c.outermost}
    return Whole(step, modules, calls, found, weights)


@contextmanager
def _changed(change: Change, *models: torch.nn.Module | None) -> Iterator[None]:
    """A harmless change, with models in its dtype: the averaged one with the trained one."""
    with ExitStack() as stack:
        stack.enter_context(change.around())
        for model in models:
            if model is not None and change.dtype is not None:
                stack.enter_context(converted(model, change.dtype))
        yield


def run_modules(
    whole: Whole,
    recorded: Mapping[tuple[str, int], Recorded],
    *,
    change: Change = AS_IT_IS,
    failed: dict[tuple[str, int], str] | None = None,
) -> dict[tuple[str, int], Pulled]:
    """Run every module by itself on what was recorded, and pull back what was recorded.

    Args:
        whole: Whose modules, and how it calls them. A call that it does not make is left out.
        failed: Calls that raised, and what; None where that is an error.
    """
    found: dict[tuple[str, int], Pulled] = {}
    rounded = change.rounding()
    with _changed(change, whole.step.model):
        for key, own in recorded.items():
            call = whole.calls.get(key)
            if call is None:
                continue
            try:
                module = whole.modules[key[0]]
                found[key] = pull(module, call, own, rounded=rounded, dtype=change.dtype)
            except FOREIGN as error:
                if failed is None:
                    raise
                failed[key] = one_line(error)
    return found


def run_forced(
    build: Build, script: Script, *, change: Change = AS_IT_IS, done: Stepped | None = None
) -> Stepped:
    """Build a step anew and run it by a script.

    Args:
        done: What it makes is put there as it comes: where the step raises, that is left.
    """
    step = built(build)
    with _changed(change, step.model, step.ema):
        names = {fqn for fqn, _ in script.calls}
        modules = {fqn: m for fqn, m in modules_of(step.model).items() if fqn in names}
        forcing = Forcing(step, script, rounded=change.rounding(), dtype=change.dtype)
        forcing.done = done if done is not None else forcing.done
        made = forcing.run(modules)
        for parameter in step.model.parameters():
            parameter.grad = None
    return made
