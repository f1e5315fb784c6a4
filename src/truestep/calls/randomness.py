"""Where random numbers are made: every draw of torch's, seen as it happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CREATED = ("randn", "rand", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson")
_LIKE = ("randn_like", "rand_like", "randint_like")
_FILLED = (
    "normal_",
    "uniform_",
    "random_",
    "bernoulli_",
    "exponential_",
    "log_normal_",
    "geometric_",
    "cauchy_",
)

DRAWS: dict[Any, str] = {
    **{getattr(torch, name): name for name in (*_CREATED, *_LIKE)},
    **{getattr(torch.Tensor, name): name for name in _FILLED},
    torch.Tensor.bernoulli: "bernoulli",
    torch.Tensor.multinomial: "multinomial",
}
"""Functions that draw random numbers, and their names."""

Told = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Draws(TorchFunctionMode):
    """While it is on, tells of every draw in this thread."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def on(self) -> None:
        """See draws again, after `off`."""
        super().__enter__()  # type: ignore[no-untyped-call]

    def off(self) -> None:
        """See no draws; it must be the innermost mode of this thread."""
        super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Let everything through, draws by way of who is told."""
        name = DRAWS.get(func)
        if name is None:
            return func(*args, **(kwargs or {}))
        return self._told(name, func, args, kwargs or {})
