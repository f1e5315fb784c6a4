"""Watch a process of an engine: its denoisers, schedulers and the functions that its adapter names.

Calls are written as they end (`CallSpool`). What goes wrong in here ends the watching, with a line
that says so, and never the program.
"""

from __future__ import annotations

import atexit
import builtins
import inspect
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from truestep.calls.values import qualified
from truestep.engines.engine import GENERIC, TIMES, Boundary, engine, engines, running
from truestep.engines.watch import frames
from truestep.engines.watch.described import (
    branch_of,
    config_of,
    dtype_of,
    largest_of,
    named_of,
    signature_of,
)
from truestep.engines.watch.exchanges import ORDER, Exchanges, root
from truestep.engines.watch.injection import Injection
from truestep.engines.watch.inside import Inside
from truestep.engines.watch.request import Request
from truestep.engines.watch.spool import CallSpool, environment, rank, ranks
from truestep.replay.program import say
from truestep.replay.site.waiting import when_loaded

STEP, SET_TIMESTEPS = "step", "set_timesteps"
_HELD = ("sigmas", "timesteps")
_WATCHED = "_truestep_watched"
_KINDS = {
    **dict.fromkeys(("prediction", "passes", "guided", "text", "decode"), "model"),
    "update": "scheduler",
}
"""By role of a boundary; all others are functions."""


class _Thread(threading.local):
    """What a thread is doing: whether inside a closed boundary, and the calls that are open."""

    def __init__(self) -> None:
        self.inside = 0
        self.open: list[int] = []


class Watcher:
    """Watches this process until it ends."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._engines = (engine(request.engine),) if request.engine else (*engines(), GENERIC)
        self._thread = _Thread()
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._generations = 0
        self._spool: CallSpool | None = None
        self._begun = self._stepped = 0
        self._stopped = False
        self._names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self._classes: Counter[str] = Counter()
        self._loops: set[CodeType] = set()
        self._shown: set[int] = set()
        self._sizes: dict[str, list[tuple[int, ...]]] = {}
        self._unpatch: list[Callable[[], None]] = []
        self._injection = Injection(Path(request.inject)) if request.inject else None
        self._inside = Inside(request.inside, self._lock, self._fail) if request.inside else None
        self._exchanges = Exchanges(request.inside is not None, self._begin, self._finish_inside)

    def start(self) -> None:
        """Begin; torch is loaded, the engine is not."""
        self._watch_modules()
        self._watch_classes()
        self._unpatch += self._exchanges.watch()
        for one in self._engines:
            for boundary in one.boundaries:
                when_loaded(boundary.module, partial(self._watch_function, boundary))
        if self._injection is not None:
            self._unpatch.append(self._injection.watch_noise())
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the generation that is open, and watch no more."""
        if os.getpid() != self._pid or self._stopped:
            return
        self._stopped = True
        self._end_generation()
        for undo in self._unpatch:
            undo()

    def _fail(self, error: Exception) -> None:
        self._stopped = True
        say(f"recording stopped: {type(error).__name__}: {error}")

    # what is watched

    def _watch_modules(self) -> None:
        original: Any = torch.nn.Module.__call__

        def watched(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._stopped or torch.compiler.is_compiling():
                return original(module, *args, **kwargs)
            if self._thread.inside:
                return self._part(module, original, args, kwargs)
            return self._module(module, original, args, kwargs)

        def undo() -> None:
            if torch.nn.Module.__call__ is watched:
                torch.nn.Module.__call__ = original  # type: ignore[method-assign]

        torch.nn.Module.__call__ = watched  # type: ignore[method-assign]
        self._unpatch.append(undo)

    def _watch_classes(self) -> None:
        """Schedulers are classes with `step` and `set_timesteps`: known ones, and all to come."""
        for module in list(sys.modules.values()):
            for value in list(getattr(module, "__dict__", {}).values()):
                if issubclass(type(value), type):  # `isinstance` would ask the value
                    self._watch_scheduler(value)
        original = builtins.__build_class__

        def build(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            if isinstance(made, type):
                self._watch_scheduler(made)
            return made

        def undo() -> None:
            if builtins.__build_class__ is build:
                builtins.__build_class__ = original

        builtins.__build_class__ = build
        self._unpatch.append(undo)

    def _watch_scheduler(self, cls: type) -> None:
        with suppress(Exception):  # classes of other libraries may answer anything
            if issubclass(cls, torch.nn.Module) or not hasattr(cls, SET_TIMESTEPS):
                return
            if not hasattr(cls, STEP):
                return
            for name in (STEP, SET_TIMESTEPS):
                own = vars(cls).get(name)
                if inspect.isfunction(own) and not hasattr(own, _WATCHED):
                    setattr(cls, name, self._scheduler_method(own, name))
                    self._unpatch.append(partial(setattr, cls, name, own))

    def _scheduler_method(self, method: Any, name: str) -> Any:
        signature = inspect.signature(method)

        @wraps(method)
        def watched(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if self._idle():
                return method(scheduler, *args, **kwargs)
            return self._scheduler(scheduler, name, method, signature, args, kwargs)

        setattr(watched, _WATCHED, method)
        return watched

    def _watch_function(self, boundary: Boundary) -> None:
        owner: Any = sys.modules[boundary.module]
        *way, last = boundary.path
        for part in way:
            owner = getattr(owner, part, None)
        function = owner.__dict__.get(last) if owner is not None else None
        if not callable(function) or hasattr(function, _WATCHED):
            return  # another version of the engine: its models and schedulers are watched
        signature = inspect.signature(function)

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._idle():
                return function(*args, **kwargs)
            return self._function(boundary, function, signature, args, kwargs)

        setattr(watched, _WATCHED, function)
        setattr(owner, last, watched)

    # calls

    def _idle(self) -> bool:
        return bool(self._stopped or self._thread.inside)

    def _part(self, module: Any, original: Any, args: Any, kwargs: Any) -> Any:
        call = partial(original, module, *args, **kwargs)
        return self._exchanges.module(module, call) if self._exchanges.wants(module) else call()

    def _module(self, module: Any, original: Any, args: Any, kwargs: Any) -> Any:
        frame = sys._getframe(2)
        found = frames.using(module, frame, self._loops)
        if found is not None and self._composite(*found):
            return self._part(module, original, args, kwargs)
        named = named_of(signature_of(type(module).forward), (module, *args), kwargs)
        fields = self._of_model(module, "forward")
        call = partial(original, module, *args, **kwargs)
        return self._observe(fields, named, call, within=module)

    def _of_model(self, model: torch.nn.Module, method: str) -> dict[str, Any]:
        return {
            "component": self._name(model),
            "method": method,
            "kind": "model",
            "owner": qualified(type(model)),
            "dtype": dtype_of(model),
            "context": branch_of(model),
        }

    def _composite(self, frame: FrameType, model: torch.nn.Module) -> bool:
        """Take a running function for a call of a model; its parts are inside of that."""
        fields = self._of_model(model, frames.method_of(frame, model))
        named = {k: v for k, v in frames.arguments(frame).items() if v is not model}
        begun = self._begin(fields, named)
        if begun is None:
            return False

        def over(output: Any, error: BaseException | None) -> None:
            leave()
            self._thread.inside -= 1
            self._thread.open.pop()
            if error is None:
                self._finish(begun, output)

        if not frames.when_over(frame, over):
            return False
        leave = self._enter(begun, model, named)
        self._thread.open.append(begun["begun"])
        self._thread.inside += 1
        return True

    def _scheduler(
        self, scheduler: Any, name: str, method: Any, signature: Any, args: Any, kwargs: Any
    ) -> Any:
        self._note_loop(sys._getframe(2))
        if name == SET_TIMESTEPS and self._stepped and not self._thread.open:
            self._end_generation()
        fields = {
            "component": self._name(scheduler),
            "method": name,
            "kind": "scheduler",
            "owner": qualified(type(scheduler)),
            "dtype": "",
            "context": None,
        }
        named = named_of(signature, (scheduler, *args), kwargs)

        def call() -> Any:
            output = method(scheduler, *args, **kwargs)
            if name == SET_TIMESTEPS and self._injection is not None:
                self._injection.schedule(scheduler)
            return output

        def also() -> dict[str, Any]:
            first = name == SET_TIMESTEPS or id(scheduler) not in self._shown
            if not first or self._spool is None:
                return {}
            self._shown.add(id(scheduler))
            held = {k: getattr(scheduler, k, None) for k in _HELD}
            state = {k: self._spool.keep(v) for k, v in held.items() if v is not None}
            return {"state": state, "config": config_of(scheduler)}

        output = self._observe(fields, named, call, also=also)
        self._stepped += name == STEP
        return output

    def _function(
        self, boundary: Boundary, function: Any, signature: Any, args: Any, kwargs: Any
    ) -> Any:
        first = boundary.role in ("generation", "run", "noise")  # of what a generation begins with
        if first and self._stepped and not self._thread.open:
            self._end_generation()
        *owner, method = boundary.path
        component = ".".join(owner) or boundary.module.rpartition(".")[2]
        if boundary.role == "update":
            component, method = self._of_size(component, (*args, *kwargs.values())), STEP
        fields = {
            "component": component,
            "method": method,
            "kind": _KINDS.get(boundary.role, "function"),
            "owner": boundary.module,
            "dtype": "",
            "context": None,
            "role": boundary.role,
            "branches": list(boundary.branches),
        }
        named = named_of(signature, args, kwargs)

        def call() -> Any:
            output = function(*args, **kwargs)
            if self._injection is not None:
                output = self._injection.given(boundary, output)
            return output

        within = largest_of(named.values()) if boundary.role == "prediction" else None
        try:
            return self._observe(fields, named, call, opened=boundary.open, within=within)
        finally:
            self._stepped += boundary.role in ("run", "update")
            if boundary.role == "generation" and not self._thread.open:
                self._end_generation()

    def _of_size(self, component: str, values: Iterable[Any]) -> str:
        """Name of what steps a latent of one size: one stepper may step video and sound."""
        sizes = (tuple(value.shape) for value in values if torch.is_tensor(value))
        known = self._sizes.setdefault(component, [])
        size = next(sizes, ())
        if size not in known:
            known.append(size)
        number = known.index(size)
        return f"{component}~{number}" if number else component

    def _observe(
        self,
        fields: dict[str, Any],
        named: Mapping[str, Any],
        call: Callable[[], Any],
        *,
        also: Callable[[], dict[str, Any]] = dict,
        opened: bool = False,
        within: torch.nn.Module | None = None,
    ) -> Any:
        begun = self._begin(fields, named)
        if begun is None:
            return call()
        thread = self._thread
        thread.open.append(begun["begun"])
        thread.inside += not opened
        leave = self._enter(begun, within, named)
        try:
            output = call()
        finally:
            leave()
            thread.inside -= not opened
            thread.open.pop()
        self._finish(begun, output, also)
        return output

    def _enter(
        self, begun: dict[str, Any], model: torch.nn.Module | None, named: Mapping[str, Any]
    ) -> Callable[[], None]:
        """Look into a call of a model, where that is asked for; returns what ends the look."""
        running = None if model is None else root(begun["begun"], begun["component"], model)
        before = self._exchanges.enter(running)
        if model is not None:
            self._look(begun, model, named)

        def leave() -> None:
            self._exchanges.enter(before)
            if self._inside is not None and "inside" in begun:
                try:
                    self._inside.close()
                except Exception as error:  # the program goes on, unwatched
                    self._fail(error)

        return leave

    def _look(
        self, begun: dict[str, Any], model: torch.nn.Module, named: Mapping[str, Any]
    ) -> None:
        """Look into a denoiser, which is given a time; of several ranks all is kept already."""
        if self._inside is None or ranks() > 1:
            return
        own = (name.partition("/")[0] for one in self._engines for name in one.timestep)
        times = {*TIMES, *own}
        with self._lock:
            if self._spool is None or not times & named.keys():
                return
            try:
                table = self._inside.open(model, self._spool)
                begun |= {} if table is None else {"inside": table}
            except Exception as error:  # likewise
                self._fail(error)
                with suppress(Exception):
                    self._inside.close()

    def _begin(
        self, fields: dict[str, Any], named: Mapping[str, Any], whole: bool = True
    ) -> dict[str, Any] | None:
        """What is kept of a call before it is made; None where that failed."""
        if self._stopped:
            return None
        with self._lock:
            try:
                spool = self._open()
                self._begun += 1
                arguments = {name: spool.keep(v, whole=whole) for name, v in named.items()}
                parameters = [name for name in named if not name.startswith("*")]
                return {
                    **fields,
                    "begun": self._begun,
                    "thread": threading.get_ident(),
                    "parameters": parameters,
                    "arguments": arguments,
                }
            except Exception as error:  # the program goes on, unwatched
                self._fail(error)
                return None

    def _finish(
        self,
        begun: dict[str, Any],
        output: Any,
        also: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        with self._lock:
            if self._spool is None or self._stopped:
                return
            try:
                self._spool.add({**begun, "output": self._spool.keep(output), **also()})
            except Exception as error:  # likewise
                self._fail(error)

    def _finish_inside(self, begun: dict[str, Any], output: Any, whole: bool) -> None:
        with self._lock:
            if self._spool is None or self._stopped:
                return
            try:
                call = {**begun, "output": self._spool.keep(output, whole=whole)}
                order = {"list": [begun["begun"], self._begun]}
                call["arguments"] = {**begun["arguments"], ORDER: order}
                (self._spool.add if whole else self._spool.note)(call)
            except Exception as error:  # likewise
                self._fail(error)

    def _open(self) -> CallSpool:
        if self._spool is None or os.getpid() != self._pid:
            self._pid = os.getpid()  # a process that was forked has its own spool
            self._generations += 1
            seen = [one.name for one in running(sys.modules.keys(), self._engines)]
            head = {
                "engine": self._request.engine or ", ".join(seen) or GENERIC.name,
                "program": sys.argv,
                "command": list(self._request.command),
                "rank": rank(),
                "ranks": ranks(),
                "environment": environment(),
            }
            self._spool = CallSpool(
                Path(self._request.output),
                self._generations,
                head,
                largest=self._request.largest,
            )
        return self._spool

    def _end_generation(self) -> None:
        with self._lock:
            spool, self._spool = self._spool, None
            self._begun = self._stepped = 0
            self._shown.clear()
            if self._inside is not None:
                self._inside.begin()
            used = dict(self._injection.used) if self._injection else {}
            if self._injection is not None:
                self._injection.begin()
            if spool is not None:
                try:
                    spool.end(used)
                except OSError as error:
                    self._fail(error)

    def _note_loop(self, frame: FrameType | None) -> None:
        while frame is not None:
            self._loops.add(frame.f_code)
            frame = frame.f_back

    def _name(self, thing: Any) -> str:
        if thing not in self._names:
            cls = type(thing).__name__
            self._classes[cls] += 1
            number = self._classes[cls]
            self._names[thing] = cls if number == 1 else f"{cls}_{number}"
        return self._names[thing]
