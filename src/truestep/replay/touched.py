"""What a change under test touched: weights, buffers, classes, hooks, configuration, settings.

A change that touched nothing is no evidence: an adapter whose names fit no weight, an option that
nobody reads. Functions and classes are compared as objects, weights by a digest of their bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from types import FunctionType, ModuleType
from typing import Any

import torch

from truestep.calls.subject import components_of
from truestep.recording.format import bytes_of
from truestep.recording.header import digest
from truestep.replay.implementation import patched
from truestep.replay.shared_code import SETTINGS
from truestep.runtime.lent import content_of
from truestep.runtime.pipeline import MODELS, Pipeline

NOTHING = "touched nothing: no weight, buffer, class, hook, configuration or setting differs"
"""What is said of a change that left everything as it was."""

Snapshot = Mapping[str, object]
"""Place to what is there. Objects are kept, so that another one cannot be taken for them."""

_COUNTERS = ("forwards", "branches", "text_plans", "refused", "controls", "code")
"""Fields of a pipeline that a run sets itself."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def snapshot(pipe: Pipeline) -> Snapshot:
    """Everything of a pipeline, and of the process, that a change may touch."""
    return dict(_seen(pipe))


def snapshot_of(pipe: Any) -> Snapshot:
    """The same of a pipeline of a library: components, attributes, and the code of their classes.

    Args:
        pipe: An object with `components`, or any other, whose attributes count.
    """
    return dict(_held(pipe))


def touched(before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    """Places that are not what they were, sorted."""
    absent = object()
    return tuple(
        sorted(
            place
            for place in {*before, *after}
            if not _alike(before.get(place, absent), after.get(place, absent))
        )
    )


def _alike(before: object, after: object) -> bool:
    if before is after:
        return True
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        return all(map(_alike, before, after))
    simple = isinstance(before, _SIMPLE) and type(before) is type(after)
    return simple and repr(before) == repr(after)  # by its text, for NaN is not itself


def _seen(pipe: Pipeline) -> Iterator[tuple[str, object]]:
    for field in fields(pipe):
        if field.name in (*MODELS, *_COUNTERS, "settings", "scheduler", "tokenizer"):
            continue
        yield f"pipeline.{field.name}", _value(getattr(pipe, field.name))
    for key, value in pipe.settings.model_dump().items():
        yield f"settings.{key}", _value(value)
    for name in ("scheduler", "tokenizer"):
        part = getattr(pipe, name)
        yield f"{name}.class", type(part)
        for key, value in vars(part).items() if hasattr(part, "__dict__") else ():
            yield f"{name}.{key}", _value(value)
    for name in MODELS:
        model = getattr(pipe, name)
        yield f"{name}.is", model
        if isinstance(model, torch.nn.Module):
            yield from _module(name, model)
    yield "process.patched", tuple(patched(pipe))
    yield from _process()


def _process() -> Iterator[tuple[str, object]]:
    for name, (read, _) in SETTINGS.items():
        yield f"process.{name}", read()


_UNSEEN = ("_progress_bar_config",)
"""Attributes of a pipeline that change nothing that it computes."""

_DEPTH = 4
_CODE = (FunctionType, classmethod, staticmethod, property, type)


def _held(pipe: Any) -> Iterator[tuple[str, object]]:
    parts = dict(components_of(pipe) or {})
    classes: set[type] = {type(pipe)}
    yield "pipeline.class", type(pipe)
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            yield f"{name}.is", part
            yield from _module(str(name), part)
            for module in part.modules():
                classes |= {type(module), type(getattr(module, "processor", None))}
        else:
            yield from _object(str(name), part, classes)
    for key, value in vars(pipe).items() if hasattr(pipe, "__dict__") else ():
        if key not in parts and key not in _UNSEEN:
            yield from _object(f"pipeline.{key}", value, classes)
    yield from _code(classes)
    yield from _process()
    yield "process.environ", tuple(os.environ.items())


def _object(
    place: str, value: object, classes: set[type], depth: int = 0
) -> Iterator[tuple[str, object]]:
    """An object by its class and attributes; what has none is itself."""
    if hasattr(value, "to_str"):  # a tokenizer of another language keeps its words to itself
        yield place, digest(value.to_str().encode())
        return
    whole = isinstance(value, (*_SIMPLE, *_CODE, ModuleType, torch.Tensor, torch.nn.Module))
    plain = isinstance(value, Mapping | list | tuple | set | frozenset)
    if whole or plain or depth == _DEPTH or not hasattr(value, "__dict__"):
        yield place, _value(value)
        return
    classes.add(type(value))
    yield f"{place}.class", type(value)
    for key, inner in vars(value).items():
        yield from _object(f"{place}.{key}", inner, classes, depth + 1)


def _code(classes: set[type]) -> Iterator[tuple[str, object]]:
    """The code of classes, and of the modules that they are written in, as objects."""
    owners = {owner for each in classes for owner in each.__mro__[:-1]}
    homes = {owner.__module__ for owner in owners} | {"torch", "torch.nn.functional"}
    for owner in owners:
        yield from _names(f"{owner.__module__}.{owner.__qualname__}", vars(owner))
    for home in homes:
        yield from _names(home, vars(sys.modules[home]) if home in sys.modules else {})


def _names(place: str, names: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in names.items():
        if callable(value) or isinstance(value, (*_CODE, *_SIMPLE)):
            yield f"code.{place}.{key}", value


def _module(name: str, model: torch.nn.Module) -> Iterator[tuple[str, object]]:
    for fqn, module in model.named_modules(remove_duplicate=False):
        place = f"{name}.{fqn}" if fqn else name
        yield f"{place}.class", type(module)
        for kind in _HOOKS:
            yield f"{place}.{kind}", tuple(getattr(module, kind, {}).values())
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield f"{place}.{key}", None if tensor is None else _content(tensor)
        for key, value in vars(module).items():
            if not key.startswith("_") or key in ("_internal_dict", "_cache_config"):
                yield f"{place}.{key}", _value(value)
        processor = getattr(module, "processor", None)
        for key, value in vars(processor).items() if hasattr(processor, "__dict__") else ():
            yield f"{place}.processor.{key}", _value(value)


def _content(tensor: torch.Tensor) -> object:
    """Form, order in memory and bytes of a tensor; of one without bytes of its own, the tensor."""
    stored = content_of(tensor)
    if stored is not None:  # on disk
        return (type(tensor), tensor.dtype, tuple(tensor.shape), stored)
    try:
        content = digest(bytes_of(tensor.detach().to("cpu")))
    except (RuntimeError, TypeError, NotImplementedError):  # meta, quantised in a wrapper
        return tensor
    return (type(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), content)


def _value(value: object) -> object:
    """What stands for a value: its parts where it is made of simple ones, else itself."""
    if isinstance(value, torch.Tensor):
        return _content(value)
    if isinstance(value, Mapping):
        return tuple((str(key), _value(item)) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(_value(item) for item in value)
    method = getattr(value, "__func__", None)  # bound anew each time it is looked up
    return value if method is None else (method, value.__self__)  # type: ignore[attr-defined]
