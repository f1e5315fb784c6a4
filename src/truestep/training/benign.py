"""Harmless changes of a training step: what its noise floor is measured under."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from truestep.runtime.changes import (
    JITTERS,
    OtherFunctions,
    math_kernel,
    one_rounding,
    thread_count,
)
from truestep.runtime.precision import HIGHER
from truestep.training.watching import Round


@dataclass(frozen=True)
class Change:
    """One harmless change.

    Attributes:
        kind, detail: What is changed, as a noise floor names it.
        around: What it runs in.
        dtype: Precision that it runs in, if another.
        seed: Of one rounding on what is recorded, if so.
    """

    kind: str
    detail: str
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    dtype: torch.dtype | None = None
    seed: int | None = None

    def rounding(self) -> Round | None:
        """One rounding of a tensor, by random numbers that begin anew."""
        if self.seed is None:
            return None
        generator = torch.Generator("cpu").manual_seed(self.seed)

        def rounded(tensor: torch.Tensor) -> torch.Tensor:
            return one_rounding(tensor, generator) if tensor.is_floating_point() else tensor

        return rounded


AS_IT_IS = Change("repeat", "the same step again")


def changes(dtype: str) -> list[Change]:
    """Every change that this machine can make; those that tell how large rounding is come first."""
    listed = []
    higher = HIGHER.get(dtype)
    if higher:
        listed.append(
            Change("precision", f"{dtype} against {higher}", dtype=getattr(torch, higher))
        )
    listed += [
        Change("jitter", f"one rounding on inputs and gradients, seed {seed}", seed=seed)
        for seed in range(JITTERS)
    ]
    listed.append(AS_IT_IS)
    current, cores = torch.get_num_threads(), os.cpu_count() or 1
    listed += [
        Change("threads", f"{current} -> {count} threads", partial(thread_count, count))
        for count in sorted({1, min(2, cores)} - {current})
    ]
    listed.append(Change("attention", "math kernel", math_kernel))
    listed.append(
        Change(
            "functions",
            "exp, sin, ... as another library computes them",
            partial(OtherFunctions, 0),
        )
    )
    return listed
