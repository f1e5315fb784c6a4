"""Check a pipeline while it serves: between two requests, one recorded call is made and judged."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import update_wrapper
from pathlib import Path
from typing import Any, Literal

import torch

from truestep.calls.alone import (
    Alone,
    call_place,
    calls_alone,
    component_of,
    condition_of,
    keeps_state,
)
from truestep.calls.boundaries import is_watched
from truestep.calls.check import named_sides
from truestep.calls.classes import Equal, swapped_class
from truestep.calls.forcing import kept_as_it_is
from truestep.calls.judging import comparison_of, rows_of
from truestep.calls.precision import recorded_precision
from truestep.calls.rebuilding import CannotBuildError
from truestep.calls.recording import CallRecording
from truestep.calls.subject import Subject, components_of
from truestep.engines.pipelines import opened
from truestep.errors import FOREIGN, UsageError, one_line
from truestep.judge.floor import Limits
from truestep.randomness import own_randomness
from truestep.recording.format import Recording
from truestep.recording.manifest import CallEntry
from truestep.serving.requests import Requests
from truestep.text import visible
from truestep.verdict import Comparison

_ONE = threading.Lock()
"""Held while any watch makes a call: random states of the process are set back after it."""

LOGGER = logging.getLogger("truestep.watch")

UNMADE = ("training", "cache")
"""With another one of these conditions, a call would leave something behind in the component."""


@dataclass(frozen=True)
class Result:
    """What one check showed.

    Attributes:
        place: Of the call: `transformer.forward (cond) at step 3`.
        component: Whose call it is.
        outcome: `left` the floor, or what decides its answer has changed since the watch began.
        said: What is wrong; empty where nothing is.
        ratio: The largest distance of what it gave, as a multiple of the noise floor.
        seconds: What the check took.
        comparison: All rows; None where the call was not made.
    """

    place: str
    component: str
    outcome: Literal["passed", "left", "error"]
    said: str
    ratio: float | None
    seconds: float
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Pace:
    """How often, and for how long.

    Attributes:
        every: Requests from one check to the next.
        share: Of the time since the start that checks may take, at most.
        clock: Says the time in seconds.
    """

    every: int
    share: float
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise UsageError(
                f"every = {self.every!r} is no number of requests",
                measured="a whole number from 1 up",
            )
        if not 0 < self.share <= 1:
            raise UsageError(
                f"share = {self.share!r} is no part of the time",
                measured="above 0, and 1 at most: 0.01 is one hundredth",
            )


@dataclass
class Spent:
    """Where the time went, in seconds.

    Attributes:
        start: When the watch began.
        requests, checks: Altogether.
        last: By the place of a call, what its last check took.
    """

    start: float
    requests: float = 0.0
    checks: float = 0.0
    last: dict[str, float] = field(default_factory=dict)


class Watch:
    """A pipeline that is watched, until `stop()`; see `watch`.

    Attributes:
        last: By the place of a call, the last result.
        hidden, copied: As `truestep.calls.classes.Watcher` has them.
    """

    hidden = False
    copied = False

    def __init__(
        self,
        pipe: Any,
        reference: CallRecording,
        pace: Pace,
        on_result: Callable[[Result], None] | None = None,
    ) -> None:
        """Begin to watch."""
        components = _components_of(pipe)
        self.last: dict[str, Result] = {}
        self._pipe, self._reference, self._pace = pipe, reference, pace
        self._on_result = on_result
        self._requests = Requests()
        self._counts: Counter[str] = Counter()
        self._due = 0
        self._wrong: dict[str, tuple[str, ...]] = {}
        self._told: set[str] = set()
        self._limits = Limits(reference.floor, raised=bool(recorded_precision(reference)))
        self._alone = Alone(reference, components.values())
        self._rotation, unplayable = _rotation(reference, components)
        self._counts["not_replayable"] = unplayable
        if unplayable:
            self._say_once(
                f"{unplayable} of {unplayable + len(self._rotation)} recorded calls cannot be made "
                "on their own, and are not checked",
                logging.INFO,
            )
        parts = {c.component: component_of(components, c.component) for c in self._rotation}
        self._conditions = {name: condition_of(part) for name, part in parts.items()}
        subject = Subject(pipe, components, label=type(pipe).__name__)
        self._sides = named_sides(subject, reference, {"looked_at": ("one call, made alone",)})
        self._spent = Spent(pace.clock())
        self._original = type(pipe)
        self._swapped = swapped_class(self._original, self, ())
        update_wrapper(self._swapped.__call__, self._original.__call__)
        object.__setattr__(pipe, "__class__", self._swapped)

    @property
    def counts(self) -> dict[str, int]:
        """How many: `requests`; checks that `passed`, `left` the floor or ended in an `error`;
        checks that were `skipped` for their share of the time, or `put_off` as another request ran;
        recorded calls that are `not_replayable` on their own."""
        names = ("requests", "passed", "left", "error", "skipped", "put_off", "not_replayable")
        return {name: self._counts[name] for name in names}

    @property
    def seconds(self) -> float:
        """Time that checks took altogether."""
        return self._spent.checks

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the pipeline its class back; what was counted stays."""
        if type(self._pipe) is self._swapped:
            object.__setattr__(self._pipe, "__class__", self._original)

    def check_now(self) -> Result:
        """Check the next call now, whatever its share, once no request runs.

        Raises:
            UsageError: It is called inside a request, or no call can be made alone any more.
        """
        if self._requests.inside:
            raise UsageError(
                "check_now() was called inside a request, which it would wait for",
                hint="call it once the pipeline has returned",
            )
        with self._requests.between(wait=True):
            result = self._checked_next(None)
        if result is None:
            raise UsageError("no recorded call can be made on its own here")
        return result

    def enter_context(self, name: Any, context: Any) -> Any:
        """Nothing is noted of guidance passes."""
        return context

    def arrive(
        self, owner: Any, method: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Serve a request; a check may follow before its result is returned."""
        stopped = type(self._pipe) is not self._swapped
        if owner is not self._pipe or stopped or self._requests.inside:
            return call(*args, **kwargs)
        with self._requests.one():
            began = self._pace.clock()
            output = call(*args, **kwargs)
            took = self._pace.clock() - began
        try:
            self._served(output, took)
        except FOREIGN as error:  # whatever a check does, the request was served
            self._failed(error, "between two requests")
        return output

    def _served(self, output: Any, took: float) -> None:
        """Count a request, and use the moment after it where a check is due."""
        with self._requests.counting:
            self._counts["requests"] += 1
            self._spent.requests += took
            self._due += self._counts["requests"] % self._pace.every == 0 or self._due > 0
        if not self._due:
            return
        with self._requests.between() as free:
            # A request of `record` or `check` is part of their run, whose calls are told to them.
            free = free and not is_watched(_components_of(self._pipe).values())
            if free and self._due:
                self._due = 0
                if self._has_time():
                    self._checked_next(output)
                else:
                    self._counts["skipped"] += 1
        if not free:
            with self._requests.counting:
                self._counts["put_off"] += 1
            if self._due > self._pace.every:
                self._say_once("other requests ran at the end of each one: nothing is checked")

    def _has_time(self) -> bool:
        """Whether the next check, as far as its cost can be foretold, stays within the share.

        A call that was not checked yet is taken to cost no more than a request, in which it is.
        """
        if not self._rotation:
            return True
        request = self._spent.requests / max(self._counts["requests"], 1)
        cost = self._spent.last.get(call_place(self._rotation[0]), request)
        passed = self._pace.clock() - self._spent.start
        return self._spent.checks + cost <= self._pace.share * passed

    def _checked_next(self, output: Any) -> Result | None:
        """Check the next call that can be made; the tensors of a request's result stay as they are.

        A pipeline may answer every request in one buffer, which the check would fill anew.
        """
        while self._rotation:
            call = self._rotation[0]
            began = self._pace.clock()
            try:
                with kept_as_it_is(output):
                    result = self._checked(call, began)
            except CannotBuildError as error:
                self._rotation.pop(0)
                self._counts["not_replayable"] += 1
                self._spend(began)
                self._say_once(f"{call_place(call)} cannot be made on its own: {error}")
                continue
            except FOREIGN as error:
                self._failed(error, call_place(call))
                result = self._result(call, began, "error", one_line(error))
            self._rotation.append(self._rotation.pop(0))
            self._spent.last[result.place] = self._spend(began)
            self._tell(result)
            return result
        self._say_once("no recorded call can be made on its own any more: nothing is checked")
        return None

    def _spend(self, began: float) -> float:
        seconds = self._pace.clock() - began
        self._spent.checks += seconds
        return seconds

    def _checked(self, call: CallEntry, began: float) -> Result:
        """Make one call and judge it, as a check of the whole pipeline judges it."""
        component = component_of(_components_of(self._pipe), call.component)
        changes = _changes(self._conditions[call.component], condition_of(component))
        if component is None or any(name in UNMADE for name in changes):
            changes = changes if component is not None else {"component": "is not there any more"}
            return self._result(call, began, "left", _told(changes))
        with _ONE, own_randomness(), torch.no_grad():
            seen = self._alone.make(component, call)
        comparison = comparison_of(rows_of(self._reference, seen, self._limits), self._sides)
        healthy = comparison.verdict.passed and not changes
        said = [_told(changes)] if changes else []
        said += [] if comparison.verdict.passed else [comparison.sentence]
        outcome: Literal["passed", "left"] = "passed" if healthy else "left"
        return self._result(call, began, outcome, "; ".join(said), comparison)

    def _result(
        self,
        call: CallEntry,
        began: float,
        outcome: Literal["passed", "left", "error"],
        said: str,
        comparison: Comparison | None = None,
    ) -> Result:
        rows = comparison.rows if comparison is not None else ()
        ratio = max((row.ratio for row in rows if row.ratio is not None), default=None)
        seconds = self._pace.clock() - began
        place = call_place(call)
        return Result(place, call.component, outcome, said, ratio, seconds, comparison)

    def _tell(self, result: Result) -> None:
        """Keep a result, count it, and say what is new of it."""
        self.last[result.place] = result
        if result.outcome != "error":  # was counted where it was raised
            self._counts[result.outcome] += 1
            self._log(result)
        if self._on_result is not None:
            try:
                self._on_result(result)
            except FOREIGN as error:
                self._failed(error, "on_result")

    def _log(self, result: Result) -> None:
        """One line when a call leaves the floor or is wrong otherwise, one when it is back."""
        before, now = self._wrong.get(result.place, ()), _what_is_wrong(result)
        self._wrong[result.place] = now
        if now and now != before:
            LOGGER.warning("%s", visible(f"{result.place} left the noise floor: {result.said}"))
        elif before and not now:
            LOGGER.info("%s", visible(f"{result.place} is within the noise floor again"))

    def _failed(self, error: BaseException, where: str) -> None:
        """Count an error of a check; one of each kind is logged."""
        self._counts["error"] += 1
        kind = f"{type(error).__name__} {where}"
        if kind not in self._told:
            self._told.add(kind)
            LOGGER.warning("%s", visible(f"a check failed ({where}): {one_line(error)}"))

    def _say_once(self, text: str, level: int = logging.WARNING) -> None:
        if text not in self._told:
            self._told.add(text)
            LOGGER.log(level, "%s", visible(text))


def watch(
    pipe: Any,
    reference: Recording | str | Path,
    *,
    every: int = 100,
    share: float = 0.01,
    on_result: Callable[[Result], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Watch:
    """Check a pipeline while it serves: one recorded call at a time, between two requests.

    A check makes one call of a model (text encoder, denoiser or decoder) on its recorded inputs and
    judges what it gives by the reference's noise floor, as `check` does. It is made in the thread
    of the request before it, once that has its result: what a thread sets (autocast, device,
    stream) then holds for it too, and no other thread has to know when a service is idle. That
    request returns later by the check, and no request of this pipeline runs at once with it.
    Nothing that a request could see is changed. Requests of another pipeline that shares components
    with this one are not held back meanwhile; two such watches make their calls in turn.

    A model in 16 bits is judged in 16 bits: faults of up to a percent may hide in their rounding,
    which `check` sees by raising the precision.

    Args:
        pipe: A pipeline of diffusers, as it serves; it is watched until `stop()`, or as a context.
        reference: Recording of a plain pipeline, as `record(pipe, call={...})` makes it.
        every: Requests from one check to the next.
        share: Of the time since the start that checks may take; one that would go beyond is skipped
            and counted.
        on_result: Told of every check; what it raises is counted as an error.
        clock: Says the time in seconds.

    Returns:
        The watch: `stop()`, `check_now()`, `counts`, `last`. The logger `truestep.watch` gets one
        warning when a call leaves the floor, or is wrong in another way, and one line when it is
        back. `truestep.serving.metrics` hands the numbers to Prometheus and OpenTelemetry.

    Raises:
        FileFormatError: The reference cannot be read.
        UsageError: The pipeline is watched already, has no components, or none of the recorded
            calls can be made alone; or an option means nothing.
    """
    pace = Pace(every, share, clock)
    if isinstance(type(pipe), Equal):
        raise UsageError(
            f"{type(pipe).__name__} is being watched already",
            hint="stop() the first watch before the second begins",
        )
    recording = reference if isinstance(reference, CallRecording) else opened(reference)
    return Watch(pipe, recording, pace, on_result)


def _components_of(pipe: Any) -> Mapping[str, Any]:
    held = components_of(pipe)
    if held is None or not callable(pipe):
        raise UsageError(
            f"{type(pipe).__name__} cannot be watched",
            measured="needed: a pipeline, which has components and can be called",
        )
    return held


def _rotation(
    reference: CallRecording, components: Mapping[str, Any]
) -> tuple[list[CallEntry], int]:
    """Calls to check one after the other, and how many cannot be made.

    What keeps something from call to call answers otherwise alone, and keeps what it was given.
    """
    possible, unplayable = calls_alone(reference)
    parts = {call.component: component_of(components, call.component) for call in possible}
    calls = [
        call
        for call in possible
        if parts[call.component] is not None and not keeps_state(parts[call.component])
    ]
    if not calls:
        raise UsageError(
            "no call of the reference can be made on its own",
            measured=f"{unplayable + len(possible)} calls of models; components here: "
            f"{', '.join(components)}",
            likely="a reference of another pipeline, or a cache between steps",
            hint="record the pipeline that serves, without a cache",
        )
    return calls, unplayable + len(possible) - len(calls)


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Which conditions of a component are others than at the start, in words."""
    return {
        name: f"was {before[name]}, is {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    }


def _told(changes: Mapping[str, str]) -> str:
    text = "; ".join(f"{name} {words}" for name, words in changes.items())
    return f"changed since the watch began: {text}"


def _what_is_wrong(result: Result) -> tuple[str, ...]:
    """What tells one thing that is wrong from another; numbers move from check to check."""
    if result.outcome == "passed":
        return ()
    if result.comparison is None:
        return (result.said,)
    failing = [row for row in result.comparison.rows if not row.verdict.passed]
    changed = result.said.removesuffix(result.comparison.sentence)
    return (changed, *(f"{row.verdict.value} {row.name}" for row in failing))
