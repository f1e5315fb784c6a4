"""What ranks exchange, and on each the modules inside of models' calls, where these are asked for.

Collectives are those of `torch.distributed` and its functional ones. Of each the kind, the ranks,
the shapes and the line that calls it are kept; what was exchanged only where modules are asked for.
Of a process that is alone no module is kept here: see `inside`.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from truestep.engines.watch.spool import ranks

PART, COLLECTIVE = "part", "collective"
"""Kinds of these calls."""

ORDER = "order"
"""Argument that says how many calls had begun when this one began, and when it was over."""

DISTRIBUTED = "torch.distributed"
_FUNCTIONAL = "torch.distributed._functional_collectives"
_TORCH = str(Path(torch.__file__).parent)
_OWN = str(Path(__file__).parent)
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "module"})
"""Names that wrappers of a model put into the names of its modules."""

GIVEN_AND_MADE: Mapping[str, tuple[str, str]] = {
    "all_reduce": ("tensor", "tensor"),
    "reduce": ("tensor", "tensor"),
    "broadcast": ("tensor", "tensor"),
    "all_gather": ("tensor", "tensor_list"),
    "all_gather_into_tensor": ("input_tensor", "output_tensor"),
    "all_to_all": ("input_tensor_list", "output_tensor_list"),
    "all_to_all_single": ("input", "output"),
    "reduce_scatter": ("input_list", "output"),
    "reduce_scatter_tensor": ("input", "output"),
    "gather": ("tensor", "gather_list"),
    "scatter": ("scatter_list", "tensor"),
    "send": ("tensor", ""),
    "isend": ("tensor", ""),
    "recv": ("", "tensor"),
    "irecv": ("", "tensor"),
}
"""Functions of `torch.distributed`: which argument is given, and which is written to."""

RETURNING = (
    "all_reduce",
    "broadcast",
    "all_gather_single",
    "all_gather_single_autograd",
    "all_gather_tensor",
    "all_gather_tensor_autograd",
    "reduce_scatter_single",
    "reduce_scatter_single_autograd",
    "reduce_scatter_tensor",
    "reduce_scatter_tensor_autograd",
    "all_to_all_single",
    "all_to_all_single_autograd",
    "permute_tensor",
)
"""Functional ones: they are given `self`, and return what is made."""


@dataclass(frozen=True)
class Root:
    """The model's call that is running.

    Attributes:
        begun: Its number.
        component: The model's name.
        names: Of its modules, by their identity.
    """

    begun: int
    component: str
    names: Mapping[int, str]


def root(begun: int, component: str, model: torch.nn.Module) -> Root:
    """A model's call, with the names of its modules."""
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    return Root(begun, component, names)


def plain_name(name: str) -> str:
    """The name of a module without those of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.root: Root | None = None
        self.modules: list[str] = []
        self.exchanging = False


Begin = Callable[[dict[str, Any], Mapping[str, Any], bool], dict[str, Any] | None]
"""Keeps what a call is given; the last argument: with its content."""

Finish = Callable[[dict[str, Any], Any, bool], None]

_End = Callable[[Any, Mapping[str, Any], Callable[[Any], None]], None]


class Exchanges:
    """Modules and collectives of the running calls of models.

    Args:
        modules: Whether modules are kept, and what collectives exchange, where several ranks run.
        begin: Keeps what a call is given, and returns what is known of it.
        finish: Keeps what it gave.
    """

    def __init__(self, modules: bool, begin: Begin, finish: Finish) -> None:
        self._asked = modules
        self._begin, self._finish = begin, finish
        self._thread = _Thread()
        self._pending: dict[int, tuple[Any, Callable[[], None]]] = {}

    @property
    def modules(self) -> bool:
        """Whether modules are kept, as it is now."""
        return self._asked and ranks() > 1

    def enter(self, running: Root | None) -> Root | None:
        """Say which call of a model runs; returns the one that ran before."""
        before, self._thread.root = self._thread.root, running
        return before

    def wants(self, module: torch.nn.Module) -> bool:
        """Whether a call of a module is kept: one inside of a running model."""
        running = self._thread.root
        return running is not None and bool(running.names.get(id(module))) and self.modules

    def module(self, module: torch.nn.Module, call: Callable[[], Any]) -> Any:
        """Make a module's call, and keep what it gave."""
        running = self._thread.root
        name = running.names[id(module)] if running else ""
        fields = {
            "component": f"{running.component if running else ''}.{name}",
            "method": "forward",
            "kind": PART,
            "owner": f"{type(module).__module__}.{type(module).__qualname__}",
        }
        named = {"name": name, "inside": running.begun if running else 0}
        begun = self._begin(fields, named, True)
        self._thread.modules.append(name)
        try:
            output = call()
        finally:
            self._thread.modules.pop()
        if begun is not None:
            self._finish(begun, output, True)
        return output

    def watch(self) -> list[Callable[[], None]]:
        """Watch the collectives of this process; returns what undoes it."""
        if not torch.distributed.is_available():
            return []
        import torch.distributed.distributed_c10d as core

        undo = [
            self._replace((core, torch.distributed), name, self._writing(name, *which))
            for name, which in GIVEN_AND_MADE.items()
        ]
        functional = sys.modules.get(_FUNCTIONAL) or __import__(_FUNCTIONAL, fromlist=["_"])
        undo += [self._replace((functional,), name, self._returning(name)) for name in RETURNING]
        return [*undo, self._watch_waiting(core)]

    def _replace(
        self, owners: tuple[Any, ...], name: str, around: Callable[[Any], Any]
    ) -> Callable[[], None]:
        original = getattr(owners[0], name, None)
        if not callable(original):
            return lambda: None
        watched = around(original)
        for owner in owners:
            setattr(owner, name, watched)

        def undo() -> None:
            for owner in owners:
                if getattr(owner, name, None) is watched:
                    setattr(owner, name, original)

        return undo

    def _writing(self, name: str, given: str, made: str) -> Callable[[Any], Any]:
        """Around a collective that writes into one of its arguments, at once or when awaited."""

        def end(work: Any, values: Mapping[str, Any], over: Callable[[Any], None]) -> None:
            if hasattr(work, "wait"):
                self._pending[id(work)] = (work, lambda: over(values.get(made)))
            else:
                over(values.get(made))

        return self._around(name, given, end)

    def _returning(self, name: str) -> Callable[[Any], Any]:
        """Around a collective that returns what it made, or something to wait for it."""

        def end(output: Any, _: Mapping[str, Any], over: Callable[[Any], None]) -> None:
            over(output.wait() if hasattr(output, "wait") else output)

        return self._around(name, "self", end)

    def _around(self, name: str, given: str, end: _End) -> Callable[[Any], Any]:
        """Keep what a collective is given, and let `end` tell what it made.

        Args:
            name: The function.
            given: Its argument that holds what is exchanged.
            end: Told what it returned, its arguments, and whom to give what it made.
        """

        def around(original: Any) -> Any:
            signature = inspect.signature(original)

            @wraps(original)
            def watched(*args: Any, **kwargs: Any) -> Any:
                if self._thread.exchanging or torch.compiler.is_compiling():
                    return original(*args, **kwargs)
                values = _bound(signature, args, kwargs)
                fields = self._said(name, values, values.get("group"))
                whole = self.modules
                begun = self._begin(fields, self._named(fields, values.get(given)), whole)
                output = self._outermost(original, args, kwargs)
                if begun is not None:
                    end(output, values, lambda made: self._finish(begun, made, whole))
                return output

            return watched

        return around

    def _outermost(self, original: Any, args: Any, kwargs: Any) -> Any:
        self._thread.exchanging = True
        try:
            return original(*args, **kwargs)
        finally:
            self._thread.exchanging = False

    def _watch_waiting(self, core: Any) -> Callable[[], None]:
        """What an asynchronous collective wrote is there when it has been waited for."""
        work: Any = core.Work
        original = work.wait

        def wait(one: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(one, *args, **kwargs)
            held = self._pending.pop(id(one), None)
            if held is not None:
                held[1]()
            return result

        def undo() -> None:
            if work.wait is wait:
                work.wait = original

        work.wait = wait
        return undo

    def _said(self, name: str, values: Mapping[str, Any], group: Any) -> dict[str, Any]:
        """What is known of a collective beside its tensors, under `said`."""
        running = self._thread.root
        said: dict[str, Any] = {
            "ranks": ranks_of(group),
            "line": _line(sys._getframe(2)),
            "module": self._thread.modules[-1] if self._thread.modules else "",
            "inside": running.begun if running else 0,
        }
        for peer in ("src", "dst", "group_src", "group_dst", "tag"):
            if type(values.get(peer)) is int:
                said[peer] = values[peer]
        for named in ("op", "reduceOp"):
            if named in values:
                said["op"] = str(values[named]).rpartition(".")[2].lower()
        return {
            "component": DISTRIBUTED,
            "method": name,
            "kind": COLLECTIVE,
            "owner": DISTRIBUTED,
            "said": said,
        }

    def _named(self, fields: dict[str, Any], given: Any) -> dict[str, Any]:
        return {"given": given, **fields.pop("said")}


def _bound(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # the function itself will say so
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def ranks_of(group: Any) -> list[int]:
    """Ranks of a group in its own order; empty where that cannot be told."""
    core = sys.modules.get("torch.distributed.distributed_c10d")
    if core is None or not core.is_initialized():
        return []
    try:
        if isinstance(group, list | tuple) and all(type(rank) is int for rank in group):
            return list(group)
        if isinstance(group, tuple):
            group = group[0].get_group(group[1])
        if isinstance(group, str):
            group = core._resolve_process_group(group)
        if hasattr(group, "get_group"):
            group = group.get_group()
        return list(core.get_process_group_ranks(group))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _line(frame: FrameType | None) -> str:
    """File and line of the nearest caller that is neither torch nor the watching."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not (_is_within(file) or file.startswith("<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@cache
def _is_within(file: str) -> bool:
    return file.startswith((_TORCH, _OWN))
