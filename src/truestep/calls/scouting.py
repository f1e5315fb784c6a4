"""Find how a candidate groups its guidance passes, by how its calls come. No model runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from truestep.calls.arguments import arguments_of
from truestep.calls.boundaries import Arrival
from truestep.calls.layouts import (
    Arrived,
    Layout,
    Layouts,
    Method,
    grouped,
    host_copies,
    layout_of,
    rows_arrived,
    sizes_of,
)
from truestep.calls.recording import CallRecording
from truestep.calls.regrouped import Regrouped
from truestep.calls.seen import EnoughError, Plan
from truestep.calls.subject import Subject
from truestep.recording.manifest import CallEntry


def found_layouts(
    subject: Subject, reference: CallRecording
) -> dict[tuple[Method, tuple[int, ...]], Layout]:
    """Find which methods a candidate calls with its passes grouped otherwise.

    Passes may come in another order, or be given what belongs to another; and where two are given
    the same, nothing says which is which. That reading is taken which leaves least to explain:
    with which what is made of these calls is nearest to what was recorded.
    """
    wanted = _steps_to_see(reference)
    if not wanted:
        return {}
    scout = _Scout(reference, wanted)
    with suppress(EnoughError):
        scout.run(subject)
    readings: list[dict[tuple[Method, tuple[int, ...]], Layout]] = [{}, {}]
    for (method, step), arrivals in scout.arrivals.items():
        for backwards, reading in enumerate(readings):
            calls = wanted[method, step]
            layout = layout_of(reference, calls, arrivals, backwards=bool(backwards))
            if layout is not None:
                reading[method, layout.recorded] = layout
    if all(layout.same_sizes for layout in readings[0].values()):
        readings.append({})  # as they come
    readings = [{k: v for k, v in reading.items() if not v.usual} for reading in readings]
    distinct = [r for place, r in enumerate(readings) if r not in readings[:place]]
    if len(distinct) == 1:
        return distinct[0]
    steps = [step for _, step in scout.arrivals]
    unsure = {method for reading in distinct for method, _ in reading}
    return min(distinct, key=lambda r: _left_over(subject, reference, r, steps, unsure))


def _steps_to_see(reference: CallRecording) -> dict[tuple[Method, int], list[CallEntry]]:
    """The first step at which each method makes several passes, and its calls there.

    Of every way in which they were recorded: in an interval of the steps there may be no guidance.
    """
    kept = reference.judged_steps
    wanted: dict[tuple[Method, int], list[CallEntry]] = {}
    for method, steps in grouped(reference).items():
        met = set()
        for step, calls in steps.items():
            sizes = sizes_of(calls, reference.shapes.__getitem__)
            if sum(sizes) > 1 and sizes not in met and (kept is None or step in kept):
                met.add(sizes)
                wanted[method, step] = calls
    return wanted


def _left_over(
    subject: Subject,
    reference: CallRecording,
    layouts: Layouts,
    steps: Sequence[int],
    unsure: Collection[Method],
) -> float:
    """How far what calls of other methods are given is from the recorded, played back.

    Args:
        subject, reference: The candidate, and the recording that is played back.
        layouts: By which it is.
        steps: At which that is looked at.
        unsure: Methods whose own inputs say nothing: how they are paired is the question.
    """
    run = _Until(reference, layouts, max(steps))
    with suppress(EnoughError):
        run.run(subject)
    worst = 0.0
    for seen in run.result.seen:
        place = seen.key
        if (
            place.side != "in"
            or place.step not in steps
            or (place.component, place.method) in unsure
        ):
            continue
        if isinstance(seen.recorded, str) and seen.actual is not None and not seen.odd:
            recorded = reference.recording[seen.recorded].double()
            far = float((seen.actual.double() - recorded).norm() / (recorded.norm() or 1.0))
            worst = max(worst, far)
    return worst


class _Until(Regrouped):
    """Plays a recording back as far as a step's end."""

    def __init__(self, reference: CallRecording, layouts: Layouts, last: int) -> None:
        super().__init__(reference, Plan(made=lambda call: False, precision=torch.float32), layouts)
        self._last_step = last

    def __call__(self, arrival: Arrival) -> Any:
        """Answer a call, or end the run."""
        if self._updated >= self._last_step:
            raise EnoughError
        return super().__call__(arrival)


class _Scout(_Until):
    """Looks at how a candidate's calls come; whatever rows it is answered."""

    def __init__(
        self,
        reference: CallRecording,
        wanted: Mapping[tuple[Method, int], list[CallEntry]],
    ) -> None:
        super().__init__(reference, {}, max(step for _, step in wanted))
        self._wanted = wanted
        self._grouped = grouped(reference)
        self.arrivals: dict[tuple[Method, int], list[Arrived]] = {}

    def __call__(self, arrival: Arrival) -> Any:
        """Note what comes."""
        method, step = (arrival.component, arrival.method), self._updated + 1
        calls = self._grouped.get(method, {}).get(step)
        if (
            not calls
            or self._updated >= self._last_step
            or self._came[method] < self._first(method)
        ):
            return super().__call__(arrival)
        arguments = arguments_of(arrival, calls[0].parameters)
        rows = rows_arrived(arguments, calls[0], self._shapes.__getitem__)
        if not rows:
            return super().__call__(arrival)
        if (method, step) in self._wanted:
            came = Arrived(rows, arrival.context, host_copies(arguments))
            self.arrivals.setdefault((method, step), []).append(came)
        size = sizes_of(calls[:1], self._shapes.__getitem__)[0]
        fetch = self._fetch(arrival, calls[0], self.plan.handed)
        return self.from_rows([calls[0].output], [(0, row % size) for row in range(rows)], fetch)

    def _first(self, method: Method) -> int:
        """Which call of a method is the first inside the steps."""
        stages = [call.stage for call in self.reference.by_method[method]]
        return stages.index("prediction")
