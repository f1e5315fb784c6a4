"""What a change replaced of the code and settings that the whole process shares.

A patched class or library function (`WanAttnProcessor.__call__`, `torch.nn.functional.gelu`) is the
trusted model's, too, wherever both sides run in one process. What a change replaced is therefore
put back as soon as it has been applied, and is on only while the candidate runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

import torch

from truestep.calls.subject import components_of
from truestep.runtime.applying import Apply, apply_change
from truestep.runtime.pipeline import MODELS, Pipeline

_ABSENT = object()
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_CODE = (classmethod, staticmethod, property, type)

_OF_TORCH = ("torch", "torch.nn.functional", "torch.nn.modules.")
"""Of torch, the modules that are looked at: what models call by name."""

_KERNELS = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")

SETTINGS: Mapping[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "matmul": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "dtype": (torch.get_default_dtype, torch.set_default_dtype),
    **{
        kernel: (
            getattr(torch.backends.cuda, f"{kernel}_enabled"),
            getattr(torch.backends.cuda, f"enable_{kernel}"),
        )
        for kernel in _KERNELS
    },
}
"""Settings of torch for the whole process: how each is read and set."""


@dataclass(frozen=True, eq=False)
class Place:
    """A name that a class or a Python module has.

    Attributes:
        owner: The class or module.
        name: The attribute.
    """

    owner: Any
    name: str

    def __str__(self) -> str:
        if isinstance(self.owner, ModuleType):
            return f"{self.owner.__name__}.{self.name}"
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"

    @property
    def value(self) -> object:
        """What is there; `_ABSENT` where nothing is."""
        return vars(self.owner).get(self.name, _ABSENT)

    def put(self, value: object) -> None:
        """Have it there."""
        if value is not _ABSENT:
            setattr(self.owner, self.name, value)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)


@dataclass
class Shared:
    """What one change replaced for the whole process.

    Attributes:
        code: Each place, with what the change put there.
        settings: Each of `SETTINGS` that it changed, with its value.
    """

    code: dict[Place, object] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """What was replaced, sorted."""
        settings = (f"torch's {name}" for name in self.settings)
        return (*sorted(map(str, self.code)), *sorted(settings))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Have it as the change left it, until the block ends."""
        code = {place: place.value for place in self.code}
        settings = {name: SETTINGS[name][0]() for name in self.settings}
        try:
            _put(self.code, self.settings)
            yield
        finally:
            _put(code, settings)


@contextmanager
def taken_back(pipe: Any) -> Iterator[Shared]:
    """Put back at the end what the block replaced for the whole process, whatever it raises.

    Args:
        pipe: A pipeline of any kind: what its parts are made of is looked at, and torch.

    Yields:
        What was replaced; filled when the block has ended.
    """
    shared = Shared()
    owners = [(owner, dict(vars(owner))) for owner in _owners(pipe)]
    settings = {name: read() for name, (read, _) in SETTINGS.items()}
    try:
        yield shared
    finally:
        code = {place: before for owner, kept in owners for place, before in _other(owner, kept)}
        shared.code |= {place: place.value for place in code}
        other = {k: v for k, v in settings.items() if SETTINGS[k][0]() != v}
        shared.settings |= {name: SETTINGS[name][0]() for name in other}
        _put(code, other)


def changed_alone(pipe: Pipeline, change: Apply | None) -> Pipeline:
    """A pipeline of truestep's stages as a change makes it, and nothing else of the process.

    Raises:
        UsageError, ProcessEndedError: As `apply_change` does.
    """
    if change is None:
        return pipe
    with taken_back(pipe) as shared:
        pipe = apply_change(pipe, change)
    pipe.code = shared.on
    return pipe


def _put(code: Mapping[Place, object], settings: Mapping[str, Any]) -> None:
    for place, value in code.items():
        place.put(value)
    for name, value in settings.items():
        SETTINGS[name][1](value)


def _other(owner: Any, kept: Mapping[str, object]) -> Iterator[tuple[Place, object]]:
    """Places of an owner that are not what they were, with what they were.

    A name that a module has got is left alone: an import puts those of submodules there.
    """
    now = vars(owner)
    for name, before in kept.items():
        value = now.get(name, _ABSENT)
        alike = isinstance(value, _SIMPLE) and type(value) is type(before) and value == before
        if value is not before and not alike and any(map(_is_code, (before, value))):
            yield Place(owner, name), before
    if isinstance(owner, type):
        added = [name for name, value in now.items() if name not in kept and _is_code(value)]
        yield from ((Place(owner, name), _ABSENT) for name in added)


def _is_code(value: object) -> bool:
    return callable(value) or isinstance(value, (*_CODE, *_SIMPLE))


def _owners(pipe: Any) -> Iterator[Any]:
    """Classes and Python modules of the libraries that a pipeline is made of, and of torch."""
    classes = {owner for part in _parts(pipe) for owner in type(part).__mro__[:-1]}
    packages = {owner.__module__.partition(".")[0] for owner in classes} - {"torch"}
    for name, module in list(sys.modules.items()):
        of_torch = name in _OF_TORCH or name.startswith(_OF_TORCH[-1])
        if not isinstance(module, ModuleType):
            continue
        if of_torch or name.partition(".")[0] in packages:
            yield module
            values = list(vars(module).values())
            classes |= {v for v in values if isinstance(v, type) and v.__module__ == name}
    yield from {*classes, torch.Tensor}


def _parts(pipe: Any) -> Iterator[Any]:
    """A pipeline, its components, and all that models of it are made of."""
    yield pipe
    parts = components_of(pipe) or {name: getattr(pipe, name, None) for name in MODELS}
    for part in parts.values():
        yield part
        for module in part.modules() if isinstance(part, torch.nn.Module) else ():
            yield from (module, getattr(module, "processor", None))
