"""Functions that call a model's parts, and never the model: found from the stack of their callers.

`vae.decode(...)` and a function `denoise(dit, latents, ...)` that goes through the blocks of `dit`
by itself are uses of one model, though that is never called. Where a module is called from
outside of any other, the callers are asked whether one of them was given a model of which the
module is a part.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch

MOST = 64
"""Callers that are looked at."""

_parts: WeakKeyDictionary[torch.nn.Module, tuple[int, frozenset[int]]] = WeakKeyDictionary()


def using(module: torch.nn.Module, frame: FrameType, loops: set[CodeType]) -> Any:
    """The outermost caller that was given the smallest model that a module is part of.

    Args:
        module: Called from outside of any other.
        frame: Of its caller.
        loops: Code that goes through several steps: what is given to that is no single use.

    Returns:
        The caller's frame and the model, or None.
    """
    best: tuple[int, torch.nn.Module, FrameType] | None = None
    for caller in _callers(frame):
        if caller.f_code in loops:
            break
        for model in _models(caller):
            size = _holds(model, module)
            if size and (best is None or size < best[0] or model is best[1]):
                best = (size, model, caller)
    return None if best is None else (best[2], best[1])


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    for _ in range(MOST):
        if frame is None:
            return
        if frame.f_globals.get("__name__") != "torch.nn.modules.module":
            yield frame
        frame = frame.f_back


def arguments(frame: FrameType) -> dict[str, Any]:
    """What a function was given, as its names hold it now."""
    code, values = frame.f_code, frame.f_locals
    count = code.co_argcount + code.co_kwonlyargcount
    given = {name: values[name] for name in code.co_varnames[:count] if name in values}
    rest = list(code.co_varnames[count : count + 2])
    if code.co_flags & inspect.CO_VARARGS and rest:
        more = values.get(rest.pop(0))
        given |= {f"*{i}": value for i, value in enumerate(more if type(more) is tuple else ())}
    if code.co_flags & inspect.CO_VARKEYWORDS and rest:
        named = values.get(rest[0])
        given |= named if type(named) is dict else {}
    return given


def method_of(frame: FrameType, model: torch.nn.Module) -> str:
    """What a use of a model is called: its method, where a decorator stands around it."""
    for name in _names(frame):
        if hasattr(type(model), name):
            return name
    return frame.f_code.co_name


def _names(outer: FrameType) -> Iterator[str]:
    """Names of functions that a running one has called, from itself inwards."""
    inside = []
    for caller in _callers(sys._getframe(2)):
        inside.append(caller.f_code.co_name)
        if caller is outer:
            break
    yield from reversed(inside)


def _models(frame: FrameType) -> Iterator[torch.nn.Module]:
    for value in arguments(frame).values():
        if isinstance(value, torch.nn.Module) and is_model(value):
            yield value


def is_model(module: torch.nn.Module) -> bool:
    """Whether it could be called: what only holds models (a pipeline) could not."""
    unset = torch.nn.Module.forward
    return getattr(type(module), "forward", unset) is not unset


def _holds(model: torch.nn.Module, module: torch.nn.Module) -> int:
    """How many modules a model has, if the module is one of its parts."""
    known = _parts.get(model)
    if known is None:
        inside = frozenset(map(id, model.modules())) - {id(model)}
        known = _parts[model] = (len(inside), inside)
    return known[0] if id(module) in known[1] else 0


def when_over(frame: FrameType, then: Callable[[Any, BaseException | None], None]) -> bool:
    """Have a function called with what a running one returns, or raises.

    Returns:
        False where the thread is traced already, by a debugger: nothing is called then.
    """
    if sys.gettrace() is not None:
        return False
    raised: list[BaseException | None] = [None]

    def inside(_: FrameType, event: str, value: Any) -> Any:
        if event == "exception":
            raised[0] = value[1]
        elif event == "return":
            sys.settrace(None)
            then(value, raised[0] if value is None else None)
            return None
        return inside

    sys.settrace(_nothing)
    frame.f_trace_lines = False
    frame.f_trace = inside
    return True


def _nothing(_frame: FrameType, _event: str, _value: Any) -> None:
    """Other functions are not traced."""
