"""The trainer's own code around its model: loss, clipping, optimiser, EMA, merge.

The step runs, and its models do not: each call returns what was recorded, and its backward hands
every parameter the gradient that was recorded. So the loss is judged by right predictions, and the
optimiser by right gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.nests import flatten
from truestep.training.masters import stepped_for
from truestep.training.names import call_name
from truestep.training.nests import Arguments, exchanged, matched, outputs
from truestep.training.step import TrainingStep, parameters, seeded
from truestep.training.unchecked import without_checkpointing
from truestep.training.watching import ModuleCall, Round, wrapped

PROBES = 4
"""Steps of the optimiser after the trainer's own one. One step from an empty state tells no betas:
Adam's first is the sign of the gradient, whatever they are."""

RUNNING_SUM = 0.25
"""A running sum of n numbers is off by this many epsilon times the root of n: a norm over 3e4
numbers in one sum measured 24 epsilon beside one over the norms of the parameters
(`bench/faults/training.py`, clip-by-hand)."""

_DECADES = 6.0
"""Drawn gradients are of this many sizes, a power of ten apart: some are as small as an epsilon."""


@dataclass(frozen=True)
class Handed:
    """What a call of an outermost module hands on in the model's place.

    Attributes:
        call: The call as it was made when nothing was forced.
        made: Recorded outputs by path.
        backward: Recorded gradients by slot, of its inputs and parameters.
        given: Recorded inputs by path.
    """

    call: ModuleCall
    made: Mapping[str, torch.Tensor]
    backward: Mapping[str, torch.Tensor]
    given: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Script:
    """What was recorded of a whole step.

    Attributes:
        calls: Of the outermost modules.
        clipped: Gradients that the optimiser was given, by `0/NAME`; empty while they are recorded.
        size: Root mean square of all of them: the size of drawn gradients; 0: of those that come.
    """

    calls: Mapping[tuple[str, int], Handed]
    clipped: Mapping[str, torch.Tensor] = field(default_factory=dict)
    size: float = 0.0


@dataclass
class Stepped:
    """What the trainer's code made.

    Attributes:
        tensors: By the names of rows.
        notes: What went otherwise than it was recorded.
        size: Root mean square of what the optimiser was given.
        unprobed: Parameters that the step moves, by what the optimiser holds in their place.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    size: float = 0.0
    unprobed: set[str] = field(default_factory=set)


class _Stub(torch.autograd.Function):
    """Returns recorded outputs, and hands on recorded gradients."""

    @staticmethod
    def forward(ctx: Any, stub: _Handing, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.stub = stub
        ctx.set_materialize_grads(False)
        made = tuple(value.clone() for value in stub.values)
        ctx.mark_non_differentiable(*(m for m in made if not m.is_floating_point()))
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.stub.arrived(gradients)
        return (None, *ctx.stub.handed)


class _Handing:
    """One call of a stub.

    Attributes:
        values: Recorded outputs. handed: recorded gradients, one a tensor that takes one.
        came: Gradients that came back, by place.
    """

    def __init__(self, values: list[torch.Tensor], handed: list[torch.Tensor | None]) -> None:
        self.values, self.handed = values, handed
        self.came: dict[int, torch.Tensor] = {}

    def arrived(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        for at, gradient in enumerate(gradients):
            if gradient is not None:
                self.came[at] = gradient.detach().clone()


class Forcing:
    """Runs a step by a script.

    Args:
        step: Made anew.
        script: What was recorded.
        rounded: Done to what is handed on, if anything. dtype: its cast, likewise.
    """

    def __init__(
        self,
        step: TrainingStep,
        script: Script,
        *,
        rounded: Round | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.step, self.script = step, script
        self.done = Stepped()
        self._rounded, self._dtype = rounded, dtype
        self._named = dict(parameters(step.model))
        self._numbers = Counter[str]()
        self._depth, self._steps = 0, 0
        self._handing: list[tuple[tuple[str, int], list[str], _Handing]] = []
        self._before: dict[str, torch.Tensor] = {}
        self._stepped: dict[str, torch.Tensor] = {}
        self._late: dict[str, str] = {}  # name of a row to that of a parameter that moves later

    def run(self, modules: Mapping[str, torch.nn.Module]) -> Stepped:
        """Run the step, then the optimiser on drawn gradients.

        Args:
            modules: Those that are outermost somewhere.
        """
        step = self.step
        averaged, begun = _values(step.ema), _values(step.model)
        with ExitStack() as stack:
            stack.enter_context(wrapped(modules, self._call))
            self._hooks(stack)
            seeded(step.seed)
            self._said(step.run())
        self._count()
        self._moved_late()
        for key, paths, handing in self._handing:
            for at, gradient in handing.came.items():
                name = call_name("prediction", key, paths[at])
                self.done.tensors[name] = self._scaled(gradient)
        self._after(begun)
        for name, value in _values(step.ema).items():
            self.done.tensors[f"ema/{name}"] = self._held(value) - averaged[name]
        if step.merge is not None:
            self._merge()
        if step.optimizer is not None and self._steps:
            self._probe(step.optimizer)
        return self.done

    def _after(self, begun: Mapping[str, torch.Tensor]) -> None:
        """What the whole step adds to each parameter, whoever adds it."""
        for name, parameter in self._named.items():
            moved = self._held(parameter.detach()) - begun[name]
            if parameter.requires_grad or not torch.equal(parameter, begun[name]):
                self.done.tensors[f"after/{name}"] = moved
            if name not in self._stepped and not torch.equal(parameter, begun[name]):
                self.done.unprobed.add(name)

    def _held(self, value: torch.Tensor) -> torch.Tensor:
        """What a parameter holds, of a benign run rounded once more: another way to compute the
        same step ends at a neighbouring number."""
        return self._rounded(value) if self._rounded else value

    def _scaled(self, gradient: torch.Tensor, numbers: int = 1) -> torch.Tensor:
        """A gradient whose one factor is off by the rounding of a benign run.

        Args:
            gradient: All of it has one factor: a loss's weight, the norm that it is clipped by.
            numbers: How many were added up for that factor.
        """
        if self._rounded is None or not gradient.is_floating_point():
            return gradient
        off = torch.finfo(gradient.dtype).eps * max(1.0, RUNNING_SUM * float(numbers) ** 0.5)
        return self._rounded(gradient).mul(1 + off)

    def _said(self, made: Any) -> None:
        """The loss that the step returned, and its parts."""
        if made is None:
            return
        for name, value in flatten(made).items():
            self.done.tensors[f"loss/{name}"] = value.detach().reshape(-1)

    def _count(self) -> None:
        for key in self.script.calls:
            if key[1] >= self._numbers[key[0]]:
                self.done.notes.append(f"{key[0]} is called {self._numbers[key[0]]} times only")
        if self.step.optimizer is not None and not self._steps:
            self.done.notes.append("the optimiser was not stepped")

    def _call(
        self,
        fqn: str,
        module: torch.nn.Module,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        key = fqn, self._numbers[fqn]
        handed = self.script.calls.get(key) if self._depth == 0 else None
        if handed is None:
            if self._depth == 0:
                self.done.notes.append(f"{fqn} is called once more (call {key[1]})")
                self._numbers[fqn] += 1
            self._depth += 1
            try:
                return own(*args, **kwargs)
            finally:
                self._depth -= 1
        self._numbers[fqn] += 1
        arguments = Arguments(module, args, kwargs).tensors()
        pairs = matched(arguments, handed.given)
        for path, tensor in arguments.items():
            name = call_name("input", key, pairs.get(path, path))
            self.done.tensors[name] = tensor.detach().clone()
        return self._returned(key, module, handed, arguments, pairs)

    def _returned(
        self,
        key: tuple[str, int],
        module: torch.nn.Module,
        handed: Handed,
        arguments: Mapping[str, torch.Tensor],
        pairs: Mapping[str, str],
    ) -> Any:
        """Recorded outputs, whose backward hands on recorded gradients."""
        takes: list[torch.Tensor] = []
        gives: list[torch.Tensor | None] = []
        for path, tensor in arguments.items():
            if tensor.requires_grad:
                takes.append(tensor)
                gives.append(self._as(handed.backward.get(pairs.get(path, path)), tensor))
        for name, parameter in parameters(module):
            if parameter.requires_grad:
                takes.append(parameter)
                gives.append(self._as(handed.backward.get(f"w.{name}"), parameter))
        own = outputs(handed.call.output)
        pairs = matched(own, handed.made)
        paths = [path for path in own if path in pairs]
        values = [self._moved(handed.made[pairs[path]], own[path]) for path in paths]
        handing = _Handing(values, gives)
        self._handing.append((key, [pairs[path] for path in paths], handing))
        made: Sequence[torch.Tensor] = values
        if torch.is_grad_enabled() and takes:
            made = _Stub.apply(handing, *takes)  # type: ignore[no-untyped-call]
        placed = dict(zip(paths, made, strict=True))
        return exchanged(handed.call.output, lambda path, tensor: placed.get(path, tensor))

    def _as(self, gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        if gradient is None or gradient.shape != like.shape:
            return None
        return self._moved(gradient, like)

    def _moved(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A recorded tensor as another is: its device, its dtype or the one asked for."""
        if not value.is_floating_point():
            return value.to(like.device)
        value = self._rounded(value) if self._rounded else value
        return value.to(like.device, self._dtype or like.dtype)

    def _hooks(self, stack: ExitStack) -> None:
        optimizer = self.step.optimizer
        if optimizer is None:
            return
        for handle in (
            optimizer.register_step_pre_hook(lambda *_: self._begin()),
            optimizer.register_step_post_hook(lambda *_: self._end()),
        ):
            stack.callback(handle.remove)

    def _begin(self) -> None:
        """The optimiser is about to step: what it was given is kept, and replaced."""
        self._moved_late()
        if not self._steps and self.step.optimizer is not None:
            self._stepped = stepped_for(self.step.optimizer, self._named)
        squares, count = 0.0, 0
        largest = max(parameter.numel() for parameter in self._named.values())
        for name, parameter in self._named.items():
            self._before[name] = parameter.detach().clone()
            stepped = self._stepped.get(name, parameter)
            gradient = parameter.grad if stepped.grad is None else stepped.grad
            if gradient is None:
                continue
            key = f"{self._steps}/{name}"
            self.done.tensors[f"clipped/{key}"] = self._scaled(gradient.detach(), largest)
            squares += float(gradient.detach().double().square().sum())
            count += gradient.numel()
            recorded = self._as(self.script.clipped.get(key), stepped)
            if recorded is not None:
                stepped.grad = recorded
        self.done.size = (squares / max(count, 1)) ** 0.5

    def _end(self) -> None:
        """The optimiser has stepped. A parameter that it does not hold moves when the trainer
        copies its master back: until the next step, or the end."""
        for name, parameter in self._named.items():
            if not parameter.requires_grad:
                continue
            key = f"update/{self._steps}/{name}"
            self.done.tensors[key] = self._held(parameter.detach()) - self._before[name]
            if self._stepped.get(name) is not parameter:
                self._late[key] = name
        self._steps += 1

    def _moved_late(self) -> None:
        for key, name in self._late.items():
            moved = self._held(self._named[name].detach()) - self._before[name]
            self.done.tensors[key] = moved
        self._late = {}

    def _probe(self, optimizer: torch.optim.Optimizer) -> None:
        """Step on gradients that are drawn, of many sizes."""
        size = self.script.size or self.done.size
        for number in range(PROBES):
            probed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            for at, (name, parameter) in enumerate(self._named.items()):
                if not parameter.requires_grad:
                    continue
                stepped = self._stepped.get(name, parameter)
                before = stepped.detach().to(parameter.dtype, copy=True)
                stepped.data.copy_(before)  # a master in a higher precision begins where others do
                probed[name] = stepped, before
                if name in self._stepped:
                    stepped.grad = self._moved(drawn(parameter, size, at, number), stepped)
            optimizer.step()
            for name, (stepped, before) in probed.items():
                if name not in self.done.unprobed:
                    moved = self._held(stepped.detach().to(before.dtype)) - before
                    self.done.tensors[f"probe/{number}/{name}"] = moved

    def _merge(self) -> None:
        """What the merged model holds and makes, beside the trainer's own model."""
        step, first = self.step, next(iter(self.script.calls.values()), None)
        assert step.merge is not None
        with torch.no_grad(), without_checkpointing():
            training = step.model.training
            own = _answers(step.model.eval(), first, self._moved)
            step.model.train(training)
            merged = step.merge().eval()
            trained = {name for name, p in self._named.items() if p.requires_grad}
            for name, parameter in parameters(merged):
                if name not in trained:  # a LoRA's own may stay, or be gone
                    value = self._held(parameter.detach().clone())
                    self.done.tensors[f"merged/w/{name}"] = value
            if first is None or first.call.fqn != "(root)":
                return
            for path, value in _answers(merged, first, self._moved).items():
                self.done.tensors[f"merged/out/{path}"] = value
            for path, value in own.items():
                self.done.tensors[f"unmerged/out/{path}"] = value


def _answers(
    model: torch.nn.Module,
    first: Handed | None,
    moved: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What a whole model makes of the inputs of the first call."""
    if first is None or first.call.fqn != "(root)":
        return {}
    pairs = matched(first.call.arguments.tensors(), first.given)

    def exchange(path: str, tensor: torch.Tensor) -> torch.Tensor:
        name = pairs.get(path)
        return tensor if name is None else moved(first.given[name], tensor)

    made = first.call.arguments.exchanged(exchange).call(model)
    return {path: tensor.detach() for path, tensor in outputs(made).items()}


def drawn(like: torch.Tensor, size: float, at: int, number: int) -> torch.Tensor:
    """A gradient of many sizes, the same for everybody: of a parameter's place and a number."""
    generator = torch.Generator("cpu").manual_seed(1009 * number + at)
    shape = tuple(like.shape)
    signs = torch.randn(shape, generator=generator)
    decades = torch.rand(shape, generator=generator) * _DECADES
    return (size or 1.0) * signs * 10.0 ** (1.0 - decades)


def _values(model: torch.nn.Module | None) -> dict[str, torch.Tensor]:
    named = parameters(model) if model is not None else ()
    return {name: parameter.detach().clone() for name, parameter in named}


def script_of(
    recorded: Mapping[str, torch.Tensor],
    calls: Mapping[tuple[str, int], ModuleCall],
    backward: Mapping[tuple[str, int], Mapping[str, torch.Tensor]],
    *,
    outermost: list[tuple[str, int]],
    size: float = 0.0,
) -> Script:
    """The script of a recording.

    Args:
        recorded: Its tensors.
        calls: How the side that is run calls its modules.
        backward: Recorded gradients of each call by slot.
        outermost: Calls that stubs stand for.
        size: See `Script`.
    """
    made: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    given: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    clipped: dict[str, torch.Tensor] = {}
    for name in recorded:
        head, _, rest = name.partition("/")
        if head in ("returned", "given"):
            fqn, number, path = rest.split("/", 2)
            side = made if head == "returned" else given
            side.setdefault((fqn, int(number)), {})[path] = recorded[name]
        elif head == "clipped":
            clipped[rest] = recorded[name]
    handed = {
        key: Handed(calls[key], made.get(key, {}), backward.get(key, {}), given.get(key, {}))
        for key in outermost
        if key in calls
    }
    return Script(handed, clipped, size)
