"""A step without activation checkpointing: what it computes again is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint


class _Directly:
    """Stands for `CheckpointFunction`: calls the function, and lets autograd keep what it needs."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands for the generator in whose middle the function is called: its hooks are not set."""
    yield


_STAND_INS = {
    "CheckpointFunction": _Directly,
    "_checkpoint_without_reentrant_generator": _nothing,
}
"""What `torch.utils.checkpoint.checkpoint` looks up when it is called, however it was imported."""


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Have `torch.utils.checkpoint.checkpoint` call its function alone."""
    names = [name for name in _STAND_INS if hasattr(torch.utils.checkpoint, name)]
    kept = {name: getattr(torch.utils.checkpoint, name) for name in names}
    try:
        for name in names:
            setattr(torch.utils.checkpoint, name, _STAND_INS[name])
        yield
    finally:
        for name, value in kept.items():
            setattr(torch.utils.checkpoint, name, value)
