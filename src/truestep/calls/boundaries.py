"""Watch every outermost call of a subject's components, and where random numbers are made.

The class of a component is swapped for a subclass of it while the subject runs, so that copies of
a component are watched as well. What a user put on the instance (`forward`, `step`, hooks) stays
inside the boundary. Everything is restored on any exit.
"""

from __future__ import annotations

import gc
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.overrides import _get_current_function_mode

from truestep.calls import blocks
from truestep.calls.classes import (
    CONTEXT,
    Kind,
    kind_of,
    methods_of,
    signature_of,
    submodules,
    swapped_class,
)
from truestep.calls.randomness import Draws
from truestep.calls.subject import Subject
from truestep.errors import UsageError
from truestep.pairing.naming import runs_compiled

FUNCTIONS = "functions"
"""Component name of functions that have a name of their own."""

RANDOM = "random"
"""Component name of draws of random numbers."""


@dataclass(frozen=True)
class Arrival:
    """One outermost call, before it is made.

    Attributes:
        component, method, kind: What is called.
        owner: The object, or None of a draw and of a function of a module.
        args, kwargs: What it is called with.
        proceed: Makes the call, with these or other arguments.
        signature: What it takes, as its class says.
        context: The guidance pass, where the pipeline says it.
        block: The innermost block that it is in, where the run is made of blocks.
    """

    component: str
    method: str
    kind: Kind
    owner: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    proceed: Callable[..., Any]
    signature: inspect.Signature | None = None
    context: str | None = None
    block: str = ""


Observer = Callable[[Arrival], Any]
"""Answers a call: makes it by `proceed`, or does not."""


@dataclass(frozen=True)
class _Part:
    component: str
    kind: Kind
    compiled: bool = False


@dataclass
class Watch:
    """The boundaries of a subject while it runs.

    Attributes:
        observer: Told of every outermost call.
        hidden: Whether calls that come now are inside another one.
        elsewhere: Calls that came from other threads; nobody was told of them.
    """

    observer: Observer
    hidden: bool = False
    copied: bool = False
    elsewhere: Counter[str] = field(default_factory=Counter)
    _thread: int = field(default_factory=threading.get_ident)
    _parts: dict[int, _Part] = field(default_factory=dict)
    _classes: dict[int, _Part] = field(default_factory=dict)
    _kept_classes: list[Any] = field(default_factory=list)
    _functions: dict[tuple[int, str], str] = field(default_factory=dict)
    _copies: Counter[str] = field(default_factory=Counter)
    _contexts: list[Any] = field(default_factory=list)
    _blocks: list[tuple[Any, str]] = field(default_factory=list)
    _swaps: list[tuple[Any, type, type]] = field(default_factory=list)
    _others: list[Any] = field(default_factory=list)
    _patches: list[tuple[ModuleType, str, Any]] = field(default_factory=list)
    draws: Draws = field(init=False)

    def __post_init__(self) -> None:
        self.draws = Draws(self._draw)

    def arrive(
        self, owner: Any, method: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Tell the observer of a call, unless it is inside another one."""
        if threading.get_ident() != self._thread:
            self.elsewhere[type(owner).__name__] += 1
            return call(*args, **kwargs)
        if self.hidden:
            return call(*args, **kwargs)
        part = self._part(owner)
        component, kind = part.component, part.kind
        if component == blocks.BLOCK:
            return self._enter_block(owner, call, args, kwargs)
        function = self._functions.get((id(owner), method))
        if function is not None:
            component, method, kind = FUNCTIONS, function, Kind.FUNCTION

        def proceed(*args: Any, **kwargs: Any) -> Any:
            with self._inside(kind, owner if part.compiled else None):
                return call(*args, **kwargs)

        with self._quiet():
            signature = signature_of(owner, method, call)
            context = str(self._contexts[-1]) if self._contexts else None
            block = self._blocks[-1][1] if self._blocks else ""
            return self.observer(
                Arrival(
                    component, method, kind, owner, args, kwargs, proceed, signature, context, block
                )
            )

    def _enter_block(self, owner: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a block, named by where it stands in the one that called it."""

        def proceed(*args: Any, **kwargs: Any) -> Any:
            with self._inside(Kind.FUNCTION, None):
                return call(*args, **kwargs)

        above, path = self._blocks[-1] if self._blocks else (None, "")
        own = next((n for n, part in blocks.parts_of(above).items() if part is owner), "")
        name = ".".join(filter(None, (path, own)))
        self._blocks.append((owner, name))
        try:
            if not name or not blocks.is_judged(owner):
                return call(*args, **kwargs)
            with self._quiet():
                return self.observer(
                    Arrival(
                        blocks.BLOCK, name, Kind.FUNCTION, owner, args, kwargs, proceed, block=name
                    )
                )
        finally:
            self._blocks.pop()

    def _draw(self, name: str, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._quiet():
            return self.observer(Arrival(RANDOM, name, Kind.RANDOM, None, args, kwargs, call))

    @contextmanager
    def enter_context(self, name: Any, context: Any) -> Iterator[Any]:
        """Note the guidance pass while a model's context for it lasts."""
        with context as value:
            self._contexts.append(name)
            try:
                yield value
            finally:
                self._contexts.pop()

    def _part(self, owner: Any) -> _Part:
        """What an object is: a component, a module of one, or a copy of one."""
        part = self._parts.get(id(owner))
        if part is not None:
            return part
        of = self._classes[id(type(owner))]
        self._copies[of.component] += 1
        part = _Part(f"{of.component}~{self._copies[of.component]}", of.kind, of.compiled)
        self._parts[id(owner)] = part
        self._others.append(owner)  # alive, so that its id stays its own
        return part

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """While an observer works: nothing is a call, and draws are its own."""
        before, self.hidden = self.hidden, True
        popped = _get_current_function_mode() is self.draws
        if popped:
            self.draws.off()
        try:
            yield
        finally:
            if popped:
                self.draws.on()
            self.hidden = before

    @contextmanager
    def _inside(self, kind: Kind, compiled: Any) -> Iterator[None]:
        """While a call is made: of what is not a model, draws are seen; of functions, calls too."""
        if kind is Kind.MODEL:
            swapped = type(compiled)
            if compiled is not None:
                object.__setattr__(compiled, "__class__", swapped._original)
            try:
                yield
            finally:
                if compiled is not None:
                    object.__setattr__(compiled, "__class__", swapped)
            return
        before, self.hidden = self.hidden, kind is Kind.SCHEDULER
        try:
            with self.draws:
                yield
        finally:
            self.hidden = before

    def _swap(self, value: Any, swapped: type, part: _Part) -> None:
        original = type(value)
        self._parts[id(value)] = part
        self._swaps.append((value, original, swapped))
        object.__setattr__(value, "__class__", swapped)

    def restore(self) -> None:
        """Give every object its class back, whatever happens meanwhile."""
        interrupted: BaseException | None = None
        while self._swaps or self._patches:
            try:
                if self._patches:
                    module, name, value = self._patches[-1]
                    setattr(module, name, value)
                    self._patches.pop()
                    continue
                value, original, swapped = self._swaps[-1]
                if type(value) is swapped:
                    object.__setattr__(value, "__class__", original)
                self._swaps.pop()
            except KeyboardInterrupt as error:
                interrupted = error
        self._restore_copies()
        if interrupted is not None:
            raise interrupted

    def _restore_copies(self) -> None:
        """The same for copies that were made meanwhile."""
        if not self.copied and not self._others:
            return
        classes = list(self._kept_classes)
        for value in gc.get_referrers(*classes) if classes else ():
            if any(type(value) is swapped for swapped in classes):
                object.__setattr__(value, "__class__", type(value)._original)

    def begin(self, subject: Subject, methods: Mapping[str, Collection[str]]) -> None:
        """Swap the classes of everything that a subject is cut at.

        Args:
            methods: Further methods of each component, as a recording has them.
        """
        functions: dict[int, dict[str, str]] = {}
        for name, (owner, attribute) in subject.functions.items():
            if isinstance(owner, ModuleType):
                self._patch(owner, attribute, name)
            else:
                functions.setdefault(id(owner), {})[attribute] = name
                self._functions[id(owner), attribute] = name
        owners = {id(owner): owner for owner, _ in subject.functions.values()}
        inner: list[tuple[str, torch.nn.Module]] = []
        for component, value in subject.components.items():
            kind = kind_of(value)
            if kind is None or id(value) in self._parts:
                continue
            names = methods_of(value, kind, methods.get(component, ()))
            names |= set(functions.pop(id(value), ()))
            self._begin(value, _Part(component, kind, runs_compiled(value)), names)
            inner += [(f"{component}.{name}", module) for name, module in submodules(value)]
        for identity, attributes in functions.items():
            self._begin(owners[identity], _Part(FUNCTIONS, Kind.FUNCTION), set(attributes))
        self._begin_blocks(subject.blocks)
        by_class: dict[type, type] = {}
        for name, module in inner:
            if id(module) in self._parts:
                continue
            original = type(module)
            if original not in by_class:
                by_class[original] = swapped_class(original, self, ())
                self._classes[id(by_class[original])] = _Part(name, Kind.MODEL)
                self._kept_classes.append(by_class[original])
            self._swap(module, by_class[original], _Part(name, Kind.MODEL))

    def _begin_blocks(self, root: Any) -> None:
        part = _Part(blocks.BLOCK, Kind.FUNCTION)
        for block in blocks.every(root) if root is not None else ():
            if id(block) not in self._parts and callable(block):
                self._begin(block, part, set())

    def _begin(self, value: Any, part: _Part, methods: set[str]) -> None:
        context = {CONTEXT} if callable(getattr(value, CONTEXT, None)) else set()
        called = part.kind is not Kind.GUIDER  # its own call takes what blocks hold
        swapped = swapped_class(type(value), self, methods | context, called=called)
        self._classes[id(swapped)] = part
        self._kept_classes.append(swapped)
        try:
            self._swap(value, swapped, part)
        except TypeError as error:
            self._swaps.pop()
            raise UsageError(
                f"{part.component} cannot be watched",
                where=type(value).__name__,
                measured=str(error),
                hint="wrap it in a Python class, and give that as the component",
            ) from error

    def _patch(self, module: ModuleType, attribute: str, name: str) -> None:
        original = getattr(module, attribute)

        def watched(*args: Any, **kwargs: Any) -> Any:
            return self.arrive(module, attribute, original, args, kwargs)

        self._functions[id(module), attribute] = name
        self._parts[id(module)] = _Part(FUNCTIONS, Kind.FUNCTION)
        self._patches.append((module, attribute, original))
        setattr(module, attribute, watched)


_LOCK = threading.Lock()
_TAKEN: dict[int, str] = {}
"""What is being watched, by any thread."""


@contextmanager
def watching(
    subject: Subject, observer: Observer, methods: Mapping[str, Collection[str]] | None = None
) -> Iterator[Watch]:
    """Watch a subject's boundaries.

    Args:
        subject: Its components keep their identity; their classes are back afterwards.
        observer: Answers every outermost call.
        methods: Further methods of each component that are boundaries.

    Raises:
        UsageError: A component is being watched already, or cannot be.
    """
    watch = Watch(observer)
    with _taken(subject):
        try:
            watch.begin(subject, methods or {})
            with watch.draws:
                yield watch
        finally:
            watch.restore()
            watch.observer = _over  # classes are in circles: what an observer has would stay


def _over(arrival: Arrival) -> Any:
    """Make a call that a copy of a component gets after the run."""
    return arrival.proceed(*arrival.args, **arrival.kwargs)


def is_watched(components: Iterable[Any]) -> bool:
    """Whether any of these is being watched now, by any thread."""
    with _LOCK:
        return any(id(part) in _TAKEN for part in components)


@contextmanager
def _taken(subject: Subject) -> Iterator[None]:
    """Have a subject's components to oneself."""
    parts = {id(value): name for name, value in subject.components.items()}
    parts |= {id(owner): name for name, (owner, _) in subject.functions.items()}
    parts |= {} if subject.blocks is None else {id(subject.blocks): "the pipeline"}
    with _LOCK:
        for identity, name in parts.items():
            if identity in _TAKEN:
                raise UsageError(
                    f"{name} is being recorded or checked already",
                    likely="another thread runs a pipeline that shares it",
                    hint="run one after the other, or give each its own copy",
                )
        _TAKEN.update(parts)
    try:
        yield
    finally:
        with _LOCK:
            for identity in parts:
                _TAKEN.pop(identity, None)
