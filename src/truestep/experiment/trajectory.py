"""A trusted generation that was kept, and what becomes of it where its models are changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from truestep.case import Case
from truestep.joint import Value, each, gather, tensors_of
from truestep.keys import step_name
from truestep.replay.meant_weights import Models
from truestep.replay.record import record_pipeline
from truestep.replay.stages import recorded_step, recorded_texts
from truestep.replay.steps import floor_steps, given, recorded_schedule
from truestep.runtime.applying import Apply, apply_change
from truestep.runtime.guidance import Adaptive
from truestep.runtime.loading import load
from truestep.runtime.pipeline import Pipeline, Step, Texts, forget, generate, guide, models_of
from truestep.runtime.quantising import denoisers_of

Tensor = torch.Tensor
During = Callable[[], AbstractContextManager[None]]
"""Makes the block in which models are changed."""


class Generation(Protocol):
    """A generation of any kind.

    Attributes:
        spent: Forwards of denoisers so far; a backward counts as two.
    """

    spent: int

    @property
    def forwards(self) -> int:
        """Of one generation."""

    @property
    def models(self) -> Models:
        """All models, by name; their weights may be changed meanwhile."""

    @property
    def denoisers(self) -> Models:
        """Those of them that run at every step."""

    @property
    def total(self) -> int:
        """Denoise steps."""

    def some_steps(self) -> tuple[int, ...]:
        """First, middle and last step."""

    def begin(self) -> None:
        """As a run begins."""

    def guided(self, index: int) -> Value:
        """The guided prediction at a step, on the recorded latent; it can be differentiated."""

    def trusted(self, index: int) -> Value:
        """The recorded guided prediction."""

    def end(self, index: int, during: During) -> Value:
        """The final latent of a run in which models are changed during one step."""

    def final(self) -> Value:
        """The recorded final latent."""

    def frames(self) -> Value:
        """What is decoded from it."""

    def latent(self) -> Value:
        """Final latent of a free run."""

    def free(self) -> tuple[Value, Value]:
        """Final latent and frames of a free run."""

    def shortened(self, most: int) -> Generation:
        """The same models at no more than so many steps; nothing of it is recorded."""

    def loaded(self, change: Apply | None) -> Generation:
        """The same case with models of its own, as a change makes them."""


@dataclass
class Trajectory:
    """A trusted pipeline of truestep's own stages, and a recording of its generation.

    Attributes:
        case: Of it.
        pipe: Its weights may be changed meanwhile.
        tensors: What was recorded.
        forwards: Of the recorded generation.
        spent: Forwards so far; a backward counts as two.
    """

    case: Case
    pipe: Pipeline
    tensors: Mapping[str, Tensor]
    forwards: int = 0
    spent: int = field(default=0)

    @classmethod
    def recorded(cls, case: Case) -> Trajectory:
        """Load a case and record it.

        Raises:
            CaseError, ModelLoadError: The case cannot be run.
        """
        pipe = load(case)
        recording = record_pipeline(pipe, case=case, floor="none")
        forwards = recording.manifest.forwards
        return cls(case, pipe, dict(recording), forwards, spent=forwards)

    @property
    def models(self) -> Models:
        """All models, by attribute of the pipeline."""
        return models_of(self.pipe)

    @property
    def denoisers(self) -> Models:
        """Its transformers."""
        return denoisers_of(self.pipe)

    @property
    def total(self) -> int:
        """Denoise steps."""
        return len(recorded_schedule(self.tensors).timesteps)

    def some_steps(self) -> tuple[int, ...]:
        """First, middle and last step."""
        return tuple(floor_steps(self.tensors))

    def step(self, index: int) -> Step:
        """A recorded step."""
        plan = recorded_schedule(self.tensors)
        return recorded_step(self.pipe, plan, index, plan.experts)

    def texts(self) -> Texts:
        """What the transformer was given of the prompts."""
        stage = "text" if self.pipe.connect is None else "connector"
        return recorded_texts(self.pipe, self.tensors, stage)

    def begin(self) -> None:
        """As a run begins."""
        self.pipe.prepare(self.pipe)
        forget(self.pipe)
        self.pipe.make_schedule(self.pipe)

    def guided(self, index: int, latent: Value = None) -> Value:
        """The guided prediction at a step, on the recorded latent where none is given."""
        before = self.pipe.forwards
        if latent is None:
            latent = given(self.pipe, self.tensors, step_name(index, "latent"))
        step, passes = self.step(index), self.pipe.passes(self.pipe)
        made = self.pipe.predict_passes(self.pipe, latent, step, self.texts(), passes)
        self.spent += self.pipe.forwards - before
        return guide(self.pipe, step, made, Adaptive(self.pipe.settings, self.total))

    def trusted(self, index: int) -> Value:
        """The recorded guided prediction."""
        return given(self.pipe, self.tensors, step_name(index, "guided"))

    def end(self, index: int, during: During) -> Value:
        """The final latent of a run in which models are changed during one step.

        Steps before are driven on what was recorded, for schedulers that remember them; those after
        run.
        """
        with torch.no_grad():
            self.begin()
            with during():
                guided = self.guided(index)
            self.begin()
            for at in range(index + 1):
                latent = given(self.pipe, self.tensors, step_name(at, "latent"))
                taken = guided if at == index else self.trusted(at)
                latent = self.pipe.update(self.pipe, self.step(at), taken, latent)
            for at in range(index + 1, self.total):
                if not self.pipe.skips(self.pipe, at):
                    taken = self.guided(at, latent)
                latent = self.pipe.update(self.pipe, self.step(at), taken, latent)
        return latent

    def final(self) -> Value:
        """The recorded final latent."""
        return each(lambda t: t.to(self.pipe.device), gather(self.tensors, "latent/final"))

    def frames(self) -> Value:
        """What is decoded from it."""
        with torch.no_grad():
            return self.pipe.decode(self.pipe, each(torch.clone, self.final()))

    def latent(self) -> Value:
        """Final latent of a free run."""
        before = self.pipe.forwards
        with torch.no_grad():
            latent = generate(self.pipe)
        self.spent += self.pipe.forwards - before
        return latent

    def shortened(self, most: int) -> Trajectory:
        """The same models at no more than so many steps; nothing of it is recorded."""
        if self.total <= most:
            return Trajectory(self.case, self.pipe, self.tensors)
        settings = self.pipe.settings.model_copy(update={"steps": most})
        return Trajectory(self.case, replace(self.pipe, settings=settings), {})

    def loaded(self, change: Apply | None) -> Trajectory:
        """The same case with models of its own, as a change makes them."""
        return Trajectory(self.case, apply_change(load(self.case), change), self.tensors)

    def free(self) -> tuple[Value, Value]:
        """Final latent and frames of a free run."""
        latent = self.latent()
        with torch.no_grad():
            return latent, self.pipe.decode(self.pipe, latent)


def apart(actual: Value, reference: Value) -> float:
    """Relative distance of two values, all of their parts together."""
    off = length(each(lambda a, r: a.double() - r.double(), actual, reference))
    whole = length(reference)
    return off / whole if whole else (math.inf if off else 0.0)


def length(value: Value) -> float:
    """Euclidean norm of a value, all of its parts together."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in tensors_of(value)))
