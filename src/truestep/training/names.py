"""Names of what is recorded of a training step, and where in it each belongs.

=============================  =========  ==========================================================
name                           stage      what
=============================  =========  ==========================================================
`given/FQN/0/in.x`                        what a module was given in its first call
`returned/FQN/0/out.0`                    what an outermost module returned
`pulled/FQN/0/out.0`                      the gradient that came back to it
`random/FQN/0`                            state of the random numbers before a call that drew some
`weight/NAME`                  weights    a parameter before the step
`input/FQN/0/in.x`             input      what the trainer's code gives an outermost module
`module/FQN/0/forward/out.0`   forward    what a module makes of recorded inputs
`loss/NAME`                    loss       the loss of recorded predictions, and its parts
`prediction/FQN/0/out.0`       loss       its gradient
`module/FQN/0/backward/in.x`   backward   what a module makes of a recorded gradient: of an input
`module/FQN/0/backward/w.NAME` backward   likewise: of a parameter
`gradient/NAME`                gradient   a parameter's gradient, nothing forced
`clipped/0/NAME`               optimizer  what the optimiser is given, of recorded gradients
`update/0/NAME`                optimizer  what it adds to a parameter, of recorded gradients
`after/NAME`                   optimizer  what the whole step adds to it, the optimiser and all else
`ema/NAME`                     optimizer  what is added to the averaged model
`probe/2/NAME`                 optimizer  what the optimiser adds, of drawn gradients, after that
`merged/w/NAME`                merge      a parameter of the merged model
`merged/out/out.0`             merge      what it makes; recorded is what the trainer's model makes
=============================  =========  ==========================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from truestep.keys import Address, key_of
from truestep.training.pulling import BACKWARD, FORWARD, Recorded

STAGES = {
    "weight": "weights",
    "input": "input",
    "loss": "loss",
    "prediction": "loss",
    "gradient": "gradient",
    "clipped": "optimizer",
    "update": "optimizer",
    "after": "optimizer",
    "probe": "optimizer",
    "ema": "optimizer",
    "merged": "merge",
}
"""First part of a name to stage; of a module it is the name's own branch."""

ORDER = (
    "weights",
    "input",
    FORWARD,
    "loss",
    BACKWARD,
    "gradient",
    "optimizer",
    "merge",
)
"""Stages in the order in which one fault makes the next."""


def describe(name: str) -> Address:
    """Where a tensor belongs. All of it may hold one value: a loss has one element."""
    head, _, rest = name.partition("/")
    if head == "module":
        key = key_of(name)
        return Address(key.part, key.number, None, key.fqn, inner=True)
    stage = STAGES.get(head, head)
    if head in ("input", "prediction"):
        fqn, number, _ = rest.split("/", 2)
        return Address(stage, int(number), None, fqn, inner=True)
    if head in ("clipped", "update", "probe"):
        number, _, rest = rest.partition("/")
        return Address(stage, int(number), None, rest, inner=True)
    fqn = "" if head in ("merged", "loss") else rest
    return Address(stage, None, None, fqn or None, inner=True)


def call_name(head: str, key: tuple[str, int], path: str = "") -> str:
    """`given/blocks.0/0/in.x` for the first call of `blocks.0`."""
    fqn, number = key
    return "/".join(part for part in (head, fqn, str(number), path) if part)


def recorded_calls(
    tensors: Mapping[str, torch.Tensor], wants: Mapping[str, Iterable[str]]
) -> dict[tuple[str, int], Recorded]:
    """What was recorded of every call, in order.

    Args:
        tensors: The recording.
        wants: Call (`blocks.0/0`) to inputs whose gradient is judged: each call is in it.
    """
    parts: dict[tuple[str, int], dict[str, dict[str, torch.Tensor]]] = {}
    states: dict[tuple[str, int], torch.Tensor] = {}
    for name in tensors:
        head, _, rest = name.partition("/")
        if head == "random":
            fqn, number = rest.split("/")
            states[fqn, int(number)] = tensors[name]
        elif head in ("given", "pulled"):
            fqn, number, path = rest.split("/", 2)
            parts.setdefault((fqn, int(number)), {}).setdefault(head, {})[path] = tensors[name]
    found = {}
    for text, paths in wants.items():
        fqn, _, number = text.rpartition("/")
        key = fqn, int(number)
        own = parts.get(key, {})
        found[key] = Recorded(
            own.get("given", {}), frozenset(paths), own.get("pulled", {}), states.get(key)
        )
    return found
