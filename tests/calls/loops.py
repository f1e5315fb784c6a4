"""A pipeline in a page: encoder, denoiser, scheduler and decoder, called as pipelines do."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from truestep.calls.forcing import Forcing
from truestep.calls.recorder import recorded
from truestep.calls.recording import CallRecording, read
from truestep.calls.seen import Forced, Plan
from truestep.calls.subject import Subject, subject_of


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 6)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"last": self.embed(input_ids), "unread": self.embed(input_ids) * 2}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(6, 6)
        self.out = torch.nn.Linear(6, 6)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, *, options: Any = None
    ) -> tuple[torch.Tensor]:
        return (self.out(torch.tanh(self.inner(x) + text.mean(1)) * (1 + t / 1000)),)


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 4)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.decode(z)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.linear(z)


class Scheduler:
    """Euler, with or without noise that is added at each step."""

    def __init__(self, noise: float = 0.0, top: float = 1.0) -> None:
        self.noise, self.top = noise, top

    def set_timesteps(self, steps: int) -> None:
        self.sigmas = torch.linspace(self.top, 0, steps + 1)
        self.timesteps = self.sigmas[:-1] * 1000
        self.index = 0

    def step(
        self, velocity: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, generator: Any = None
    ) -> tuple[torch.Tensor]:
        delta = self.sigmas[self.index + 1] - self.sigmas[self.index]
        self.index += 1
        sample = sample + delta * velocity
        if self.noise:
            sample = sample + self.noise * torch.randn(sample.shape, generator=generator)
        return (sample,)


class Loop:
    """A pipeline; every part of its call can be replaced."""

    def __init__(self, scheduler: Any = None) -> None:
        torch.manual_seed(0)
        self.encoder, self.net, self.decoder = Encoder(), Net(), Decoder()
        self.scheduler = scheduler or Scheduler()
        self.scale, self.steps = 3.0, 4

    @property
    def components(self) -> dict[str, Any]:
        names = ("encoder", "net", "decoder", "scheduler")
        return {name: getattr(self, name) for name in names}

    def __call__(self, generator: Any = None) -> torch.Tensor:
        text, none = (self.encoder(input_ids=torch.tensor([ids]))["last"] for ids in ([1, 2], [0]))
        scheduler = self.prepared(self.scheduler)
        scheduler.set_timesteps(self.steps)
        x = torch.randn(1, 6, generator=generator)
        for t in scheduler.timesteps:
            cond = self.predict(x, t, text)
            uncond = self.predict(x, t, none)
            velocity = uncond + self.scale * (cond - uncond)
            takes = "generator" in inspect.signature(scheduler.step).parameters
            x = scheduler.step(velocity, t, x, **({"generator": generator} if takes else {}))[0]
        return self.decoder.decode(x)

    def prepared(self, scheduler: Any) -> Any:
        return scheduler

    def predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.net(x, t, text=text)[0]


class Copying(Loop):
    """Each call steps with a copy of its scheduler."""

    def prepared(self, scheduler: Any) -> Any:
        return copy.deepcopy(scheduler)


def subject(pipeline: Any, change: Callable[[Any], Any] | None = None) -> Subject:
    if change is not None:
        change(pipeline)
    return subject_of(pipeline)


def through_a_file(subject: Subject, tmp_path: Path) -> CallRecording:
    recorded(subject).write(tmp_path / "reference.safetensors")
    return read(tmp_path / "reference.safetensors")


def replayed(subject: Subject, reference: CallRecording, *, made: bool) -> Forced:
    return Forcing(reference, Plan(made=lambda call: made)).run(subject)
