"""What the modules inside of a denoiser are given and give, in chosen calls of it, and its weights.

Hooks are there while such a call runs, and no longer. What is kept has a bound: weights may take a
quarter of it, modules inside of others half, so that something of every block is there.
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from types import CodeType
from typing import Any

import torch

from truestep.calls.values import qualified
from truestep.engines.watch.request import Looked
from truestep.engines.watch.spool import CallSpool
from truestep.measure.plain import plain
from truestep.replay.lines import Line, Watch

ROOT = "(root)"
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass
class _Opened:
    """One call that is looked into.

    Attributes:
        spool: Where it goes.
        table: What is said of it; see `Inside.open`.
        thread: That it runs in.
        running: Modules that have begun, each with the number of its call.
        seen: Calls of each module.
    """

    spool: CallSpool
    table: dict[str, Any]
    thread: int = field(default_factory=threading.get_ident)
    running: list[tuple[str, int]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)


class Inside:
    """Looks into chosen calls of the denoisers of a process.

    Args:
        looked: Which calls and modules, and the most bytes a generation.
        lock: Held while something is kept.
        fail: Told of what goes wrong in here; the program goes on.
    """

    def __init__(
        self, looked: Looked, lock: threading.RLock, fail: Callable[[Exception], None]
    ) -> None:
        self._looked, self._lock, self._fail = looked, lock, fail
        self._counts: Counter[int] = Counter()
        self._weighed: set[int] = set()
        self._opened: _Opened | None = None
        self._handles: list[Any] = []
        self._watch: Watch | None = None
        self._busy = False

    def begin(self) -> None:
        """A generation begins."""
        self._counts.clear()
        self._weighed.clear()

    def open(self, model: torch.nn.Module, spool: CallSpool) -> dict[str, Any] | None:
        """Hook the parts of a model until `close`, where this call of it is to be looked into.

        Returns:
            A table that is complete then: `classes` by fqn, `sources` by class; `weights` by name,
            in the first call of a model; `modules`: fqn, number of its call, `in` or `out`, tree of
            what it was given or gave, as it happened; `operators`, where these are asked for: the
            innermost module, name, arguments, tree of results, line and code; `left`: tensors
            without room. None where the call is not looked into.
        """
        number = self._counts[id(model)]
        self._counts[id(model)] += 1
        if number not in self._looked.calls or self._opened is not None:
            return None
        modules = dict(_walk(model))
        classes = {fqn: qualified(type(module)) for fqn, module in modules.items()}
        sources = {qualified(type(each)): _source(type(each)) for each in modules.values()}
        table: dict[str, Any] = {"classes": classes, "sources": sources, "modules": [], "left": 0}
        opened = self._opened = _Opened(spool, table)
        if id(model) not in self._weighed:
            self._weighed.add(id(model))
            table["weights"] = self._weights(modules, spool)
        for fqn, module in modules.items():
            if fqn != ROOT and _hears(module) and _chosen(fqn, self._looked.select):
                before, after = self._hooks(opened, fqn)
                self._handles += [
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(after),
                ]
        if self._looked.operators and all(map(_is_open, modules.values())):
            table["operators"] = []
            self._watch = Watch(partial(self._operator, opened))
            self._watch.__enter__()  # type: ignore[no-untyped-call]
        return table

    def close(self) -> None:
        """Take the hooks off."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._opened = None
        while self._handles:
            self._handles.pop().remove()

    def _hooks(self, opened: _Opened, fqn: str) -> tuple[Callable[..., None], Callable[..., None]]:
        limit = self._looked.largest // (1 if _outermost(fqn) else 2)

        def before(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._hears(opened):
                return
            number = opened.seen[fqn]
            opened.seen[fqn] += 1
            opened.running.append((fqn, number))
            self._keep(opened, (fqn, number, "in"), {**dict(enumerate(args)), **kwargs}, limit)

        def after(_: object, _args: object, output: object) -> None:
            if not self._hears(opened):
                return
            while opened.running:  # what raised inside of it, and was caught, has no output
                name, number = opened.running.pop()
                if name == fqn:
                    self._keep(opened, (fqn, number, "out"), output, limit)
                    return

        return before, after

    def _hears(self, opened: _Opened) -> bool:
        here = opened is self._opened and opened.thread == threading.get_ident()
        return here and not torch.compiler.is_compiling()

    def _keep(self, opened: _Opened, place: tuple[str, int, str], value: Any, limit: int) -> None:
        """Note what a module is given or gives."""
        tree = self._kept(opened, value, limit)
        opened.table["modules"].append([*place, tree])

    def _operator(
        self,
        opened: _Opened,
        name: str,
        arguments: tuple[str, ...],
        outputs: list[torch.Tensor],
        line: Line,
    ) -> None:
        """Note an operator that is no work of these hooks themselves."""
        if self._busy or not self._hears(opened):
            return
        fqn = opened.running[-1][0] if opened.running else ROOT
        tree = self._kept(opened, outputs, self._looked.largest * 3 // 4)
        opened.table["operators"].append([fqn, name, list(arguments), tree, line.text, line.code])

    def _kept(self, opened: _Opened, value: Any, limit: int) -> Any:
        self._busy = True
        try:
            with self._lock:
                tree, left = opened.spool.keep_within(value, limit)
        except Exception as error:  # the program goes on, unwatched
            self._opened = None
            self._fail(error)
            return None
        finally:
            self._busy = False
        opened.table["left"] += left
        return tree

    def _weights(self, modules: Mapping[str, torch.nn.Module], spool: CallSpool) -> dict[str, Any]:
        """Parameters and buffers, layer by layer of every list, as far as there is room."""
        every = {
            f"{'' if fqn == ROOT else f'{fqn}.'}{name}": tensor
            for fqn, module in modules.items()
            for name, tensor in _tensors(module)
        }
        limit, found = self._looked.largest // 4, {}
        for name in sorted(every, key=_layer):
            with suppress(Exception):  # a shard, or packed by a library: only its class reads it
                found[name], _ = spool.keep_within(plain(every[name]), limit)
        return {name: found[name] for name in every if name in found}


def _walk(module: torch.nn.Module, fqn: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules by name, without wrappers; none inside of what runs as one compiled graph."""
    yield fqn or ROOT, module
    if not _is_open(module):
        return
    for name, child in module._modules.items():
        if child is not None:
            inner = fqn if name in _WRAPPERS else f"{fqn}.{name}".removeprefix(".")
            yield from _walk(child, inner)


def _is_open(module: torch.nn.Module) -> bool:
    """Whether a module's own code runs when it is called, and no graph."""
    whole = type(module).__name__ == "OptimizedModule" or isinstance(module, torch.jit.ScriptModule)
    return not whole and getattr(module, "_compiled_call_impl", None) is None


def _hears(module: torch.nn.Module) -> bool:
    """Whether hooks of a module run: it can be called, and its call is no graph."""
    unset: Any = torch.nn.Module.forward
    forward = getattr(type(module), "forward", unset) is not unset or "forward" in vars(module)
    return forward and _is_open(module)


def _source(kind: type) -> str:
    """File and line of a class's forward."""
    code = getattr(inspect.unwrap(getattr(kind, "forward", _source)), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if isinstance(code, CodeType) else ""


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _chosen(fqn: str, select: str) -> bool:
    """Whether globs by commas choose a name; those behind `!` leave it out."""
    globs = [part.strip() for part in select.split(",") if part.strip()]
    taken = [glob for glob in globs if not glob.startswith("!")] or ["*"]
    left = [glob[1:] for glob in globs if glob.startswith("!")]
    return any(fnmatchcase(fqn, g) for g in taken) and not any(fnmatchcase(fqn, g) for g in left)


def _outermost(fqn: str) -> bool:
    """Whether a module is directly in the model, or in a list there."""
    return sum(not part.isdecimal() for part in fqn.split(".")) == 1


def _layer(name: str) -> tuple[int, str]:
    """What is in no list first, then all first layers, all second ones."""
    number = next((int(part) for part in name.split(".") if part.isdecimal()), -1)
    return number, name
