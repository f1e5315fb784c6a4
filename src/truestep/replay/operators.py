"""The operators that run inside one module: the level below modules.

Each output of an ATen operator is recorded as `MODULE::aten.mm.default`, the second one of a step
and branch with `#1`. Views are left out: they hold what they are made from. Operators inside a
compiled graph, and those of other threads, are not seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from truestep.nests import leaves, safe_fqn
from truestep.pairing.naming import compiled

if TYPE_CHECKING:
    from truestep.replay.tracer import Tracer


class _Watch(TorchDispatchMode):
    """Shows every operator's output to a tracer."""

    def __init__(self, tracer: Tracer, fqn: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer, self._fqn = tracer, fqn

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not (getattr(func, "is_view", False) or func is torch.ops.aten._unsafe_view.default):
            self._tracer.operator(f"{self._fqn}::{safe_fqn(str(func))}", leaves(output, "out"))
        return output


def trace_operators(tracer: Tracer, module: torch.nn.Module, fqn: str) -> None:
    """Record every operator inside a module's forward, until the tracer is detached."""
    if compiled(module):
        tracer.note(f"{fqn} is compiled: its operators were not traced")
        return
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not tracer.recording:
            return original(*args, **kwargs)
        with _Watch(tracer, fqn):
            return original(*args, **kwargs)

    tracer.replace(module, "forward", forward)
