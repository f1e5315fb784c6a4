"""Stubs for private dependencies of an official implementation, used for its import only.

A stub stands where a module cannot be installed. It refuses to cover a module that can, and its
use is part of the evidence.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import Any

from truestep.errors import UsageError

_used: list[str] = []
_installed: list[stub] = []
_libraries: list[Any] = []
"""torch unregisters an operator when its library object dies; these keep the stubs' alive."""


class stub:  # noqa: N801  reads as the statement it is: with stub("flash_attn", ...)
    """Install a stub module while official code is imported.

    ::

        with stub("flash_attn", "flash_attn_func", ops={"flash_attn::fwd(Tensor q) -> Tensor": f}):
            Model = FAMILY.official_class("wan.modules.model:WanModel")

    Args:
        name: Module; submodules by dotted name, whose parents are made too.
        placeholders: Attributes that may be imported, and raise when they are called.
        ops: torch operators to register, by schema; an operator that exists is kept. They stay
            registered after the block, since the imported code calls them through `torch.ops`.
        attributes: Attributes with a value.

    Raises:
        UsageError: On entry, if the real module can be imported.
    """

    def __init__(
        self,
        name: str,
        *placeholders: str,
        ops: Mapping[str, Callable[..., Any]] | None = None,
        **attributes: Any,
    ) -> None:
        self.name, self._ops = name, dict(ops or {})
        self._attributes = {key: _placeholder(f"{name}.{key}") for key in placeholders}
        self._attributes |= attributes
        self._made: dict[str, ModuleType] = {}

    def __enter__(self) -> ModuleType:
        self.install()
        return self._made[self.name]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def install(self) -> None:
        """Put the stub in place until `remove`, or the end of the parity test.

        Raises:
            UsageError: The real module can be imported.
        """
        _refuse_real(self.name)
        parts = self.name.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name in sys.modules:
                continue
            module = ModuleType(name, "A stub: the real module is not installed.")
            module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
            module.__path__ = []
            module.__truestep_stub__ = True  # type: ignore[attr-defined]
            sys.modules[name] = self._made[name] = module
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
        self._made.setdefault(self.name, sys.modules[self.name])
        for key, value in self._attributes.items():
            setattr(sys.modules[self.name], key, value)
        for schema, function in self._ops.items():
            _register(schema, function)
        _installed.append(self)
        _used.append(self.name)

    def remove(self) -> None:
        """Take the stub out again; registered operators stay."""
        for name, module in self._made.items():
            if sys.modules.get(name) is module and hasattr(module, "__truestep_stub__"):
                del sys.modules[name]
        self._made.clear()
        if self in _installed:
            _installed.remove(self)


def take_used() -> tuple[str, ...]:
    """Names of the stubs used since the last call; those still installed are removed."""
    for left in list(_installed):
        left.remove()
    names = tuple(dict.fromkeys(_used))
    _used.clear()
    return names


def _refuse_real(name: str) -> None:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:end]))
        if module is not None and hasattr(module, "__truestep_stub__"):
            return
        try:
            if importlib.util.find_spec(".".join(parts[:end])) is None:
                return
        except (ModuleNotFoundError, ValueError):
            return
    raise UsageError(
        f"{name} is installed, so it must not be stubbed",
        likely="the real dependency has arrived since the stub was written",
        hint=f"delete stub({name!r}, ...) from the parity test",
    )


def _placeholder(label: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{label} is a stub: it lets the official code be imported, not computed with"
        )

    call.__name__ = call.__qualname__ = label.rpartition(".")[2]
    return call


def _register(schema: str, function: Callable[..., Any]) -> None:
    import torch

    qualified, paren, rest = schema.partition("(")
    namespace, colons, operator = qualified.partition("::")
    if not (paren and colons and operator):
        raise UsageError(
            f"{schema!r} is no operator schema",
            hint="write it as namespace::operator(Tensor q) -> Tensor",
        )
    if hasattr(getattr(torch.ops, namespace), operator.partition(".")[0]):
        return
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(f"{operator}({rest}")
    library.impl(operator, function, "CompositeExplicitAutograd")
    _libraries.append(library)
