"""Hooks on modules that record what goes in and comes out, and the place they record it under."""

from __future__ import annotations

import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch

from truestep.errors import WriteError
from truestep.keys import module_name
from truestep.measure.moments import Moments, from_device, on_device, with_square
from truestep.measure.sketch import SIZE, STEP, sketch_and_square
from truestep.nests import argument_leaves, leaves, unread
from truestep.pairing.naming import ROOT, Named, callable_module
from truestep.recording.format import bytes_of
from truestep.recording.header import bad_name
from truestep.recording.manifest import Level
from truestep.recording.spool import Blob, Memory, Spool, storable
from truestep.records import STATS
from truestep.text import listed

Leaves = Iterable[tuple[str, torch.Tensor]]

MAX_NOTES = 20

UNREAD = (
    "returned, beside tensors,",
    "returned no tensor",
    "has tensors that cannot be stored",
    "could not be recorded",
    "has tensors under names",
)
"""What notes say, after a module's name, of values that no trace holds."""


@dataclass
class _Place:
    """Where one thread is: its root's call, and the modules in it that have begun."""

    step: int
    branch: str
    on: bool
    counts: dict[str, int]
    begun: dict[tuple[int, str], list[int]] = field(default_factory=dict)


class Tracer:
    """Records tensors under the current step and branch.

    Several threads may run the model at once: each has its own step and branch. A thread that no
    root was called in works for the root that was called last.

    Attributes:
        hooks: Modules that are hooked.
        names: Names of the tensors recorded so far.
        calls: Calls of a root so far.
        active: Whether a hooked root is running.
    """

    def __init__(
        self, sink: Spool | Memory, *, level: Level, steps: frozenset[int] | None, inputs: bool
    ) -> None:
        self.sink, self.level, self.steps, self.inputs = sink, level, steps, inputs
        self.hooks, self.calls = 0, 0
        self.names: list[str] = []
        self.seen_steps: set[int] = set()
        self._counts: dict[tuple[int, str], dict[str, int]] = {(0, "main"): {}}
        self._latest = _Place(0, "main", steps is None, self._counts[0, "main"])
        self._places: dict[int, _Place] = {}
        self._fired: list[list[int]] = []
        self._fqns: list[str] = []
        self._notes: dict[str, int] = {}
        self._pending: list[tuple[tuple[Any, ...], torch.Tensor]] = []
        self._moments = Moments()
        # A module often returns the very tensor that its last child returned. It is not sketched
        # twice, unless its moments say that something has changed it in between.
        self._last: tuple[Callable[[], object], object, list[Blob]] = (lambda: None, None, [])
        self._order = 0
        self._lock = threading.RLock()
        self._undo: list[Callable[[], None]] = []

    # --- where -------------------------------------------------------------------------------

    def enter(self, step: int, branch: str, *, stepless: bool = False) -> None:
        """What is recorded from now on belongs to this step and branch.

        Args:
            stepless: It is of no denoise step, and is recorded whatever steps were chosen.
        """
        wanted = stepless or self.steps is None or step in self.steps
        on = wanted and self.sink.owned()
        with self._lock:
            counts = self._counts.setdefault((step, branch), {})
            self._latest = self._places[get_ident()] = _Place(step, branch, on, counts)
            if not stepless:
                self.seen_steps.add(step)
                self.calls += 1

    @contextmanager
    def call(self, step: int, branch: str, *, stepless: bool = False) -> Iterator[None]:
        """Enter for a block, then leave."""
        self.enter(step, branch, stepless=stepless)
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """A root's call is over: read back what devices computed, and hand it all on."""
        with self._lock:
            self._places.pop(get_ident(), None)
            if self._latest.on:
                self._read_back()
                self.sink.flush()

    @property
    def active(self) -> bool:
        return bool(self._places)

    def _place(self) -> _Place:
        return self._places.get(get_ident(), self._latest)

    # --- hooks -------------------------------------------------------------------------------

    def attach(self, named: Named, chosen: Iterable[str]) -> None:
        """Hook the chosen modules; `detach` takes the hooks off again."""
        for fqn in chosen:
            if not callable_module(named.modules[fqn]):
                continue  # a ModuleList: what is in it runs, itself never
            before, after = self._pair(fqn)
            self.around(named.modules[fqn], before, after, kwargs=self.inputs)
            self.hooks += 1
        for fqn, count in named.compiled.items():
            if count:
                self.note(
                    f"{count} modules inside {fqn} run as one compiled graph and were not traced: "
                    "trace the model before it is compiled"
                )

    def _pair(self, fqn: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """What runs before and after one module."""
        cell = [0]
        self._fired.append(cell)
        self._fqns.append(fqn)
        takes_inputs = self.inputs

        def before(_: object, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            place = self._place()
            if not place.on:
                return
            call = self._next(place, fqn)
            place.begun.setdefault((get_ident(), fqn), []).append(call)
            if takes_inputs:
                self.record(fqn, call, argument_leaves(args, kwargs or {}))

        def after(_: object, args: object, output: object) -> None:
            place = self._place()
            if not place.on:
                return
            calls = place.begun.get((get_ident(), fqn))
            call = calls.pop() if calls else self._next(place, fqn)
            cell[0] += 1
            if type(output) is torch.Tensor:
                self.record(fqn, call, (("out.0", output),))
            else:
                found = self.record(fqn, call, leaves(output, "out"))
                if not found:
                    self.note(f"{fqn} returned no tensor ({type(output).__name__})")
                else:
                    self._unread(fqn, output)

        return before, after

    def _unread(self, fqn: str, output: object) -> None:
        with suppress(Exception):  # a mapping may raise anything; what it gave is recorded
            for kind in dict.fromkeys(unread(output)):
                self.note(f"{fqn} {UNREAD[0]} a {kind}")

    def around(
        self,
        module: torch.nn.Module,
        before: Callable[..., None],
        after: Callable[..., None],
        *,
        kwargs: bool = False,
        always: bool = False,
    ) -> None:
        """Run functions around a module's call: by hooks, or around its compiled call.

        Args:
            module: The module.
            before: Given module, arguments and, with `kwargs`, keywords.
            after: Given module, arguments and output.
            kwargs: Whether `before` wants keywords.
            always: Whether `after` also runs, with None, when the module raised.
        """
        whole: Any = getattr(module, "_compiled_call_impl", None)
        if whole is None:
            handles = (
                module.register_forward_pre_hook(before, with_kwargs=kwargs),
                module.register_forward_hook(after, always_call=always),
            )
            self._undo += [handle.remove for handle in handles]
            return
        # `module.compile()`: hooks would run inside the graph, and change it.
        layers = getattr(whole, "truestep_layers", None)
        if layers is not None:
            layers.append((before, after, always))
            return
        around = [(before, after, always)]

        def traced(*args: Any, **keywords: Any) -> Any:
            for first, _, _ in around:
                first(module, args, keywords)
            output = None
            try:
                output = whole(*args, **keywords)
            except BaseException:
                for _, then, even_so in around:
                    if even_so:
                        then(module, args, None)
                raise
            for _, then, _ in around:
                then(module, args, output)
            return output

        traced.truestep_layers = around  # type: ignore[attr-defined]
        self.replace(module, "_compiled_call_impl", traced)

    def replace(self, module: torch.nn.Module, name: str, value: object) -> None:
        """Set an attribute of an instance until `detach`."""
        place, missing = weakref.ref(module), object()
        old = module.__dict__.get(name, missing)
        object.__setattr__(module, name, value)

        def restore() -> None:
            owner = place()
            if owner is None:
                return
            if old is missing:
                with suppress(AttributeError):
                    object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, old)

        self._undo.append(restore)

    def detach(self) -> None:
        """Take every hook off, whatever happens."""
        self._stop()
        self._places.clear()
        with ExitStack() as stack:
            for undo in self._undo:
                stack.callback(undo)
            self._undo = []

    # --- recording ---------------------------------------------------------------------------

    def record(self, fqn: str, call: int, found: Leaves) -> int:
        """Record tensors of one module call; what goes wrong is noted, and the program goes on.

        Returns:
            The number of tensors.

        Raises:
            WriteError: The disk is full, or alike; `where` names the module.
        """
        count, place = 0, self._place()
        paths: set[str] = set()
        try:
            with self._lock:
                for path, tensor in found:
                    count += 1
                    if path in paths:
                        self.note(f"{fqn} has two tensors under {path}: the first was recorded")
                        continue
                    paths.add(path)
                    self._take(place, fqn, call, path, tensor)
        except WriteError as error:
            error.where = f"{error.where} (recording {fqn})"
            self._stop()
            raise
        except Exception as error:  # any tensor subclass or mapping may raise anything
            text = str(error).strip().splitlines()
            kind = f"{type(error).__name__}: {text[0] if text else ''}"[:200]
            self.note(f"{fqn} could not be recorded: {kind}")
        return count

    def _stop(self) -> None:
        """Nothing is recorded from now on."""
        for place in (self._latest, *self._places.values()):
            place.on = False

    @property
    def recording(self) -> bool:
        """Whether what runs now is recorded."""
        return self._place().on

    def operator(self, label: str, found: Leaves) -> None:
        """Record the output of one operator."""
        self.record(label, self._next(self._place(), label), found)

    def _next(self, place: _Place, label: str) -> int:
        """Number of a call that begins, within its step and branch."""
        with self._lock:
            call = place.counts.get(label, 0)
            place.counts[label] = call + 1
        return call

    def _take(self, place: _Place, fqn: str, call: int, path: str, tensor: torch.Tensor) -> None:
        if type(tensor) is not torch.Tensor or tensor.is_complex():
            tensor = self._plain(fqn, tensor)
        if tensor.requires_grad:
            tensor = tensor.detach()
        if tensor.is_meta or tensor.layout is not torch.strided or not storable(tensor.dtype):
            what = "meta" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
            self.note(f"{fqn} has tensors that cannot be stored: {what}")
            return
        step, branch = place.step, place.branch
        name = module_name(fqn, step=step, branch=branch, slot=path, call=call)
        if bad_name(name):
            self.note(f"{fqn} has tensors under names that no recording can hold")
            return
        dtype = str(tensor.dtype)[6:]
        fields = (name, self._order, dtype, tuple(tensor.shape), step, branch, fqn, call)
        self._order += 1
        if self.level == "stats" and tensor.device.type != "cpu" and tensor.numel():
            self._pending.append((fields, on_device(tensor)))
        else:
            self.sink.add(fields, self._blobs(tensor.to("cpu"), dtype))
        self.names.append(name)

    def _plain(self, fqn: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of no subclass, and of real numbers."""
        if hasattr(tensor, "to_local"):
            self.note(f"{fqn} has sharded tensors: the local shard was recorded")
            tensor = tensor.to_local()
        tensor = tensor.detach()
        if tensor.is_complex():
            self.note(f"{fqn} has complex tensors: recorded as pairs of real numbers")
            tensor = torch.view_as_real(tensor.resolve_conj())
        return tensor

    def _blobs(self, host: torch.Tensor, dtype: str) -> list[Blob]:
        if self.level == "full":
            if host.is_neg():
                host = host.resolve_neg()
            return [Blob(dtype, tuple(host.shape), bytes_of(host))]
        if self.level == "stats":
            return [_stats(self._moments.of(host))]
        before, known, blobs = self._last
        if before() is host and known == (self._moments.of(host, chunk=STEP), _version(host)):
            return blobs
        self._moments.begin()
        projected, square = sketch_and_square(host, each=self._moments.add)
        quick = self._moments.values(host)
        stats = _stats(with_square(quick, square))
        blobs = [stats, Blob("float32", (SIZE,), bytes_of(projected))]
        self._last = (weakref.ref(host), (quick, _version(host)), blobs)
        return blobs

    def _read_back(self) -> None:
        """One transfer for all moments that devices have computed."""
        with self._lock:
            pending, self._pending = self._pending, []
            places = {sums.device for _, sums in pending}
            for place in places:
                own = [item for item in pending if item[1].device == place]
                numbers = torch.stack([sums for _, sums in own]).tolist()
                for (fields, _), sums in zip(own, numbers, strict=True):
                    self.sink.add(fields, [_stats(from_device(sums))])

    # --- what is told ------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Keep something the reader of the trace must know; equal notes are counted."""
        with self._lock:
            self._notes[text] = self._notes.get(text, 0) + 1

    @property
    def fired(self) -> int:
        """Hooked modules that have run."""
        return sum(1 for cell in self._fired if cell[0])

    def notes(self) -> tuple[str, ...]:
        """Everything noted, and how many hooks fired."""
        silent = [f for f, cell in zip(self._fqns, self._fired, strict=True) if not cell[0]]
        told = [f"{self.fired} of {self.hooks} hooks fired"]
        if silent:
            told.append(f"never called: {listed(silent, 10)}")
        if self.steps is not None:
            missed = sorted(self.steps - self.seen_steps)
            if missed:
                told.append(f"steps never reached: {', '.join(map(str, missed))}")
        ordered = sorted(self._notes.items(), key=lambda note: not note[0].startswith(ROOT))
        kept = [text if times == 1 else f"{text} ({times} times)" for text, times in ordered]
        if len(kept) > MAX_NOTES:
            kept = [*kept[:MAX_NOTES], f"{len(kept) - MAX_NOTES} more notes were left out"]
        return (*told, *kept)

    def finish(self) -> None:
        """Read back what is left."""
        self._read_back()


def _stats(values: tuple[float, ...]) -> Blob:
    return Blob("float64", (len(STATS),), struct.pack(f"<{len(STATS)}d", *values))


def _version(tensor: torch.Tensor) -> int:
    """Count of the changes in place that torch knows of; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version
