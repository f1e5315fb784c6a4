"""Open the model of the first stage that failed, and say in which module it departs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from truestep.comparison.matching import with_divergence
from truestep.errors import UsageError
from truestep.noise import RAISED
from truestep.recording.names import step_name
from truestep.recording.raised import raised, raised_precision
from truestep.recording.replay import default_steps, recorded_schedule, recorded_step
from truestep.runtime.pipeline import Branch, Pipeline
from truestep.tracing.drill import Drilled, Known, Subject, drill
from truestep.tracing.isolation import Forward
from truestep.tracing.partners import Partners, partners_of
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
    rename: Mapping[str, str] | None = None,
    known: Callable[[Place], Known] | None = None,
) -> Comparison:
    """Add where inside the first failing stage's model the candidate departs.

    Args:
        pipe: The candidate that was checked.
        trusted: The reference's model, loaded here and unchanged.
        recording: The reference.
        comparison: The candidate's check at depth `steps`.
        rename: Candidate's module names to trusted ones, `*` for one part; goes before what the
            weights say. Without it, models with the same names are taken as they are named.
        known: What earlier calls with the same trusted pipeline measured at a place; added to.

    Returns:
        The comparison with module rows and a first divergence down to the module, its kind with it;
        or with a note that says why no module is named. Another note says how many modules were
        paired, where names differ.

    Raises:
        UsageError: The rename map names modules that there are not.
    """
    place = failing_place(comparison.rows)
    if place is None:
        return comparison
    models = [_model(side, place, recording) for side in (pipe, trusted)]
    if not all(isinstance(model, torch.nn.Module) for model in models):
        return _noted(comparison, f"no module named: the {place.stage} model is no torch module")
    try:
        partners = partners_of(models[0], models[1], rename=rename)
    except UsageError as error:  # weights that are not there, or are no tensors
        if rename:
            raise
        return _noted(comparison, f"no module named: the models cannot be paired ({error.what})")
    drilled = drill_stage(
        pipe,
        trusted,
        recording,
        place,
        partners=partners,
        known=known(place) if known is not None else None,
    )
    if partners is not None:
        comparison = _noted(comparison, partners.note())
    if drilled.left_out:
        comparison = _noted(comparison, _left_out(drilled.left_out))
    if drilled.divergence is None:
        return _noted(
            comparison,
            f"no module named: on the same inputs every module of the {place.stage} model agrees "
            "(the stage around the model differs)",
        )
    return with_divergence(comparison, drilled.divergence, _prefixed(drilled, place))


def drill_stage(
    pipe: Pipeline,
    trusted: Pipeline,
    recording: Mapping[str, torch.Tensor],
    place: Place,
    *,
    partners: Partners | None = None,
    known: Known | None = None,
) -> Drilled:
    """Drill into one model call of a stage, on recorded inputs; see `drill`."""
    models = [_model(side, place, recording) for side in (pipe, trusted)]
    with _same_precision(pipe, trusted) as (ours, theirs):
        before = _before(ours, place, recording)
        return drill(
            Subject(models[0], _forward(ours, place, recording), before),
            Subject(models[1], _forward(theirs, place, recording)),
            step=place.step,
            branch=place.branch,
            partners=partners,
            known=known,
        )


def failing_place(rows: tuple[Row, ...]) -> Place | None:
    """The first stage with a model whose row failed; raised rows count as their stage's."""
    for stage in STAGES:
        for row in rows:
            if row.stage == stage and not row.verdict.passed and not row.name.startswith("samples"):
                own = row.name.partition("/")[2] if row.name.startswith(RAISED) else row.name
                branch = own.rpartition("/")[2] if stage != "decoding" else "main"
                return Place(stage, row.step or 0, branch)
    return None


def _left_out(names: Sequence[str]) -> str:
    """What other code has in a form that cannot be compared."""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"left out, since the candidate has nothing of these sizes there: {shown}"


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
    return prediction(pipe, place, recording)


def _before(pipe: Pipeline, place: Place, recording: Mapping[str, torch.Tensor]) -> Forward | None:
    """What a check runs before a prediction: a new schedule, and the prediction before this one.

    What one call leaves for the next (a cache, a buffer) is in place then, and what a run clears
    is cleared.
    """
    if place.stage != "prediction":
        return None
    earlier = [step for step in default_steps(recording) if step < place.step]
    guided = "text/uncond" in recording
    last: Place | None = None
    if place.branch == "uncond":
        last = Place(place.stage, place.step, "cond")
    elif earlier:
        last = Place(place.stage, earlier[-1], "uncond" if guided else "cond")

    def run() -> None:
        with torch.no_grad():
            pipe.prepare(pipe)
            pipe.make_schedule(pipe)
            if last is not None:
                prediction(pipe, last, recording)()

    return run


def prediction(pipe: Pipeline, place: Place, recording: Mapping[str, torch.Tensor]) -> Forward:
    """One prediction on the recorded latent and text."""
    schedule = recorded_schedule(recording)
    step = recorded_step(pipe, schedule, place.step, schedule.experts)
    branch: Branch = "uncond" if place.branch == "uncond" else "cond"

    def predict() -> torch.Tensor:
        latent = recording[step_name(place.step, "latent")].to(pipe.device, copy=True)
        text = recording[f"text/{branch}"].to(pipe.device, copy=True)
        return pipe.predict(pipe, latent, step, text, branch)

    return predict
