"""What a change under test touched: weights, buffers, classes, hooks, configuration, settings.

A change that touched nothing is no evidence: an adapter whose names fit no weight, an option that
nobody reads. Functions and classes are compared as objects, weights by a digest of their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

import torch

from truestep.recording.format import bytes_of
from truestep.recording.header import digest
from truestep.replay.implementation import patched
from truestep.runtime.pipeline import MODELS, Pipeline

NOTHING = "touched nothing: no weight, buffer, class, hook, configuration or setting differs"
"""What is said of a change that left everything as it was."""

Snapshot = Mapping[str, object]
"""Place to what is there. Objects are kept, so that another one cannot be taken for them."""

_COUNTERS = ("forwards", "branches", "text_plans", "refused", "controls")
"""Fields of a pipeline that a run sets itself."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def snapshot(pipe: Pipeline) -> Snapshot:
    """Everything of a pipeline, and of the process, that a change may touch."""
    return dict(_seen(pipe))


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
    yield "process.threads", torch.get_num_threads()
    yield "process.matmul", torch.get_float32_matmul_precision()
    yield "process.deterministic", torch.are_deterministic_algorithms_enabled()
    yield "process.dtype", torch.get_default_dtype()
    backends = torch.backends.cuda
    for kernel in ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp"):
        yield f"process.{kernel}", getattr(backends, f"{kernel}_enabled")()


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
    """Form and bytes of a tensor; of one that has no bytes of its own, the tensor."""
    try:
        content = digest(bytes_of(tensor.detach().to("cpu")))
    except (RuntimeError, TypeError, NotImplementedError):  # meta, quantised in a wrapper
        return tensor
    return (type(tensor), tensor.dtype, tuple(tensor.shape), content)


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
