"""Keep what a run shows: every named tensor copied to the host, in order, with stage times."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from truestep.environment import Environment, watch_attention
from truestep.joint import Value
from truestep.measure.plain import plain
from truestep.pairing.naming import runs_compiled
from truestep.progress import Progress
from truestep.runtime.pipeline import MODELS, Branch, Observer, Pipeline, Step

_ATTENTION = re.compile("attention$|attn$", re.IGNORECASE)
"""Class names of attention modules (`WanAttention`, `CrossAttn`)."""


@dataclass
class Capture(Observer):
    """An observer that keeps a copy of every tensor.

    Attributes:
        tensors: Name to host copy, in execution order.
        progress: Told about each step.
        label: What the progress is called.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    progress: Progress | None = None
    label: str = "generate"

    def tensor(self, name: str, value: torch.Tensor) -> None:
        """Keep a real copy: later in-place work cannot reach it."""
        self.tensors[name] = plain(value, name).to("cpu", copy=True).contiguous()

    def step_done(self, index: int, total: int) -> None:
        """Report the step."""
        if self.progress:
            self.progress(self.label, index + 1, total)


@contextmanager
def attention_observed(pipe: Pipeline) -> Iterator[Callable[[], str | None]]:
    """Watch which attention kernels the pipeline's first forward really uses.

    The numbers are untouched. Nothing is seen inside compiled modules, which are left alone.

    Yields:
        A function that returns the kernels seen (`flash-cpu`, `math`, ...) or None.
    """
    original = pipe.predict
    seen: list[str | None] = []

    def first_watched(
        inner: Pipeline, latent: Value, step: Step, text: Value, branch: Branch
    ) -> Value:
        model = inner.expert(step.expert)
        if seen or runs_compiled(model):
            return original(inner, latent, step, text, branch)
        with _watched(model) as kernels:
            result = original(inner, latent, step, text, branch)
        seen.append(kernels())
        return result

    pipe.predict = first_watched
    try:
        yield lambda: seen[0] if seen else None
    finally:
        if pipe.predict is first_watched:
            pipe.predict = original


@contextmanager
def _watched(model: Any) -> Iterator[Callable[[], str | None]]:
    """Watch the model's first attention module, or all that runs where none is recognised."""
    module = _first_attention(model)
    if module is None:
        with watch_attention() as kernels:
            yield kernels
        return
    watches: list[AbstractContextManager[Callable[[], str | None]]] = []
    found: list[Callable[[], str | None]] = []

    def enter(*_: object) -> None:
        watches.append(watch_attention())
        found.append(watches[-1].__enter__())

    def leave(*_: object) -> None:
        watches.pop().__exit__(None, None, None)

    handles = (
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    )
    try:
        yield lambda: found[0]() if found else None
    finally:
        for handle in handles:
            handle.remove()


def _first_attention(model: Any) -> torch.nn.Module | None:
    if not isinstance(model, torch.nn.Module):
        return None
    named = (m for m in model.modules() if _ATTENTION.search(type(m).__name__))
    return next(named, None)


def run_environment(pipe: Pipeline, *, attention: str | None) -> Environment:
    """Fingerprint of the process, the attention kernel it used and the weights it ran."""
    current = Environment.current(pipe.device, attention=attention)
    return Environment({**current, "model.weights": pipe.weights})


def recorded_settings(pipe: Pipeline) -> dict[str, Any]:
    """Every control of a run, as JSON values: settings, scheduler configuration, class names."""
    parts = ("tokenizer", *MODELS, "scheduler")
    scheduler = getattr(pipe.scheduler, "config", {})
    return {
        **pipe.settings.model_dump(mode="json"),
        "boundary_ratio": pipe.boundary_ratio,
        "expand_timesteps": pipe.expand_timesteps,
        "components": {
            part: type(getattr(pipe, part)).__name__
            for part in parts
            if getattr(pipe, part) is not None
        },
        "scheduler_config": {
            key: value for key, value in dict(scheduler).items() if _json_like(value)
        },
        "generator_device": "cpu",
        "guidance_dtype": pipe.settings.guidance_dtype
        or str(pipe.first_transformer.dtype).removeprefix("torch."),
        **_joint_settings(pipe),
    }


def _joint_settings(pipe: Pipeline) -> dict[str, Any]:
    """The controls of an audio-video run, all of them, and the sound's samples a second."""
    if pipe.controls is None:
        return {}
    rate = int(pipe.vocoder.config.output_sampling_rate)
    return {**asdict(pipe.controls), "sample_rate": rate}


def _json_like(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
