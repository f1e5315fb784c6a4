"""Run a subject with every call fed what was recorded, judged by what it gives, and answered by it.

Nothing that a call gives reaches the next one, so that a difference shows where it is made: in what
a call gives, or in the code between two calls, where what arrives is not what was recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from traceback import extract_tb
from typing import Any

import torch

from truestep.calls.arguments import Arguments, arguments_of
from truestep.calls.blocks import BLOCK, state_in
from truestep.calls.boundaries import Arrival, watching
from truestep.calls.classes import Kind
from truestep.calls.keys import Key, Path, Side
from truestep.calls.pairing import Match, Matches, matched
from truestep.calls.rebuilding import (
    CannotBuildError,
    Fetch,
    Swaps,
    build,
    laid_out_as,
    laid_over,
    written_back,
)
from truestep.calls.recorder import RUN, held_tensors, scheduler_state, weight_dtype
from truestep.calls.recording import STATE, WRITTEN, CallRecording, host_copy, key
from truestep.calls.seen import Change, Forced, Plan, Seen, number
from truestep.calls.subject import Subject
from truestep.calls.values import Tree, dict_keys, encode, in_real_numbers, tensors
from truestep.errors import FOREIGN, TruestepError, one_line
from truestep.measure.distance import same_bits
from truestep.measure.plain import plain
from truestep.randomness import own_states, set_own_state
from truestep.recording.manifest import CallEntry


class Forcing:
    """An observer that answers every call from a recording."""

    def __init__(self, reference: CallRecording, plan: Plan) -> None:
        self.reference, self.plan = reference, plan
        self.result = Forced()
        self._came: Counter[tuple[str, str]] = Counter()
        self._packages: set[str] = set()
        self._last: Arrival | None = None
        self._updated = -1
        self._block = ""
        self._others: list[str] = []
        self._with_own: set[int] = set()
        self._own: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._judged = reference.judged_steps
        self._shapes = reference.shapes

    def run(self, subject: Subject) -> Forced:
        """Run a subject once; what it raises is part of what it shows."""
        parts = [*subject.components.values(), *(owner for owner, _ in subject.functions.values())]
        self._packages = packages_of(parts)
        try:
            with subject.code(), watching(subject, self, self.reference.methods):
                output = subject.run()
        except TruestepError:
            raise
        except FOREIGN as error:  # whatever a candidate raises is its outcome
            last = self._last
            after = f", after {last.component}.{last.method} was called" if last else ""
            self.result.raised = f"raised {one_line(error)}{after}"
            self.result.frames = extract_tb(error.__traceback__)
        else:
            for call in self.reference.by_method.get((RUN, RUN), ()):
                self._came[RUN, RUN] += 1
                self._keep(call, "out", matched(output, call.output, self._shapes.__getitem__))
        finally:
            for (_, name), (owner, value) in self._own.items():
                setattr(owner, name, value)
        self._ended()
        for method, calls in self.reference.by_method.items():
            if method[0] != BLOCK:  # code may be cut into other blocks
                self.result.missing += calls[self._came[method] :]
        return self.result

    def _ended(self) -> None:
        """The run is over; what did not come is counted next."""

    def __call__(self, arrival: Arrival) -> Any:
        """Answer a call."""
        self._block = arrival.block
        method = (arrival.component, arrival.method)
        calls = self.reference.by_method.get(method, [])
        number = self._came[method]
        self._came[method] += 1
        self._last = arrival
        if number >= len(calls):
            return self._unexpected(arrival)
        call = calls[number]
        if arrival.component == BLOCK:
            return self._run_block(arrival, call)
        if call.stage == "update" and call.step is not None:
            self._updated = call.step
        if arrival.kind is Kind.RANDOM:
            return self._drawn(arrival, call)
        arguments = arguments_of(arrival, call.parameters)
        notes, swaps = self._arguments(call, arguments)
        if arrival.kind is Kind.MODEL and not (call.live or notes or self.plan.made(call)):
            with suppress(CannotBuildError):
                return self._answer(arrival, call, arguments)
        output = self._make(arrival, call, arguments, swaps, "; ".join(notes))
        self._with_own |= {id(call)} if notes else set()
        again = [
            each
            for each in self.plan.again.get((*method, number), ())
            if id(each) not in self._with_own
        ]
        with kept_as_it_is(output) if again else nullcontext():
            for earlier in again:
                self._make_again(arrival, earlier, arguments)
        return output

    def _arguments(self, call: CallEntry, arguments: Arguments) -> tuple[list[str], Swaps]:
        """Compare arguments; say what cannot be replaced, and what replaces the others."""
        notes: list[str] = []
        replaced: dict[int, torch.Tensor] = {}
        numbers: dict[Path, float] = {}
        for name, value, tree in self._compared(call, arguments):
            matches = matched(value, tree, self._shapes.__getitem__, (name,))
            self._keep(call, "in", matches)
            notes += self._notes(matches)
            self._keep_words(call, matches)
            for match in matches.alike:
                self._replace(call, match, replaced, numbers)
        return notes, Swaps(replaced, numbers)

    def _compared(self, call: CallEntry, arguments: Arguments) -> Iterator[tuple[str, Any, Tree]]:
        """Arguments that are set against recorded ones: name, what came, what was recorded."""
        for name in dict.fromkeys([*call.arguments, *arguments.values]):
            value = arguments.values.get(name, arguments.defaults.get(name))
            tree = call.arguments.get(name)
            if name not in call.arguments and value is arguments.defaults.get(name):
                continue
            if name not in call.arguments and name in arguments.defaults:
                tree = encode(arguments.defaults[name], _no_name)
            yield name, value, tree

    def _notes(self, matches: Matches) -> list[str]:
        """What of an argument cannot be replaced by what was recorded."""
        odd = [_odd_text(match, self._shapes) for match in matches.odd]
        return odd + [text for _, text in matches.differences]

    def _replace(
        self,
        call: CallEntry,
        match: Match,
        replaced: dict[int, torch.Tensor],
        numbers: dict[Path, float],
    ) -> None:
        if isinstance(match.actual, torch.Tensor):
            node = match.recorded
            if isinstance(node, str):
                replaced[id(match.actual)] = self._in_place_of(match.actual, node, self.plan.given)
        elif isinstance(match.actual, float) and isinstance(match.recorded, float | int):
            numbers[match.own or match.path] = float(match.recorded)

    def _in_place_of(
        self, actual: torch.Tensor, name: str, change: Change | None, rows: Sequence[int] = ()
    ) -> torch.Tensor:
        """A recorded tensor, or some rows of it, for one that is there; that where nothing differs.

        Views of it may be kept, and its layout in memory may decide which kernel runs.
        """
        recorded = self.reference.recording[name]
        recorded = recorded[list(rows)] if rows else recorded
        precision = self._raised(recorded)
        same = change is None and precision is None
        real = in_real_numbers(plain(actual))
        if same and same_bits(real, recorded.to(actual.device)):
            return actual
        if actual.is_complex():
            changed = recorded.clone() if change is None else change(recorded.clone())
            return torch.view_as_complex(changed).to(actual.device, actual.dtype)
        value = recorded.reshape(actual.shape).to(precision or recorded.dtype, copy=True)
        if precision is None and actual.is_floating_point() == recorded.is_floating_point():
            value = value.to(actual.dtype)
        value = value if change is None else change(value)
        return laid_out_as(value, actual).to(actual.device)

    def _raised(self, recorded: torch.Tensor) -> torch.dtype | None:
        precision = self.plan.precision
        if precision is None or not recorded.is_floating_point():
            return None
        return precision if recorded.itemsize <= precision.itemsize else None

    def _make(
        self, arrival: Arrival, call: CallEntry, arguments: Arguments, swaps: Swaps, note: str
    ) -> Any:
        """Make a call on recorded inputs, and hand on what was recorded."""
        given = {n: laid_over(v, swaps, (n,)) for n, v in arguments.values.items()}
        args, kwargs = arguments.split(given)
        self.result.made += arrival.kind is Kind.MODEL
        output = self.plan.by(call, arrival.proceed)(*args, **kwargs)
        state = scheduler_state(arrival)
        matches = matched(output, call.output, self._shapes.__getitem__)
        effect = bool(note)
        self._keep(call, "out", matches, note=note, effect=effect)
        for name, tree in call.written.items():
            if name in given:
                inner = matched(given[name], tree, self._shapes.__getitem__, (WRITTEN, name))
                self._keep(call, "out", inner, note=note, effect=effect)
        self._write_back(call, arguments)
        self._force_state(arrival, call, state, note)
        return laid_over(output, self._handed(matches))

    def _handed(self, matches: Matches) -> Swaps:
        replaced: dict[int, torch.Tensor] = {}
        numbers: dict[Path, float] = {}
        for match in matches.alike:
            if isinstance(match.actual, torch.Tensor) and isinstance(match.recorded, str):
                replaced[id(match.actual)] = self._in_place_of(
                    match.actual, match.recorded, self.plan.handed
                )
            elif isinstance(match.actual, float) and isinstance(match.recorded, float):
                numbers[match.own or match.path] = match.recorded
        return Swaps(replaced, numbers)

    def _make_again(self, arrival: Arrival, call: CallEntry, arguments: Arguments) -> None:
        """Make an earlier call once more, with what cannot be built taken from the present one."""
        given = dict(arguments.values)
        fetch = self._fetch(arrival, call, self.plan.given)
        for name, tree in call.arguments.items():
            with suppress(CannotBuildError):
                given[name] = build(tree, fetch, self._packages)
        args, kwargs = arguments.split(given)
        output = arrival.proceed(*args, **kwargs)
        for match in matched(output, call.output, self._shapes.__getitem__).alike:
            if isinstance(match.actual, torch.Tensor):
                self.result.again[str(self._key(call, "out", match.path))] = host_copy(match.actual)

    def _fetch(self, arrival: Arrival, call: CallEntry, change: Change | None) -> Fetch:
        """What gets recorded tensors for a call: where it computes, and in its dtype."""
        device = _device(arrival)
        dtype = weight_dtype(arrival.owner)
        other = getattr(torch, dtype) if dtype and call.dtype and dtype != call.dtype else None

        def fetch(name: str) -> torch.Tensor:
            recorded = self.reference.recording[name]
            value = recorded.to(self._raised(recorded) or recorded.dtype, copy=True)
            if other is not None and str(recorded.dtype) == f"torch.{call.dtype}":
                value = value.to(other)
            return (value if change is None else change(value)).to(device)

        return fetch

    def _answer(self, arrival: Arrival, call: CallEntry, arguments: Arguments) -> Any:
        """Answer a call without making it."""
        fetch = self._fetch(arrival, call, self.plan.handed)
        output = build(call.output, fetch, self._packages)
        for name, tree in call.written.items():
            if name in arguments.values:
                written_back(arguments.values[name], build(tree, fetch, self._packages))
        for name, stored in call.random:
            generator = arguments.values.get(name) if name else None
            state = self.reference.recording[stored].clone()
            if isinstance(generator, torch.Generator):
                generator.set_state(state)
            elif name in own_states():
                set_own_state(name, state)
        return output

    def _write_back(self, call: CallEntry, arguments: Arguments) -> None:
        for name, tree in call.written.items():
            if name not in arguments.values:
                continue
            with suppress(CannotBuildError):
                written_back(arguments.values[name], build(tree, self._copy, self._packages))

    def _copy(self, name: str) -> torch.Tensor:
        return self.reference.recording[name].clone()

    def _force_state(
        self, arrival: Arrival, call: CallEntry, state: Mapping[str, Any], note: str
    ) -> None:
        """Compare what a scheduler holds, then make it hold what was recorded."""
        for name, tree in call.state.items():
            matches = matched(state.get(name), tree, self._shapes.__getitem__, (STATE, name))
            self._keep(call, "out", matches, note=note)
            for match in matches.alike:
                if isinstance(match.actual, torch.Tensor) and isinstance(match.recorded, str):
                    value = self._in_place_of(match.actual, match.recorded, None)
                    if value is not match.actual:
                        self._hold(arrival.owner, name, value)
            for match in matches.odd:
                if isinstance(match.actual, torch.Tensor) and isinstance(match.recorded, str):
                    recorded = self._copy(match.recorded)
                    self._hold(arrival.owner, name, recorded.to(match.actual.device))
            if type(tree) is int and type(state.get(name)) is int and state[name] != tree:
                self._hold(arrival.owner, name, tree)

    def _hold(self, owner: Any, name: str, value: Any) -> None:
        """Make a scheduler hold a value until the run ends."""
        self._own.setdefault((id(owner), name), (owner, getattr(owner, name)))
        setattr(owner, name, value)

    def _drawn(self, arrival: Arrival, call: CallEntry) -> Any:
        """Let random numbers be drawn, so that generators move; hand on the recorded ones."""
        output = arrival.proceed(*arrival.args, **arrival.kwargs)
        matches = matched(output, call.output, self._shapes.__getitem__)
        self._keep(call, "out", matches)
        handed = laid_over(output, self._handed(matches))
        in_place = arrival.args and arrival.args[0] is output
        return output.copy_(handed) if in_place and handed is not output else handed

    def _run_block(self, arrival: Arrival, call: CallEntry) -> Any:
        """Run a block, and set what it wrote into the state to what was recorded."""
        output = arrival.proceed(*arrival.args, **arrival.kwargs)
        held = state_in(output)
        if held is None:
            return output
        self._block = arrival.block
        names = dict_keys(call.output)
        value = {name: held[name] for name in names if name in held}
        matches = matched(value, call.output, self._shapes.__getitem__)
        self._keep(call, "out", matches)
        laid_over(value, self._handed(matches))
        for name, part in value.items():
            if part is not held[name]:
                held[name] = part
        return output

    def _unexpected(self, arrival: Arrival) -> Any:
        output = arrival.proceed(*arrival.args, **arrival.kwargs)
        if arrival.component == BLOCK:
            self._others += [arrival.method] if arrival.method not in self._others else []
            return output
        if any(tensors(encode(output, _no_name))):
            self.result.unexpected.append((arrival.component, arrival.method))
        return output

    def _key(self, call: CallEntry, side: Side, path: Path) -> Key:
        return key(call, side, path, self.plan.raised)

    def _keep_words(self, call: CallEntry, matches: Matches) -> None:
        for path, text in matches.differences:
            place = self._key(call, "in", path)
            self.result.seen.append(Seen(place, call.context, None, None, odd="words", note=text))

    def _keep(
        self, call: CallEntry, side: Side, matches: Matches, *, note: str = "", effect: bool = False
    ) -> None:
        if self._judged is not None and call.step is not None and call.step not in self._judged:
            return  # only what the next steps need was kept of it
        alike = [(match, False) for match in matches.alike]
        for match, odd in [*alike, *((match, True) for match in matches.odd)]:
            self.result.seen.append(
                Seen(
                    key=self._key(call, side, match.path),
                    context=call.context,
                    actual=self._kept(match, odd),
                    recorded=match.recorded,
                    odd=("unreadable" if match.unreadable else "shape") if odd else "",
                    effect=effect and not odd,
                    note=_odd_text(match, self._shapes) if odd else note,
                    block=self._code(side),
                )
            )

    def _code(self, side: Side) -> str:
        """Where the code is that made what is seen, as far as the place of it does not say that."""
        block = f"in block {self._block}" if side == "in" and self._block else ""
        if not self._others or not (block or self._block):
            return block
        others = f"or in {', '.join(self._others[:3])}, which the reference has not"
        return f"{block} {others}".strip()

    def _kept(self, match: Match, odd: bool) -> torch.Tensor | None:
        """A host copy of a tensor; the recorded one itself where no bit differs."""
        whole = not odd and not self.plan.copies
        if whole and isinstance(match.actual, torch.Tensor) and isinstance(match.recorded, str):
            recorded = self.reference.recording[match.recorded]
            actual = in_real_numbers(plain(match.actual))
            if same_bits(actual, recorded.to(actual.device)):
                return recorded
        return copy_of(match)


@contextmanager
def kept_as_it_is(output: Any) -> Iterator[None]:
    """Give the tensors of an output the values back that they had: a candidate may answer every
    call in one buffer of its own, as a captured graph does, and what we call again is ours."""
    found = [*held_tensors(output).values()]
    before = [plain(tensor).clone() for tensor in found]
    yield
    for tensor, value in zip(found, before, strict=True):
        now = plain(tensor)
        if not same_bits(in_real_numbers(now), in_real_numbers(value)):
            with torch.inference_mode(tensor.is_inference()):  # elsewhere such are not written to
                now.copy_(value)


def packages_of(parts: Iterable[Any]) -> set[str]:
    """Packages of which a call of these parts may be given objects."""
    names = {c.__module__.partition(".")[0] for part in parts for c in type(part).__mro__}
    return names - {"builtins", "torch"}


def copy_of(match: Match) -> torch.Tensor | None:
    """A host copy of what came; a number as a tensor; None where nothing came."""
    if match.actual is None:
        return None
    if not isinstance(match.actual, torch.Tensor):
        return number(match.actual)
    return host_copy(match.actual)


def _no_name(path: Path, tensor: torch.Tensor) -> str:
    return ""


def _odd_text(match: Match, shapes: Mapping[str, tuple[int, ...]]) -> str:
    name = ".".join(match.path)
    if match.unreadable:
        return f"{name} came as a {match.unreadable}, which is not read as numbers"
    if match.actual is None:
        return f"{name} is not given"
    if match.recorded is None:
        return f"{name} was not given"
    mine = list(match.actual.shape) if isinstance(match.actual, torch.Tensor) else "a number"
    theirs = list(shapes[match.recorded]) if isinstance(match.recorded, str) else "a number"
    return f"{name} has shape {mine}, recorded {theirs}"


def _device(arrival: Arrival) -> torch.device:
    """Where a call's outputs belong: where its inputs are."""
    values = [*arrival.args, *arrival.kwargs.values()]
    given = (value.device for value in values if isinstance(value, torch.Tensor))
    weights = arrival.owner.parameters() if isinstance(arrival.owner, torch.nn.Module) else ()
    held = (weight.device for weight in weights if weight.device.type != "meta")
    return next(given, next(held, torch.device("cpu")))
