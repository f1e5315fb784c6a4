"""One module by itself: run on recorded inputs, and pulled back with recorded gradients.

What comes of it is the module's vector-Jacobian product: the gradient of each input and of each of
its parameters. Nothing of the modules around it takes part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from truestep.keys import module_name
from truestep.training.nests import Arguments, matched, outputs
from truestep.training.step import parameters
from truestep.training.watching import ModuleCall, Round, autocast_as

FORWARD, BACKWARD = "forward", "backward"
MOST_NODES = 20_000
"""Nodes of a graph that are looked at."""

_BOOKKEEPING = frozenset({"AccumulateGrad", "CloneBackward0"})


@dataclass(frozen=True)
class Recorded:
    """What was recorded of a module's call.

    Attributes:
        given: Inputs by path. wants: those whose gradient is judged.
        pulled: Gradients of its outputs by path.
        random: State of the random numbers before it, if it drew any.
    """

    given: Mapping[str, torch.Tensor]
    wants: frozenset[str]
    pulled: Mapping[str, torch.Tensor]
    random: torch.Tensor | None = None


@dataclass
class Pulled:
    """What a module made.

    Attributes:
        forward: Outputs by slot. backward: gradients by slot: `in.x` of an input, `w.NAME` of a
            parameter.
        nodes: How often its graph holds each kind of node.
        custom: Kind of node to file and line, of those that are somebody's own.
    """

    forward: dict[str, torch.Tensor] = field(default_factory=dict)
    backward: dict[str, torch.Tensor] = field(default_factory=dict)
    nodes: Counter[str] = field(default_factory=Counter)
    custom: dict[str, str] = field(default_factory=dict)

    def named(self, key: tuple[str, int]) -> dict[str, torch.Tensor]:
        """Everything under the name of its row."""
        fqn, number = key
        sides = {FORWARD: self.forward, BACKWARD: self.backward}
        return {
            module_name(fqn, step=number, branch=side, slot=slot): tensor
            for side, tensors in sides.items()
            for slot, tensor in tensors.items()
        }


def pull(
    module: torch.nn.Module,
    call: ModuleCall,
    recorded: Recorded,
    *,
    rounded: Round | None = None,
    dtype: torch.dtype | None = None,
) -> Pulled:
    """Run a module on recorded inputs and pull recorded gradients back through it.

    Args:
        module: The candidate's, or the trusted one.
        call: How it calls the module: its arguments, which are given other tensors.
        recorded: What it is given in their place.
        rounded: Done to inputs and gradients first, if anything. dtype: their cast, likewise.

    Returns:
        Outputs and gradients; a gradient that does not come is left out.
    """
    leaves: dict[str, torch.Tensor] = {}
    arguments = _given(call.arguments, recorded, leaves, rounded=rounded, dtype=dtype)
    found = Pulled()
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(autocast_as(call.autocast))
        stack.enter_context(_random(recorded.random))
        named = [(n, p) for n, p in parameters(module) if p.requires_grad]
        stack.enter_context(_without_gradients(named))
        made = outputs(arguments.call(module))
        found.forward = {path: tensor.detach() for path, tensor in made.items()}
        pairs = matched(made, recorded.pulled)
        starts = [
            (tensor, _cast(recorded.pulled[pairs[path]], tensor, rounded))
            for path, tensor in made.items()
            if path in pairs and tensor.requires_grad
        ]
        if starts:
            found.nodes, found.custom = nodes_of([tensor for tensor, _ in starts])
            torch.autograd.backward([t for t, _ in starts], [g for _, g in starts])
        for path in recorded.wants:
            leaf = leaves.get(path)
            if leaf is not None and leaf.grad is not None:
                found.backward[path] = leaf.grad
        for name, parameter in named:
            if parameter.grad is not None:
                found.backward[f"w.{name}"] = parameter.grad.detach().clone()
    return found


def _given(
    arguments: Arguments,
    recorded: Recorded,
    leaves: dict[str, torch.Tensor],
    *,
    rounded: Round | None,
    dtype: torch.dtype | None,
) -> Arguments:
    """Arguments with the recorded tensors, as copies of leaves: they may be written in place."""
    pairs = matched(arguments.tensors(), recorded.given)

    def exchange(path: str, tensor: torch.Tensor) -> torch.Tensor:
        name = pairs.get(path)
        if name is None:
            return tensor.detach()
        value = recorded.given[name].to(tensor.device, copy=True)
        if value.is_floating_point():
            value = value.to(dtype) if dtype else value
            value = rounded(value) if rounded else value
        if name not in recorded.wants:
            return value
        leaf = leaves.setdefault(name, value.requires_grad_())
        return leaf.clone()

    return arguments.exchanged(exchange)


def _cast(gradient: torch.Tensor, output: torch.Tensor, rounded: Round | None) -> torch.Tensor:
    gradient = gradient.to(output.device, output.dtype)
    return rounded(gradient) if rounded else gradient


@contextmanager
def _random(state: torch.Tensor | None) -> Iterator[None]:
    """The random numbers that a recorded call drew; the others go on as they were."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield


@contextmanager
def _without_gradients(named: list[tuple[str, torch.nn.Parameter]]) -> Iterator[None]:
    """Parameters begin without a gradient, and get theirs back."""
    kept = [(parameter, parameter.grad) for _, parameter in named]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def nodes_of(tensors: list[torch.Tensor]) -> tuple[Counter[str], dict[str, str]]:
    """Kinds of nodes of the graph behind tensors, and where somebody's own ones are written."""
    counts, custom = Counter[str](), dict[str, str]()
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while waiting and len(seen) < MOST_NODES:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = node.name().rpartition("::")[2]
        if kind not in _BOOKKEEPING:
            counts[kind] += 1
        forward: Any = getattr(type(node), "_forward_cls", None)
        if forward is not None:
            custom[kind] = _written(forward)
        waiting += [inner for inner, _ in node.next_functions if inner is not None]
    return counts, custom


def _written(function: type) -> str:
    """`port.py:12`: where the backward of somebody's own function is written."""
    code = getattr(getattr(function, "backward", None), "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else function.__module__
