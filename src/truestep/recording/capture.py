"""Keep what a run shows: every named tensor copied to the host, in order, with stage times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from truestep.environment import Environment, watch_attention
from truestep.recording.manifest import TensorEntry
from truestep.recording.names import address
from truestep.runtime.pipeline import Branch, Observer, Pipeline, Step

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) while something long goes on."""


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
        self.tensors[name] = value.detach().to("cpu", copy=True).contiguous()

    def step_done(self, index: int, total: int) -> None:
        """Report the step."""
        if self.progress:
            self.progress(self.label, index + 1, total)


def tensor_table(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorEntry, ...]:
    """Table rows in execution order, without digests (the writer fills them in)."""
    table = []
    for order, (name, tensor) in enumerate(tensors.items()):
        place = address(name)
        table.append(
            TensorEntry(
                name=name,
                kind=place.stage,
                order=order,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                digest="",
                step=place.step,
                branch=place.branch,
                fqn=place.fqn,
            )
        )
    return tuple(table)


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
        inner: Pipeline, latent: torch.Tensor, step: Step, text: torch.Tensor, branch: Branch
    ) -> torch.Tensor:
        if seen or _compiled(inner.expert(step.expert)):
            return original(inner, latent, step, text, branch)
        with watch_attention() as kernels:
            result = original(inner, latent, step, text, branch)
        seen.append(kernels())
        return result

    pipe.predict = first_watched
    try:
        yield lambda: seen[0] if seen else None
    finally:
        if pipe.predict is first_watched:
            pipe.predict = original


def _compiled(model: Any) -> bool:
    if not isinstance(model, torch.nn.Module):
        return False
    return any(
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def run_environment(pipe: Pipeline, *, attention: str | None, weights: str) -> Environment:
    """Fingerprint of the process, the attention kernel it used and the weights it ran."""
    current = Environment.current(pipe.device, attention=attention)
    return Environment({**current, "model.weights": weights})


def recorded_settings(pipe: Pipeline) -> dict[str, Any]:
    """Every control of a run, as JSON values: settings, scheduler configuration, class names."""
    parts = ("tokenizer", "text_encoder", "transformer", "transformer_2", "vae", "scheduler")
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
        "guidance_dtype": str(pipe.first_transformer.dtype).removeprefix("torch."),
    }


def _json_like(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
