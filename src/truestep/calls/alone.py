"""Make one recorded call of a component that is there, outside of a run, on what was recorded.

A call can be made so where all that decides its answer was kept: its arguments, and nothing that
other calls, or generators, leave behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from truestep.calls.boundaries import Arrival
from truestep.calls.choosing import chosen_steps
from truestep.calls.classes import FORWARD, Kind, positional, signature_of
from truestep.calls.forcing import Forcing, packages_of
from truestep.calls.judging import place_of
from truestep.calls.pairing import matched
from truestep.calls.rebuilding import build
from truestep.calls.recording import WRITTEN, CallRecording, key
from truestep.calls.seen import Forced, Plan
from truestep.calls.values import leaves, tensors
from truestep.recording.manifest import CallEntry

STAGES = ("text", "prediction", "decoding")
"""Whose calls of models are made alone: what a service spends its time on."""


class Alone(Forcing):
    """Makes single calls; nothing is run around them."""

    def __init__(self, reference: CallRecording, parts: Iterable[Any]) -> None:
        """Prepare to make calls.

        Args:
            reference: What the calls are of.
            parts: Of whose packages classes may be built.
        """
        super().__init__(reference, Plan(made=lambda call: True))
        self._packages = packages_of(parts)

    def make(self, owner: Any, call: CallEntry) -> Forced:
        """Make a call as it was recorded, and see what it gives.

        Raises:
            CannotBuildError: It was given what only a live run can give.
        """
        output, given = self.made(owner, call)
        self.result = Forced(made=1)
        self._keep(call, "out", matched(output, call.output, self._shapes.__getitem__))
        for name, tree in call.written.items():
            place = (WRITTEN, name)
            inner = matched(given.get(name), tree, self._shapes.__getitem__, place)
            self._keep(call, "out", inner)
        return self.result

    def made(self, owner: Any, call: CallEntry) -> tuple[Any, dict[str, Any]]:
        """What a call gives that is made as it was recorded, and what it was given.

        Raises:
            CannotBuildError: See `make`.
        """
        method = owner if call.method == FORWARD else getattr(owner, call.method)
        signature = signature_of(owner, call.method, method)
        arrival = Arrival(call.component, call.method, Kind.MODEL, owner, (), {}, method, signature)
        fetch = self._fetch(arrival, call, None)
        trees = call.arguments
        given = {name: build(tree, fetch, self._packages) for name, tree in trees.items()}
        unnamed = max((i + 1 for i, name in enumerate(given) if name.startswith("*")), default=0)
        values = list(given.values())[:unnamed]
        named = {_present(name, call, arrival): given[name] for name in list(given)[unnamed:]}
        return method(*values, **named), given


def _present(name: str, call: CallEntry, arrival: Arrival) -> str:
    """What a parameter is called in the present code: its own name, or that in its place."""
    signature = arrival.signature
    known = signature.parameters if signature else {}
    if name in known or name not in call.parameters:
        return name
    place, names = call.parameters.index(name), positional(signature)
    return names[place] if place < len(names) else name


def calls_alone(reference: CallRecording) -> tuple[list[CallEntry], int]:
    """Calls of models that can be made alone, as far as a recording says, and how many cannot.

    They are those outside of steps, and those at the steps at which a check runs models.
    """
    steps = chosen_steps(reference)
    models = [
        call
        for call in reference.calls
        if call.kind == Kind.MODEL and call.stage in STAGES
        if call.step is None or call.step in steps
    ]
    possible = [call for call in models if _is_whole(call)]
    return possible, len(models) - len(possible)


def _is_whole(call: CallEntry) -> bool:
    if call.live or call.random or "~" in call.component or not any(tensors(call.output)):
        return False
    kinds = {leaf.kind for tree in call.arguments.values() for _, leaf in leaves(tree)}
    return not kinds & {"dropped", "opaque"}


def call_place(call: CallEntry) -> str:
    """A call for people: `transformer.forward (cond) at step 3`."""
    return place_of(key(call, "out", ()), call.context).partition(":")[0]


def component_of(components: Mapping[str, Any], name: str) -> Any:
    """A component, or a module inside of one; None where it is not there."""
    first, _, inside = name.partition(".")
    part = components.get(first)
    if not inside or not isinstance(part, torch.nn.Module):
        return None if inside else part
    return dict(part.named_modules()).get(inside)


def condition_of(component: Any) -> dict[str, str]:
    """What decides what a component gives beside its weights and its code: name to text.

    Devices of a module that is offloaded change with every call, and are left out.
    """
    if not isinstance(component, torch.nn.Module):
        return {}
    weights = list(component.parameters())
    devices = {str(weight.device) for weight in weights} - {"meta"}
    return {
        "dtype": ", ".join(sorted({str(weight.dtype)[6:] for weight in weights})),
        "device": "offloaded" if _is_offloaded(component) else ", ".join(sorted(devices)),
        "adapters": ", ".join(sorted(_adapters(component))) or "none",
        "training": "on" if component.training else "off",
        "cache": "on" if keeps_state(component) else "off",
    }


def keeps_state(component: Any) -> bool:
    """Whether a component says that its answer depends on calls before."""
    if getattr(component, "_cache_config", None) is not None:
        return True
    return any(hook._is_stateful for hook in _hooks(component).values())


def _hooks(component: Any) -> dict[str, Any]:
    """Hooks of diffusers on a module and on those inside of it."""
    modules = component.modules() if isinstance(component, torch.nn.Module) else ()
    registries = [getattr(module, "_diffusers_hook", None) for module in modules]
    return {
        f"{place} {name}": hook
        for place, registry in enumerate(registries)
        if registry is not None
        for name, hook in registry.hooks.items()
    }


def _is_offloaded(component: torch.nn.Module) -> bool:
    if any(hasattr(module, "_hf_hook") for module in component.modules()):
        return True
    return any("offload" in name for name in _hooks(component))


def _adapters(component: torch.nn.Module) -> set[str]:
    """Adapters of peft that are loaded; those that act are marked."""
    loaded = set(getattr(component, "peft_config", None) or ())
    acting: set[str] = set()
    for module in component.modules():
        layer: Any = module
        if isinstance(getattr(type(layer), "active_adapters", None), property):
            acting |= set() if layer.disable_adapters else set(layer.active_adapters)
    return {f"{name} (active)" if name in acting else name for name in loaded | acting}
