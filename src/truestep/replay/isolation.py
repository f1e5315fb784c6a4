"""Run every module of a model on a reference's inputs, in one forward.

Before each call the module's tensor inputs are replaced by those that the reference's module of the
same name was given, so that no module sees the error of another. What a module returns then differs
by the error *made in it*; what it was about to be given differs by the error that the code between
it and the modules before it made. One more forward without replacement shows what is *inherited*.

A candidate may be built in another way: `Partners` says which reference module each of its modules
answers to. Arguments are then matched by their place or, failing that, by their shape, and what has
no counterpart is left out and listed, never compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.calls.judging import without_endless
from truestep.calls.values import in_real_numbers
from truestep.floors import NoiseRun
from truestep.judge.floor import pair_of
from truestep.judge.rows import measured_run
from truestep.keys import key_of, module_name
from truestep.measure.plain import plain
from truestep.nests import argument_leaves, leaves
from truestep.pairing.naming import ROOT, named_modules
from truestep.pairing.partners import Names, Part, namesake
from truestep.replay.forms import in_another_form
from truestep.runtime.changes import OtherFunctions, math_kernel, one_rounding
from truestep.runtime.precision import HIGHER, converted

Tensor = torch.Tensor
Forward = Callable[[], Any]

_HEARD: ContextVar[bool] = ContextVar("heard", default=True)
"""Whether calls of hooked modules that come now are of the forward that is looked at."""


def heard() -> bool:
    """Whether calls of modules are kept."""
    return _HEARD.get()


@contextmanager
def hearing(on: bool) -> Iterator[None]:
    """Keep calls of modules, or let them pass: a run makes other calls than the one looked at."""
    before = _HEARD.set(on)
    try:
        yield
    finally:
        _HEARD.reset(before)


@dataclass(frozen=True)
class Apart:
    """A tensor that a module was given and that nothing of the reference's call matches.

    Attributes:
        label: The call, by the reference's name.
        slot: Where the candidate has it: `in.1`.
        tensor: A host copy.
    """

    label: str
    slot: str
    tensor: Tensor


@dataclass
class Flow:
    """What one forward showed, in the order in which it happened.

    Attributes:
        tensors: `module/<fqn>/<step>/<branch>/in.*` (received) and `out.*`, host copies; complex
            ones with real and imaginary parts as their last axis.
        calls: Labels of the modules called (`blocks.0`, `blocks.0#1`), in order of their start.
        silent: Modules that were called and returned no tensor.
        classes: Label to the class of the module called.
        apart: What modules of another class were given beyond what the reference's were.
        left_out: Names of reference tensors without a counterpart in a module of another class.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)
    apart: list[Apart] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def flow(
    model: torch.nn.Module,
    forward: Forward,
    *,
    place: tuple[int, str],
    given: Flow | None = None,
    select: Container[str] | None = None,
    parts: Names = namesake,
    change: Callable[[Tensor], Tensor] | None = None,
    precision: torch.dtype | None = None,
) -> Flow:
    """Run a forward and keep what its modules receive and return.

    Args:
        model: Its modules are hooked while the forward runs.
        forward: Runs the model, once.
        place: Step and branch of the forward; part of the names.
        given: The reference's flow: where it has a module's inputs, they replace the received
            ones (in the dtype and on the device of those). Received tensors are kept all the same.
        select: Modules to hook, by the reference's fqn; None is all. The root always is.
        parts: Which of the reference's modules a module answers to; by default its namesake.
        change: Applied to every tensor that replaces another.
        precision: Floating dtype of the tensors that replace others, instead of that of those.

    Raises:
        Exception: Whatever the forward raises; the hooks are removed.
    """
    recorder = _Recorder(place, given, change, precision)
    handles = []
    for own, module in named_modules(model).modules.items():
        answers = (Part(ROOT),) if own == ROOT else parts(own)
        answers = tuple(p for p in answers if p.fqn == ROOT or select is None or p.fqn in select)
        if not answers:
            continue
        enter, leave = recorder.hooks(answers)
        handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return recorder.found


class _Recorder:
    """Keeps one forward's tensors; its hooks replace inputs by the reference's."""

    def __init__(
        self,
        place: tuple[int, str],
        given: Flow | None,
        change: Callable[[Tensor], Tensor] | None,
        precision: torch.dtype | None,
    ) -> None:
        self.found = Flow()
        self.place = place
        self.change, self.precision = change, precision
        self.seen: Counter[str] = Counter()
        self.open: list[tuple[str, ...]] = []
        self.classes = given.classes if given is not None else {}
        self.given: dict[str, dict[str, Tensor]] = {}
        for name, tensor in given.tensors.items() if given is not None else ():
            key = key_of(name)
            self.given.setdefault(key.label, {})[key.name] = tensor

    def name(self, label: str, slot: str) -> str:
        fqn, _, call = label.partition("#")
        step, branch = self.place
        return module_name(fqn, step=step, branch=branch, slot=slot, call=int(call or 0))

    def hooks(self, parts: tuple[Part, ...]) -> tuple[Callable[..., Any], Callable[..., None]]:
        def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not heard():
                return None
            labels = tuple(self._start(part, type(module).__name__) for part in parts)
            self.open.append(labels)
            received = list(argument_leaves(args, kwargs))
            swaps: dict[int, Tensor] = {}
            for label in labels:
                for tensor, theirs in self._received(label, received):
                    swaps.setdefault(id(tensor), self._replacing(tensor, theirs))
            return (replaced(args, swaps), replaced(kwargs, swaps)) if swaps else None

        def leave(module: Any, args: Any, output: Any) -> None:
            if not heard():
                return
            returned = list(leaves(output, "out"))
            for label, part in zip(self.open.pop(), parts, strict=True):
                cut = [(slot, in_real_numbers(part.of(tensor))) for slot, tensor in returned]
                self._match(label, cut, "out")
                if not cut:
                    self.found.silent.append(label)

        return enter, leave

    def _start(self, part: Part, cls: str) -> str:
        label = part.fqn if not self.seen[part.fqn] else f"{part.fqn}#{self.seen[part.fqn]}"
        self.seen[part.fqn] += 1
        self.found.calls.append(label)
        self.found.classes[label] = cls
        return label

    def _received(
        self, label: str, received: list[tuple[str, Tensor]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Keep what a call receives; yields the tensors that others replace, with those."""
        real = [(slot, in_real_numbers(tensor)) for slot, tensor in received]
        matched = self._match(label, real, "in")
        theirs = self.given.get(label, {})
        for (_, tensor), (_, own), slot in zip(received, real, matched, strict=True):
            swapped = laid_out(theirs[slot], own) if slot in theirs else None
            if swapped is not None:
                yield tensor, swapped

    def _match(self, label: str, tensors: list[tuple[str, Tensor]], kind: str) -> list[str | None]:
        """Keep tensors under the reference's slots; what has none is left out or kept as it is."""
        known = self.given.get(label)
        if known is None:  # nothing to match with: the reference itself, or one call more
            for slot, tensor in tensors:
                self.found.tensors[self.name(label, slot)] = _copy(tensor)
            return [slot for slot, _ in tensors]
        theirs = {slot: t for slot, t in known.items() if slot.partition(".")[0] == kind}
        slots = matched_slots(tensors, theirs)
        alike = self.classes.get(label) == self.found.classes[label]
        for (own, tensor), match in zip(tensors, slots, strict=True):
            if match is not None:
                seen = laid_out(tensor, theirs[match])
                self.found.tensors[self.name(label, match)] = _copy(
                    tensor if seen is None else seen
                )
            elif alike:
                self.found.tensors[self.name(label, own)] = _copy(tensor)
            else:
                self.found.apart.append(Apart(label, own, _copy(tensor)))
        if not alike:
            missing = [slot for slot in theirs if slot not in slots]
            self.found.left_out += [self.name(label, slot) for slot in missing]
        return slots

    def _replacing(self, tensor: Tensor, theirs: Tensor) -> Tensor:
        lifted = self.precision if tensor.is_floating_point() else None
        dtype = lifted or in_real_numbers(tensor).dtype
        swapped = theirs.to(tensor.device, dtype, copy=True)
        swapped = self.change(swapped) if self.change else swapped
        return torch.view_as_complex(swapped) if tensor.is_complex() else swapped


def matched_slots(
    tensors: Sequence[tuple[str, Tensor]], theirs: Mapping[str, Tensor]
) -> list[str | None]:
    """The reference's slot of every tensor of a call; None of what has none.

    One in the same place with the same sizes, else the next in order with the same sizes: not
    angles where the other has their cosines. Of results, only where both sides have as many of
    these: else order does not tell which is which, as of six parts of a modulation of which another
    module hands on four.
    """
    slots: list[str | None] = [
        slot if slot in theirs and alike(tensor, theirs[slot]) else None for slot, tensor in tensors
    ]
    unmet = [slot for slot in theirs if slot not in slots]
    rest = [tensor for (_, tensor), slot in zip(tensors, slots, strict=True) if slot is None]
    for index, (own, tensor) in enumerate(tensors):
        if slots[index] is not None:
            continue
        like = [slot for slot in unmet if alike(tensor, theirs[slot])]
        many = sum(alike(other, tensor) for other in rest)
        if own.partition(".")[0] != "out" or len(like) == many:
            fitting = (s for s in like if not in_another_form(tensor, theirs[s]))
            slots[index] = next((slot for slot in fitting if slot not in slots), None)
    return slots


def alike(tensor: Tensor, reference: Tensor) -> bool:
    """Whether two tensors hold the same sizes in one order, or the same tokens.

    Dimensions of size 1 do not count; `b c f h w`, `b f h w c` and `b (f h w) c` hold the same.
    """
    return laid_out(tensor, reference) is not None


def laid_out(tensor: Tensor, reference: Tensor) -> Tensor | None:
    """A view of a tensor in the reference's layout; None where they hold other sizes."""
    if tensor.shape == reference.shape:
        return tensor
    if _sizes(tensor) == _sizes(reference):
        return tensor.reshape(reference.shape)
    if reference.ndim >= 4 and tensor.ndim == 3 and _sizes(_tokens(reference)) == _sizes(tensor):
        return tensor.transpose(1, 2).reshape(reference.shape)
    if tensor.ndim >= 4 and reference.ndim == 3 and _sizes(_tokens(tensor)) == _sizes(reference):
        return _tokens(tensor)
    if tensor.ndim >= 4 and reference.ndim == 3:
        flat = tensor.flatten(1, -2)
        return flat if _sizes(flat) == _sizes(reference) else None
    if reference.ndim >= 4 and tensor.ndim == 3:
        fits = _sizes(reference.flatten(1, -2)) == _sizes(tensor)
        return tensor.reshape(reference.shape) if fits else None
    return None


def _tokens(tensor: Tensor) -> Tensor:
    """`b c f h w` as `b (f h w) c`."""
    return tensor.flatten(2).transpose(1, 2)


def _sizes(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]


def _copy(tensor: Tensor) -> Tensor:
    return plain(tensor).to("cpu", copy=True).contiguous()


def replaced(nest: Any, swaps: Mapping[int, Tensor]) -> Any:
    """The nest with tensors replaced by identity; what is no tuple, list or dict stays as it is.

    Lists and dicts are changed in place: a module may write into them for its caller (a cache).
    """
    if isinstance(nest, torch.Tensor):
        return swaps.get(id(nest), nest)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(replaced(part, swaps) for part in nest))
    if isinstance(nest, tuple):
        return type(nest)(replaced(part, swaps) for part in nest)
    if isinstance(nest, list):
        nest[:] = [replaced(part, swaps) for part in nest]
    if type(nest) is dict:
        nest.update({key: replaced(part, swaps) for key, part in nest.items()})
    return nest


def benign_flows(
    model: torch.nn.Module,
    forward: Forward,
    reference: Flow,
    *,
    place: tuple[int, str],
    given: Flow | None = None,
    select: Container[str] | None = None,
    parts: Names = namesake,
    working: str,
) -> Iterator[NoiseRun]:
    """The noise floor of every module on its own: trusted forwards under harmless changes.

    Args:
        reference: The trusted forward's own flow.
        given: What its modules were given there, where that is another's.
        working: Precision of both sides; the model's rounding is measured against the next higher.
    """
    higher, pair = HIGHER.get(working), pair_of(working, working)

    def run(**options: Any) -> Flow:
        around: dict[str, Any] = {"place": place, "select": select, "parts": parts}
        return flow(model, forward, given=given or reference, **around, **options)

    def measured(kind: str, detail: str, found: Flow) -> NoiseRun:
        pairs = {
            name: set_against(name, tensor, reference.tensors[name])
            for name, tensor in found.tensors.items()
            if name in reference.tensors and tensor.shape == reference.tensors[name].shape
        }
        return measured_run(kind, detail, pair, pairs)

    if higher:
        dtype = getattr(torch, higher)
        with suppress(RuntimeError, ValueError, TypeError), converted(model, dtype):
            # A model that refuses another precision has one benign run less.
            yield measured("precision", f"against {higher}", run(precision=dtype))
    with math_kernel():
        yield measured("attention", "math kernel", run())
    if given is not None:  # another implementation's: it may well compute them so
        for seed in (0, 1):
            with OtherFunctions(seed):
                detail = f"exp, sin, ... as another library computes them, seed {seed}"
                yield measured("functions", detail, run())
    for seed in (0, 1):
        generator = torch.Generator("cpu").manual_seed(seed)
        yield measured(
            "jitter", f"one rounding on the inputs, seed {seed}", run(change=rounding(generator))
        )


def set_against(name: str, actual: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of a flow as distances take them: masks that are given hold infinities."""
    outward = key_of(name).outward
    return (actual, reference) if outward else without_endless(actual, reference)


def rounding(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        narrow = tensor.is_floating_point() and tensor.itemsize > 1
        return one_rounding(tensor, generator) if narrow else tensor

    return change
