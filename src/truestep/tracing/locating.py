"""Open the model of the first stage that failed, and say in which module it departs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from truestep.comparison.matching import with_divergence
from truestep.noise import RAISED
from truestep.recording.names import step_name
from truestep.recording.raised import raised, raised_precision
from truestep.recording.replay import recorded_schedule, recorded_step
from truestep.runtime.pipeline import Branch, Pipeline
from truestep.tracing.drill import Drilled, Subject, drill
from truestep.tracing.isolation import Forward, Rename
from truestep.verdict import Comparison, Row

STAGES = ("text", "prediction", "decoding")
"""Stages with a model to open, in the order of a run."""


@dataclass(frozen=True)
class Place:
    """A stage's model call: which stage, at which step and branch."""

    stage: str
    step: int
    branch: str


def locate_module(
    pipe: Pipeline,
    trusted: Pipeline,
    recording: Mapping[str, torch.Tensor],
    comparison: Comparison,
    *,
    rename: Rename | None = None,
) -> Comparison:
    """Add where inside the first failing stage's model the candidate departs.

    Args:
        pipe: The candidate that was checked.
        trusted: The reference's model, loaded here and unchanged.
        recording: The reference.
        comparison: The candidate's check at depth `steps`.
        rename: Name of the trusted module that a candidate's module answers to.

    Returns:
        The comparison with module rows and a first divergence down to the module, its kind with it;
        or with a note that says why no module is named.
    """
    place = failing_place(comparison.rows)
    if place is None:
        return comparison
    models = [_model(side, place, recording) for side in (pipe, trusted)]
    if not all(isinstance(model, torch.nn.Module) for model in models):
        return _noted(comparison, f"no module named: the {place.stage} model is no torch module")
    with _same_precision(pipe, trusted) as (ours, theirs):
        drilled = drill(
            Subject(models[0], _forward(ours, place, recording)),
            Subject(models[1], _forward(theirs, place, recording)),
            step=place.step,
            branch=place.branch,
            rename=rename,
        )
    if drilled.divergence is None:
        return _noted(
            comparison,
            f"no module named: on the same inputs every module of the {place.stage} model agrees "
            "(the stage around the model differs)",
        )
    return with_divergence(comparison, drilled.divergence, _prefixed(drilled, place))


def failing_place(rows: tuple[Row, ...]) -> Place | None:
    """The first stage with a model whose row failed; raised rows count as their stage's."""
    for stage in STAGES:
        for row in rows:
            if row.stage == stage and not row.verdict.passed and not row.name.startswith("samples"):
                own = row.name.partition("/")[2] if row.name.startswith(RAISED) else row.name
                branch = own.rpartition("/")[2] if stage != "decoding" else "main"
                return Place(stage, row.step or 0, branch)
    return None


def _prefixed(drilled: Drilled, place: Place) -> tuple[Row, ...]:
    return tuple(row.model_copy(update={"stage": f"{place.stage} module"}) for row in drilled.rows)


def _noted(comparison: Comparison, note: str) -> Comparison:
    return comparison.model_copy(update={"notes": (*comparison.notes, note)})


@contextmanager
def _same_precision(pipe: Pipeline, trusted: Pipeline) -> Iterator[tuple[Pipeline, Pipeline]]:
    """Both sides raised where their precision would hide a fault."""
    precision = raised_precision(trusted.settings.dtype)
    with ExitStack() as stack:
        ours, theirs = (
            stack.enter_context(raised(side, precision) if precision else nullcontext(side))
            for side in (pipe, trusted)
        )
        yield ours, theirs


def _model(pipe: Pipeline, place: Place, recording: Mapping[str, torch.Tensor]) -> Any:
    if place.stage == "text":
        return pipe.text_encoder
    if place.stage == "decoding":
        return pipe.vae
    return pipe.expert(int(recorded_schedule(recording).experts[place.step]))


def _forward(pipe: Pipeline, place: Place, recording: Mapping[str, torch.Tensor]) -> Forward:
    """One call of the stage on what the recording holds."""
    settings = pipe.settings
    if place.stage == "text":
        prompt = settings.prompt if place.branch == "cond" else settings.negative_prompt
        return lambda: pipe.encode_text(pipe, [prompt])
    if place.stage == "decoding":
        return lambda: pipe.decode(pipe, recording["latent/final"].to(pipe.device, copy=True))
    schedule = recorded_schedule(recording)
    step = recorded_step(pipe, schedule, place.step, schedule.experts)
    branch: Branch = "uncond" if place.branch == "uncond" else "cond"

    def predict() -> torch.Tensor:
        latent = recording[step_name(place.step, "latent")].to(pipe.device, copy=True)
        text = recording[f"text/{branch}"].to(pipe.device, copy=True)
        return pipe.predict(pipe, latent, step, text, branch)

    return predict
