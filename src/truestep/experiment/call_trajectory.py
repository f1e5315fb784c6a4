"""A trusted generation of a plain pipeline, and what becomes of it where its models are changed.

Its own code runs; what a denoiser predicts at a step is asked of it alone, on what it was given
there, and weighed as the pipeline's guidance weighs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from truestep.call_case import CallCase
from truestep.calls.alone import Alone, component_of
from truestep.calls.boundaries import Arrival
from truestep.calls.classes import Kind
from truestep.calls.freely import Ends, run_watched
from truestep.calls.guidance import Guidance, Row, guidance
from truestep.calls.rebuilding import CannotBuildError
from truestep.calls.recorder import held_tensors
from truestep.calls.recording import CallRecording
from truestep.calls.subject import Subject, subject_of
from truestep.calls.values import Path, encode, tensors
from truestep.engines.diffusers import unread
from truestep.engines.pipelines import changed, record_pipeline
from truestep.errors import UsageError
from truestep.experiment.trajectory import During
from truestep.joint import Value
from truestep.recording.manifest import CallEntry
from truestep.replay.meant_weights import Models
from truestep.runtime.applying import Apply

Tensor = torch.Tensor
Outputs = Callable[[CallEntry], Mapping[Path, Tensor]]
"""What a call of a model gave, by places."""

STEPS = "num_inference_steps"
"""What pipelines call the number of their steps."""

_SCHEDULES = ("sigmas", "timesteps")
"""Arguments that say each step."""


@dataclass
class CallTrajectory:
    """A trusted plain pipeline, and a recording of its generation.

    Attributes:
        case: Of it.
        pipe: Its weights may be changed meanwhile.
        call: What it is called with.
        recording: Every call of it, at every step.
        spent: Forwards of its denoisers so far; a backward counts as two.
        whole: What a free run of the trusted models ends with, and what it returns.
    """

    case: CallCase
    pipe: Any
    call: Mapping[str, Any]
    recording: CallRecording
    spent: int = 0
    whole: tuple[Value, Value] | None = None
    _guidance: dict[int, Guidance] = field(default_factory=dict)

    @classmethod
    def recorded(cls, case: CallCase) -> CallTrajectory:
        """Load a case and record it.

        Raises:
            CaseError, ModelLoadError, FileFormatError: The case cannot be run.
            UsageError: It has no steps at which a model predicts.
        """
        pipe, call = unread(case)
        recording = record_pipeline(pipe, call, floor="none", keep="all", seed=case.seed)
        run = cls(case, pipe, call, recording)
        if not run.denoisers:
            raise UsageError(
                "no model of this pipeline predicts at a step: there are no layers to rank",
                where=case.model,
            )
        run.spent = run.forwards
        run.whole = run.free()
        return run

    @property
    def subject(self) -> Subject:
        """What runs."""
        return subject_of(self.pipe, seed=self.case.seed, **self.call)

    @property
    def models(self) -> Models:
        """The components that are models, by name."""
        parts = self.subject.components
        return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}

    @property
    def denoisers(self) -> Models:
        """Those that predict at the recorded steps."""
        names = {call.component.partition(".")[0] for call in self._predictions()}
        return {name: model for name, model in self.models.items() if name in names}

    @property
    def forwards(self) -> int:
        """Of one generation."""
        return len(self._predictions())

    @property
    def total(self) -> int:
        """Denoise steps."""
        return self.recording.steps

    def some_steps(self) -> tuple[int, ...]:
        """First, middle and last step."""
        return tuple(sorted({0, self.total // 2, self.total - 1}))

    def begin(self) -> None:
        """Nothing is kept between calls that are made alone."""

    def guided(self, index: int) -> Value:
        """The guided prediction at a step, by calls of the models alone; it can be differentiated.

        Raises:
            UsageError: A call was given what only a run can give.
        """
        alone = Alone(self.recording, self.subject.components.values())

        def output(call: CallEntry) -> Mapping[Path, Tensor]:
            owner = component_of(self.subject.components, call.component)
            self.spent += 1
            try:
                return held_tensors(alone.made(owner, call)[0])
            except CannotBuildError as error:
                raise UsageError(
                    f"{call.component} cannot be looked at by itself: {error}",
                    where=self.case.model,
                    likely="it is given an object of the run, such as a cache",
                ) from None

        return self._weighed(index, output)

    def trusted(self, index: int) -> Value:
        """The recorded guided prediction."""
        recorded = self.recording.recording

        def output(call: CallEntry) -> Mapping[Path, Tensor]:
            return {path: recorded[name] for path, name in tensors(call.output)}

        return self._weighed(index, output)

    def end(self, index: int, during: During) -> Value:
        """The final latent of a free run in which models are changed during one step."""
        return self._run(self.subject, at=index, during=during)

    def final(self) -> Value:
        """The final latent of the trusted models."""
        assert self.whole is not None
        return self.whole[0]

    def frames(self) -> Value:
        """What the pipeline returns with them."""
        assert self.whole is not None
        return self.whole[1]

    def latent(self) -> Value:
        """Final latent of a free run."""
        return self._run(self.subject)

    def free(self) -> tuple[Value, Value]:
        """Final latent of a free run, and what it returns."""
        subject, returned = self.subject, list[Any]()

        def run() -> Any:
            returned[:] = [subject.run()]
            return returned[0]

        latent = self._run(replace(subject, run=run))
        return latent, _numbers(returned[0])

    def shortened(self, most: int) -> CallTrajectory:
        """The same models at no more than so many steps, where the call says how many they are."""
        call = self.call
        if self.total > most and STEPS in call and not any(name in call for name in _SCHEDULES):
            call = {**call, STEPS: most}
        return CallTrajectory(self.case, self.pipe, call, self.recording)

    def loaded(self, change: Apply | None) -> CallTrajectory:
        """The same case with models of its own, as a change makes them."""
        pipe = changed(unread(self.case)[0], change)
        return CallTrajectory(self.case, pipe, self.call, self.recording)

    def _predictions(self, index: int | None = None) -> list[CallEntry]:
        """Calls of models that predict, at a step or at all."""
        return [
            call
            for call in self.recording.calls
            if call.kind == Kind.MODEL and call.stage == "prediction"
            if index is None or call.step == index
        ]

    def _weighed(self, index: int, output: Outputs) -> Tensor:
        """What models give at a step, weighed by the pipeline's guidance; flat, all in one.

        Where guidance is no weighted sum, every pass counts as it is.
        """
        if index not in self._guidance:
            self._guidance[index] = guidance(self.subject, self.recording, index)
        found = self._guidance[index]
        outputs = {
            (call.component, call.method, call.call): output(call)
            for call in self._predictions(index)
        }

        def part(row: Row) -> Tensor:
            whole = outputs[row.component, row.method, row.call][row.path]
            return (whole if row.row is None else whole[row.row]).reshape(-1)

        weighed = _samples(found)
        if weighed is None:
            every = (each for held in outputs.values() for each in held.values())
            return torch.cat([each.reshape(-1) for each in every if each.is_floating_point()])
        sums = (sum(weight * part(row) for row, weight in sample) for sample in weighed)
        return torch.cat(list(sums))  # type: ignore[arg-type]

    def _run(
        self, subject: Subject, *, at: int | None = None, during: During = nullcontext
    ) -> Tensor:
        """What a free run ends with; flat, all in one.

        Raises:
            UsageError: It raised.
        """
        ends = _Changed(self.recording, frozenset(self.denoisers), at, during)
        result = run_watched(subject, self.recording, ends)
        self.spent += ends.forwards
        if result.raised:
            raise UsageError(f"the pipeline {result.raised}", where=self.case.model)
        parts = [seen.actual for seen in result.seen if seen.actual is not None]
        return torch.cat([part.reshape(-1).double() for part in parts])


class _Changed(Ends):
    """Lets every call be, and changes the models during one step."""

    def __init__(
        self,
        reference: CallRecording,
        denoisers: frozenset[str],
        at: int | None,
        during: During,
    ) -> None:
        super().__init__(reference, None)
        self._denoisers, self._at, self._during = denoisers, at, during
        self._came: dict[tuple[str, str], int] = {}
        self.forwards = 0

    def __call__(self, arrival: Arrival) -> Any:
        """Make a call."""
        if arrival.component.partition(".")[0] not in self._denoisers:
            return super().__call__(arrival)
        method = (arrival.component, arrival.method)
        number = self._came[method] = self._came.get(method, -1) + 1
        self.forwards += 1
        calls = self.reference.by_method.get(method, ())
        here = number < len(calls) and calls[number].step == self._at is not None
        with self._during() if here else nullcontext():
            return super().__call__(arrival)


def _samples(found: Guidance) -> list[list[tuple[Row, float]]] | None:
    """Rows and weights of each guided sample; None where they are no weighted sums."""
    if not found.affine or not found.passes:
        return None
    samples: list[list[tuple[Row, float]]] = []
    ordered = sorted(found.passes, key=lambda each: (each.into, each.source.path))
    for _, group in groupby(ordered, key=lambda each: (each.into, each.source.path)):
        columns = list(_columns(list(group)))
        if len({len(column) for column in columns}) > 1:
            return None
        samples += [list(sample) for sample in zip(*columns, strict=True)]
    return samples


def _columns(passes: Sequence[Any]) -> Iterator[list[tuple[Row, float]]]:
    """Of one output of a model: the rows of each pass, in order."""
    weights = dict.fromkeys((each.name, each.weight) for each in passes)
    for name, weight in weights:
        yield [(p.source, p.weight) for p in passes if (p.name, p.weight) == (name, weight)]


def _numbers(value: Any) -> Tensor:
    """Every number of what a pipeline returns, pictures among them; flat, all in one."""
    found: list[Tensor] = []

    def keep(path: Path, tensor: Tensor) -> str:
        found.append(tensor.detach().cpu().reshape(-1).double())
        return ""

    encode(value, keep)
    return torch.cat(found) if found else torch.zeros(0)
