"""Operators as they are called: name, arguments that are no tensors, results, and the line of code.

Nothing here needs more than torch: engines have environments of their own.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import FrameSummary
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from truestep.nests import leaves

Tensor = torch.Tensor
Place = tuple[str, int]
"""A file relative to the current folder, and a line of it."""


class Line(NamedTuple):
    """A line of code.

    Attributes:
        text: `file:line`, as a person would name the file.
        code: That line.
        place: File and number, where the file is the user's; see `_below`.
    """

    text: str
    code: str
    place: Place | None


Told = Callable[[str, tuple[str, ...], list[Tensor], Line], None]
"""Given an operator's name, arguments that are no tensors, results, and the line that calls it."""

_TORCH = str(Path(torch.__file__).parent)
_MOVING = ("accelerate/utils/", "hooks/layerwise_casting.py", "hooks/group_offloading.py")
"""Files whose operators bring weights to where they are used, and are none of the model."""

_HOOKS = ("/accelerate/hooks.py", "/diffusers/hooks/hooks.py")
"""Files whose code calls a module's forward for it."""

_LENDING = tuple(f"runtime/{name}.py" for name in ("buffers", "lent", "reached", "weight"))
_ROOMS = ("calls", "replay", "engines/watch", *_LENDING)
_OWN = tuple(str(Path(__file__).parent.parent / room) for room in _ROOMS)
_UNSEEN = {
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
"""Operators without a result of their own: views, and memory that was not filled yet."""


class Watch(TorchDispatchMode):
    """Tells of every operator that gives something of its own."""

    def __init__(self, told: Told) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._told = told

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False) or func in _UNSEEN:
            return output
        line = _calling()
        if not any(part in line.text for part in _MOVING):
            outputs = [t.detach() for _, t in leaves(output, "out") if not t.is_meta]
            self._told(str(func), _plain(func, args, kwargs), outputs, line)
        return output


def _plain(func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[str, ...]:
    """Arguments that are numbers, words, dtypes or lists of them; with names from the schema."""
    names = [argument.name for argument in func._schema.arguments]
    told = [
        *((names[i] if i < len(names) else "", value) for i, value in enumerate(args)),
        *(kwargs or {}).items(),
    ]
    return tuple(
        f"{name} = {value!r}" if name else repr(value) for name, value in told if _simple(value)
    )


def _simple(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_simple(part) for part in value)
    return isinstance(value, bool | int | float | str | torch.dtype)


def _calling() -> Line:
    """The line of the nearest frame outside torch and this module."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if not _passed_by(frame.f_code.co_filename):
            return _line(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return Line("?", "", None)


def raising_line(frames: Sequence[FrameSummary]) -> Line | None:
    """The line nearest to where an error was raised, outside torch and this module."""
    for frame in reversed(frames):
        if not _passed_by(frame.filename) and frame.lineno is not None:
            return _line(frame.filename, frame.lineno)
    return None


def _passed_by(file: str) -> bool:
    return file.startswith((_TORCH, *_OWN, "<")) or file.endswith(_HOOKS)


def _line(file: str, number: int) -> Line:
    import linecache

    code = linecache.getline(file, number).strip()
    return Line(f"{_shown(file)}:{number}", code, _below(file, number))


def _below(file: str, number: int) -> Place | None:
    """The line as a place in the current folder; None where it is of a library, or elsewhere."""
    purelib, here = (os.path.join(p, "") for p in (sysconfig.get_paths()["purelib"], os.getcwd()))
    file = os.path.abspath(file)
    if file.startswith(purelib) or not file.startswith(here):
        return None
    return file[len(here) :].replace(os.sep, "/"), number


def _shown(file: str) -> str:
    """A path as a person would name it: from site-packages or the current folder on."""
    for root in (sysconfig.get_paths()["purelib"], str(Path.cwd())):
        if file.startswith(root):
            return file[len(root) :].lstrip("/")
    return Path(file).name
