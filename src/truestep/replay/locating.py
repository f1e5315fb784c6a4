"""Open the model of the first stage that failed, and say in which module it departs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from truestep.errors import UsageError
from truestep.joint import Value
from truestep.judge.sentence import with_divergence
from truestep.keys import key_of, step_name
from truestep.pairing.naming import ROOT
from truestep.pairing.partners import Partners, partners_of
from truestep.replay.causes.around import Around, around_cause
from truestep.replay.causes.stages import STAGES as WITHOUT_MODEL
from truestep.replay.causes.stages import raised_precision_of, stage_cause
from truestep.replay.drill import Drilled, Subject, drill
from truestep.replay.isolation import Forward
from truestep.replay.levels import Known
from truestep.replay.raised import raised, raised_stages
from truestep.replay.stages import recorded_step, recorded_texts, replay
from truestep.replay.steps import default_steps, given, recorded_schedule
from truestep.runtime.pipeline import Branch, Observer, Pipeline, connect, text_branch
from truestep.runtime.precision import raised_precision
from truestep.text import listed
from truestep.verdict import Cause, Comparison, Row

STAGES = ("text", "connector", "prediction", "decoding")
"""Stages with a model to open, in the order of a run."""

BRANCHES: tuple[Branch, ...] = ("cond", "uncond", "perturbed", "modality")
"""Passes of a step, in the order of a run."""

UNEXPLAINED = "no cause named:"
"""How the note begins that says that nothing explains a fault."""

_SOUND = ("audio_vae", "vocoder")
"""Models of a decoded sound, in the order of a run."""


@dataclass(frozen=True)
class Place:
    """A stage's model call: which stage, at which step and branch, and of what decoding.

    Attributes:
        model: Attribute of the pipeline that holds the model; empty where the stage says it.
    """

    stage: str
    step: int
    branch: str
    model: str = ""


def locate_module(
    pipe: Pipeline,
    trusted: Pipeline,
    recording: Mapping[str, torch.Tensor],
    comparison: Comparison,
    *,
    rename: Mapping[str, str] | None = None,
    known: Callable[[Place], Known] | None = None,
    explain: bool = False,
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
        explain: Look for the cause, too; see `replay.causes`.

    Returns:
        The comparison with module rows and a first divergence down to the module, its kind with it;
        or with a note that says why no module is named. Another note says how many modules were
        paired, where names differ.

    Raises:
        UsageError: The rename map names modules that there are not.
    """
    first = comparison.first_divergence
    if explain and first is not None and first.stage in WITHOUT_MODEL:
        return _explained(pipe, trusted, recording, comparison, first.stage)
    place = failing_place(comparison.rows)
    if place is None:
        return comparison
    looked = [replace(place, model=name) for name in _SOUND] if place.model else [place]
    for at in looked:
        found = _located(
            pipe, trusted, recording, comparison, at, rename=rename, known=known, explain=explain
        )
        if found.first_divergence != comparison.first_divergence:
            return found
    return found


def _explained(
    pipe: Pipeline,
    trusted: Pipeline,
    recording: Mapping[str, torch.Tensor],
    comparison: Comparison,
    stage: str,
) -> Comparison:
    """The comparison with why a stage without a model is wrong, or a note that nothing explains
    it."""
    with pipe.code():
        outputs = replay(pipe, recording, only=(stage,)).outputs
    precision = raised_precision_of(stage, comparison.rows)
    if precision:
        steps = {row.step for row in comparison.rows if key_of(row.name).precision == precision}
        with pipe.code(), raised(pipe, precision) as lifted:
            outputs |= raised_stages(
                lifted,
                recording,
                steps=[step for step in steps if step is not None],
                precision=precision,
                only=(stage,),
            ).outputs
    cause, tried = stage_cause(stage, comparison.rows, outputs, recording, trusted)
    return with_cause(comparison, cause, tried)


def _located(
    pipe: Pipeline,
    trusted: Pipeline,
    recording: Mapping[str, torch.Tensor],
    comparison: Comparison,
    place: Place,
    *,
    rename: Mapping[str, str] | None,
    known: Callable[[Place], Known] | None,
    explain: bool,
) -> Comparison:
    """The comparison with what one model of the failing stage shows."""
    prefix = f"{place.model}." if place.model else ""
    into = Into(
        model=f"{place.model or place.stage} model",
        around="the stage around the model",
        stage=place.stage,
        named=lambda fqn: prefix + fqn,
        changes={"modality": _modality(comparison.rows, place)},
    )
    models = [_model(side, place, recording) for side in (pipe, trusted)]

    def drilled(partners: Partners | None) -> Drilled:
        measured = known(place) if known is not None else None
        return drill_stage(
            pipe, trusted, recording, place, partners=partners, known=measured, explain=explain
        )

    found = opened(comparison, models, drilled, into, rename=rename)
    first = found.first_divergence
    if not explain or first is None or first.cause is not None:
        return found
    return _around(pipe, trusted, recording, found, place)


def _around(
    pipe: Pipeline,
    trusted: Pipeline,
    recording: Mapping[str, torch.Tensor],
    comparison: Comparison,
    place: Place,
) -> Comparison:
    """The comparison with why the code around a stage's model is wrong, where that explains it."""
    name = {"text": "text_encoder", "prediction": "transformer"}.get(place.stage, "vae")
    first = comparison.first_divergence
    if first is None or place.model or place.stage not in ("text", "prediction", "decoding"):
        return comparison
    method = "decode" if place.stage == "decoding" else "forward"
    places = _alike(place, recording)
    with _same_precision(pipe, trusted) as sides:
        ours, theirs = (
            Around(
                _model(side, place, recording),
                method,
                [_forward(side, each, recording) for each in places],
                side.code,
            )
            for side in sides
        )
        parts = {each: getattr(trusted, each) for each in ("tokenizer", "scheduler", name)}
        cause, _ = around_cause(place.stage, name, ours, theirs, parts)
    if cause is None:
        return comparison
    notes = tuple(note for note in comparison.notes if not note.startswith(UNEXPLAINED))
    found = first.model_copy(update={"cause": cause})
    return comparison.model_copy(update={"first_divergence": found, "notes": notes})


def _alike(place: Place, recording: Mapping[str, torch.Tensor]) -> list[Place]:
    """The place, and those that the same code is run at: other prompts, other steps of the
    expert."""
    if place.stage == "text":
        return [replace(place, branch=b) for b in ("cond", "uncond") if f"text/{b}" in recording]
    if place.stage != "prediction":
        return [place]
    others = [step for step in _steps_of_expert(recording, place) if step != place.step]
    return [place, *(replace(place, step=s) for s in others[:3])]


@dataclass(frozen=True)
class Into:
    """Which model is opened, and how what is in it is named.

    Attributes:
        model, around: It and what is around it, in words.
        stage: That it belongs to.
        named: The name of a module of it in results.
        changes: Further fields of the divergence.
    """

    model: str
    around: str
    stage: str
    named: Callable[[str], str]
    changes: Mapping[str, Any] = field(default_factory=dict)


def opened(
    comparison: Comparison,
    models: Sequence[Any],
    drilled_with: Callable[[Partners | None], Drilled],
    into: Into,
    *,
    rename: Mapping[str, str] | None,
    pair: Callable[..., Partners | None] = partners_of,
) -> Comparison:
    """The comparison with where in a model the candidate departs, or with why that is not said.

    Args:
        models: Candidate's and trusted one.
        drilled_with: Drills into them, given which of their modules answer to which.
        rename: See `locate_module`.
        pair: Says which module answers to which.

    Raises:
        UsageError: The rename map names modules that there are not.
    """
    if not all(isinstance(model, torch.nn.Module) for model in models):
        return noted(comparison, f"no module named: the {into.model} is no torch module")
    try:
        partners = pair(models[0], models[1], rename=rename)
    except UsageError as error:  # weights that are not there, or are no tensors
        if rename:
            raise
        return noted(comparison, f"no module named: the models cannot be paired ({error.what})")
    drilled = drilled_with(partners)
    if partners is not None:
        comparison = noted(comparison, partners.note())
    if drilled.left_out:
        comparison = noted(comparison, _left_out(drilled.left_out))
    if drilled.divergence is None:
        return noted(
            comparison,
            f"no module named: on the same inputs every module of the {into.model} agrees "
            f"({into.around} differs)",
        )
    if drilled.tried and drilled.divergence.cause is None:
        text = unexplained(drilled.tried)
        comparison = noted(comparison, text)
    fqn = into.named(drilled.divergence.fqn or ROOT)
    also = tuple(
        each.model_copy(update={"fqn": into.named(each.fqn)}) for each in drilled.divergence.also
    )
    divergence = drilled.divergence.model_copy(update={"fqn": fqn, "also": also, **into.changes})
    placed = {k: v for k, v in into.changes.items() if k in ("step", "branch")}
    rows = tuple(
        row.model_copy(
            update={"stage": f"{into.stage} module", "fqn": into.named(row.fqn or ROOT), **placed}
        )
        for row in drilled.rows
    )
    return with_divergence(comparison, divergence, rows)


def _modality(rows: Sequence[Row], place: Place) -> str | None:
    """The modality that is further off where both came out of one forward."""
    there = [
        row
        for row in rows
        if (row.stage, row.step or 0) == (place.stage, place.step) and not row.verdict.passed
    ]
    if place.stage == "prediction":
        there = [row for row in there if row.branch == place.branch]
    return max(there, key=lambda row: row.ratio or 0.0).modality if there else None


def drill_stage(
    pipe: Pipeline,
    trusted: Pipeline,
    recording: Mapping[str, torch.Tensor],
    place: Place,
    *,
    partners: Partners | None = None,
    known: Known | None = None,
    explain: bool = False,
) -> Drilled:
    """Drill into one model call of a stage, on recorded inputs; see `drill`."""
    models = [_model(side, place, recording) for side in (pipe, trusted)]
    with _same_precision(pipe, trusted) as (ours, theirs):
        other = _later(recording, place)

        def at(place: Place) -> tuple[Subject, Subject, tuple[int, str]]:
            before = _before(ours, place, recording)
            sides = (
                Subject(models[0], _forward(ours, place, recording), before),
                Subject(models[1], _forward(theirs, place, recording)),
            )
            return *sides, (place.step, place.branch)

        subjects = at(place)
        return drill(
            subjects[0],
            subjects[1],
            place=subjects[2],
            partners=partners,
            known=known,
            explain=explain,
            again=(lambda: at(other)) if other is not None else None,
        )


def _later(recording: Mapping[str, torch.Tensor], place: Place) -> Place | None:
    """The same pass at the last recorded step that the same model makes; None where there is no
    other."""
    if place.stage != "prediction":
        return None
    steps = _steps_of_expert(recording, place)
    return replace(place, step=steps[-1]) if steps and steps[-1] != place.step else None


def _steps_of_expert(recording: Mapping[str, torch.Tensor], place: Place) -> list[int]:
    """Default steps at which the same model makes the same pass."""
    experts = recorded_schedule(recording).experts
    steps = [step for step in default_steps(recording) if experts[step] == experts[place.step]]
    return [step for step in steps if step_name(step, place.branch) in recording]


def failing_place(rows: Sequence[Row]) -> Place | None:
    """The first stage with a model whose row failed; raised rows count as their stage's."""
    for stage in STAGES:
        for row in rows:
            if row.stage == stage and not row.verdict.passed and not key_of(row.name).mean:
                key = key_of(row.name)
                branch = key.name if stage != "decoding" else "main"
                sound = stage == "decoding" and key.modality == "audio"
                return Place(stage, row.step or 0, branch, _SOUND[0] if sound else "")
    return None


def _left_out(names: Sequence[str]) -> str:
    """What other code has in a form that cannot be compared."""
    return f"left out, since the candidate has nothing of these sizes there: {listed(names, 4)}"


def unexplained(tried: int) -> str:
    """Why no cause is named."""
    return f"{UNEXPLAINED} none of {tried} hypotheses gives what the candidate gave"


def with_cause(comparison: Comparison, cause: Cause | None, tried: int) -> Comparison:
    """The comparison with why its first place is wrong, or a note that nothing explains it."""
    first = comparison.first_divergence
    if cause is None or first is None:
        return noted(comparison, unexplained(tried))
    found = first.model_copy(update={"cause": cause})
    return comparison.model_copy(update={"first_divergence": found})


def noted(comparison: Comparison, note: str) -> Comparison:
    """The comparison with one more note."""
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
    if place.stage == "connector":
        return pipe.connectors
    if place.stage == "decoding":
        return getattr(pipe, place.model) if place.model else pipe.vae
    return pipe.expert(int(recorded_schedule(recording).experts[place.step]))


def _forward(pipe: Pipeline, place: Place, recording: Mapping[str, torch.Tensor]) -> Forward:
    """One call of the stage on what the recording holds, by the side's own code."""
    with pipe.code():
        call = _stage_call(pipe, place, recording)

    def forward() -> Any:
        with pipe.code():
            return call()

    return forward


def _stage_call(pipe: Pipeline, place: Place, recording: Mapping[str, torch.Tensor]) -> Forward:
    settings = pipe.settings
    if pipe.audio_video:
        pipe.prepare(pipe)  # its controls say which passes there are
    if place.stage == "text":
        prompt = settings.prompt if place.branch == "cond" else settings.negative_prompt
        return lambda: pipe.encode_text(pipe, [prompt])
    if place.stage == "connector" and pipe.connect is not None:
        texts = recorded_texts(pipe, recording, "text")
        return lambda: connect(pipe, texts, Observer())
    if place.stage == "decoding":
        return lambda: pipe.decode(pipe, given(pipe, recording, "latent/final"))
    return prediction(pipe, place, recording)


def _before(pipe: Pipeline, place: Place, recording: Mapping[str, torch.Tensor]) -> Forward | None:
    """What a check runs before a prediction: a new schedule, and the prediction before this one.

    What one call leaves for the next (a cache, a buffer) is in place then, and what a run clears
    is cleared.
    """
    if place.stage != "prediction":
        return None
    earlier = [step for step in default_steps(recording) if step < place.step]
    ran = [branch for branch in BRANCHES if step_name(place.step, branch) in recording]
    at = ran.index(place.branch) if place.branch in ran else 0
    last: Place | None = None
    if at:
        last = Place(place.stage, place.step, ran[at - 1])
    elif earlier:
        last = Place(place.stage, earlier[-1], ran[-1] if ran else "cond")

    def run() -> None:
        with pipe.code(), torch.no_grad():
            pipe.prepare(pipe)
            pipe.make_schedule(pipe)
            if last is not None:
                prediction(pipe, last, recording)()

    return run


def prediction(pipe: Pipeline, place: Place, recording: Mapping[str, torch.Tensor]) -> Forward:
    """One prediction on the recorded latent and text."""
    schedule = recorded_schedule(recording)
    step = recorded_step(pipe, schedule, place.step, schedule.experts)
    branch: Branch = next((b for b in pipe.passes(pipe) if b == place.branch), "cond")
    stage = "text" if pipe.connect is None else "connector"

    def predict() -> Value:
        latent = given(pipe, recording, step_name(place.step, "latent"))
        text = given(pipe, recording, f"{stage}/{text_branch(branch)}")
        return pipe.predict(pipe, latent, step, text, branch)

    return predict
