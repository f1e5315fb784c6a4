"""Run every module of a model on a reference's inputs, in one forward.

Before each call the module's tensor inputs are replaced by those that the reference's module of the
same name was given, so that no module sees the error of another. What a module returns then differs
by the error *made in it*; what it was about to be given differs by the error that the code between
it and the modules before it made. One more forward without replacement shows what is *inherited*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.noise import NoiseRun
from truestep.recording.floor import math_kernel, measured_run, one_rounding
from truestep.recording.names import module_name
from truestep.recording.raised import converted
from truestep.tracing.naming import ROOT, named_modules
from truestep.tracing.nests import argument_leaves, leaves

Forward = Callable[[], Any]
Rename = Callable[[str], "str | None"]
"""A candidate's fqn to the reference's; None where it has no partner."""


@dataclass
class Flow:
    """What one forward showed, in the order in which it happened.

    Attributes:
        tensors: `module/<fqn>/<step>/<branch>/in.*` (received) and `out.*`, host copies.
        calls: Labels of the modules called (`blocks.0`, `blocks.0#1`), in order of their start.
        silent: Modules that were called and returned no tensor.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


def flow(
    model: torch.nn.Module,
    forward: Forward,
    *,
    step: int,
    branch: str,
    given: Mapping[str, torch.Tensor] | None = None,
    select: Container[str] | None = None,
    rename: Rename | None = None,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    precision: torch.dtype | None = None,
) -> Flow:
    """Run a forward and keep what its modules receive and return.

    Args:
        model: Its modules are hooked while the forward runs.
        forward: Runs the model, once.
        step, branch: Where the forward belongs; part of the names.
        given: Reference tensors by name: where it has a module's inputs, they replace the received
            ones (in the dtype and on the device of those). Received tensors are kept all the same.
        select: Modules to hook, by the reference's fqn; None is all. The root always is.
        rename: Name of the reference's module that a module answers to; by default its own.
        change: Applied to every tensor that replaces another.
        precision: Floating dtype of the tensors that replace others, instead of that of those.

    Raises:
        Exception: Whatever the forward raises; the hooks are removed.
    """
    seen: Counter[str] = Counter()
    found = Flow()
    open_calls: list[str] = []

    def name(label: str, slot: str) -> str:
        fqn, _, call = label.partition("#")
        return module_name(fqn, step=step, branch=branch, slot=slot, call=int(call or 0))

    def enter(fqn: str) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            label = fqn if not seen[fqn] else f"{fqn}#{seen[fqn]}"
            seen[fqn] += 1
            open_calls.append(label)
            found.calls.append(label)
            swaps: dict[int, torch.Tensor] = {}
            for path, tensor in argument_leaves(args, kwargs):
                key = name(label, path)
                found.tensors[key] = _copy(tensor)
                theirs = given.get(key) if given is not None else None
                if theirs is not None and theirs.shape == tensor.shape:
                    lifted = precision if tensor.is_floating_point() else None
                    swapped = theirs.to(tensor.device, lifted or tensor.dtype, copy=True)
                    swaps[id(tensor)] = change(swapped) if change else swapped
            return (_swapped(args, swaps), _swapped(kwargs, swaps)) if swaps else None

        return hook

    def leave(module: Any, args: Any, output: Any) -> None:
        label = open_calls.pop()
        kept = False
        for path, tensor in leaves(output, "out"):
            found.tensors[name(label, path)] = _copy(tensor)
            kept = True
        if not kept:
            found.silent.append(label)

    handles = []
    for own, module in named_modules(model).modules.items():
        theirs = rename(own) if rename and own != ROOT else own
        if theirs is None or (own != ROOT and select is not None and theirs not in select):
            continue
        handles.append(
            module.register_forward_pre_hook(enter(theirs), prepend=True, with_kwargs=True)
        )
        handles.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _swapped(nest: Any, swaps: Mapping[int, torch.Tensor]) -> Any:
    """The nest with tensors replaced by identity; what is no tuple, list or dict stays as it is."""
    if isinstance(nest, torch.Tensor):
        return swaps.get(id(nest), nest)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(_swapped(part, swaps) for part in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(_swapped(part, swaps) for part in nest)
    if type(nest) is dict:
        return {key: _swapped(part, swaps) for key, part in nest.items()}
    return nest


def benign_flows(
    model: torch.nn.Module,
    forward: Forward,
    reference: Mapping[str, torch.Tensor],
    *,
    step: int,
    branch: str,
    select: Container[str] | None = None,
    higher: str | None,
    pair: str,
) -> Iterator[NoiseRun]:
    """The noise floor of every module on its own: trusted forwards under harmless changes.

    Args:
        reference: The trusted forward's own `Flow.tensors`.
        higher: Precision to measure the model's rounding against; None for no such run.
        pair: Working precisions, candidate first.
    """

    def run(**options: Any) -> Flow:
        place: dict[str, Any] = {"step": step, "branch": branch, "select": select}
        return flow(model, forward, given=reference, **place, **options)

    def measured(kind: str, detail: str, found: Flow) -> NoiseRun:
        pairs = {
            name: (tensor, reference[name])
            for name, tensor in found.tensors.items()
            if name in reference and tensor.shape == reference[name].shape
        }
        return measured_run(kind, detail, pair, pairs)

    if higher:
        dtype = getattr(torch, higher)
        with converted(model, dtype):
            yield measured("precision", f"against {higher}", run(precision=dtype))
    with math_kernel():
        yield measured("attention", "math kernel", run())
    for seed in (0, 1):
        generator = torch.Generator("cpu").manual_seed(seed)
        yield measured(
            "jitter", f"one rounding on the inputs, seed {seed}", run(change=_rounding(generator))
        )


def _rounding(generator: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        narrow = tensor.is_floating_point() and tensor.itemsize > 1
        return one_rounding(tensor, generator) if narrow else tensor

    return change
