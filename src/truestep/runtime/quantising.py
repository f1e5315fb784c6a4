"""Layers of a pipeline's denoisers that quantisers take, and what a change makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from truestep.errors import UsageError
from truestep.measure.quantisers import QUANTISERS
from truestep.pairing.naming import named_modules
from truestep.runtime.pipeline import Pipeline, models_of

Tensor = torch.Tensor

DENOISERS = ("transformer", "transformer_2")
"""Models whose layers are quantised."""

_TAKEN = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A layer with a weight.

    Attributes:
        name: Its fqn, with the model before it.
        weight: The parameter itself.
    """

    name: str
    weight: torch.nn.Parameter

    @property
    def bytes(self) -> int:
        """As it is now."""
        return self.weight.numel() * self.weight.element_size()


def denoisers_of(pipe: Pipeline) -> dict[str, torch.nn.Module]:
    """The models of a pipeline whose layers are quantised, by attribute."""
    return {name: model for name, model in models_of(pipe).items() if name in DENOISERS}


def layers_of(pipe: Pipeline) -> dict[str, Layer]:
    """The layers of a pipeline's denoisers; see `layers_in`."""
    return layers_in(denoisers_of(pipe))


def layers_in(models: Mapping[str, torch.nn.Module]) -> dict[str, Layer]:
    """The linear and convolutional layers of models, by name; none twice."""
    found: dict[str, Layer] = {}
    seen: set[int] = set()
    for model, part in models.items():
        for fqn, module in named_modules(part).modules.items():
            weight = module._parameters.get("weight") if isinstance(module, _TAKEN) else None
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                found[f"{model}.{fqn}"] = Layer(f"{model}.{fqn}", weight)
    return found


def quantised(layers: Iterable[Layer], name: str) -> dict[str, Tensor]:
    """What a quantiser makes of layers, in the precision that they are kept in.

    Returns:
        By name; without those whose shape does not suit it.
    """
    made = {}
    for layer in layers:
        found = QUANTISERS[name](layer.weight)
        if found is not None:
            made[layer.name] = found.values.to(layer.weight.dtype)
    return made


@contextmanager
def instead(layers: Mapping[str, Layer], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The layers with other numbers."""
    before = {name: layers[name].weight.data for name in weights}
    try:
        for name, tensor in weights.items():
            layers[name].weight.data = tensor.to(before[name].device, before[name].dtype)
        yield
    finally:
        for name, tensor in before.items():
            layers[name].weight.data = tensor


def quantise(pipe: Pipeline, name: str) -> Pipeline:
    """Quantise a pipeline's denoisers in place, as numbers of their own precision.

    Args:
        name: Of a quantiser: `int8`, `gguf:Q4_K`.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in QUANTISERS:
        raise UsageError(f"no quantiser {name!r}", measured=f"known are {', '.join(QUANTISERS)}")
    layers = layers_of(pipe)
    for layer, tensor in quantised(layers.values(), name).items():
        layers[layer].weight.data = tensor
    return pipe
