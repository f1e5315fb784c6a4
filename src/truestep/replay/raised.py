"""Raise a pipeline's weights and arithmetic to a higher precision, for a while.

Rounding in a 16-bit dtype hides faults of up to a percent. The same stages on the same inputs in
float32 do not: what is left there is the fault, or nothing. Weights keep their values (the
conversion is exact), so a candidate's own code runs; only the noise goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from truestep.joint import Value, each, floating
from truestep.keys import address
from truestep.pairing.naming import runs_compiled
from truestep.replay.kept import Replay
from truestep.replay.stages import replay
from truestep.replay.steps import chosen_steps
from truestep.runtime.pipeline import MODELS, Pipeline, Step
from truestep.runtime.precision import converted

_STAGE_MODELS = {
    "text": ("text_encoder",),
    "connector": ("connectors",),
    "prediction": ("transformer", "transformer_2"),
    "guidance": ("transformer", "transformer_2"),  # combined in the predictions' dtype
    "decoding": ("vae", "audio_vae", "vocoder"),
}
"""Stages that round in the working dtype, and the models that it is the dtype of."""


@contextmanager
def raised(pipe: Pipeline, precision: str) -> Iterator[Pipeline]:
    """Run the same weights in `precision`; on leaving, every weight is what it was.

    Args:
        pipe: Its torch modules are converted in place, so that hooks and closures keep working.
        precision: `float32` or `float64`.

    Yields:
        The pipeline with guidance and update raised too.
    """
    dtype = getattr(torch, precision)

    def lifted(value: Value) -> Value:
        return each(floating(lambda tensor: tensor.to(dtype)), value)

    def combine(inner: Pipeline, step: Step, *predictions: Value) -> Value:
        return pipe.combine(inner, step, *(lifted(value) for value in predictions))

    def update(inner: Pipeline, step: Step, guided: Value, latent: Value) -> Value:
        return pipe.update(inner, step, lifted(guided), lifted(latent))

    with ExitStack() as stack:
        for name in MODELS:
            stack.enter_context(converted(getattr(pipe, name), dtype))
        yield replace(pipe, combine=combine, update=update)


def raised_replay(
    pipe: Pipeline,
    recording: Mapping[str, torch.Tensor],
    *,
    steps: Iterable[int],
    precision: str,
    in_order: bool | None = None,
) -> Replay:
    """Replay the stages that round, raised; outputs are named `float32/<name>`.

    Raises:
        TypeError: A model is compiled or not a torch module, and cannot be raised.
    """
    for name in MODELS:
        model = getattr(pipe, name)
        if model is None:
            continue
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"{name} is a {type(model).__name__}, not a torch module")
        if runs_compiled(model):
            raise TypeError(f"{name} is compiled")
    narrow = _narrow_stages(pipe, precision)
    with raised(pipe, precision) as lifted:
        return raised_stages(
            lifted, recording, steps=steps, precision=precision, only=narrow, in_order=in_order
        )


def raised_stages(
    lifted: Pipeline,
    recording: Mapping[str, torch.Tensor],
    *,
    steps: Iterable[int] | None,
    precision: str,
    only: Iterable[str] | None = None,
    in_order: bool | None = None,
) -> Replay:
    """Replay stages of a pipeline that is raised already: those of `only` that were recorded, or,
    where none was yet, all of them.

    Guidance is kept at the same steps as the predictions.
    """
    chosen = chosen_steps(recording, steps)
    prefix = f"{precision}/"
    recorded = {address(name).stage for name in recording if name.startswith(prefix)}
    only = recorded if only is None else set(only) & (recorded or set(only))
    found = replay(lifted, recording, steps=chosen, only=only, in_order=in_order)
    return Replay(
        outputs={
            f"{precision}/{name}": value
            for name, value in found.outputs.items()
            if (place := address(name)).stage != "guidance" or place.step in chosen
        },
        failures={f"{precision}/{name}": text for name, text in found.failures.items()},
        effects={
            f"{precision}/{name}": (f"{precision}/{prediction}", made)
            for name, (prediction, made) in found.effects.items()
        },
    )


def _narrow_stages(pipe: Pipeline, precision: str) -> list[str]:
    """Stages whose models hold weights narrower than `precision`."""
    itemsize = getattr(torch, precision).itemsize
    return [
        stage
        for stage, names in _STAGE_MODELS.items()
        if any(
            parameter.is_floating_point() and parameter.itemsize < itemsize
            for name in names
            if getattr(pipe, name) is not None
            for parameter in getattr(pipe, name).parameters()
        )
    ]
