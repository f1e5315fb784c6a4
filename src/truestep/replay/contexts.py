"""What diffusers' pipelines say about a call of their model: `model.cache_context("cond", ...)`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from typing import Any

import torch

_said: weakref.WeakKeyDictionary[torch.nn.Module, dict[int, list[tuple[str, int | None]]]] = (
    weakref.WeakKeyDictionary()
)
"""What was said to a model, by the thread that said it."""


def said(module: torch.nn.Module) -> tuple[str, int | None] | None:
    """Branch and step, where a pipeline has said them, of the call that is being made."""
    stack = _said.get(module, {}).get(get_ident())
    return stack[-1] if stack else None


def listening(
    module: torch.nn.Module, original: Callable[..., AbstractContextManager[Any]]
) -> Callable[..., AbstractContextManager[Any]]:
    """A `cache_context` that does what `original` does, and is remembered meanwhile."""

    @contextmanager
    def cache_context(name: str, **details: Any) -> Iterator[Any]:
        step = details.get("step_index")
        stack = _said.setdefault(module, {}).setdefault(get_ident(), [])
        stack.append((str(name), step if isinstance(step, int) else None))
        try:
            with original(name, **details) as value:
                yield value
        finally:
            stack.pop()

    return cache_context


def listen_to_all() -> Callable[[], None]:
    """Remember what is said to any model from now on; diffusers has been imported.

    Returns:
        What undoes it.
    """
    from diffusers.models.cache_utils import CacheMixin

    original = CacheMixin.cache_context

    def cache_context(self: torch.nn.Module, name: str, **details: Any) -> Any:
        return listening(self, original.__get__(self))(name, **details)

    def undo() -> None:
        if CacheMixin.cache_context is cache_context:
            CacheMixin.cache_context = original

    CacheMixin.cache_context = cache_context
    return undo
