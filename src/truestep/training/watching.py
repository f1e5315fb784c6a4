"""Watch a training step: every call of a module, what it was given and returned, and the gradient
that came back to it.

A module's own `_call_impl` is wrapped, so that what hooks make of inputs and outputs is seen too.
What activation checkpointing computes again during the backward is no call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from truestep.pairing.naming import callable_module, compiled, matching, named_modules
from truestep.training.nests import Arguments, exchanged, outputs
from truestep.training.step import inside

Round = Callable[[torch.Tensor], torch.Tensor]

DEVICES = ("cpu", "cuda")
"""Devices whose autocast is kept."""


@dataclass
class ModuleCall:
    """One call of a module in a training step.

    Attributes:
        fqn: Of the module. number: counts its calls in the step.
        arguments: What it was called with.
        outermost: Whether it was not called by another module.
        given: Tensors among the arguments by path. wants: those that required a gradient.
        output: What it returned, as it is. made: its tensors by path.
        pulled: Gradient that came back to each of them.
        random: State of the CPU's random numbers before, if the call drew any.
        autocast: Device to (whether on, dtype).
    """

    fqn: str
    number: int
    arguments: Arguments
    outermost: bool
    given: dict[str, torch.Tensor] = field(default_factory=dict)
    wants: frozenset[str] = frozenset()
    output: Any = None
    made: dict[str, torch.Tensor] = field(default_factory=dict)
    pulled: dict[str, torch.Tensor] = field(default_factory=dict)
    random: torch.Tensor | None = None
    autocast: Mapping[str, tuple[bool, torch.dtype]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """Module and number."""
        return self.fqn, self.number


def in_backward() -> bool:
    """Whether autograd runs a backward now: a forward in it is one that checkpointing repeats."""
    return int(torch._C._current_graph_task_id()) != -1


def modules_of(model: torch.nn.Module, select: str = "*") -> dict[str, torch.nn.Module]:
    """The modules that are looked at, by name; of wrappers what they hold, unless it is compiled:
    then the wrapper's call is all that Python runs."""
    layers = [module for _, module in inside(model)]
    whole = next((module for module in layers if compiled(module)), layers[-1])
    named = named_modules(whole)
    called = {fqn: m for fqn, m in named.modules.items() if callable_module(m)}
    chosen = set(matching(called, select))
    return {fqn: module for fqn, module in called.items() if fqn in chosen}


@contextmanager
def wrapped(
    modules: Mapping[str, torch.nn.Module],
    around: Callable[..., Any],
) -> Iterator[None]:
    """Have a function called in the place of each module, with its name, itself and its call.

    Args:
        modules: By name.
        around: Called with name, module, the module's own call, its arguments and keywords.
    """
    kept: list[tuple[torch.nn.Module, str, Any, bool]] = []
    try:
        for fqn, module in modules.items():
            runs_graph = compiled(module) and getattr(module, "_compiled_call_impl", None)
            name = "_compiled_call_impl" if runs_graph else "_call_impl"
            own = getattr(module, name)
            kept.append((module, name, own, name in vars(module)))
            vars(module)[name] = partial(_called, around, fqn, module, own)
        yield
    finally:
        for module, name, own, held in reversed(kept):
            if held:
                vars(module)[name] = own
            else:
                del vars(module)[name]


def _called(
    around: Callable[..., Any],
    fqn: str,
    module: torch.nn.Module,
    own: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if in_backward():
        return own(*args, **kwargs)
    return around(fqn, module, own, args, kwargs)


class Watch:
    """Keeps every call of the modules of a model while a step runs.

    Args:
        copies: Whether tensors are copied: an operation in place would change them later.
        rounded: What is done to what the outermost modules are given, if anything.
        dtype: What they are cast to first, if anything.
    """

    def __init__(
        self,
        *,
        copies: bool = True,
        rounded: Round | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.calls: list[ModuleCall] = []
        self._copies, self._rounded, self._dtype = copies, rounded, dtype
        self._numbers = Counter[str]()
        self._depth = 0

    def seen(
        self,
        fqn: str,
        module: torch.nn.Module,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Make a call, and keep it."""
        arguments = Arguments(module, args, kwargs)
        outermost = self._depth == 0
        if outermost and (self._rounded or self._dtype):
            arguments = arguments.exchanged(lambda path, tensor: self._moved(tensor))
        call = ModuleCall(fqn, self._numbers[fqn], arguments, outermost, autocast=autocast_state())
        self._numbers[fqn] += 1
        tensors = arguments.tensors()
        call.wants = frozenset(path for path, tensor in tensors.items() if tensor.requires_grad)
        call.given = {path: self._kept(tensor) for path, tensor in tensors.items()}
        before = torch.get_rng_state()
        self._depth += 1
        try:
            made = arguments.call(own)
        finally:
            self._depth -= 1
        if not torch.equal(before, torch.get_rng_state()):
            call.random = before
        for path, tensor in outputs(made).items():
            call.made[path] = self._kept(tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(self._pulled, call, path))
        call.arguments = arguments.exchanged(lambda _, tensor: tensor.detach())
        call.output = exchanged(made, lambda _, tensor: tensor.detach())
        self.calls.append(call)
        return made

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(self._dtype) if self._dtype else tensor
        if self._rounded is None:
            return tensor
        moved = self._rounded(tensor.detach())
        return tensor + (moved - tensor.detach())

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone() if self._copies else tensor.detach()

    def _pulled(self, call: ModuleCall, path: str, gradient: torch.Tensor) -> None:
        if path in call.pulled:
            call.pulled[path] = call.pulled[path] + gradient.detach()
        else:
            call.pulled[path] = gradient.detach().clone()


def autocast_state() -> dict[str, tuple[bool, torch.dtype]]:
    """Whether autocast is on, and in which dtype, by device."""
    return {
        device: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in DEVICES
    }


@contextmanager
def autocast_as(state: Mapping[str, tuple[bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as it was when a call was made."""
    with ExitStack() as stack:
        for device, (enabled, dtype) in state.items():
            if device == "cpu" or torch.cuda.is_available():
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        yield


class Gradients:
    """The gradient of every parameter as it is accumulated, before anything is done to it.

    Attributes:
        found: Name to gradient; a parameter that got none is not in it.
    """

    def __init__(self, named: Collection[tuple[str, torch.nn.Parameter]]) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self._named = named

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep them while a step runs."""
        with ExitStack() as stack:
            for name, parameter in self._named:
                if parameter.requires_grad:
                    hook = partial(self._accumulated, name)
                    handle = parameter.register_post_accumulate_grad_hook(hook)
                    stack.callback(handle.remove)
            yield

    def _accumulated(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.found[name] = parameter.grad.detach().clone()
