"""Which methods of a component are boundaries, and the class that stands in for its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from functools import wraps
from types import FunctionType, MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from truestep.pairing.naming import runs_compiled, unwrapped

FORWARD = "forward"
"""What a call of a component itself is named, whatever lets it be called."""

CONTEXT = "cache_context"
"""The method by which a pipeline tells a model which guidance pass comes next."""

STEP, SET_TIMESTEPS = "step", "set_timesteps"
SCHEDULER_METHODS = (SET_TIMESTEPS, STEP, "scale_model_input", "add_noise", "scale_noise")
"""Looked for also where a scheduler's class does not have them, but hands them on."""


class Kind(str, Enum):
    """What a boundary belongs to: models may be answered for, everything else always runs."""

    MODEL = "model"
    SCHEDULER = "scheduler"
    GUIDER = "guider"
    FUNCTION = "function"
    RANDOM = "random"
    RUN = "run"

    __str__ = str.__str__


class Watcher(Protocol):
    """Who is told of calls."""

    hidden: bool

    def arrive(
        self, owner: Any, method: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Answer a call."""

    def enter_context(self, name: Any, context: Any) -> Any:
        """Note which guidance pass comes next, for as long as a context lasts."""

    copied: bool


def kind_of(component: Any) -> Kind | None:
    """What a component is, by what it can do; None of what prepares inputs for others."""
    if isinstance(component, torch.nn.Module):
        return Kind.MODEL
    if _has(component, "model_input_names", "preprocess", "convert_tokens_to_ids"):
        return None
    if _has(component, STEP) and _has(component, SET_TIMESTEPS):
        return Kind.SCHEDULER
    if _has(component, FORWARD) and _has(component, "prepare_inputs"):
        return Kind.GUIDER
    return Kind.MODEL if callable(component) or [*_public(type(component), "")] else None


def _has(component: Any, *names: str) -> bool:
    return any(hasattr(component, name) for name in names)


def methods_of(component: Any, kind: Kind, also: Collection[str] = ()) -> set[str]:
    """Methods of a component that are boundaries, a call of itself left out.

    Args:
        component: Of this kind.
        kind: A guider's only boundary is `forward`.
        also: Methods that are so too where the component has them in any way.
    """
    if kind is Kind.GUIDER:
        return {FORWARD}
    anchor = STEP if kind is Kind.SCHEDULER else FORWARD
    names = set(_public(type(component), anchor))
    if kind is Kind.SCHEDULER:
        also = {*also, *SCHEDULER_METHODS}
    if isinstance(component, torch.nn.Module):
        names |= set(_public(type(unwrapped(component)), anchor)) | {FORWARD}
    return names | {name for name in also if callable(getattr(component, name, None))}


def _public(cls: type, anchor: str) -> Iterator[str]:
    """Public methods of the classes that make a component what it is, not of those it mixes in.

    They are the classes that define its anchor (`forward`, `step`) and what derives from them.
    """
    anchors = [c for c in cls.__mro__ if anchor in vars(c) and c is not torch.nn.Module]
    line = [c for c in cls.__mro__ if any(issubclass(c, a) for a in anchors)] or [cls]
    for part in line:
        if part.__module__ == "builtins":
            continue
        for name, value in vars(part).items():
            public = isinstance(value, FunctionType) and not name.startswith("_")
            if public and not hasattr(torch.nn.Module, name):
                yield name


def submodules(component: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules inside a component whose own call can be watched, and their names in it.

    None of a component that runs compiled code: what it was compiled for must not change.
    """
    if not isinstance(component, torch.nn.Module) or runs_compiled(component):
        return
    for name, module in component.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def signature_of(owner: Any, method: str, call: Callable[..., Any]) -> inspect.Signature | None:
    """What a boundary takes, as its class says: a wrapper's `*args` says nothing."""
    if method == FORWARD and isinstance(owner, torch.nn.Module):
        inner = unwrapped(owner)
        signatures = [_signature(getattr(type(inner), FORWARD, None), bound=False)]
        signatures.append(_signature(inner.forward, bound=True))
    else:
        inside = getattr(owner, "__wrapped__", None) if method == FORWARD else None
        signatures = [_signature(inside or call, bound=True)]
    named = [s for s in signatures if s is not None and positional(s)]
    return next(iter(named), next(iter(signatures), None))


def positional(signature: inspect.Signature | None) -> tuple[str, ...]:
    """Names of the parameters that a value without a name may go to, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature.parameters.values() if signature else ()
    return tuple(p.name for p in parameters if p.kind in kinds)


def _signature(function: Any, *, bound: bool) -> inspect.Signature | None:
    """What a function takes; of one that is not bound, without its first parameter."""
    if isinstance(function, MethodType):
        function, bound = function.__func__, False
    if not isinstance(function, FunctionType):
        return _inspected(function, bound=bound)
    known = _signatures.setdefault(function, {})
    if bound not in known:
        known[bound] = _inspected(function, bound=bound)
    return known[bound]


_signatures: WeakKeyDictionary[FunctionType, dict[bool, inspect.Signature | None]]
_signatures = WeakKeyDictionary()


def _inspected(function: Any, *, bound: bool) -> inspect.Signature | None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    if bound:
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


class WatchedMethod:
    """A method of a watched class. It comes before what is on the instance, and calls that."""

    def __init__(self, watcher: Watcher, original: type, name: str) -> None:
        self._watcher, self._original, self._name = watcher, original, name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """The method of an instance, watched."""
        if instance is None:
            return getattr(self._original, self._name)
        call = self._of(instance)
        if not callable(call) or self._watcher.hidden:
            return call

        @wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._name == CONTEXT:
                name = args[0] if args else next(iter(kwargs.values()), None)
                return self._watcher.enter_context(name, call(*args, **kwargs))
            return self._watcher.arrive(instance, self._name, call, args, kwargs)

        return watched

    def _of(self, instance: Any) -> Any:
        here = getattr(instance, "__dict__", {})
        if self._name in here:
            return here[self._name]
        static = inspect.getattr_static(self._original, self._name, None)
        if static is None:  # handed on by __getattr__
            return self._original.__getattr__(instance, self._name)  # type: ignore[attr-defined]
        return static.__get__(instance, self._original) if hasattr(static, "__get__") else static

    def __set__(self, instance: Any, value: Any) -> None:
        """Put something on the instance, as a plain class would."""
        instance.__dict__[self._name] = value

    def __delete__(self, instance: Any) -> None:
        """Take it off again."""
        if self._name not in instance.__dict__:
            raise AttributeError(self._name)
        del instance.__dict__[self._name]


class _Shield:
    """Keeps classes from hearing of a subclass of theirs."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class Equal(type):
    """A class that says it is the one it stands in for."""

    _original: type

    def mro(cls) -> list[type]:
        """The usual order, with what keeps classes from hearing of a subclass before them all."""
        first, *others = super().mro()
        return [first, _Shield, *others]

    def __eq__(cls, other: object) -> bool:
        return (
            other is cls
            or other is cls._original
            or (isinstance(other, Equal) and other._original is cls._original)
        )

    def __hash__(cls) -> int:
        return hash(cls._original)


def swapped_class(
    original: type, watcher: Watcher, methods: Collection[str], *, called: bool = True
) -> type:
    """A subclass that tells a watcher of calls of some methods of an instance.

    Args:
        called: Whether a call of the instance itself is one.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        real = original.__call__
        if watcher.hidden:
            return real(self, *args, **kwargs)
        return watcher.arrive(self, FORWARD, real.__get__(self), args, kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        watcher.copied = True
        return original.__reduce_ex__(self, protocol)  # type: ignore[call-arg]

    space: dict[str, Any] = {
        "__slots__": (),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce_ex,
        **{name: WatchedMethod(watcher, original, name) for name in methods},
    }
    if called and hasattr(original, "__call__"):  # noqa: B004 - of the class's instances
        space["__call__"] = call
    usual = type(original)
    metaclass: Any = Equal if usual is type else type("Equal", (Equal, usual), {})
    new: type = metaclass(original.__name__, (original,), space)
    new._original = original  # type: ignore[attr-defined]
    return new
