"""The inputs of a parity case: from a CPU generator a seed, or those that a recording holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from truestep.errors import UsageError
from truestep.nests import take_apart
from truestep.parity.component import Parity
from truestep.parity.sides import Tensors, bits
from truestep.recording.format import Recording
from truestep.replay.functions import inputs_of

Samples = list[dict[str, torch.Tensor]]
Rebuild = Callable[[Tensors], dict[str, Any]]


def samples_of(parity: Parity) -> tuple[Samples, Rebuild]:
    """One sample a seed as named tensors, and what makes call arguments of them.

    Raises:
        UsageError: The inputs are no function of their seed, are not on the CPU or hold no tensor.
    """
    make = parity.inputs
    if make is None:
        raise UsageError("Parity(inputs=...) is needed: a function of a CPU generator")
    samples: Samples = []
    rebuild: Rebuild | None = None
    for seed in parity.seeds:
        tensors, build = take_apart(make(torch.Generator("cpu").manual_seed(seed)))
        again = take_apart(make(torch.Generator("cpu").manual_seed(seed)))[0]
        for name, tensor in tensors.items():
            if name not in again or not torch.equal(bits(tensor), bits(again[name])):
                raise UsageError(
                    "the inputs are not a function of their seed",
                    where=f"{name}, seed {seed}",
                    measured="two calls with the same generator made different values",
                    hint="draw everything from it: torch.randn(..., generator=generator)",
                )
        samples.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
        rebuild = rebuild or build
    assert rebuild is not None
    return samples, rebuild


def recorded_samples(recording: Recording, parity: Parity) -> tuple[Samples, Rebuild]:
    """The inputs that a recording of the official side holds; the nest is that of `inputs`."""
    rebuild: Rebuild = dict
    if parity.inputs is not None:
        rebuild = take_apart(parity.inputs(torch.Generator("cpu").manual_seed(parity.seeds[0])))[1]
    return inputs_of(recording), rebuild
