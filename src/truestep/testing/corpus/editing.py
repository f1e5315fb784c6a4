"""Change a pipeline as a porter does: another line in a method, another helper, a wrapped call.

Nothing outside the object is changed: its class is replaced by a subclass.
"""

from __future__ import annotations

import inspect
import linecache
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

from truestep.testing.corpus.entry import NotApplicable


def edit(owner: Any, method: str, *changes: tuple[str, str]) -> None:
    """Replace text in the source of an object's method, wherever it stands.

    Args:
        owner: A pipeline, component or processor.
        method: Of its class.
        changes: Text and what stands for it; the method must hold each.

    Raises:
        NotApplicable: The method's source, in this version, does not hold the text.
    """
    function = _function(owner, method)
    source = source_of(owner, method)
    for old, new in changes:
        if old not in source:
            raise NotApplicable(f"{type(owner).__name__}.{method} does not say {old!r}")
        source = source.replace(old, new)
    _define(owner, method, source, dict(function.__globals__))


def source_of(owner: Any, method: str) -> str:
    """The source of a method of an object's class, edited or not."""
    return textwrap.dedent(inspect.getsource(_function(owner, method)))


def _define(owner: Any, method: str, source: str, space: dict[str, Any]) -> None:
    """Make a method of source, and put it on an object; the source can be read again."""
    name = f"<{type(owner).__name__}.{method}, edited {len(linecache.cache)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), space)
    derive(owner, {method: space[method]})


def with_function(owner: Any, method: str, name: str, function: Callable[..., Any]) -> None:
    """Let an object's method use another function than the one of its module.

    Raises:
        NotApplicable: The method's module has no such function.
    """
    plain = _function(owner, method)
    if not callable(plain.__globals__.get(name)):
        raise NotApplicable(f"{type(owner).__name__}.{method} uses no {name}")
    _define(owner, method, source_of(owner, method), {**plain.__globals__, name: function})


def derive(owner: Any, methods: dict[str, Any]) -> None:
    """Put methods on an object by a subclass of its class that bears the same name."""
    original = type(owner)
    space = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        **methods,
    }
    kind: Any = type(original)
    owner.__class__ = kind(original.__name__, (original,), space)


def around(owner: Any, method: str, change: Callable[..., Any]) -> None:
    """Wrap a method of an object: `change(call, *args, **kwargs)` stands for `call`.

    Raises:
        NotApplicable: The object has no such method.
    """
    call = getattr(owner, method, None)
    if not callable(call):
        raise NotApplicable(f"{type(owner).__name__} has no {method}")

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return change(call, *args, **kwargs)

    wrapped.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    setattr(owner, method, wrapped)


def denoiser(pipe: Any) -> Any:
    """The model that a pipeline calls at every step."""
    return getattr(pipe, denoiser_name(pipe))


def denoiser_name(pipe: Any) -> str:
    """The name of the model that a pipeline calls at every step."""
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def _function(owner: Any, method: str) -> FunctionType:
    held = inspect.getattr_static(type(owner), method, None)
    held = getattr(held, "__func__", held)
    function = inspect.unwrap(held) if callable(held) else None
    if not isinstance(function, FunctionType):
        raise NotApplicable(f"{type(owner).__name__} has no method {method}")
    return function
