"""A trusted generation that was kept, and what becomes of it where one thing is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from truestep.joint import Value, each, tensors_of
from truestep.keys import step_name
from truestep.replay.stages import recorded_step, recorded_texts
from truestep.replay.steps import given, recorded_schedule
from truestep.runtime.guidance import Adaptive
from truestep.runtime.pipeline import Pipeline, Step, Texts, forget, generate, guide

Tensor = torch.Tensor


@dataclass
class Trajectory:
    """A trusted pipeline and a recording of its generation.

    Attributes:
        pipe: Its weights may be changed meanwhile.
        tensors: What was recorded.
        spent: Forwards so far; a backward counts as two.
    """

    pipe: Pipeline
    tensors: Mapping[str, Tensor]
    spent: int = field(default=0)

    @property
    def total(self) -> int:
        """Denoise steps."""
        return len(recorded_schedule(self.tensors).timesteps)

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

    def end(self, index: int, guided: Value) -> Value:
        """The final latent where the guided prediction of one step is another.

        Steps before are driven on what was recorded, for schedulers that remember them; those after
        run.
        """
        with torch.no_grad():
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
            return Trajectory(self.pipe, self.tensors)
        settings = self.pipe.settings.model_copy(update={"steps": most})
        return Trajectory(replace(self.pipe, settings=settings), {})

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
