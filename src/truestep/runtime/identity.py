"""What the numbers of a run depend on, as text that tells one run from another."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from truestep.files import sha256_of
from truestep.measure.plain import inside, is_wrapped
from truestep.recording.format import bytes_of
from truestep.runtime import lent
from truestep.runtime.loading import fingerprint


def weights_of(parts: Mapping[str, Any]) -> dict[str, str]:
    """Modules by name, each as a digest of its classes and of every weight and buffer."""
    return {
        f"weights.{name}": _weights(part)
        for name, part in parts.items()
        if isinstance(part, torch.nn.Module)
    }


def device_of(parts: Mapping[str, Any]) -> str:
    """Where modules compute: where the first weights are that do not wait on the CPU."""
    modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    places = (weight.device for module in modules for weight in module.parameters())
    return next((str(place) for place in places if place.type not in ("cpu", "meta")), "cpu")


def _weights(model: torch.nn.Module) -> str:
    total = xxhash.xxh3_128()
    for fqn, module in model.named_modules():
        total.update(f"{fqn} {type(module).__module__}.{type(module).__qualname__}\n".encode())
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                kind = (key, tensor.dtype, tuple(tensor.shape), tensor.device.type)
                total.update(repr(kind).encode())
                total.update(_content(tensor))
    return total.hexdigest()[:16]


def _content(tensor: torch.Tensor) -> bytes | memoryview:
    """Bytes of a weight; of one that is not in memory, what says where it is."""
    stored = lent.content_of(tensor)
    if stored is not None:
        return repr(stored).encode()
    parts = inside(tensor)
    if is_wrapped(tensor):
        named = sorted((parts or {}).items())
        kind = [type(tensor).__qualname__.encode()]
        return b" ".join([*kind, *(name.encode() + _content(part) for name, part in named)])
    try:
        return bytes_of(tensor.detach().to("cpu"))
    except (RuntimeError, TypeError, NotImplementedError):  # meta
        return type(tensor).__qualname__.encode()


def source_of(function: Callable[..., Any] | None) -> dict[str, str]:
    """A change by its name and the content of the file that it is written in.

    One without a file is like no other, not even itself: nobody can say that it is the same.
    """
    if function is None:
        return {}
    inner: Any = function
    bound: list[object] = []
    while isinstance(inner, partial):
        bound += [inner.args, sorted(inner.keywords.items())]
        inner = inner.func
    code = inner if inspect.isroutine(inner) or isinstance(inner, type) else type(inner)
    name = getattr(code, "__qualname__", repr(code))
    try:
        content = sha256_of(Path(inspect.getfile(code)))[:16]
    except (OSError, TypeError):
        content = f"without a file, {secrets.token_hex(8)}"
    bound += [cell.cell_contents for cell in getattr(code, "__closure__", None) or ()]
    held = [getattr(value, "__qualname__", repr(value)) for value in bound]
    return {"apply": " ".join([name, *held, content])}


def content_of(values: Mapping[str, Any], place: str) -> dict[str, str]:
    """Values by dotted key, those that name a file or a folder with what is in it."""
    return dict(_flat(values, place))


def _flat(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}")
        return
    yield place, repr(value)
    if not isinstance(value, str) or not value or "prompt" in place:
        return
    try:
        path = Path(value).expanduser()
        if path.is_file():
            yield f"{place} (file)", sha256_of(path)[:16]
        elif path.is_dir():
            yield f"{place} (folder)", fingerprint(path)
    except (OSError, ValueError, RuntimeError):  # no path, or of no user's home
        return
