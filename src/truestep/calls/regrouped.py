"""Run a candidate that groups guidance passes otherwise than they were recorded.

Its calls are fed and answered in its own layout; each row is judged as part of the recorded call
that it stands for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from truestep.calls.arguments import Arguments, arguments_of
from truestep.calls.boundaries import Arrival
from truestep.calls.forcing import Forcing, kept_as_it_is
from truestep.calls.keys import Path, Side
from truestep.calls.layouts import (
    Layout,
    Layouts,
    Method,
    Slot,
    rows_arrived,
    sizes_of,
)
from truestep.calls.pairing import Match, Matches, Taken, matched
from truestep.calls.passes import names_of
from truestep.calls.rebuilding import CannotBuildError, Fetch, Swaps, build, laid_out_as, laid_over
from truestep.calls.recorder import held_tensors
from truestep.calls.recording import CallRecording, host_copy
from truestep.calls.seen import Change, Plan
from truestep.calls.values import Tree, in_real_numbers, rebuilt, renamed, tensors
from truestep.measure.distance import same_bits
from truestep.recording.manifest import CallEntry


@dataclass(frozen=True)
class _Part:
    """What of an arriving call stands for one recorded call.

    Attributes:
        call: The recorded one.
        number: Which of its step.
        at: Rows of the arriving batch, in the order of the recorded ones.
        rows: Those.
        batch, size: Rows of the two calls.
    """

    call: CallEntry
    number: int
    at: tuple[int, ...]
    rows: tuple[int, ...]
    batch: int
    size: int
    origins: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.rows) == self.size

    def taking(self, recorded: Mapping[Path, tuple[int, ...]]) -> Taken:
        """Takes the part's rows of tensors that have a row for each sample.

        Args:
            recorded: Shapes of the recorded tensors by their places.
        """

        def take(path: Path, tensor: torch.Tensor) -> torch.Tensor:
            shape = recorded.get(path, ())
            split = tensor.ndim and tensor.shape[0] == self.batch and shape[:1] == (self.size,)
            if not split or len(shape) != in_real_numbers(tensor).ndim:
                return tensor
            same = self.at == tuple(range(self.batch))
            taken = tensor.view_as(tensor) if same else tensor[list(self.at)]
            self.origins[id(taken)] = tensor, taken
            return taken

        return take


@dataclass
class _Fills:
    """Recorded rows for tensors that arrived."""

    pieces: dict[int, tuple[torch.Tensor, list[tuple[tuple[int, ...], torch.Tensor]]]] = field(
        default_factory=dict
    )
    whole: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, part: _Part, actual: torch.Tensor, value: torch.Tensor) -> None:
        """Note a value for what a part took."""
        original, _ = part.origins.get(id(actual), (None, None))
        if original is None:
            self.whole[id(actual)] = value
        elif value is not actual:
            self.pieces.setdefault(id(original), (original, []))[1].append((part.at, value))

    def tensors(self) -> dict[int, torch.Tensor]:
        """By the identity of what arrived: what takes its place."""
        filled = dict(self.whole)
        for identity, (original, pieces) in self.pieces.items():
            value = original.detach().to(pieces[0][1].dtype, copy=True)
            for at, rows in pieces:
                value[list(at)] = rows.to(value.device)
            filled[identity] = laid_out_as(value, original)
        return filled


@dataclass
class _Group:
    """The calls of one step, as far as they came."""

    calls: list[CallEntry]
    layout: Layout
    arrived: int = 0
    pieces: dict[tuple[int, Side], list[tuple[_Part, Matches]]] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.calls[0].step or 0

    def parts(self) -> list[_Part]:
        """Of the next call: its parts, in the order of the recorded calls."""
        slots = self.layout.arrivals[self.arrived]
        self.arrived += 1
        parts = []
        for number in sorted({number for number, _ in slots}):
            rows = sorted((row, at) for at, (n, row) in enumerate(slots) if n == number)
            parts.append(
                _Part(
                    call=self.calls[number],
                    number=number,
                    at=tuple(at for _, at in rows),
                    rows=tuple(row for row, _ in rows),
                    batch=len(slots),
                    size=self.layout.recorded[number],
                )
            )
        return parts

    def came(self, number: int, side: Side) -> int:
        """How many rows of a recorded call came."""
        return sum(len(part.rows) for part, _ in self.pieces.get((number, side), ()))


class Regrouped(Forcing):
    """Answers calls that come in a layout of their own."""

    def __init__(self, reference: CallRecording, plan: Plan, layouts: Layouts) -> None:
        super().__init__(reference, plan)
        self._layouts = layouts
        self._methods = {method for method, _ in layouts}
        self._open: dict[Method, _Group] = {}
        self._names = names_of(reference)

    def __call__(self, arrival: Arrival) -> Any:
        """Answer a call."""
        method = (arrival.component, arrival.method)
        group = self._group(method) if method in self._methods else None
        if group is None:
            return super().__call__(arrival)
        self._last, self._block = arrival, arrival.block
        arguments = arguments_of(arrival, group.calls[0].parameters)
        parts = group.parts()
        rows = rows_arrived(arguments, group.calls[0], self._shapes.__getitem__)
        if not parts or rows != parts[0].batch:
            return self._unexpected(arrival)
        output = self._in_layout(arrival, arguments, group, parts)
        if group.arrived == len(group.layout.arrivals):
            with kept_as_it_is(output):
                self._repeat(arrival, arguments, group)
        return output

    def _ended(self) -> None:
        for method in [*self._open]:
            self._close(method)

    def _group(self, method: Method) -> _Group | None:
        """The calls that a call of a method now belongs to; None where they come as recorded."""
        group = self._open.get(method)
        if group and (group.arrived == len(group.layout.arrivals) or group.step <= self._updated):
            self._close(method)
            group = None
        calls = self.reference.by_method[method]
        while group is None and self._came[method] < len(calls):
            step = calls[self._came[method]].step
            same = [call for call in calls[self._came[method] :] if call.step == step]
            sizes = sizes_of(same, self._shapes.__getitem__)
            layout = None if step is None else self._layouts.get((method, sizes))
            if layout is None:
                return None
            group = self._open[method] = _Group(same, layout)
            if group.step <= self._updated:  # nothing came at this step
                self._close(method)
                group = None
        return group

    def _close(self, method: Method) -> None:
        group = self._open.pop(method)
        self._came[method] += len(group.calls)
        for number, (call, size) in enumerate(zip(group.calls, group.layout.recorded, strict=True)):
            pieces = group.pieces.get((number, "in"), ())
            came = {row for part, _ in pieces for row in part.rows}
            if len(came) < size:
                self.result.missing.append(call)
            if 0 < len(came) < size:
                names = self._names.get((*method, call.call), [""] * size)
                lost = {names[row] for row in range(size) if row not in came} - {""}
                which = f" ({', '.join(sorted(lost))})" if lost else ""
                text = f"{size - len(came)} of the {size} rows of its batch did not come{which}"
                self.result.parts[id(call)] = text

    def _in_layout(
        self, arrival: Arrival, arguments: Arguments, group: _Group, parts: Sequence[_Part]
    ) -> Any:
        notes, swaps = self._rows_given(arguments, group, parts)
        calls = [part.call for part in parts]
        if not (notes or any(call.live or self.plan.made(call) for call in calls)):
            with suppress(CannotBuildError):
                return self._rows_answered(arrival, parts)
        given = {n: laid_over(v, swaps, (n,)) for n, v in arguments.values.items()}
        args, kwargs = arguments.split(given)
        self.result.made += 1
        output = self.plan.by(calls[0], arrival.proceed)(*args, **kwargs)
        fills, numbers = _Fills(), dict[Path, float]()
        for part in parts:
            matches = self._matched(part, output, part.call.output, ())
            self._fill(part, matches, self.plan.handed, fills, numbers)
            self._judge(group, part, "out", matches, note="; ".join(notes))
        output = laid_over(output, Swaps(fills.tensors(), numbers))
        self._with_own |= {id(call) for call in calls} if notes else set()
        return output

    def _repeat(self, arrival: Arrival, arguments: Arguments, group: _Group) -> None:
        """Make earlier calls once more, in the candidate's layout."""
        method = (arrival.component, arrival.method)
        numbers = range(self._came[method], self._came[method] + len(group.calls))
        earlier = [call for n in numbers for call in self.plan.again.get((*method, n), ())]
        for step in dict.fromkeys(call.step for call in earlier):
            calls = [call for call in self.reference.by_method[method] if call.step == step]
            sizes = sizes_of(calls, self._shapes.__getitem__)
            own = any(id(call) in self._with_own for call in calls)
            if own or sizes != group.layout.recorded:
                continue
            again = _Group(calls, group.layout)
            for _ in again.layout.arrivals:
                self._make_rows_again(arrival, arguments, again)

    def _make_rows_again(self, arrival: Arrival, arguments: Arguments, again: _Group) -> None:
        parts = again.parts()
        if not parts:
            return
        given, held = dict(arguments.values), held_tensors(arguments.values)
        calls = [part.call for part in parts]
        split = {path for path, t in held.items() if t.ndim and t.shape[0] == parts[0].batch}
        for name in calls[0].arguments:
            trees = [call.arguments[name] for call in calls]
            with suppress(CannotBuildError):
                fetch = self._fetch(arrival, calls[0], self.plan.given)
                given[name] = self.from_rows(trees, _slots(parts), fetch, (name,), split)
        args, kwargs = arguments.split(given)
        output = arrival.proceed(*args, **kwargs)
        for part in parts:
            pieces = again.pieces.setdefault((part.number, "out"), [])
            pieces.append((part, self._matched(part, output, part.call.output, ())))
            if again.came(part.number, "out") == part.size:
                for match in self._joined(pieces).alike:
                    if isinstance(match.actual, torch.Tensor):
                        key = self._key(part.call, "out", match.path)
                        self.result.again[str(key)] = host_copy(match.actual)

    def _rows_given(
        self, arguments: Arguments, group: _Group, parts: Sequence[_Part]
    ) -> tuple[list[str], Swaps]:
        """Compare arguments row by row; say what cannot be replaced, and what replaces the rest."""
        notes: list[str] = []
        fills, numbers = _Fills(), dict[Path, float]()
        for part in parts:
            whole = Matches()
            for name, value, tree in self._compared(part.call, arguments):
                matches = self._matched(part, value, tree, (name,))
                notes += self._notes(matches)
                self._keep_words(part.call, matches)
                self._fill(part, matches, self.plan.given, fills, numbers)
                whole.alike += matches.alike
                whole.odd += matches.odd
            self._judge(group, part, "in", whole)
        return list(dict.fromkeys(notes)), Swaps(fills.tensors(), numbers)

    def _matched(self, part: _Part, value: Any, tree: Tree, prefix: Path) -> Matches:
        """Compare a part's rows of a value with a recorded tree."""
        places = {(*prefix, *path): self._shapes[name] for path, name in tensors(tree)}

        def shape(name: str) -> tuple[int, ...]:
            recorded = self._shapes[name]
            split = not part.whole and recorded[:1] == (part.size,)
            return (len(part.rows), *recorded[1:]) if split else recorded

        return matched(value, tree, shape, prefix, part.taking(places))

    def _fill(
        self,
        part: _Part,
        matches: Matches,
        change: Change | None,
        fills: _Fills,
        numbers: dict[Path, float],
    ) -> None:
        for match in matches.alike:
            if isinstance(match.actual, torch.Tensor) and isinstance(match.recorded, str):
                rows = () if part.whole or id(match.actual) not in part.origins else part.rows
                value = self._in_place_of(match.actual, match.recorded, change, rows)
                fills.add(part, match.actual, value)
            elif isinstance(match.actual, float) and isinstance(match.recorded, float | int):
                numbers[match.own or match.path] = float(match.recorded)

    def _judge(
        self, group: _Group, part: _Part, side: Side, matches: Matches, *, note: str = ""
    ) -> None:
        """Keep what is compared of a recorded call once all of its rows came."""
        pieces = group.pieces.setdefault((part.number, side), [])
        pieces.append((part, matches))
        if group.came(part.number, side) == part.size:
            self._keep(part.call, side, self._joined(pieces), note=note, effect=bool(note))

    def _joined(self, pieces: Sequence[tuple[_Part, Matches]]) -> Matches:
        """What came of a recorded call, in its order."""
        if len(pieces) == 1:
            return pieces[0][1]
        paths = dict.fromkeys(match.path for _, matches in pieces for match in matches.alike)
        joined = Matches(odd=[match for _, matches in pieces for match in matches.odd])
        odd = {match.path for match in joined.odd}
        for path in paths:
            found = [(p, m) for p, matches in pieces for m in matches.alike if m.path == path]
            if path not in odd:
                joined.alike.append(self._one(found))
        return joined

    def _one(self, found: Sequence[tuple[_Part, Match]]) -> Match:
        """Rows of several calls as one tensor; of what belongs to all rows the one that differs."""
        first = found[0][1]
        rows = [
            (row, match.actual[at])
            for part, match in found
            if isinstance(match.actual, torch.Tensor) and id(match.actual) in part.origins
            for at, row in enumerate(part.rows)
        ]
        if rows:
            whole = torch.stack([tensor for _, tensor in sorted(rows, key=lambda row: row[0])])
            return replace(first, actual=whole)
        return next((match for _, match in found if self._differs(match)), first)

    def _differs(self, match: Match) -> bool:
        if isinstance(match.actual, torch.Tensor) and isinstance(match.recorded, str):
            recorded = self.reference.recording[match.recorded]
            return not same_bits(in_real_numbers(match.actual), recorded.to(match.actual.device))
        return match.actual != match.recorded

    def _rows_answered(self, arrival: Arrival, parts: Sequence[_Part]) -> Any:
        """Answer a call with recorded rows, without making it."""
        fetch = self._fetch(arrival, parts[0].call, self.plan.handed)
        return self.from_rows([part.call.output for part in parts], _slots(parts), fetch)

    def from_rows(
        self,
        trees: Sequence[Tree],
        rows: Sequence[Slot],
        fetch: Fetch,
        prefix: Path = (),
        split: Collection[Path] | None = None,
    ) -> Any:
        """A value made of rows of what recorded calls were given, or gave.

        Args:
            trees: Of each of the calls.
            rows: Which of the trees, and which row of it.
            fetch: Tensors by name.
            prefix: Goes before every path.
            split: Where tensors have a row for each sample; None is everywhere.
        """
        names = [{"/".join(path): (path, n) for path, n in tensors(tree)} for tree in trees]

        def fetch_rows(place: str) -> torch.Tensor:
            path, name = names[0][place]
            if split is not None and (*prefix, *path) not in split:
                return fetch(name)
            held = [fetch(named[place][1]) for named in names]
            return torch.stack([held[tree][row] for tree, row in rows])

        tree = renamed(trees[0], lambda path, name: "/".join(path))
        return build(_resized(tree, len(rows)), fetch_rows, self._packages)


def _slots(parts: Sequence[_Part]) -> list[Slot]:
    """Of each row of an arriving call: which of its parts, and which recorded row."""
    slots = sorted(
        (at, number, row)
        for number, part in enumerate(parts)
        for at, row in zip(part.at, part.rows, strict=True)
    )
    return [(number, row) for _, number, row in slots]


def _resized(tree: Tree, rows: int) -> Tree:
    """A tree whose dropped tensors have another number of rows."""
    if not isinstance(tree, dict):
        return tree
    if "dropped" in tree:
        return {**tree, "dropped": [rows, *tree["dropped"][1:]]}
    return rebuilt(tree, lambda part, name: _resized(part, rows))
