"""From what a forced run showed to rows, and to the place that a person is told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from truestep.calls.blocks import BLOCK
from truestep.calls.boundaries import FUNCTIONS, RANDOM
from truestep.calls.keys import Key, Path, dotted, key_of
from truestep.calls.passes import Names, failing_pass, names_of
from truestep.calls.precision import widened
from truestep.calls.recorder import RUN
from truestep.calls.recording import RANDOM_STATE, STATE, WRITTEN, CallRecording
from truestep.calls.seen import END, Forced, Seen, number
from truestep.judge.floor import Limits
from truestep.judge.repeats import differing, with_second_answers
from truestep.judge.rows import build_comparison, compare_tensors, tensor_info
from truestep.keys import PRECISIONS, Address
from truestep.recording.manifest import CallEntry
from truestep.verdict import Comparison, Divergence, Row, Side, TensorInfo, Verdict

RAISED = "(raised)"
"""End of the name of the row that says what a subject raised."""

UNEXPECTED = "(unexpected)"
"""The same of the row that says which calls came that were not recorded."""

WRONG = (Verdict.DRIFTED, Verdict.INVALID)


class Recorded(Mapping[str, torch.Tensor]):
    """Recorded tensors by the keys under which they were seen, read when they are asked for."""

    def __init__(self, reference: CallRecording, seen: Iterable[Seen]) -> None:
        self._recording = reference.recording
        self._names: dict[str, str | float] = {}
        for tensor in seen:
            if not tensor.odd and tensor.actual is not None and tensor.recorded is not None:
                self._names[str(tensor.key)] = tensor.recorded

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._names[name]
        if isinstance(stored, float | int):
            return number(stored)
        if name in self._recording:
            return self._recording[name]
        precision, tensor = name.partition("/")[0], self._recording[stored]
        return widened(tensor, getattr(torch, precision)) if precision in PRECISIONS else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def pairs(reference: CallRecording, result: Forced) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What can be set against each other, by key: what came, and what was recorded."""
    recorded = Recorded(reference, result.seen)
    return {
        name: _comparable(seen, seen.actual, recorded[name])
        for seen in result.seen
        if (name := str(seen.key)) in recorded and seen.actual is not None
    }


def sides_of(
    both: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Pairs as two sides: what came, and what was recorded."""
    return (
        {name: actual for name, (actual, _) in both.items()},
        {name: recorded for name, (_, recorded) in both.items()},
    )


def _comparable(
    seen: Seen, actual: torch.Tensor, recorded: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two sides as distances take them.

    A number and a tensor of one element are set against each other.
    """
    if actual.numel() == recorded.numel() == 1:
        actual = actual.reshape(recorded.shape)
    return (actual, recorded) if seen.key.side == "out" else without_endless(actual, recorded)


def without_endless(
    actual: torch.Tensor, recorded: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is given to both sides, without the infinities that both hold in the same places.

    Masks have them: the rest is compared.
    """
    if not recorded.is_floating_point() or recorded.itemsize < 2:
        return actual, recorded
    endless = ~torch.isfinite(recorded)
    if actual.shape != recorded.shape or not bool(endless.any()):
        return actual, recorded
    kept = actual[endless].double().nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0)
    if not kept.equal(recorded[endless].double().nan_to_num(nan=2.0, posinf=1.0, neginf=-1.0)):
        return actual, recorded
    return actual.masked_fill(endless, 0.0), recorded.masked_fill(endless, 0.0)


def rows_of(reference: CallRecording, result: Forced, limits: Limits) -> list[Row]:
    """Judge a forced run.

    Returns:
        A row for every tensor, in the order in which they came, then what did not come.
    """
    both = pairs(reference, result)
    first, expected = sides_of(both)
    contexts = {str(seen.key): seen.context for seen in result.seen}
    rows = compare_tensors(
        first,
        expected,
        describe=lambda name: _address(name, contexts.get(name)),
        limits=limits,
    )
    otherwise = differing(first, result.again, limits)
    rows = with_second_answers(rows, result.again, expected, otherwise, limits)
    names = names_of(reference)
    judged = {row.name: _with_pass(row, names, both) for row in rows}
    ordered: list[Row] = []
    for seen in result.seen:
        row = _in_block(judged.get(str(seen.key)), seen.block)
        if seen.odd or row is None:
            ordered.append(_odd_row(reference, seen))
        elif isinstance(seen.recorded, float | int) and not row.verdict.passed:
            note = f"{_number(seen.actual)}, recorded {seen.recorded:g}"
            ordered.append(row.model_copy(update={"note": note}))
        elif seen.note:
            note = "; ".join(part for part in (row.note, seen.note) if part)
            ordered.append(row.model_copy(update={"note": note}))
        else:
            ordered.append(row)
    ordered = _by_effect(ordered, result.seen)
    if result.raised:
        return [*ordered, _raised_row(result)]
    missing = [_missing_row(call, result.parts.get(id(call), "")) for call in result.missing]
    return [*ordered, *missing, *_unexpected_rows(result)]


def _in_block(row: Row | None, block: str) -> Row | None:
    """A row that fails, with the blocks in whose code it does."""
    if row is None or row.verdict.passed or not block:
        return row
    note = "; ".join(part for part in (row.note, block) if part)
    return row.model_copy(update={"note": note})


def _with_pass(
    row: Row, names: Names, both: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Row:
    """A row that fails with the pass of its batch that does, where the call does not say it."""
    if row.verdict.passed or row.branch is not None or row.name not in both:
        return row
    branch = failing_pass(names, key_of(row.name), *both[row.name])
    return row if branch is None else row.model_copy(update={"branch": branch})


def _number(actual: torch.Tensor | None) -> str:
    return "nothing" if actual is None else f"{float(actual):g}"


def _address(name: str, context: str | None) -> Address:
    key = key_of(name)
    stage = key.stage
    inner = key.side == "in" or key.path[:1] == (STATE,)
    return Address(stage, step=key.step, branch=context, fqn=_caller(key), inner=inner)


def _caller(key: Key) -> str:
    if key.component == BLOCK:
        return f"block {key.method}"
    return key.method if key.component in (FUNCTIONS, RUN) else f"{key.component}.{key.method}"


def _odd_row(reference: CallRecording, seen: Seen) -> Row:
    """A row of what cannot be set against each other; its effect decides."""
    recorded = reference.recording[seen.recorded] if isinstance(seen.recorded, str) else None
    no_tensor = TensorInfo(dtype="object", shape=())
    schedule = seen.key.stage == "schedule"
    return Row(
        name=str(seen.key),
        verdict=Verdict.DRIFTED if schedule else Verdict.INCOMPARABLE,
        stage=seen.key.stage,
        step=seen.key.step,
        branch=seen.context,
        fqn=_caller(seen.key),
        actual=tensor_info(seen.actual) or no_tensor,
        reference=tensor_info(recorded) or no_tensor,
        note=seen.note,
    )


def _by_effect(rows: list[Row], seen: Sequence[Seen]) -> list[Row]:
    """Judge what cannot be set against each other by what was made from it.

    Of other sizes: by everything that was made of what could not be replaced, from there on; where
    nothing was, by what later calls are given. Of words: by what their own call gave, where that
    says something. What cannot be read may be given to all later calls unread: what those are given
    beside it says nothing of it.
    """
    decided = list(rows)
    for index, tensor in enumerate(seen):
        if not tensor.odd or rows[index].verdict is not Verdict.INCOMPARABLE:
            continue
        if tensor.key.component == RUN and tensor.key.side == "out":
            continue  # nothing is made of what a run ends with
        effects = [i for i in range(index, len(seen)) if seen[i].effect]
        if tensor.odd == "words":
            same = [i for i in effects if _call(seen[i].key) == _call(tensor.key)]
            effects = same or effects
        if not effects and tensor.odd != "unreadable":
            effects = [i for i in range(index, len(seen)) if _follows(seen[i])]
        if not effects:
            continue
        wrong = [i for i in effects if rows[i].verdict in WRONG]
        worst = max(wrong or effects, key=lambda i: rows[i].ratio or 0.0)
        verdict = Verdict.worst(rows[i].verdict for i in effects)
        verdict = verdict if verdict in (*WRONG, Verdict.INCONCLUSIVE) else Verdict.EQUIVALENT
        text = f"{tensor.note}; judged by its effect on {_seen_place(seen[worst])}"
        decided[index] = rows[index].model_copy(
            update={
                "verdict": Verdict.DRIFTED if verdict is Verdict.INVALID else verdict,
                "ratio": rows[worst].ratio,
                "ratio_metric": rows[worst].ratio_metric,
                "note": text,
            }
        )
        for i in wrong:
            decided[i] = decided[i].model_copy(update={"origin": "inherited"})
    return decided


def _seen_place(tensor: Seen) -> str:
    return place_of(tensor.key, tensor.context)


def _follows(tensor: Seen) -> bool:
    return not tensor.odd and (tensor.key.side == "in" or tensor.key.component == RUN)


def _call(key: Key) -> tuple[object, ...]:
    return (key.stage, key.step, key.component, key.method, key.call)


def _missing_row(call: CallEntry, part: str) -> Row:
    key = Key(call.stage, call.component, call.method, call.call, "out", (), call.step)
    return Row(
        name=str(key),
        verdict=Verdict.MISSING,
        stage=call.stage,
        step=call.step,
        branch=call.context,
        fqn=_caller(key),
        reference=TensorInfo(dtype="object", shape=()),
        note=part or "the call did not come",
    )


def _unexpected_rows(result: Forced) -> Iterator[Row]:
    for component, method in dict.fromkeys(result.unexpected):
        count = result.unexpected.count((component, method))
        yield Row(
            name=str(Key("output", component, method, 0, "out", (UNEXPECTED,))),
            verdict=Verdict.INCOMPARABLE,
            fqn=f"{component}.{method}",
            actual=TensorInfo(dtype="object", shape=()),
            note=f"unexpected: {count} more call{'s' if count > 1 else ''} than recorded",
        )


def _raised_row(result: Forced) -> Row:
    return Row(
        name=str(Key("output", RUN, RUN, 0, "out", (RAISED,))),
        verdict=Verdict.INVALID,
        fqn=RUN,
        actual=TensorInfo(dtype="object", shape=()),
        reference=TensorInfo(dtype="object", shape=()),
        note=result.raised,
    )


def place_of(key: Key, context: str | None = None) -> str:
    """A key for people: `transformer.forward at step 3: output sample`."""
    caller = _caller(key)
    if context:
        caller += f" ({context})"
    elif key.call:
        caller += f" (call {key.call + 1})"
    if key.step is not None:
        caller += f" at step {key.step}"
    if key.precision:
        caller += f", raised to {key.precision}"
    if (key.component, key.method) == (RUN, END):
        return f"end of a free run: {dotted(key.path)}"
    if key.component == RUN:
        return f"code after the last call: {_what(key.path)}"
    if key.component == RANDOM:
        return f"{caller}: other random numbers"
    if key.component == BLOCK:
        return f"{caller}: {dotted(key.path)}"
    if key.side == "in":
        return f"code before {caller}: {dotted(key.path)}"
    return f"{caller}: {_what(key.path)}"


def _what(path: Path) -> str:
    first, rest = path[:1], dotted(path[1:])
    if first == (STATE,):
        return rest
    if first == (WRITTEN,):
        return f"what it writes into {rest}"
    if first == (RANDOM_STATE,):
        return "random numbers"
    return f"output {dotted(path)}".rstrip()


@dataclass(frozen=True)
class Sides:
    """What was compared, and what is said beside it."""

    actual: Side
    reference: Side
    fields: dict[str, Any]


def in_order(rows: Sequence[Row], raised: Sequence[Row], precision: str) -> list[Row]:
    """Rows of one run in two precisions by their place in it: the first that fails is the earliest.

    Args:
        rows: In the working precision, in the order of the run.
        raised: In a higher one, likewise.
        precision: Its name, which stands before those rows' names.
    """
    places = {row.name: place for place, row in enumerate(rows)}
    placed = list(enumerate(rows))
    place = -1
    for row in raised:
        place = places.get(row.name.removeprefix(f"{precision}/"), place)
        placed.append((place, row))
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def comparison_of(rows: Sequence[Row], sides: Sides) -> Comparison:
    """Sum rows up; the sentence begins with the place where it went wrong."""
    comparison = build_comparison(
        rows, actual=sides.actual, reference=sides.reference, **sides.fields
    )
    first = _first(rows)
    if comparison.verdict.passed or first is None:
        return comparison
    name = first.name
    key = key_of(name)
    place = place_of(key, first.branch)
    if first.name.endswith(RAISED):
        place, told = "run", first.note
    elif first.verdict is Verdict.MISSING:
        place, told = place.partition(":")[0], first.note
    elif key.path == (UNEXPECTED,):
        place, told = _caller(key), first.note
    else:
        told = _told(first)
    apart = told and first.verdict in (*WRONG, Verdict.INCONCLUSIVE)
    place_text = f"{place}, {told}" if apart else f"{place} {told}"
    count = len([row for row in comparison.rows if not row.verdict.passed])
    word = comparison.verdict.value
    sentence = f"{word}: {place_text.strip()} ({count} of {len(rows)} tensors failed)"
    sentence += _one_sided(comparison, first)
    divergence = None
    if first.verdict in WRONG:
        divergence = Divergence(
            name=name,
            stage=first.stage,
            step=first.step,
            branch=first.branch,
            fqn=place,
            kind=first.note or None,
        )
    return comparison.model_copy(update={"sentence": sentence, "first_divergence": divergence})


def _one_sided(comparison: Comparison, first: Row) -> str:
    """How many calls came on one side only, where a person was told of something else."""
    told = ""
    if comparison.missing and first.verdict is not Verdict.MISSING:
        count = len(comparison.missing)
        told += f"; {count} recorded call{'s' if count > 1 else ''} did not come"
    if comparison.unexpected and first.verdict is not Verdict.INCOMPARABLE:
        told += f"; calls that were not recorded: {', '.join(_unexpected(comparison))}"
    return told


def _unexpected(comparison: Comparison) -> list[str]:
    return [_caller(key_of(name)) for name in comparison.unexpected]


def _first(rows: Sequence[Row]) -> Row | None:
    """The row that a person is told first: what is wrong, else what is missing or left open."""
    wrong = [row for row in rows if row.verdict in WRONG and row.origin != "inherited"]
    open_ = [row for row in rows if not row.verdict.passed]
    return next(iter(wrong), next(iter(open_), None))


def _told(row: Row) -> str:
    by_size = row.floor and (row.ratio or 0.0) > row.floor.bound
    if row.ratio is None or (row.note and not by_size) or ", recorded " in row.note:
        return row.note
    if math.isinf(row.ratio):
        return "; ".join(part for part in ("other values", row.note) if part)
    text = f"{row.ratio:.3g} x the noise floor"
    return f"{text}; {row.note}" if row.note else text
