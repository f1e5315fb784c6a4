"""Leave the caller's random numbers alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def own_randomness() -> Iterator[None]:
    """Run a block, or a function, on random states of its own; the caller's are what they were.

    The block's begin anywhere, as those of a new process do: what draws without a seed draws
    something else each time, and is seen to. Python's, torch's and, where it is loaded, numpy's.
    """
    import torch

    numpy = sys.modules.get("numpy")
    ours, torchs = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpys = numpy.random.get_state() if numpy is not None else None
    random.seed()
    torch.seed()
    if numpy is not None:
        numpy.random.seed()
    try:
        yield
    finally:
        random.setstate(ours)
        torch.set_rng_state(torchs)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.random.set_state(numpys)


def own_states() -> dict[str, torch.Tensor]:
    """States of torch's own generators that are in use, by device; that of the CPU has no name."""
    import torch

    states = {"": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda:{number}"] = state
    return states


def set_own_state(device: str, state: torch.Tensor) -> None:
    """Give torch's own generator of a device a state; nothing where that is not in use here."""
    import torch

    if not device:
        torch.set_rng_state(state)
    elif torch.cuda.is_initialized() and device.startswith("cuda:"):
        number = int(device.partition(":")[2])
        if number < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, number)
