"""Trace a program that cannot be edited.

`python -m truestep.replay.program run.py ARGUMENTS` runs a script with tracing on; any other way
of starting Python does the same with the folder `truestep/replay/site` on PYTHONPATH. Both read
the environment variable TRUESTEP_TRACE: globs on module names, then settings::

    TRUESTEP_TRACE="blocks.*;class=WanTransformer3DModel;output=t.safetensors;steps=0,5"

=========  ================================================  =========================
setting    what                                              default
=========  ================================================  =========================
`class`    glob on the class name of the model               any model that is called
`every`    `1`: all models of that class, not only the first  `1` without a class
`output`   the trace                                          `trace.safetensors`
`level`    `stats`, `sketch` or `full`                        `stats`
`steps`    numbers by commas                                  all
`inputs`   `1`: inputs, too                                   `0`
`ops`      globs: operators inside these modules, too         none
=========  ================================================  =========================

A model is hooked when it is first called from outside of any other. With several models each name
begins with the class (`T5EncoderModel.encoder.block.0`; the second of a class, `..._2`). The trace
is closed when the program ends, and a program that is killed leaves a spool for
`truestep trace recover`. Processes of torchrun write `t.rank1.safetensors` and so on.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truestep.errors import TruestepError, UsageError
from truestep.replay.site.waiting import when_loaded
from truestep.text import visible

if TYPE_CHECKING:
    import torch

    from truestep.recording.spool import Spool
    from truestep.replay.tracer import Tracer

VARIABLE = "TRUESTEP_TRACE"
SITE = Path(__file__).parent / "site"

_LEVELS = ("stats", "sketch", "full")


@dataclass(frozen=True)
class Request:
    """What TRUESTEP_TRACE asks for."""

    select: str = "*"
    class_name: str = "*"
    every: bool = True
    output: str = "trace.safetensors"
    level: str = "stats"
    steps: tuple[int, ...] | None = None
    inputs: bool = False
    ops: str | None = None

    def text(self) -> str:
        """The value of TRUESTEP_TRACE that asks for this."""
        parts = [self.select, f"class={self.class_name}", f"every={int(self.every)}"]
        parts += [f"output={self.output}", f"level={self.level}", f"inputs={int(self.inputs)}"]
        if self.steps is not None:
            parts.append(f"steps={','.join(map(str, self.steps))}")
        if self.ops:
            parts.append(f"ops={self.ops}")
        return ";".join(parts)


def with_site(variable: str, text: str) -> dict[str, str]:
    """The environment of a program in whose Python processes our start-up folder runs.

    Args:
        variable, text: What tells it what to do.
    """
    path = os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, variable: text}


def parse(text: str) -> Request:
    """Read TRUESTEP_TRACE.

    Raises:
        UsageError: A setting is unknown or has a value that means nothing.
    """
    select, *settings = text.split(";")
    request = Request(select=select.strip() or "*")
    given = {}
    for setting in filter(None, (part.strip() for part in settings)):
        key, equals, value = setting.partition("=")
        if not equals or key in given:
            raise UsageError(f"{setting!r} is not KEY=VALUE, or given twice", where=VARIABLE)
        given[key] = value
    readers: dict[str, tuple[str, Callable[[str], Any]]] = {
        "class": ("class_name", str),
        "every": ("every", _flag),
        "output": ("output", str),
        "level": ("level", _level),
        "steps": ("steps", parse_steps),
        "inputs": ("inputs", _flag),
        "ops": ("ops", str),
    }
    if "class" in given and given["class"] != "*":
        request = replace(request, every=False)
    for key, value in given.items():
        if key not in readers or not value:
            raise UsageError(
                f"{key!r} is no setting" if value else f"{key} has no value",
                where=VARIABLE,
                measured=f"settings: {', '.join(readers)}",
            )
        field, read = readers[key]
        request = replace(request, **{field: read(value)})
    return request


def _flag(value: str) -> bool:
    if value not in ("0", "1"):
        raise UsageError(f"{value!r} is neither 0 nor 1", where=VARIABLE)
    return value == "1"


def _level(value: str) -> str:
    if value not in _LEVELS:
        raise UsageError(f"no level {value!r}", where=VARIABLE, measured=", ".join(_LEVELS))
    return value


def parse_steps(value: str) -> tuple[int, ...]:
    """`0,5` as numbers.

    Raises:
        UsageError: They are none.
    """
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"steps are numbers by commas, not {value!r}", hint="--steps 0,5")
    return tuple(int(part) for part in parts)


def output_path(request: Request) -> Path:
    """Where this process writes: its own file among the processes of torchrun."""
    path = Path(request.output)
    rank = os.environ.get("RANK", "")
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1 and rank.isdecimal():
        path = path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
    return path


class Program:
    """Hooks models of this process when they are first called, until the process ends."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.path = output_path(request)
        self._began = time.time()
        self._tracer: Tracer | None = None
        self._sink: Spool
        self._head: dict[str, Any] = {}
        self._known: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._names: list[str] = []
        self._classes: Counter[str] = Counter()
        self._unwatch: Callable[[], None] = lambda: None
        self._unlisten: Callable[[], None] = lambda: None
        self._pid = os.getpid()
        self._hooking = threading.RLock()

    def start(self) -> None:
        """Watch for models, by what every call of a module goes through; torch is loaded."""
        import torch

        original: Any = torch.nn.Module.__call__

        def watched(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self._called(module)
            return original(module, *args, **kwargs)

        def restore() -> None:
            if torch.nn.Module.__call__ is watched:
                torch.nn.Module.__call__ = original  # type: ignore[method-assign]

        torch.nn.Module.__call__ = watched  # type: ignore[method-assign]
        self._unwatch = restore
        when_loaded("diffusers.models.cache_utils", self._listen)
        atexit.register(self.stop)

    def _listen(self) -> None:
        from truestep.replay.contexts import listen_to_all

        self._unlisten = listen_to_all()

    def _called(self, module: torch.nn.Module) -> None:
        """Before a module's call: hook it, if it is a model that is wanted."""
        if (self._tracer is not None and self._tracer.active) or module in self._known:
            return
        from truestep.pairing.naming import unwrapped

        name = type(unwrapped(module)).__name__
        if not fnmatchcase(name, self.request.class_name) or os.getpid() != self._pid:
            return
        with self._hooking:
            if module in self._known:  # another thread was first
                return
            try:
                self._hook(module, name)
            except TruestepError as error:  # the program goes on, untraced
                self.stop()
                say(f"tracing stopped: {error}")

    def _hook(self, module: torch.nn.Module, name: str) -> None:
        from truestep.pairing.naming import matching, named_modules
        from truestep.replay.hooks import Root, install

        tracer = self._tracer or self._open(module)
        self._classes[name] += 1
        prefix = ""
        if self.request.every:
            number = self._classes[name]
            prefix = name if number == 1 else f"{name}_{number}"
        else:
            self._unwatch()
        named = named_modules(module, prefix)
        self._known.update(module.modules())
        self._names += named.modules
        chosen = matching(named.modules, self.request.select)
        inside = matching(named.modules, self.request.ops) if self.request.ops else []
        install(tracer, Root(module, named), chosen, inside)
        say(f"tracing {name}: {len(chosen)} of {len(named.modules)} modules")

    def _open(self, module: torch.nn.Module) -> Tracer:
        from truestep.recording.spool import Spool
        from truestep.replay.hooks import settings_of
        from truestep.replay.tracer import Tracer

        request = self.request
        level: Any = request.level
        steps = frozenset(request.steps) if request.steps is not None else None
        self._head = settings_of(
            module,
            select=request.select,
            steps=steps,
            inputs=request.inputs,
            ops=request.ops,
            level=level,
        )
        self._head["settings"]["program"] = sys.argv[:1]
        self._sink = Spool(self.path, head=self._head, level=level)
        self._tracer = Tracer(self._sink, level=level, steps=steps, inputs=request.inputs)
        return self._tracer

    def stop(self) -> None:
        """Take the hooks off and close the trace."""
        if os.getpid() != self._pid:
            return
        self._unwatch()
        self._unlisten()
        tracer, self._tracer = self._tracer, None
        if tracer is None:
            return
        from truestep.files import alone
        from truestep.pairing.naming import unmatched
        from truestep.replay.hooks import close

        for glob in unmatched(self._names, self.request.select):
            tracer.note(f"no module matched {glob!r}")
        tracer.detach()
        try:
            with alone(self.path.parent, "the trace"):  # several processes may end at once
                if self.path.exists() and self.path.stat().st_mtime >= self._began:
                    # Another process of this program has written it.
                    own = self.path.with_name(f"{self.path.stem}.{self._pid}{self.path.suffix}")
                    self._sink.target = own
                recording = close(tracer, self._head)
        except TruestepError as error:
            say(str(error))
            return
        if recording is not None:
            say(f"trace: {recording.path} ({tracer.fired} of {tracer.hooks} hooks fired)")


def say(text: str) -> None:
    """One line on stderr: stdout is the program's."""
    print(f"truestep: {visible(text)}", file=sys.stderr, flush=True)


def start_from_environment() -> None:
    """Start tracing as TRUESTEP_TRACE says; torch has been loaded."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return
    try:
        Program(parse(text)).start()
    except UsageError as error:
        say(f"nothing is traced: {error}")


def main() -> None:
    """`python -m truestep.replay.program [-m] SCRIPT ARGUMENTS`."""
    import runpy

    arguments = sys.argv[1:]
    if not arguments:
        say("give a script: python -m truestep.replay.program run.py ARGUMENTS")
        sys.exit(2)
    os.environ.setdefault(VARIABLE, "*")
    when_loaded("torch", start_from_environment)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
